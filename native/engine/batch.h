// What the phases of a batch share: T tokens through one layer.
#pragma once

#include <cstdint>
#include <span>

#include "engine/step.h"

namespace turbosparse {

/// All tokens of the step.
inline std::span<const std::int32_t> all_tokens(const Step& step) {
  return {step.scratch.all.data(), static_cast<std::size_t>(step.T)};
}
/// Normalises this thread's tokens into the shared input, and says which they are.
Range normalize_all(const Step& step, const std::vector<float>& weight, bool quantized, std::int64_t stage,
                    int index);
/// This thread's rows of y = w x, n tokens.
Range project(const Step& step, const Matrix& w, const Input& input, std::int64_t n, float* y, int index);
/// Adds some columns of `rows`, one for each of some tokens, to the rows of these tokens in `to`, [T, D].
void add_rows(const Step& step, const AlignedVector<float>& rows, std::span<const std::int32_t> tokens,
              Range columns, AlignedVector<float>& to);

/// The FFNs of T tokens; ends with a barrier.
void batch_ffn(Step& step, std::int64_t layer, int index);

}  // namespace turbosparse
