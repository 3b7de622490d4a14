// Where things lie in a packed row (see kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace turbosparse {

/// Byte offset of the fp16 scales in a quantised row.
constexpr std::int64_t scales_offset(WeightType type, std::int64_t cols) {
  return type == WeightType::kQ8_0 ? cols : (cols / kBlock + 1) / 2 * kBlock;
}

constexpr std::size_t float_type_bytes(WeightType type) { return type == WeightType::kF32 ? 4 : 2; }

inline const std::byte* row_data(const Matrix& w, std::int64_t row) noexcept {
  return w.data + static_cast<std::size_t>(row) * w.row_bytes;
}

inline float block_scale(WeightType type, const std::byte* row, std::int64_t cols,
                         std::int64_t block) noexcept {
  return half_to_float(load_unaligned<std::uint16_t>(row + scales_offset(type, cols) + 2 * block));
}

/// The 32 integer weights of a block, Q4_0's without their offset of 8.
inline void load_block_integers(WeightType type, const std::byte* row, std::int64_t block,
                                std::int8_t* out) noexcept {
  if (type == WeightType::kQ8_0) {
    std::memcpy(out, row + block * kBlock, kBlock);
    return;
  }
  const std::byte* group = row + block / 2 * kBlock;
  const int shift = block % 2 == 0 ? 0 : 4;
  for (int j = 0; j < kBlock; ++j) {
    out[j] = static_cast<std::int8_t>((std::to_integer<int>(group[j]) >> shift & 15) - 8);
  }
}

/// Weights [begin, begin + n) of a row as floats; begin % 32 == 0 and n <= 32.
inline void load_block(WeightType type, const std::byte* row, std::int64_t cols, std::int64_t begin,
                       std::int64_t n, float* out) noexcept {
  switch (type) {
    case WeightType::kF32:
      std::memcpy(out, row + 4 * begin, static_cast<std::size_t>(4 * n));
      return;
    case WeightType::kF16:
      for (std::int64_t j = 0; j < n; ++j) {
        out[j] = half_to_float(load_unaligned<std::uint16_t>(row + 2 * (begin + j)));
      }
      return;
    case WeightType::kBF16:
      for (std::int64_t j = 0; j < n; ++j) {
        out[j] = bfloat16_to_float(load_unaligned<std::uint16_t>(row + 2 * (begin + j)));
      }
      return;
    case WeightType::kQ8_0:
    case WeightType::kQ4_0: {
      std::int8_t q[kBlock];
      load_block_integers(type, row, begin / kBlock, q);
      const float scale = block_scale(type, row, cols, begin / kBlock);
      for (std::int64_t j = 0; j < n; ++j) out[j] = static_cast<float>(q[j]) * scale;
      return;
    }
  }
}

}  // namespace turbosparse
