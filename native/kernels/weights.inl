// Weights as vectors of floats, for the kernels that compute in floats.
#pragma once

#include <algorithm>

#include "kernels/packed.h"

namespace turbosparse {
namespace {

/// Where a line is fetched to. Quantised rows in sequence go to L1: the hardware's own streams have brought
/// most of them to L2 by then. Rows of a list, several rows at a time, and rows of floats go to L2: their
/// misses would fill the few miss buffers of L1, and loads would wait behind them (2.3 times as slow,
/// docs/experiments.md).
enum class Fetch { kNear, kFar };

/// Fetches `bytes` at p, which may lie past the matrix: a prefetch never faults.
template <Fetch kTo>
inline void prefetch(const std::byte* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, kTo == Fetch::kNear ? 3 : 2);
}

/// Weights [c, c + kLanes) of a row of floats or of Q8_0 integers (their scale left out).
template <class Float, WeightType kType>
inline typename Float::V load_weights(const std::byte* row, std::int64_t c) {
  if constexpr (kType == WeightType::kF32) return Float::load(row + 4 * c);
  if constexpr (kType == WeightType::kF16) return Float::load_half(row + 2 * c);
  if constexpr (kType == WeightType::kBF16) return Float::load_bf16(row + 2 * c);
  if constexpr (kType == WeightType::kQ8_0) return Float::load_int8(row + c);
}

/// The last n < kLanes weights of a row of floats; other lanes are zero.
template <class Float, WeightType kType>
inline typename Float::V load_last_weights(const std::byte* row, std::int64_t c, std::int64_t n) {
  constexpr std::size_t kBytes = float_type_bytes(kType);
  std::byte padded[Float::kLanes * kBytes] = {};
  std::memcpy(padded, row + static_cast<std::size_t>(c) * kBytes, static_cast<std::size_t>(n) * kBytes);
  return load_weights<Float, kType>(padded, 0);
}

/// out[j] = w[row, begin + j] for 0 <= j < n; begin % 64 == 0. Quantised types write whole blocks.
template <class Float, WeightType kType>
inline void unpack_columns(const std::byte* row, std::int64_t cols, std::int64_t begin, std::int64_t n,
                           float* out) {
  constexpr int kLanes = Float::kLanes;
  if constexpr (kType == WeightType::kQ4_0) {
    for (std::int64_t j = 0; j < n; j += 2 * kBlock) {
      const std::int64_t block = (begin + j) / kBlock;
      const auto low_scale = Float::set(block_scale(kType, row, cols, block));
      const bool pair = j + kBlock < n;
      const auto high_scale = Float::set(pair ? block_scale(kType, row, cols, block + 1) : 0.0f);
      for (std::int64_t i = 0; i < kBlock; i += kLanes) {
        typename Float::V low, high;
        Float::load_nibbles(row + block / 2 * kBlock + i, &low, &high);
        Float::store(out + j + i, Float::mul(low, low_scale));
        if (pair) Float::store(out + j + kBlock + i, Float::mul(high, high_scale));
      }
    }
  } else if constexpr (kType == WeightType::kQ8_0) {
    for (std::int64_t j = 0; j < n; j += kBlock) {
      const auto scale = Float::set(block_scale(kType, row, cols, (begin + j) / kBlock));
      for (std::int64_t i = j; i < j + kBlock; i += kLanes) {
        Float::store(out + i, Float::mul(load_weights<Float, kType>(row, begin + i), scale));
      }
    }
  } else {
    std::int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) Float::store(out + j, load_weights<Float, kType>(row, begin + j));
    if (j < n) Float::store_n(out + j, n - j, load_last_weights<Float, kType>(row, begin + j, n - j));
  }
}

}  // namespace
}  // namespace turbosparse
