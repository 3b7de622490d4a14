#include "kernels/cached_tile.h"

namespace turbosparse {
namespace {

/// Quantises a vector of C values and puts value c at offset(c) of the tile.
template <class Offset>
void store_q8(const KernelTable& kernels, const float* x, std::int64_t C, std::int64_t p, std::byte* tile,
              Offset offset) {
  for (std::int64_t b = 0; b < C / kBlock; ++b) {
    std::int8_t q[kBlock];
    float scale;
    std::int32_t q_sum;
    kernels.quantize_q8(x + b * kBlock, kBlock, q, &scale, &q_sum);
    for (std::int64_t i = 0; i < kBlock; ++i)
      tile[offset(b * kBlock + i)] = static_cast<std::byte>(static_cast<std::uint8_t>(q[i]));
    const std::uint16_t half = float_to_half(scale);
    std::memcpy(tile + cached_scale_offset(p, b, C), &half, sizeof half);
  }
}

}  // namespace

void store_key_q8(const KernelTable& kernels, const float* key, std::int64_t C, std::int64_t position,
                  std::byte* tiles) noexcept {
  const std::int64_t p = position % kTilePositions;
  store_q8(kernels, key, C, p, tiles + position / kTilePositions * cached_tile_bytes(C),
           [=](std::int64_t c) { return key_offset(p, c, C); });
}

void store_value_q8(const KernelTable& kernels, const float* value, std::int64_t C, std::int64_t position,
                    std::byte* tiles) noexcept {
  const std::int64_t p = position % kTilePositions;
  store_q8(kernels, value, C, p, tiles + position / kTilePositions * cached_tile_bytes(C),
           [=](std::int64_t c) { return value_offset(p, c); });
}

}  // namespace turbosparse
