// The last norm and the output projection. Where the output has a rest, threshold mode adds it to the logits
// near the largest alone: the others hardly count in any distribution over tokens.
#include <algorithm>
#include <limits>

#include "engine/step.h"

namespace turbosparse {
namespace {

/// This thread's largest logit of token t of the batch, for all threads to see.
void note_largest(const Step& step, std::int64_t t, Range rows, const float* logits, int index) {
  const float largest = rows.size() == 0 ? -std::numeric_limits<float>::infinity()
                                         : *std::max_element(logits + rows.begin, logits + rows.end);
  step.scratch.largest[static_cast<std::size_t>(t * step.thread_count() + index)] = largest;
}

/// Adds the rest to this thread's logits that are near the largest of all.
void refine(const Step& step, std::int64_t t, const Input& input, Range rows, float* logits, int index) {
  const auto first = step.scratch.largest.begin() + t * step.thread_count();
  const float least = *std::max_element(first, first + step.thread_count()) - step.config().refine.logits;
  KeptNeurons& list = step.thread(index).refined;
  list.count = 0;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    if (logits[r] >= least) list.add_if(static_cast<std::int32_t>(r), true);
  }
  add_rest_rows(step, step.model.weights->output_rest, input, list.rows.data(), list.count, logits);
  step.scratch.refined_logits[static_cast<std::size_t>(index)] = list.count;
}

void logits_of_one(Step& step, std::int64_t token, bool refines, Range rows, float* logits, int index) {
  const Weights& weights = *step.model.weights;
  InputBuffer& input = step.thread(index).input;
  const bool quantized = is_quantized(weights.output.type) || is_quantized(weights.output_rest.type);
  normalize(step, weights.output_norm, quantized, attention_stage(step.config().num_hidden_layers), token,
            input, 0, index);
  step.thread(index).watch.lap(Part::kNorm);
  step.kernels().gemv(weights.output, input.view(), rows.begin, rows.end, logits);
  if (refines) {
    note_largest(step, 0, rows, logits, index);
    step.finish(index, Part::kLmHead);
    refine(step, 0, input.view(), rows, logits, index);
  } else {
    add_rest(step, weights.output_rest, input.view(), rows, logits);
  }
  step.finish(index, Part::kLmHead);
}

}  // namespace

void output_logits(Step& step, std::int64_t first, float* logits, int index) noexcept {
  const Weights& weights = *step.model.weights;
  const ModelConfig& config = step.config();
  const std::int64_t V = config.vocab_size;
  const std::int64_t T = step.T - first;
  const bool refines = step.refines() && weights.output_rest.rows > 0;
  const Range rows = share(step, V, index);
  if (T == 1) return logits_of_one(step, first, refines, rows, logits, index);

  InputBuffer& input = step.scratch.input;
  const bool quantized = is_quantized(weights.output.type) || is_quantized(weights.output_rest.type);
  const Range tokens = split(T, 1, index, step.thread_count());
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    normalize(step, weights.output_norm, quantized, attention_stage(config.num_hidden_layers), first + t,
              input, t, index);
  }
  step.finish(index, Part::kNorm);
  step.kernels().gemm(weights.output, input.view(), T, rows.begin, rows.end, logits, V,
                      step.thread(index).gemm.data());
  if (refines) {
    for (std::int64_t t = 0; t < T; ++t) note_largest(step, t, rows, logits + t * V, index);
    step.finish(index, Part::kLmHead);
    for (std::int64_t t = 0; t < T; ++t)
      refine(step, t, input.view(t, config.hidden_size), rows, logits + t * V, index);
  } else {
    add_rest_batch(step, weights.output_rest, input.view(), T, rows, logits, V, index);
  }
  step.finish(index, Part::kLmHead);
}

}  // namespace turbosparse
