// T tokens through one layer: products of two matrices, cut by output rows.
#include "engine/batch.h"

#include <algorithm>

#include "engine/router.h"

namespace turbosparse {

Range normalize_all(const Step& step, const std::vector<float>& weight, bool quantized, std::int64_t stage,
                    int index) {
  const Range tokens = split(step.T, 1, index, step.thread_count());
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    normalize(step, weight, quantized, stage, t, step.scratch.input, t, index);
  }
  return tokens;
}

Range project(const Step& step, const Matrix& w, const Input& input, std::int64_t n, float* y, int index) {
  const Range rows = share(step, w.rows, index);
  step.kernels().gemm(w, input, n, rows.begin, rows.end, y, w.rows, step.thread(index).gemm.data());
  return rows;
}

void add_rows(const Step& step, const AlignedVector<float>& rows, std::span<const std::int32_t> tokens,
              Range columns, AlignedVector<float>& to) {
  const std::int64_t D = step.config().hidden_size;
  const float* row = rows.data() + columns.begin;
  for (const std::int32_t t : tokens) {
    step.kernels().add(row, columns.size(), to.data() + t * D + columns.begin);
    row += D;
  }
}

namespace {

/// Bias, rotation and the cache's rows of one token.
void place_token(const Step& step, const LayerWeights& w, std::int64_t layer, std::int64_t t) {
  const ModelConfig& config = step.config();
  const KernelTable& kernels = step.kernels();
  const std::int64_t C = config.head_dim;
  const std::int64_t K = config.num_key_value_heads;
  Scratch& s = step.scratch;
  float* q = s.q.row(t, w.q.rows);
  float* k = s.k.data() + t * w.k.rows;
  float* v = s.v.data() + t * w.v.rows;
  if (!w.q_bias.empty()) kernels.add(w.q_bias.data(), w.q.rows, q);
  if (!w.k_bias.empty()) kernels.add(w.k_bias.data(), w.k.rows, k);
  if (!w.v_bias.empty()) kernels.add(w.v_bias.data(), w.v.rows, v);
  if (config.qk_norm == QkNorm::kAll) {
    kernels.rms_norm(q, w.q_norm.data(), w.q.rows, config.rms_norm_eps, q);
    kernels.rms_norm(k, w.k_norm.data(), w.k.rows, config.rms_norm_eps, k);
  }
  place_heads(step, w.q_norm, layer, t, config.num_attention_heads, q);
  place_heads(step, w.k_norm, layer, t, K, k);
  if (step.cache.quantized()) s.q.quantize(kernels, t, w.q.rows, 0, w.q.rows);
  for (std::int64_t head = 0; head < K; ++head) {
    step.cache.store(kernels, layer, head, step.position + t, k + head * C, v + head * C);
  }
}

/// Causal attention, pairs of kv head and token dealt out in turn: later tokens have more to do.
void attend_all(const Step& step, std::int64_t layer, int index) {
  const ModelConfig& config = step.config();
  const std::int64_t H = config.num_attention_heads;
  const std::int64_t C = config.head_dim;
  const std::int64_t group = H / config.num_key_value_heads;
  const std::int64_t threads = step.thread_count();
  for (std::int64_t head = 0; head < config.num_key_value_heads; ++head) {
    for (std::int64_t t = (index + head) % threads; t < step.T; t += threads) {
      const std::int64_t first = head * group;
      step.cache.attend(step.kernels(), layer, head, step.scratch.q.view((t * H + first) * C), group,
                        step.position + t + 1, step.thread(index).scores.data(),
                        step.scratch.input.row(t, H * C) + first * C);
    }
  }
}

void attention(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  const bool quantized = is_quantized(w.q.type) || is_quantized(w.k.type) || is_quantized(w.v.type);
  const Range tokens = normalize_all(step, w.attn_norm, quantized, attention_stage(layer), index);
  if (w.has_router() && step.config().router.reads_layer_input)
    route_tokens(step, w, layer, s.x.data(), tokens, index);
  step.finish(index, Part::kNorm);
  project(step, w.q, s.input.view(), step.T, s.q.row(0, 0), index);
  project(step, w.k, s.input.view(), step.T, s.k.data(), index);
  project(step, w.v, s.input.view(), step.T, s.v.data(), index);
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
  add_rows(step, s.out, all_tokens(step), project(step, w.o, s.input.view(), step.T, s.out.data(), index),
           s.x);
  step.finish(index, Part::kOut);
}

}  // namespace

void batch_layer(Step& step, std::int64_t layer, int index) noexcept {
  attention(step, step.model.weights->layers[static_cast<std::size_t>(layer)], layer, index);
  batch_ffn(step, layer, index);
}

}  // namespace turbosparse
