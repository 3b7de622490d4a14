#include "engine/step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace turbosparse {
namespace {

std::size_t count(std::int64_t a, std::int64_t b = 1) { return static_cast<std::size_t>(a * b); }

/// To whole cache lines of the 8-bit form.
std::int64_t round_up(std::int64_t values) { return static_cast<std::int64_t>(aligned_bytes(count(values))); }

std::int64_t widest(const ModelConfig& config) {
  return std::max(config.hidden_size, config.num_attention_heads * config.head_dim);
}

std::int64_t largest_rank(const Weights& weights) {
  std::int64_t rank = 0;
  for (const LayerWeights& layer : weights.layers) {
    for (const FfnWeights& ffn : layer.ffns) rank = std::max(rank, ffn.predictor.a.rows);
  }
  return round_up(rank);
}

/// FFNs that a token goes through.
std::int64_t slots(const ModelConfig& config) {
  return config.router.experts == 0 ? 1 : config.router.used + (config.shared_intermediate_size > 0 ? 1 : 0);
}

/// Pieces of the neurons that each thread takes on average: threads finish within an eighth of each other,
/// however the active ones lie and whatever else runs on their cores. A thread alone has one, since lists
/// are fetched ahead within a piece.
constexpr int kPiecesPerThread = 8;
std::int64_t pieces_per_ffn(int threads, std::int64_t ffns) {
  return threads == 1 ? 1 : (kPiecesPerThread * threads + ffns - 1) / ffns;
}

/// Outputs of one token that may have a rest added.
std::int64_t widest_refined(const Model& model) {
  if (!model.weights->has_rests) return 0;
  return std::max(model.weights->widest_ffn, model.config.vocab_size);
}

/// Outputs of a rest that a thread computes for many tokens at a time.
constexpr std::int64_t kSlab = 128;

std::int64_t blocks(std::int64_t cols) { return (cols + kBlock - 1) / kBlock; }

}  // namespace

InputBuffer::InputBuffer(std::int64_t T, std::int64_t cols)
    : x_(count(T, cols)),
      q_(count(T, cols)),
      scale_(count(T, blocks(cols))),
      q_sum_(count(T, blocks(cols))) {}

void InputBuffer::quantize(const KernelTable& kernels, std::int64_t t, std::int64_t cols, std::int64_t begin,
                           std::int64_t end) {
  const std::int64_t at = t * cols + begin;
  kernels.quantize_q8(x_.data() + at, end - begin, q_.data() + at, scale_.data() + at / kBlock,
                      q_sum_.data() + at / kBlock);
}

void InputBuffer::copy_row(const InputBuffer& from, std::int64_t t, std::int64_t to, std::int64_t cols) {
  const std::int64_t n = blocks(cols);
  std::copy_n(from.x_.data() + t * cols, cols, x_.data() + to * cols);
  std::copy_n(from.q_.data() + t * cols, cols, q_.data() + to * cols);
  std::copy_n(from.scale_.data() + t * cols / kBlock, n, scale_.data() + to * cols / kBlock);
  std::copy_n(from.q_sum_.data() + t * cols / kBlock, n, q_sum_.data() + to * cols / kBlock);
}

PredictorInput::PredictorInput(const ModelConfig& config, std::int64_t T)
    : residual(config.predictor.reads_residual ? T : 0, config.hidden_size),
      signs(config.predictor.kind == PredictorKind::kSign ? count(T, sign_words(config.hidden_size)) : 0) {}

ExpertGroups::ExpertGroups(const RouterConfig& config, std::int64_t T)
    : begin(count(config.experts + 1)),
      next(begin.size()),
      tokens(count(T, config.used)),
      factors(tokens.size()) {}

LayerCounts& LayerCounts::operator+=(const LayerCounts& other) {
  candidates += other.candidates;
  gate_passed += other.gate_passed;
  active += other.active;
  refined += other.refined;
  wanted += other.wanted;
  found += other.found;
  bytes += other.bytes;
  cached += other.cached;
  missed += other.missed;
  foreseen += other.foreseen;
  disk_bytes += other.disk_bytes;
  disk_wait_ns += other.disk_wait_ns;
  return *this;
}

StoredNeurons::StoredNeurons(std::int64_t n, std::int64_t slots)
    : neurons(count(n)),
      rows(neurons.size()),
      active(neurons.size()),
      ready(neurons.size()),
      places(neurons.size()),
      begin(count(slots + 1)),
      lists(count(slots)) {
  std::iota(places.begin(), places.end(), 0);
}

ThreadScratch::ThreadScratch(const Model& model, std::int64_t context, std::int64_t tokens)
    : input(1, widest(model.config)),
      scores(count(context, model.config.num_attention_heads / model.config.num_key_value_heads)),
      out(count(widest(model.config))),
      candidates{std::vector<std::int32_t>(count(model.weights->widest_ffn))},
      passed{std::vector<std::int32_t>(count(model.weights->widest_ffn))},
      values(count(model.weights->widest_ffn)),
      active(count(model.weights->widest_ffn)),
      refined{std::vector<std::int32_t>(count(widest_refined(model)))},
      slab(model.weights->has_rests ? count(tokens, kSlab) : 0),
      predictor(model.config, 1),
      expert_scores(count(model.config.router.experts)),
      routes(count(model.config.router.used)),
      ffns(count(slots(model.config))),
      gemm(gemm_scratch_bytes(std::max(widest(model.config), model.weights->widest_ffn))) {}

Scratch::Scratch(const Model& model, std::int64_t context, std::int64_t tokens)
    : capacity(tokens),
      x(count(tokens, model.config.hidden_size)),
      q(tokens, model.config.num_attention_heads * model.config.head_dim),
      k(count(tokens, model.config.num_key_value_heads * model.config.head_dim)),
      v(k.size()),
      slot(round_up(model.weights->widest_ffn)),
      gate(count(std::max(tokens, slots(model.config)), slot)),
      up(gate.size()),
      out(x.size()),
      cos(count(tokens, model.config.rotary_dim / 2)),
      sin(cos.size()),
      input(tokens, widest(model.config)),
      ffn_input(std::max(tokens, slots(model.config)), slot),
      predictor(model.config, tokens),
      rank(largest_rank(*model.weights)),
      hidden(std::max(tokens, slots(model.config)), rank),
      scores(count(slots(model.config), slot)),
      differences(count(scores.size(), model.weights->sign_rows)),
      expert_logits(count(tokens, model.config.router.experts)),
      routes(count(tokens, model.config.router.used)),
      groups(model.config.router, tokens),
      shared_factors(count(tokens)),
      expert_input(model.config.router.experts > 0 ? tokens : 0, model.config.hidden_size),
      ffn_sum(model.config.router.experts > 0 ? x.size() : 0),
      pieces(pieces_per_ffn(model.pool.size(), slots(model.config))),
      kept(scores.size()),
      kept_counts(count(slots(model.config), pieces)),
      raw(scores.size()),
      rest(count(widest_refined(model))),
      refined(model.weights->has_rests ? gate.size() : 0),
      refined_counts(count(tokens, std::max<std::int64_t>(pieces, model.pool.size()))),
      largest(count(tokens, model.pool.size())),
      refined_logits(count(model.pool.size())),
      all(count(std::max(slot, tokens))),
      zeros(count(slot)),
      stored(model.on_disk() ? model.config.token_neurons() : 0, slots(model.config)) {
  for (int index = 0; index < model.pool.size(); ++index) threads.emplace_back(model, context, tokens);
  std::iota(all.begin(), all.end(), 0);
}

std::int64_t Scratch::bytes(const Model& model, std::int64_t context, std::int64_t tokens) {
  const ModelConfig& config = model.config;
  constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
  constexpr auto kIndex = static_cast<std::int64_t>(sizeof(std::int32_t));
  const std::int64_t F = round_up(model.weights->widest_ffn);
  const std::int64_t D = config.hidden_size;
  const std::int64_t rank = largest_rank(*model.weights);
  const std::int64_t expert_input = config.router.experts > 0 ? D : 0;
  const std::int64_t ffn_sum = expert_input;
  const std::int64_t residual = config.predictor.reads_residual ? D : 0;
  const std::int64_t heads = 2 * config.num_key_value_heads * config.head_dim;
  const std::int64_t floats = 2 * D + heads + (model.weights->has_rests ? 3 : 2) * F + config.rotary_dim +
                              config.router.experts + ffn_sum;
  // An InputBuffer has a float and an 8-bit integer per value, a scale and a sum per block.
  const std::int64_t queries = config.num_attention_heads * config.head_dim;
  const std::int64_t inputs = widest(config) + queries + F + residual + rank + expert_input;
  const std::int64_t rows = std::max(tokens, slots(config));
  const std::int64_t per_token = floats * kFloat + inputs * (kFloat + 1) + 2 * blocks(inputs) * kFloat;
  const std::int64_t scores = context * (config.num_attention_heads / config.num_key_value_heads);
  const std::int64_t per_thread = scores * kFloat + F * (kFloat + 3 * kIndex) +
                                  static_cast<std::int64_t>(gemm_scratch_bytes(std::max(widest(config), F)));
  const std::int64_t neurons = slots(config) * F;
  return rows * per_token + model.pool.size() * per_thread +
         neurons * (4 + model.weights->sign_rows) * kIndex + (F + tokens) * kFloat +
         (model.weights->bundles ? config.token_neurons() * (4 * kIndex + 1) : 0);
}

void begin_step(Step& step, std::span<const std::int32_t> ids) {
  const ModelConfig& config = step.config();
  const std::vector<float>& factors = step.model.weights->rope_freqs;
  const std::int64_t half = config.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    double frequency =
        config.rope_scale * std::pow(config.rope_base, -static_cast<double>(i) / static_cast<double>(half));
    if (!factors.empty()) frequency /= static_cast<double>(factors[static_cast<std::size_t>(i)]);
    for (std::int64_t t = 0; t < step.T; ++t) {
      const double angle = static_cast<double>(step.position + t) * frequency;
      step.scratch.cos[count(t * half + i)] = static_cast<float>(std::cos(angle));
      step.scratch.sin[count(t * half + i)] = static_cast<float>(std::sin(angle));
    }
  }
  for (std::int64_t t = 0; t < step.T; ++t) {
    step.model.weights->embed(ids[count(t)], step.scratch.x.data() + t * config.hidden_size);
  }
  for (ThreadScratch& thread : step.scratch.threads) thread.broken_at = INT64_MAX;
}

void place_heads(const Step& step, const std::vector<float>& norm, std::int64_t layer, std::int64_t t,
                 std::int64_t n_heads, float* heads) {
  const ModelConfig& config = step.config();
  const std::int64_t C = config.head_dim;
  for (std::int64_t head = 0; head < n_heads && config.qk_norm == QkNorm::kHeads; ++head) {
    float* x = heads + head * C;
    step.kernels().rms_norm(x, norm.data(), C, config.rms_norm_eps, x);
  }
  if (!config.rotates(layer)) return;
  const float* cos = step.scratch.cos.data() + t * (config.rotary_dim / 2);
  const float* sin = step.scratch.sin.data() + t * (config.rotary_dim / 2);
  step.kernels().rope(heads, n_heads, C, config.rotary_dim, config.rope_neox, cos, sin);
}

bool all_finite(const float* x, std::int64_t n) {
  constexpr std::uint32_t kExponent = 0x7f800000;
  std::uint32_t broken = 0;
  for (std::int64_t i = 0; i < n; ++i)
    broken |= (std::bit_cast<std::uint32_t>(x[i]) & kExponent) == kExponent;
  return broken == 0;
}

void add_rest(const Step& step, const Matrix& rest, const Input& x, Range rows, float* y) {
  if (rest.rows == 0) return;
  float* more = step.scratch.rest.data();
  step.kernels().gemv(rest, x, rows.begin, rows.end, more);
  step.kernels().add(more + rows.begin, rows.size(), y + rows.begin);
}

void add_rest_rows(const Step& step, const Matrix& rest, const Input& x, const std::int32_t* rows,
                   std::int64_t n, float* y) {
  if (rest.rows == 0) return;
  float* more = step.scratch.rest.data();
  step.kernels().gemv_rows(rest, x, rows, n, more);
  for (std::int64_t i = 0; i < n; ++i) y[rows[i]] += more[rows[i]];
}

void add_rest_batch(const Step& step, const Matrix& rest, const Input& x, std::int64_t T, Range rows,
                    float* y, std::int64_t y_stride, int index) {
  if (rest.rows == 0) return;
  ThreadScratch& thread = step.thread(index);
  for (std::int64_t r = rows.begin; r < rows.end; r += kSlab) {
    const std::int64_t n = std::min(kSlab, rows.end - r);
    Matrix some = rest;
    some.data += r * static_cast<std::int64_t>(rest.row_bytes);
    some.rows = n;
    step.kernels().gemm(some, x, T, 0, n, thread.slab.data(), kSlab, thread.gemm.data());
    for (std::int64_t t = 0; t < T; ++t)
      step.kernels().add(thread.slab.data() + t * kSlab, n, y + t * y_stride + r);
  }
}

void normalize(const Step& step, const std::vector<float>& weight, bool quantized, std::int64_t stage,
               std::int64_t t, InputBuffer& input, std::int64_t to, int index) {
  const std::int64_t D = step.config().hidden_size;
  const float* x = step.scratch.x.data() + t * D;
  ThreadScratch& thread = step.thread(index);
  if (!all_finite(x, D)) note_broken(thread, stage);
  step.kernels().rms_norm(x, weight.data(), D, step.config().rms_norm_eps, input.row(to, D));
  if (quantized) input.quantize(step.kernels(), to, D, 0, D);
}

Thresholds thresholds(const Step& step, const FfnWeights& ffn) {
  if (threshold_bytes(step) > 0) return {ffn.gate_threshold.data(), ffn.threshold.data()};
  return {step.scratch.zeros.data(), step.scratch.zeros.data()};
}

std::int64_t threshold_bytes(const Step& step) {
  const bool stored =
      step.mode == Mode::kThreshold || (step.predicted() && step.model.weights->has_thresholds);
  return stored ? sizeof(float) : 0;
}

}  // namespace turbosparse
