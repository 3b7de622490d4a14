// Where things lie in a tile of 32 cached positions in 8 bits (kernels.h), and how a position gets there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace turbosparse {

/// Positions of a tile.
inline constexpr std::int64_t kTilePositions = 32;
/// Outputs of a product that lie side by side: positions for keys, columns for values.
inline constexpr std::int64_t kTileOutputs = 16;

/// Byte of column c of the key at position p of its tile.
constexpr std::int64_t key_offset(std::int64_t p, std::int64_t c, std::int64_t C) {
  return ((p / kTileOutputs * (C / 4) + c / 4) * kTileOutputs + p % kTileOutputs) * 4 + c % 4;
}
/// Byte of column c of the value at position p of its tile.
constexpr std::int64_t value_offset(std::int64_t p, std::int64_t c) {
  return ((c / kTileOutputs * (kTilePositions / 4) + p / 4) * kTileOutputs + c % kTileOutputs) * 4 + p % 4;
}
/// Byte of the scale of block b at position p of its tile.
constexpr std::int64_t cached_scale_offset(std::int64_t p, std::int64_t b, std::int64_t C) {
  return kTilePositions * C + 2 * (b * kTilePositions + p);
}

}  // namespace turbosparse
