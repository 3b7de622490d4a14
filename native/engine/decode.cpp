// One token through one layer. Small vectors (norms, 8-bit inputs) are computed by every thread for itself:
// that costs less than a barrier.
#include <algorithm>

#include "engine/router.h"
#include "engine/step.h"

namespace turbosparse {
namespace {

/// This thread's rows of y = w x + bias.
void project(const Step& step, const Matrix& w, const std::vector<float>& bias, const Input& x, float* y,
             int index) {
  const Range rows = share(step, w.rows, index);
  step.kernels().gemv(w, x, rows.begin, rows.end, y);
  if (!bias.empty()) step.kernels().add(bias.data() + rows.begin, rows.size(), y + rows.begin);
}

/// This thread's rows of the residual: x += w input.
void project_to_residual(const Step& step, const Matrix& w, const Input& input, int index) {
  float* out = step.scratch.out.data();
  const Range rows = share(step, w.rows, index);
  step.kernels().gemv(w, input, rows.begin, rows.end, out);
  step.kernels().add(out + rows.begin, rows.size(), step.scratch.x.data() + rows.begin);
}

/// Normalises queries and keys as a whole, each on one thread.
void normalize_qk(const Step& step, const LayerWeights& w, int index) {
  const float eps = step.config().rms_norm_eps;
  float* q = step.scratch.q.row(0, 0);
  float* k = step.scratch.k.data();
  if (index == 0) step.kernels().rms_norm(q, w.q_norm.data(), w.q.rows, eps, q);
  if (index == step.thread_count() - 1) step.kernels().rms_norm(k, w.k_norm.data(), w.k.rows, eps, k);
}

void store_kv(const Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  const ModelConfig& config = step.config();
  const std::int64_t C = config.head_dim;
  Scratch& s = step.scratch;
  const Range heads = split(config.num_key_value_heads, 1, index, step.thread_count());
  for (std::int64_t head = heads.begin; head < heads.end; ++head) {
    float* key = s.k.data() + head * C;
    place_heads(step, w.k_norm, layer, 0, 1, key);
    step.cache.store(step.kernels(), layer, head, step.position, key, s.v.data() + head * C);
  }
}

void attend(const Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  const ModelConfig& config = step.config();
  const std::int64_t C = config.head_dim;
  const std::int64_t group = config.num_attention_heads / config.num_key_value_heads;
  Scratch& s = step.scratch;
  const Range heads = split(config.num_attention_heads, 1, index, step.thread_count());
  place_heads(step, w.q_norm, layer, 0, heads.size(), s.q.row(0, 0) + heads.begin * C);
  if (step.cache.quantized()) s.q.quantize(step.kernels(), 0, w.q.rows, heads.begin * C, heads.end * C);
  for (std::int64_t head = heads.begin; head < heads.end;) {
    const std::int64_t end = std::min(heads.end, (head / group + 1) * group);
    step.cache.attend(step.kernels(), layer, head / group, s.q.view(head * C), end - head, step.position + 1,
                      step.thread(index).scores.data(), s.input.row(0, 0) + head * C);
    head = end;
  }
}

}  // namespace

void decode_layer(Step& step, std::int64_t layer, int index) noexcept {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  Scratch& s = step.scratch;
  InputBuffer& input = step.thread(index).input;

  if (step.on_disk()) foresee_ffns(step, layer, index);
  const bool quantized = is_quantized(w.q.type) || is_quantized(w.k.type) || is_quantized(w.v.type);
  normalize(step, w.attn_norm, quantized, attention_stage(layer), 0, input, 0, index);
  step.thread(index).watch.lap(Part::kNorm);
  if (w.has_router() && step.config().router.reads_layer_input) score_experts(step, w, s.x.data(), index);
  project(step, w.q, w.q_bias, input.view(), s.q.row(0, 0), index);
  project(step, w.k, w.k_bias, input.view(), s.k.data(), index);
  project(step, w.v, w.v_bias, input.view(), s.v.data(), index);
  step.finish(index, Part::kQkv);
  if (step.config().qk_norm == QkNorm::kAll) {
    normalize_qk(step, w, index);
    step.finish(index, Part::kCache);
  }
  store_kv(step, w, layer, index);
  step.finish(index, Part::kCache);
  attend(step, w, layer, index);
  step.finish(index, Part::kAttention);

  const float* attended = s.input.row(0, 0);
  std::copy_n(attended, w.o.cols, input.row(0, 0));
  if (is_quantized(w.o.type)) input.quantize(step.kernels(), 0, w.o.cols, 0, w.o.cols);
  project_to_residual(step, w.o, input.view(), index);
  step.finish(index, Part::kOut);

  normalize(step, w.ffn_norm, w.quantized_ffn_input(), ffn_stage(layer), 0, input, 0, index);
  step.thread(index).watch.lap(Part::kNorm);
  decode_ffn(step, layer, index);
}

}  // namespace turbosparse
