// Query heads over the cache that they share, whose keys and values are int8 in blocks of 32 with a scale
// (kernels.h: tiles of 32 positions). Both products are sums of integers: queries come as int8; the shares
// of softmax, times the scales of the values, are rounded to int8 over the positions of a tile.
#pragma once

#include "kernels/attention.inl"
#include "kernels/cached_tile.h"
#include "kernels/quantize.inl"

namespace turbosparse {
namespace {

/// Vectors that an int8 block is wide: 16 outputs, of which each needs 32 products.
inline constexpr int kBlockVectors = static_cast<int>(kTileOutputs) / Float8::kLanes;

/// kHeads x 16 dot products of 32: bytes [8][16 outputs][4] with x[h * stride + 0..32), as floats.
template <class Dot, int kHeads>
inline void multiply_block(const std::byte* bytes, const std::int8_t* x, std::int64_t stride,
                           const std::int32_t (&start)[kHeads], Float8::V (&out)[kHeads][kBlockVectors]) {
  typename Dot::V sums[kHeads][kBlockVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (auto& sum : sums[h]) sum = Dot::template begin<WeightType::kQ8_0>(&start[h]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    typename Dot::V w[kBlockVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kBlockVectors; ++v) {
      w[v] = Dot::bytes(Dot::load(bytes + k * kTileOutputs * 4 + v * kBlock));
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v)
        sums[h][v] = Dot::template step<WeightType::kQ8_0>(sums[h][v], w[v], x + h * stride + 4 * k);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kBlockVectors; ++v)
      out[h][v] = Dot::template finish<WeightType::kQ8_0>(sums[h][v], &start[h]);
  }
}

/// scores[h * scores_stride + p] of the first `count` positions of a tile.
template <class Dot, int kHeads>
inline void tile_scores(const Input& q, const std::byte* tile, std::int64_t count, std::int64_t C,
                        float scale, float* scores, std::int64_t scores_stride) {
  const std::int64_t blocks = C / kBlock;
  const std::byte* scales = tile + kTilePositions * C;
  for (std::int64_t p = 0; p < count; p += kTileOutputs) {
    Float8::V sums[kHeads][kBlockVectors];
    for (auto& head : sums) {
      for (auto& sum : head) sum = Float8::zero();
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::int32_t start[kHeads];
      for (int h = 0; h < kHeads; ++h) start[h] = -Dot::offset(WeightType::kQ8_0) * q.q_sum[h * blocks + b];
      Float8::V products[kHeads][kBlockVectors];
      multiply_block<Dot, kHeads>(tile + p * C + b * kTileOutputs * kBlock, q.q + b * kBlock, C, start,
                                  products);
      for (int v = 0; v < kBlockVectors; ++v) {
        const auto key_scale = Float8::load_half(scales + 2 * (b * kTilePositions + p + v * Float8::kLanes));
        for (int h = 0; h < kHeads; ++h) {
          const auto both = Float8::mul(key_scale, Float8::set(q.scale[h * blocks + b]));
          sums[h][v] = Float8::fma(products[h][v], both, sums[h][v]);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kBlockVectors; ++v) {
        const std::int64_t at = p + v * Float8::kLanes, left = count - at;
        const auto scaled = Float8::mul(sums[h][v], Float8::set(scale));
        float* to = scores + h * scores_stride + at;
        if (left >= Float8::kLanes) {
          Float8::store(to, scaled);
        } else if (left > 0) {
          Float8::store_n(to, left, scaled);
        }
      }
    }
  }
}

/// Shares of `count` positions times the scales of their values, as int8; positions past them have none.
template <class Dot>
inline void quantize_shares(const float* shares, const std::byte* scales, std::int64_t count, std::int8_t* q,
                            float* scale, std::int32_t* q_sum) {
  float scaled[kTilePositions] = {};
  std::int64_t p = 0;
  for (; p + Float8::kLanes <= count; p += Float8::kLanes)
    Float8::store(scaled + p, Float8::mul(Float8::load(shares + p), Float8::load_half(scales + 2 * p)));
  for (; p < count; ++p) scaled[p] = shares[p] * half_to_float(load_unaligned<std::uint16_t>(scales + 2 * p));
  quantize_block<Dot>(scaled, q, scale, q_sum);
}

/// out[h * C + c] += sum over the first `count` positions of a tile of shares[h * shares_stride + p] *
/// v[p][c].
template <class Dot, int kHeads>
inline void add_tile_values(const float* shares, std::int64_t shares_stride, const std::byte* tile,
                            std::int64_t count, std::int64_t C, float* out) {
  const std::byte* scales = tile + kTilePositions * C;
  for (std::int64_t b = 0; b < C / kBlock; ++b) {
    std::int8_t q[kHeads][kTilePositions];
    float scale[kHeads];
    std::int32_t start[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      quantize_shares<Dot>(shares + h * shares_stride, scales + 2 * b * kTilePositions, count, q[h],
                           &scale[h], &start[h]);
      start[h] *= -Dot::offset(WeightType::kQ8_0);
    }
    for (std::int64_t c = b * kBlock; c < (b + 1) * kBlock; c += kTileOutputs) {
      Float8::V products[kHeads][kBlockVectors];
      multiply_block<Dot, kHeads>(tile + c * kTilePositions, q[0], kTilePositions, start, products);
      for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < kBlockVectors; ++v) {
          float* to = out + h * C + c + v * Float8::kLanes;
          Float8::store(to, Float8::fma(products[h][v], Float8::set(scale[h]), Float8::load(to)));
        }
      }
    }
  }
}

/// `attend` for a cache of tiles.
template <class Isa>
void attend_q8(const Input& q, std::int64_t heads, const std::byte* k, const std::byte* v, std::int64_t n,
               std::int64_t C, float scale, float* scores, float* out) noexcept {
  using Dot = typename Isa::Dot;
  const std::int64_t tile_bytes = cached_tile_bytes(C);
  const auto for_some = [=](const std::byte* tiles, auto f) {
    for_tiles(n, heads, [=](std::int64_t p, std::int64_t count, std::int64_t h, auto some) {
      const std::byte* tile = tiles + p / kTilePositions * tile_bytes;
      if (h == 0) prefetch<Fetch::kFar>(tile + tile_bytes, tile_bytes);
      f(tile, p, count, h, some);
    });
  };
  for_some(k, [=, &q](const std::byte* tile, std::int64_t p, std::int64_t count, std::int64_t h, auto some) {
    const std::int64_t at = h * C;
    const Input some_q{nullptr, q.q + at, q.scale + at / kBlock, q.q_sum + at / kBlock};
    tile_scores<Dot, some()>(some_q, tile, count, C, scale, scores + h * n + p, n);
  });
  for (std::int64_t h = 0; h < heads; ++h) softmax<Float8>(n, scores + h * n);
  std::fill_n(out, heads * C, 0.0f);
  for_some(v, [=](const std::byte* tile, std::int64_t p, std::int64_t count, std::int64_t h, auto some) {
    add_tile_values<Dot, some()>(scores + h * n + p, n, tile, count, C, out + h * C);
  });
}

}  // namespace
}  // namespace turbosparse
