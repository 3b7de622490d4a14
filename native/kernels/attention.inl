// Query heads over the cache that they share: scores, softmax, weighted sum of values. Keys and values are
// half or float; halves are converted once for all heads, which took most of the time (docs/experiments.md).
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/vector_ops.inl"

namespace turbosparse {
namespace {

template <class Float>
inline typename Float::V load_cached(const std::uint16_t* p) {
  return Float::load_half(p);
}

template <class Float>
inline typename Float::V load_cached(const float* p) {
  return Float::load(p);
}

/// The last n < kLanes values of a head.
template <class Float, class Cached>
inline typename Float::V load_last_cached(const Cached* p, std::int64_t n) {
  Cached padded[Float::kLanes] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(Cached));
  return load_cached<Float>(padded);
}

/// Positions whose keys or values are converted to floats at a time, once for all heads; wider heads, and
/// caches of floats, are read where they are.
inline constexpr std::int64_t kTilePositions = 32, kTileWidth = 256;

/// Keys or values of `count` positions as floats: in `tile`, or where they are.
template <class Float, class Cached>
inline const float* tile_of(const Cached* cached, std::int64_t count, std::int64_t C, std::int64_t kv_stride,
                            float* tile) {
  for (std::int64_t p = 0; p < count; ++p) {
    std::int64_t c = 0;
    for (; c + Float::kLanes <= C; c += Float::kLanes)
      Float::store(tile + p * C + c, load_cached<Float>(cached + p * kv_stride + c));
    if (c < C)
      Float::store_n(tile + p * C + c, C - c, load_last_cached<Float>(cached + p * kv_stride + c, C - c));
  }
  return tile;
}

/// scores[p] = q . k[p] * scale for n positions; returns the largest.
template <class Float, class Cached>
inline typename Float8::V attention_scores(const float* q, const Cached* k, std::int64_t n, std::int64_t C,
                                           std::int64_t kv_stride, float scale, typename Float8::V largest,
                                           float* scores) {
  constexpr std::int64_t kLanes = Float::kLanes;
  for (std::int64_t p = 0; p < n; p += 8) {
    const std::int64_t count = std::min<std::int64_t>(8, n - p);
    const Cached* at[8];  // past the end the last position is computed again
    for (std::int64_t i = 0; i < 8; ++i) at[i] = k + (p + std::min(i, count - 1)) * kv_stride;
    typename Float::V sums[8];
    for (auto& sum : sums) sum = Float::zero();
    std::int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) {
      const auto query = Float::load(q + c);
      for (int i = 0; i < 8; ++i) sums[i] = Float::fma(query, load_cached<Float>(at[i] + c), sums[i]);
    }
    if (c < C) {
      const auto query = Float::load_n(q + c, C - c);
      for (int i = 0; i < 8; ++i) {
        sums[i] = Float::fma(query, load_last_cached<Float>(at[i] + c, C - c), sums[i]);
      }
    }
    const auto scaled = Float8::mul(Float::sum_each(sums), Float8::set(scale));
    largest = Float8::max(largest, scaled);
    if (count == 8) {
      Float8::store(scores + p, scaled);
    } else {
      Float8::store_n(scores + p, count, scaled);
    }
  }
  return largest;
}

/// scores = e^(scores - largest); returns their sum.
template <class Float>
inline float exponentials(std::int64_t n, float largest, float* scores) {
  const auto shift = Float::set(largest);
  auto total = Float::zero();
  std::int64_t p = 0;
  for (; p + Float::kLanes <= n; p += Float::kLanes) {
    const auto e = exp<Float>(Float::sub(Float::load(scores + p), shift));
    Float::store(scores + p, e);
    total = Float::add(total, e);
  }
  float sum = Float::sum(total);
  if (p < n) {
    Float::store_n(scores + p, n - p, exp<Float>(Float::sub(Float::load_n(scores + p, n - p), shift)));
    for (; p < n; ++p) sum += scores[p];
  }
  return sum;
}

/// out[0 .. kVectors * kLanes) += sum of scores[p] * v[p].
template <class Float, int kVectors, class Cached>
inline void weighted_values(const float* scores, const Cached* v, std::int64_t n, std::int64_t kv_stride,
                            float* out) {
  typename Float::V sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = Float::load(out + i * Float::kLanes);
  for (std::int64_t p = 0; p < n; ++p, v += kv_stride) {
    const auto share = Float::set(scores[p]);
    for (int i = 0; i < kVectors; ++i) {
      sums[i] = Float::fma(share, load_cached<Float>(v + i * Float::kLanes), sums[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) Float::store(out + i * Float::kLanes, sums[i]);
}

/// out[0 .. C) += sum of scores[p] * v[p].
template <class Float, class Cached>
inline void add_values(const float* scores, const Cached* v, std::int64_t n, std::int64_t C,
                       std::int64_t kv_stride, float* out) {
  constexpr std::int64_t kLanes = Float::kLanes;
  std::int64_t c = 0;
  for (; c + 8 * kLanes <= C; c += 8 * kLanes) {
    weighted_values<Float, 8>(scores, v + c, n, kv_stride, out + c);
  }
  for (; c + kLanes <= C; c += kLanes) weighted_values<Float, 1>(scores, v + c, n, kv_stride, out + c);
  if (c == C) return;
  auto sum = Float::load_n(out + c, C - c);
  for (std::int64_t p = 0; p < n; ++p) {
    sum = Float::fma(Float::set(scores[p]), load_last_cached<Float>(v + p * kv_stride + c, C - c), sum);
  }
  Float::store_n(out + c, C - c, sum);
}

/// Calls f(first position, count, rows, stride) for tiles of the cache, converted where that pays: for more
/// than one head.
template <class Float, class Cached, class F>
inline void for_tiles(const Cached* cached, std::int64_t heads, std::int64_t n, std::int64_t C,
                      std::int64_t kv_stride, F f) {
  if (std::is_same_v<Cached, float> || heads == 1 || C > kTileWidth) return f(0, n, cached, kv_stride);
  alignas(64) float tile[kTilePositions * kTileWidth];
  for (std::int64_t p = 0; p < n; p += kTilePositions) {
    const std::int64_t count = std::min(kTilePositions, n - p);
    f(p, count, tile_of<Float>(cached + p * kv_stride, count, C, kv_stride, tile), C);
  }
}

template <class Isa, class Cached>
void attend(const float* q, std::int64_t heads, const Cached* k, const Cached* v, std::int64_t n,
            std::int64_t C, std::int64_t kv_stride, float scale, float* scores, float* out) noexcept {
  using Float = typename Isa::Float;
  constexpr std::int64_t kMostHeads = 16;  // whose largest scores are kept at a time
  for (; heads > kMostHeads; heads -= kMostHeads, q += kMostHeads * C, out += kMostHeads * C) {
    attend<Isa>(q, kMostHeads, k, v, n, C, kv_stride, scale, scores, out);
  }
  Float8::V largest[kMostHeads];
  for (std::int64_t h = 0; h < heads; ++h) largest[h] = Float8::set(-std::numeric_limits<float>::infinity());
  for_tiles<Float>(k, heads, n, C, kv_stride,
                   [&](std::int64_t p, std::int64_t count, auto rows, auto stride) {
                     for (std::int64_t h = 0; h < heads; ++h) {
                       largest[h] = attention_scores<Float>(q + h * C, rows, count, C, stride, scale,
                                                            largest[h], scores + h * n + p);
                     }
                   });
  float inverse[kMostHeads];
  for (std::int64_t h = 0; h < heads; ++h) {
    inverse[h] = 1.0f / exponentials<Float>(n, Float8::largest(largest[h]), scores + h * n);
    std::fill_n(out + h * C, C, 0.0f);
  }
  for_tiles<Float>(v, heads, n, C, kv_stride,
                   [&](std::int64_t p, std::int64_t count, auto rows, auto stride) {
                     for (std::int64_t h = 0; h < heads; ++h)
                       add_values<Float>(scores + h * n + p, rows, count, C, stride, out + h * C);
                   });
  for (std::int64_t h = 0; h < heads; ++h) {
    for (std::int64_t c = 0; c < C; ++c) out[h * C + c] *= inverse[h];
  }
}

}  // namespace
}  // namespace turbosparse
