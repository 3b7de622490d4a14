// The feed-forward networks of T tokens, which are grouped by expert where there are experts. Candidates and
// thresholds are masks, or lists of rows where candidates are few: a mode computes the same function as token
// by token.
#include <algorithm>
#include <chrono>

#include "engine/batch.h"
#include "engine/predictor.h"
#include "engine/router.h"

namespace turbosparse {
namespace {

/// Tokens of the step that go through one FFN, ascending.
struct TokenGroup {
  std::span<const std::int32_t> tokens;
  std::span<const float> factors;  // of the FFN's output; empty: 1
  const InputBuffer* input;        // row i belongs to token tokens[i]

  float factor(std::size_t i) const { return factors.empty() ? 1.0F : factors[i]; }
};

/// The tokens that go through an expert.
TokenGroup group_of(const Scratch& s, std::size_t expert) {
  const auto first = static_cast<std::size_t>(s.groups.begin[expert]);
  const auto n = static_cast<std::size_t>(s.groups.begin[expert + 1]) - first;
  return {std::span(s.groups.tokens).subspan(first, n), std::span(s.groups.factors).subspan(first, n),
          &s.expert_input};
}

/// Marks the candidates among this thread's neurons in the FFN input, all tokens of the group.
void predict_group(const Step& step, const FfnWeights& w, const TokenGroup& group, std::int64_t layer,
                   int index) {
  Scratch& s = step.scratch;
  const std::int64_t F = w.neurons;
  const auto n = static_cast<std::int64_t>(group.tokens.size());
  const Range rows = share(step, F, index);
  const bool runs = runs_predictor(step, w);
  if (runs && has_hidden_layer(w)) {
    const Matrix& a = w.predictor.a;
    const Range hidden =
        project(step, a, predictor_input(step, *group.input, s.predictor), n, s.hidden.row(0, 0), index);
    for (std::int64_t i = 0; i < n; ++i) finish_hidden(step, w, i * a.rows, hidden);
    step.finish(index, Part::kPredictor);
    project(step, w.predictor.b, s.hidden.view(), n, s.ffn_input.row(0, 0), index);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    float* scores = s.ffn_input.row(i, F);
    if (runs && !has_hidden_layer(w))
      score_signs(step, w, s.predictor, i, rows, s.differences.data(), scores);
    mark_candidates(step, w, layer, group.tokens[static_cast<std::size_t>(i)], rows, scores, index);
  }
}

/// A token's own rows are read one by one where at most one neuron in so many is a candidate: a matrix
/// product of many tokens multiplies about four times as fast as products of single rows do
/// (docs/kernels.md).
constexpr std::int64_t kFewCandidates = 4;

/// Whether the group computes its candidates alone. Ends with a barrier, where that may be.
bool candidates_alone(const Step& step, const FfnWeights& w, std::int64_t n, int index) {
  if (!step.skipping || !step.predicted() || step.on_disk() || step.model.weights->has_rests) return false;
  ThreadScratch& thread = step.thread(index);
  const Range rows = share(step, w.neurons, index);
  thread.marked = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float* marks = step.scratch.ffn_input.row(i, w.neurons);
    thread.marked += std::count_if(marks + rows.begin, marks + rows.end, [](float m) { return m != 0.0F; });
  }
  step.finish(index, Part::kPredictor);
  std::int64_t marked = 0;
  for (const ThreadScratch& other : step.scratch.threads) marked += other.marked;
  return kFewCandidates * marked <= n * w.neurons;
}

/// Rows of a matrix that all tokens go through before the next ones: they stay in the L2 cache.
constexpr std::int64_t kSharedRows = 64;

/// Calls f(token, list, n) with the neurons of each token whose product, or mark, is not zero.
template <class F>
void for_each_list(const Step& step, const FfnWeights& w, std::int64_t n_tokens, Range rows, int index, F f) {
  std::int32_t* list = step.thread(index).candidates.rows.data();
  for (std::int64_t begin = rows.begin; begin < rows.end; begin += kSharedRows) {
    const Range piece{begin, std::min(begin + kSharedRows, rows.end)};
    for (std::int64_t i = 0; i < n_tokens; ++i) {
      const float* values = step.scratch.ffn_input.row(i, w.neurons);
      std::int64_t n = 0;
      for (std::int64_t r = piece.begin; r < piece.end; ++r) {
        list[n] = static_cast<std::int32_t>(r);
        n += values[r] != 0.0F;
      }
      f(i, piece, list, n);
    }
  }
}

/// gate and up of this thread's neurons, of each token's candidates; others are 0.
void multiply_candidates(const Step& step, const FfnWeights& w, const TokenGroup& group, Range rows,
                         int index) {
  const std::int64_t F = w.neurons;
  const bool gated = step.config().gated;
  Scratch& s = step.scratch;
  const auto tokens = static_cast<std::int64_t>(group.tokens.size());
  for_each_list(step, w, tokens, rows, index,
                [&](std::int64_t i, Range piece, const std::int32_t* list, std::int64_t n) {
                  const Input input = group.input->view(i, step.config().hidden_size);
                  float* gate = s.gate.data() + i * F;
                  float* up = s.up.data() + i * F;
                  std::fill(gate + piece.begin, gate + piece.end, 0.0F);
                  std::fill(up + piece.begin, up + piece.end, 0.0F);
                  step.kernels().gemv_rows(w.first(gated), input, list, n, gate);
                  if (gated) step.kernels().gemv_rows(w.up, input, list, n, up);
                });
}

/// This thread's columns of what the active neurons of each token add to its output.
void add_active(const Step& step, const FfnWeights& w, std::int64_t tokens, Range columns, int index) {
  const std::int64_t D = step.config().hidden_size;
  Scratch& s = step.scratch;
  for_each_list(step, w, tokens, {0, w.neurons}, index,
                [&](std::int64_t i, Range, const std::int32_t* list, std::int64_t n) {
                  step.kernels().axpy_rows(w.down, list, n, s.ffn_input.row(i, w.neurons), columns.begin,
                                           columns.end, s.out.data() + i * D);
                });
}

/// The rule of the mode: products of neurons that it drops become 0.
LayerCounts drop_neurons(const Step& step, const FfnWeights& w, Range rows, const float* gate,
                         const float* up, float* product, bool all_known) {
  const bool predicted = step.predicted();
  const bool gated = step.config().gated;
  const Thresholds limits = thresholds(step, w);
  LayerCounts counts;
  for (std::int64_t i = 0; i < rows.size(); ++i) {
    const bool candidate = !predicted || product[i] != 0.0F;
    const float value = gated ? gate[i] * up[i] : gate[i];
    const bool passed = !below(gate[i], limits.gate[rows.begin + i]);
    const bool kept = passed && !below(value, limits.neuron[rows.begin + i]);
    const bool active = candidate && kept;
    counts.candidates += candidate;
    counts.gate_passed += candidate && passed;
    counts.active += active;
    counts.wanted += predicted && all_known && kept;
    counts.found += predicted && all_known && active;
    product[i] = active ? value : 0.0F;
  }
  return counts;
}

/// Computes with the rests, and lists, the neurons of token t of the group whose products are largest.
std::int64_t refine(const Step& step, const FfnWeights& w, const TokenGroup& group, Range rows,
                    std::int64_t t, int index) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const bool gated = config.gated;
  const std::int64_t F = w.neurons;
  Scratch& s = step.scratch;
  float* product = s.ffn_input.row(t, F);
  float* raw = s.raw.data();
  float* up = s.up.data() + t * F;
  float* values = step.thread(index).values.data();
  std::int32_t* list = s.refined.data() + t * F + rows.begin;
  const float* limit = thresholds(step, w).neuron;
  std::int64_t n = 0;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    list[n] = static_cast<std::int32_t>(r);
    n += static_cast<std::int64_t>(product[r] != 0.0F) &
         static_cast<std::int64_t>(std::fabs(product[r]) >= config.refine.neurons * limit[r]);
  }
  const Input input = group.input->view(t, config.hidden_size);
  kernels.gemv_rows(w.first(gated), input, list, n, raw);
  add_rest_rows(step, w.first_rest(gated), input, list, n, raw);
  if (gated) add_rest_rows(step, w.up_rest, input, list, n, up);
  for (std::int64_t i = 0; i < n; ++i) values[i] = raw[list[i]];
  kernels.activate(config.activation, config.activation_parameter, values, n, values);
  const bool relu_up = config.activation == Activation::kDRelu;
  for (std::int64_t i = 0; i < n; ++i) {
    const float factor = relu_up ? std::max(up[list[i]], 0.0F) : up[list[i]];
    product[list[i]] = gated ? values[i] * factor : values[i];
  }
  s.refined_counts[static_cast<std::size_t>(t * step.thread_count() + index)] = n;
  return n;
}

/// This thread's columns of what the rest of down adds, all tokens.
void add_down_rest(const Step& step, const FfnWeights& w, std::int64_t n_tokens, Range columns, int index) {
  if (w.down_rest.rows == 0) return;
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t F = w.neurons;
  Scratch& s = step.scratch;
  if (!step.refines(w)) {
    step.kernels().gemm_t(w.down_rest, s.ffn_input.row(0, F), F, n_tokens, columns.begin, columns.end,
                          s.out.data(), D, step.thread(index).gemm.data());
    return;
  }
  for (std::int64_t t = 0; t < n_tokens; ++t) {
    for (int other = 0; other < step.thread_count(); ++other) {
      const std::int32_t* list = s.refined.data() + t * F + share(step, F, other).begin;
      const std::int64_t n = s.refined_counts[static_cast<std::size_t>(t * step.thread_count() + other)];
      step.kernels().axpy_rows(w.down_rest, list, n, s.ffn_input.row(t, F), columns.begin, columns.end,
                               s.out.data() + t * D);
    }
  }
}

/// gate and up of this thread's neurons become activations, and their product, masked, lands in the FFN
/// input: row i, of token t.
LayerCounts combine(const Step& step, const FfnWeights& w, Range rows, const Capture& capture, std::int64_t i,
                    std::int64_t t, bool all_known) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const std::int64_t at = i * w.neurons + rows.begin;
  float* gate = step.scratch.gate.data() + at;
  float* up = step.scratch.up.data() + at;
  float* product = step.scratch.ffn_input.row(0, 0) + at;
  kernels.activate(config.activation, config.activation_parameter, gate, rows.size(), gate);
  if (config.activation == Activation::kDRelu) kernels.activate(Activation::kRelu, 0.0F, up, rows.size(), up);
  if (capture.gate != nullptr) {
    const std::int64_t to = t * config.layer_neurons() + w.first_neuron + rows.begin;
    std::copy_n(gate, rows.size(), capture.gate + to);
    if (config.gated) std::copy_n(up, rows.size(), capture.up + to);
    if (!config.gated) std::fill_n(capture.up + to, rows.size(), 1.0F);
  }
  if (step.mode != Mode::kDense) return drop_neurons(step, w, rows, gate, up, product, all_known);
  if (config.gated) {
    for (std::int64_t r = 0; r < rows.size(); ++r) product[r] = gate[r] * up[r];
  } else {
    std::copy_n(gate, rows.size(), product);
  }
  return {.candidates = rows.size(), .gate_passed = rows.size(), .active = rows.size()};
}

/// Readies this thread's tokens of a group: their input, and what the predictor reads.
void prepare_group(const Step& step, const FfnWeights& w, const TokenGroup& group, std::int64_t layer,
                   int index) {
  const std::int64_t D = step.config().hidden_size;
  Scratch& s = step.scratch;
  const Range mine = split(static_cast<std::int64_t>(group.tokens.size()), 1, index, step.thread_count());
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    const std::int32_t t = group.tokens[static_cast<std::size_t>(i)];
    if (group.input == &s.expert_input) s.expert_input.copy_row(s.input, t, i, D);
    if (runs_predictor(step, w))
      prepare_prediction(step, w, layer, t, s.input.row(t, D), s.predictor, i, index);
  }
}

/// Neurons of an FFN that are in memory at the same time, and their rows.
struct Stripe {
  std::int64_t begin = 0;
  Matrix first, up, down;
};

/// All neurons, or where they are on disk stripe `number` of them, once it is there.
Stripe take_stripe(const Step& step, const FfnWeights& w, std::int64_t number, int index) {
  const bool gated = step.config().gated;
  if (!step.on_disk()) return {0, w.first(gated), w.up, w.down};
  using Clock = std::chrono::steady_clock;
  NeuronStore& store = *step.model.store;
  ThreadScratch& thread = step.thread(index);
  const Clock::time_point asked = Clock::now();
  if (index == 0) thread.counts.disk_bytes += store.stripe(number);
  step.finish(index, Part::kDisk);
  thread.counts.disk_wait_ns += std::chrono::nanoseconds(Clock::now() - asked).count() / step.thread_count();
  Stripe stripe{number * NeuronStore::kStripe,
                {},
                store.stripe_matrix(w.stored, number, Projection::kUp),
                store.stripe_matrix(w.stored, number, Projection::kDown)};
  stripe.first = gated ? store.stripe_matrix(w.stored, number, Projection::kGate) : stripe.up;
  if (gated && !store.has(Projection::kGate)) {
    stripe.first = w.gate;
    stripe.first.data += static_cast<std::size_t>(stripe.begin) * w.gate.row_bytes;
    stripe.first.rows = stripe.up.rows;
  }
  return stripe;
}

/// From the inputs of a group to the masked products of this thread's neurons of a stripe.
void multiply_in(const Step& step, const FfnWeights& w, const TokenGroup& group, const Stripe& stripe,
                 const Capture& capture, bool few, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const bool gated = step.config().gated;
  const Range part = share(step, stripe.up.rows, index);
  const auto project_part = [&](const Matrix& matrix, float* y) {
    step.kernels().gemm(matrix, group.input->view(), static_cast<std::int64_t>(group.tokens.size()),
                        part.begin, part.end, y + stripe.begin, w.neurons, thread.gemm.data());
  };
  const Range rows{stripe.begin + part.begin, stripe.begin + part.end};
  const auto n = static_cast<std::int64_t>(group.tokens.size());
  const Input input = group.input->view();
  const bool refines = step.refines(w);
  if (few) {
    multiply_candidates(step, w, group, rows, index);
  } else {
    project_part(stripe.first, s.gate.data());
    if (!refines) add_rest_batch(step, w.first_rest(gated), input, n, rows, s.gate.data(), w.neurons, index);
  }
  thread.watch.lap(Part::kGate);
  if (gated && !few) {
    project_part(stripe.up, s.up.data());
    if (!refines) add_rest_batch(step, w.up_rest, input, n, rows, s.up.data(), w.neurons, index);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const auto token = static_cast<std::size_t>(i);
    thread.counts += combine(step, w, rows, capture, i, group.tokens[token], !few);
    if (refines) thread.counts.refined += refine(step, w, group, rows, i, index);
    if (const float factor = group.factor(token); factor != 1.0F) {
      float* product = s.ffn_input.row(i, w.neurons);
      for (std::int64_t r = rows.begin; r < rows.end; ++r) product[r] *= factor;
    }
    if (!step.model.weights->neuron_major && is_quantized(w.down.type))
      s.ffn_input.quantize(step.kernels(), i, w.neurons, rows.begin, rows.end);
  }
}

/// Computes this thread's columns, which it returns, of an FFN's outputs for a group of tokens, into `out`.
Range compute_ffn(Step& step, const FfnWeights& w, const TokenGroup& group, std::int64_t layer, int index) {
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t F = w.neurons;
  const auto n = static_cast<std::int64_t>(group.tokens.size());
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const Capture capture = step.captures.empty() ? Capture{} : step.captures[static_cast<std::size_t>(layer)];
  const std::int64_t stripes = step.on_disk() ? (F + NeuronStore::kStripe - 1) / NeuronStore::kStripe : 1;

  prepare_group(step, w, group, layer, index);
  step.finish(index, Part::kNorm);  // and so nobody uses stripes of another FFN any more
  if (step.on_disk() && index == 0) step.model.store->stream(w.stored);
  if (step.predicted()) predict_group(step, w, group, layer, index);
  const bool few = candidates_alone(step, w, n, index);
  thread.watch.lap(Part::kPredictor);
  thread.counts = {};
  Range columns = share(step, D, index);
  for (std::int64_t number = 0; number < stripes; ++number) {
    const Stripe stripe = take_stripe(step, w, number, index);
    multiply_in(step, w, group, stripe, capture, few, index);
    step.finish(index, Part::kUp);
    if (!step.model.weights->neuron_major) {
      columns = project(step, w.down, s.ffn_input.view(), n, s.out.data(), index);
      continue;
    }
    for (std::int64_t i = 0; i < n && number == 0; ++i)
      std::fill_n(s.out.data() + i * D + columns.begin, columns.size(), 0.0F);
    if (few) {
      add_active(step, w, n, columns, index);
    } else {
      step.kernels().gemm_t(stripe.down, s.ffn_input.row(0, F) + stripe.begin, F, n, columns.begin,
                            columns.end, s.out.data(), D, thread.gemm.data());
    }
    add_down_rest(step, w, n, columns, index);
    thread.watch.lap(Part::kDown);
  }
  if (index == 0) {
    for (const ThreadScratch& other : s.threads) step.counts[static_cast<std::size_t>(layer)] += other.counts;
  }
  thread.watch.lap(Part::kDown);
  return columns;
}

/// Sends tokens to their experts: this thread's part of the router's work for them, and then all lists.
void route(Step& step, const LayerWeights& w, std::int64_t layer, Range tokens, int index) {
  const std::int64_t D = step.config().hidden_size;
  Scratch& s = step.scratch;
  if (!step.config().router.reads_layer_input) route_tokens(step, w, layer, s.input.row(0, 0), tokens, index);
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t)
    s.shared_factors[static_cast<std::size_t>(t)] = shared_factor(step, w, s.input.row(t, D));
  step.finish(index, Part::kRouter);
  if (index == 0) group_tokens(step);
  step.finish(index, Part::kRouter);
}

/// This thread's columns of the outputs of all experts together, into `ffn_sum`.
Range sum_experts(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  const std::int64_t D = step.config().hidden_size;
  const auto E = static_cast<std::size_t>(step.config().router.experts);
  Scratch& s = step.scratch;
  Range columns = share(step, D, index);
  for (std::int64_t t = 0; t < step.T; ++t)
    std::fill_n(s.ffn_sum.data() + t * D + columns.begin, columns.size(), 0.0F);
  for (std::size_t i = 0; i < w.ffns.size(); ++i) {
    TokenGroup group{all_tokens(step), s.shared_factors, &s.input};
    if (i < E) group = group_of(s, i);
    if (group.tokens.empty()) continue;
    columns = compute_ffn(step, w.ffns[i], group, layer, index);
    add_rows(step, s.out, group.tokens, columns, s.ffn_sum);
  }
  return columns;
}

/// Where a layer is captured, this thread's tokens: the residual, and zeros for experts that are not used.
void begin_capture(const Step& step, std::int64_t layer, Range tokens) {
  if (step.captures.empty()) return;
  const Capture& capture = step.captures[static_cast<std::size_t>(layer)];
  if (capture.gate == nullptr) return;
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t neurons = step.config().layer_neurons();
  std::copy_n(step.scratch.x.data() + tokens.begin * D, tokens.size() * D,
              capture.residual + tokens.begin * D);
  std::fill_n(capture.gate + tokens.begin * neurons, tokens.size() * neurons, 0.0F);
  std::fill_n(capture.up + tokens.begin * neurons, tokens.size() * neurons, 0.0F);
}

/// Where a layer is captured, the experts of this thread's tokens.
void capture_routes(const Step& step, std::int64_t layer, Range tokens) {
  if (step.captures.empty()) return;
  const Capture& capture = step.captures[static_cast<std::size_t>(layer)];
  if (capture.experts == nullptr) return;
  const std::int64_t used = step.config().router.used;
  for (std::int64_t i = tokens.begin * used; i < tokens.end * used; ++i)
    capture.experts[i] = step.scratch.routes[static_cast<std::size_t>(i)].expert;
}

/// Where a layer is captured, this thread's columns of the FFN's output.
void end_capture(const Step& step, std::int64_t layer, const float* total, Range columns) {
  if (step.captures.empty()) return;
  const Capture& capture = step.captures[static_cast<std::size_t>(layer)];
  for (std::int64_t t = 0; capture.out != nullptr && t < step.T; ++t) {
    const std::int64_t at = t * step.config().hidden_size + columns.begin;
    std::copy_n(total + at, columns.size(), capture.out + at);
  }
}

}  // namespace

void batch_ffn(Step& step, std::int64_t layer, int index) {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  Scratch& s = step.scratch;
  const Range tokens = normalize_all(step, w.ffn_norm, w.quantized_ffn_input(), ffn_stage(layer), index);
  begin_capture(step, layer, tokens);
  step.thread(index).watch.lap(Part::kNorm);
  if (w.has_router()) {
    route(step, w, layer, tokens, index);
    capture_routes(step, layer, tokens);
  }
  const Range columns =
      w.has_router() ? sum_experts(step, w, layer, index)
                     : compute_ffn(step, w.ffns.front(), {all_tokens(step), {}, &s.input}, layer, index);
  const AlignedVector<float>& total = w.has_router() ? s.ffn_sum : s.out;
  end_capture(step, layer, total.data(), columns);
  add_rows(step, total, all_tokens(step), columns, s.x);
  step.finish(index, Part::kDown);
}

}  // namespace turbosparse
