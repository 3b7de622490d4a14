#include "engine/predictor.h"

#include <algorithm>
#include <limits>

namespace turbosparse {

bool runs_predictor(const Step& step, const FfnWeights& ffn) {
  return step.predicted() && step.given.mask == nullptr &&
         ffn.predictor.threshold > std::numeric_limits<float>::lowest();
}

bool has_hidden_layer(const FfnWeights& ffn) { return ffn.predictor.signs == nullptr; }

std::int64_t predictor_bytes(const Step& step, const FfnWeights& ffn) {
  if (!runs_predictor(step, ffn)) return 0;
  const ModelConfig& config = step.config();
  const auto bytes = [](const Matrix& m) { return m.rows * static_cast<std::int64_t>(m.row_bytes); };
  if (has_hidden_layer(ffn)) return bytes(ffn.predictor.a) + bytes(ffn.predictor.b);
  return ffn.neurons * step.model.weights->sign_rows * sign_words(config.hidden_size) *
         static_cast<std::int64_t>(sizeof(std::uint64_t));
}

void prepare_prediction(const Step& step, const FfnWeights& ffn, std::int64_t layer, std::int64_t t,
                        const float* normalized, PredictorInput& to, std::int64_t at, int index) {
  const std::int64_t D = step.config().hidden_size;
  const bool residual = step.config().predictor.reads_residual;
  const float* x = residual ? step.scratch.x.data() + t * D : normalized;
  if (!has_hidden_layer(ffn)) {
    if (!all_finite(x, D)) note_broken(step.thread(index), predictor_stage(layer));
    step.kernels().sign_bits(x, D, to.signs.data() + at * sign_words(D));
  } else if (residual) {
    std::copy_n(x, D, to.residual.row(at, D));
    if (is_quantized(ffn.predictor.a.type)) to.residual.quantize(step.kernels(), at, D, 0, D);
  }
}

Input predictor_input(const Step& step, const InputBuffer& normalized, const PredictorInput& input) {
  return step.config().predictor.reads_residual ? input.residual.view() : normalized.view();
}

void finish_hidden(const Step& step, const FfnWeights& ffn, std::int64_t at, Range rows) {
  float* hidden = step.scratch.hidden.row(0, 0) + at + rows.begin;
  step.kernels().activate(Activation::kRelu, 0.0F, hidden, rows.size(), hidden);
  if (is_quantized(ffn.predictor.b.type))
    step.scratch.hidden.quantize(step.kernels(), 0, 0, at + rows.begin, at + rows.end);
}

void score_signs(const Step& step, const FfnWeights& ffn, const PredictorInput& input, std::int64_t at,
                 Range rows, std::int32_t* differences, float* scores) {
  const std::int64_t D = step.config().hidden_size;
  const std::int64_t words = sign_words(D);
  const std::int64_t each = step.model.weights->sign_rows;
  step.kernels().sign_differences(ffn.predictor.signs, words, input.signs.data() + at * words,
                                  rows.begin * each, rows.end * each, differences);
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    const std::int32_t most = *std::max_element(differences + r * each, differences + (r + 1) * each);
    scores[r] = static_cast<float>(D - 2 * most) / static_cast<float>(D);
  }
}

void mark_candidates(const Step& step, const FfnWeights& ffn, std::int64_t layer, std::int64_t t, Range rows,
                     float* scores, int index) {
  if (step.given.mask != nullptr) {
    const std::int64_t token = layer * step.given.tokens + step.given.first + t;
    const bool* mask = step.given.mask + token * step.config().layer_neurons() + ffn.first_neuron;
    for (std::int64_t r = rows.begin; r < rows.end; ++r) scores[r] = mask[r] ? 1.0F : 0.0F;
    return;
  }
  if (!runs_predictor(step, ffn)) {
    std::fill(scores + rows.begin, scores + rows.end, 1.0F);
    return;
  }
  if (!all_finite(scores + rows.begin, rows.size())) note_broken(step.thread(index), predictor_stage(layer));
  const float threshold = ffn.predictor.threshold;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) scores[r] = scores[r] >= threshold ? 1.0F : 0.0F;
  const std::vector<std::int32_t>& hot = ffn.predictor.hot;
  for (auto at = std::ranges::lower_bound(hot, rows.begin); at != hot.end() && *at < rows.end; ++at) {
    scores[*at] = 1.0F;
  }
}

}  // namespace turbosparse
