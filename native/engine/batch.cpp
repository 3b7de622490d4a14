// T tokens through one layer: products of two matrices, cut by output rows; candidates and thresholds are
// masks, so that a mode computes the same function as token by token.
#include <algorithm>

#include "engine/predictor.h"
#include "engine/step.h"

namespace turbosparse {
namespace {

/// Normalises this thread's tokens.
Range normalize_all(const Step& step, const std::vector<float>& weight, bool quantized, std::int64_t stage,
                    int index) {
  const Range tokens = split(step.T, 1, index, step.thread_count());
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    normalize(step, weight, quantized, stage, t, step.scratch.input, t, index);
  }
  return tokens;
}

/// This thread's rows of y = w x, all tokens.
Range project(const Step& step, const Matrix& w, const Input& input, float* y, int index) {
  const Range rows = share(step, w.rows, index);
  step.kernels().gemm(w, input, step.T, rows.begin, rows.end, y, w.rows, step.thread(index).gemm.data());
  return rows;
}

/// Adds this thread's outputs to the residual.
void add_to_residual(const Step& step, Range columns) {
  const std::int64_t D = step.config().hidden_size;
  for (std::int64_t t = 0; t < step.T; ++t) {
    const std::int64_t at = t * D + columns.begin;
    step.kernels().add(step.scratch.out.data() + at, columns.size(), step.scratch.x.data() + at);
  }
}

/// Bias, rotation and the cache's rows of one token.
void place_token(const Step& step, const LayerWeights& w, std::int64_t layer, std::int64_t t) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const std::int64_t C = config.head_dim;
  const std::int64_t K = config.num_key_value_heads;
  Scratch& s = step.scratch;
  float* q = s.q.data() + t * w.q.rows;
  float* k = s.k.data() + t * w.k.rows;
  float* v = s.v.data() + t * w.v.rows;
  if (!w.q_bias.empty()) kernels.add(w.q_bias.data(), w.q.rows, q);
  if (!w.k_bias.empty()) kernels.add(w.k_bias.data(), w.k.rows, k);
  if (!w.v_bias.empty()) kernels.add(w.v_bias.data(), w.v.rows, v);
  place_heads(step, w.q_norm, t, config.num_attention_heads, q);
  place_heads(step, w.k_norm, t, K, k);
  for (std::int64_t head = 0; head < K; ++head) {
    step.cache.store(kernels, layer, head, step.position + t, k + head * C, v + head * C);
  }
}

/// Causal attention, pairs of head and token dealt out in turn: later tokens have more to do.
void attend_all(const Step& step, std::int64_t layer, int index) {
  const ModelConfig& config = step.config();
  const std::int64_t H = config.num_attention_heads;
  const std::int64_t C = config.head_dim;
  const std::int64_t group = H / config.num_key_value_heads;
  const std::int64_t threads = step.thread_count();
  for (std::int64_t head = 0; head < H; ++head) {
    for (std::int64_t t = (index + head) % threads; t < step.T; t += threads) {
      step.cache.attend(step.kernels(), layer, head / group, step.scratch.q.data() + (t * H + head) * C,
                        step.position + t + 1, step.thread(index).scores.data(),
                        step.scratch.input.row(t, H * C) + head * C);
    }
  }
}

void attention(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  const bool quantized = is_quantized(w.q.type) || is_quantized(w.k.type) || is_quantized(w.v.type);
  const Range tokens = normalize_all(step, w.attn_norm, quantized, attention_stage(layer), index);
  step.finish(index, Part::kNorm);
  project(step, w.q, s.input.view(), s.q.data(), index);
  project(step, w.k, s.input.view(), s.k.data(), index);
  project(step, w.v, s.input.view(), s.v.data(), index);
  step.finish(index, Part::kQkv);
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) place_token(step, w, layer, t);
  step.finish(index, Part::kCache);
  attend_all(step, layer, index);
  step.finish(index, Part::kAttention);
  if (is_quantized(w.o.type)) {
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      s.input.quantize(step.kernels(), t, w.o.cols, 0, w.o.cols);
    }
    step.finish(index, Part::kOut);
  }
  add_to_residual(step, project(step, w.o, s.input.view(), s.out.data(), index));
  step.finish(index, Part::kOut);
}

/// Marks the candidates among this thread's neurons in the FFN input, all tokens.
void predict_all(const Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  const std::int64_t F = step.config().intermediate_size;
  const Range rows = share(step, F, index);
  const bool runs = runs_predictor(step, w);
  if (runs && has_hidden_layer(w)) {
    const LayerPredictor& predictor = w.predictor;
    const Range hidden =
        project(step, predictor.a, predictor_input(step, s.input, s.predictor), s.hidden.row(0, 0), index);
    for (std::int64_t t = 0; t < step.T; ++t) finish_hidden(step, w, t, hidden);
    step.finish(index, Part::kPredictor);
    project(step, predictor.b, s.hidden.view(), s.ffn_input.row(0, 0), index);
  }
  for (std::int64_t t = 0; t < step.T; ++t) {
    float* scores = s.ffn_input.row(t, F);
    if (runs && !has_hidden_layer(w)) score_signs(step, w, s.predictor, t, rows, scores);
    mark_candidates(step, w, layer, t, rows, scores, index);
  }
}

/// The rule of the mode: products of neurons that it drops become 0.
LayerCounts drop_neurons(const Step& step, const LayerWeights& w, Range rows, const float* gate,
                         const float* up, float* product) {
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
    counts.wanted += predicted && kept;
    counts.found += predicted && active;
    product[i] = active ? value : 0.0F;
  }
  return counts;
}

/// Computes with the rests, and lists, the neurons of token t whose products are largest.
std::int64_t refine(const Step& step, const LayerWeights& w, Range rows, std::int64_t t, int index) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const bool gated = config.gated;
  const std::int64_t F = config.intermediate_size;
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
  const Input input = s.input.view(t, config.hidden_size);
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
void add_down_rest(const Step& step, const LayerWeights& w, Range columns, int index) {
  if (w.down_rest.rows == 0) return;
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t F = step.config().intermediate_size;
  Scratch& s = step.scratch;
  if (!step.refines()) {
    step.kernels().gemm_t(w.down_rest, s.ffn_input.row(0, F), F, step.T, columns.begin, columns.end,
                          s.out.data(), D, step.thread(index).gemm.data());
    return;
  }
  for (std::int64_t t = 0; t < step.T; ++t) {
    for (int other = 0; other < step.thread_count(); ++other) {
      const std::int32_t* list = s.refined.data() + t * F + share(step, F, other).begin;
      const std::int64_t n = s.refined_counts[static_cast<std::size_t>(t * step.thread_count() + other)];
      step.kernels().axpy_rows(w.down_rest, list, n, s.ffn_input.row(t, F), columns.begin, columns.end,
                               s.out.data() + t * D);
    }
  }
}

/// gate and up of this thread's neurons become activations, and their product, masked, lands in the FFN
/// input.
LayerCounts combine(const Step& step, const LayerWeights& w, Range rows, const Capture& capture,
                    std::int64_t t) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const std::int64_t F = config.intermediate_size;
  const std::int64_t at = t * F + rows.begin;
  float* gate = step.scratch.gate.data() + at;
  float* up = step.scratch.up.data() + at;
  float* product = step.scratch.ffn_input.row(t, F) + rows.begin;
  kernels.activate(config.activation, config.activation_parameter, gate, rows.size(), gate);
  if (config.activation == Activation::kDRelu) kernels.activate(Activation::kRelu, 0.0F, up, rows.size(), up);
  if (capture.gate != nullptr) {
    std::copy_n(gate, rows.size(), capture.gate + at);
    if (config.gated) std::copy_n(up, rows.size(), capture.up + at);
    if (!config.gated) std::fill_n(capture.up + at, rows.size(), 1.0F);
  }
  if (step.mode != Mode::kDense) return drop_neurons(step, w, rows, gate, up, product);
  if (config.gated) {
    for (std::int64_t i = 0; i < rows.size(); ++i) product[i] = gate[i] * up[i];
  } else {
    std::copy_n(gate, rows.size(), product);
  }
  return {.candidates = rows.size(), .gate_passed = rows.size(), .active = rows.size()};
}

void ffn(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t F = step.config().intermediate_size;
  const bool gated = step.config().gated;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const Capture capture = step.captures.empty() ? Capture{} : step.captures[static_cast<std::size_t>(layer)];
  const bool neuron_major = step.model.weights->neuron_major;

  const Range tokens = normalize_all(step, w.ffn_norm, w.quantized_ffn_input(), ffn_stage(layer), index);
  for (std::int64_t t = tokens.begin; runs_predictor(step, w) && t < tokens.end; ++t) {
    prepare_prediction(step, w, layer, t, s.input.row(t, D), s.predictor, t, index);
  }
  step.finish(index, Part::kNorm);
  if (step.predicted()) predict_all(step, w, layer, index);
  thread.watch.lap(Part::kPredictor);
  const Range rows = project(step, w.first(gated), s.input.view(), s.gate.data(), index);
  if (!step.refines())
    add_rest_batch(step, w.first_rest(gated), s.input.view(), step.T, rows, s.gate.data(), F, index);
  thread.watch.lap(Part::kGate);
  if (gated) {
    project(step, w.up, s.input.view(), s.up.data(), index);
    if (!step.refines()) add_rest_batch(step, w.up_rest, s.input.view(), step.T, rows, s.up.data(), F, index);
  }
  thread.counts = {};
  for (std::int64_t t = 0; t < step.T; ++t) {
    thread.counts += combine(step, w, rows, capture, t);
    if (step.refines()) thread.counts.refined += refine(step, w, rows, t, index);
    if (!neuron_major && is_quantized(w.down.type)) {
      s.ffn_input.quantize(step.kernels(), t, F, rows.begin, rows.end);
    }
  }
  step.finish(index, Part::kUp);

  Range columns = share(step, D, index);
  if (neuron_major) {
    for (std::int64_t t = 0; t < step.T; ++t)
      std::fill_n(s.out.data() + t * D + columns.begin, columns.size(), 0.0F);
    step.kernels().gemm_t(w.down, s.ffn_input.row(0, F), F, step.T, columns.begin, columns.end, s.out.data(),
                          D, thread.gemm.data());
    add_down_rest(step, w, columns, index);
  } else {
    columns = project(step, w.down, s.ffn_input.view(), s.out.data(), index);
  }
  if (capture.out != nullptr) {
    for (std::int64_t t = 0; t < step.T; ++t) {
      const std::int64_t at = t * D + columns.begin;
      std::copy_n(s.out.data() + at, columns.size(), capture.out + at);
      std::copy_n(s.x.data() + at, columns.size(), capture.residual + at);
    }
  }
  add_to_residual(step, columns);
  if (index == 0) {
    for (const ThreadScratch& other : s.threads) {
      step.counts[static_cast<std::size_t>(layer)] += other.counts;
    }
  }
  step.finish(index, Part::kDown);
}

}  // namespace

void batch_layer(Step& step, std::int64_t layer, int index) noexcept {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  attention(step, w, layer, index);
  ffn(step, w, layer, index);
}

}  // namespace turbosparse
