// Query heads over the cache that they share: scores, softmax, weighted sum of values. Keys and values are
// half or float. Eight sums are kept in registers, of up to four heads at once, so that what is read is
// converted once for all of them (docs/experiments.md). A sum's order does not depend on who shares its pass.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/cached_tile.h"
#include "kernels/vector_ops.inl"
#include "kernels/weights.inl"

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

/// Sums side by side: enough to hide the latency of fma, few enough for sixteen registers.
inline constexpr int kSums = 8;
// Positions that all heads go through before the next ones, kTilePositions: their halves stay in the L1
// cache, also where two threads share it.
static_assert(kTilePositions % kSums == 0);

/// scores[h * scores_stride + p] = q[h] . k[p] * scale for kHeads heads and `count` positions.
template <class Float, int kHeads, class Cached>
inline void attention_scores(const float* q, const Cached* k, std::int64_t count, std::int64_t C,
                             std::int64_t kv_stride, float scale, float* scores, std::int64_t scores_stride) {
  constexpr int kPositions = kSums / kHeads;
  constexpr std::int64_t kLanes = Float::kLanes;
  for (std::int64_t p = 0; p < count; p += kPositions) {
    const std::int64_t left = std::min<std::int64_t>(kPositions, count - p);
    const Cached* at[kPositions];  // past the end the last position is computed again
    for (std::int64_t i = 0; i < kPositions; ++i) at[i] = k + (p + std::min(i, left - 1)) * kv_stride;
    typename Float::V sums[kSums];
    for (auto& sum : sums) sum = Float::zero();
    typename Float::V keys[kPositions];
    std::int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) {
      for (int i = 0; i < kPositions; ++i) keys[i] = load_cached<Float>(at[i] + c);
      for (int h = 0; h < kHeads; ++h) {
        const auto query = Float::load(q + h * C + c);
        for (int i = 0; i < kPositions; ++i)
          sums[h * kPositions + i] = Float::fma(query, keys[i], sums[h * kPositions + i]);
      }
    }
    if (c < C) {
      for (int i = 0; i < kPositions; ++i) keys[i] = load_last_cached<Float>(at[i] + c, C - c);
      for (int h = 0; h < kHeads; ++h) {
        const auto query = Float::load_n(q + h * C + c, C - c);
        for (int i = 0; i < kPositions; ++i)
          sums[h * kPositions + i] = Float::fma(query, keys[i], sums[h * kPositions + i]);
      }
    }
    float scaled[kSums];
    Float::store(scaled, Float::mul(Float::sum_each(sums), Float::set(scale)));
    for (int h = 0; h < kHeads; ++h)
      std::copy_n(scaled + h * kPositions, left, scores + h * scores_stride + p);
  }
}

template <class Float>
inline float largest_score(const float* scores, std::int64_t n) {
  auto largest = Float::set(-std::numeric_limits<float>::infinity());
  std::int64_t p = 0;
  for (; p + Float::kLanes <= n; p += Float::kLanes) largest = Float::max(largest, Float::load(scores + p));
  for (; p < n; ++p) largest = Float::max(largest, Float::set(scores[p]));
  return Float::largest(largest);
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

/// scores = softmax(scores)
template <class Float>
inline void softmax(std::int64_t n, float* scores) {
  const float inverse = 1.0f / exponentials<Float>(n, largest_score<Float>(scores, n), scores);
  const auto factor = Float::set(inverse);
  std::int64_t p = 0;
  for (; p + Float::kLanes <= n; p += Float::kLanes)
    Float::store(scores + p, Float::mul(Float::load(scores + p), factor));
  for (; p < n; ++p) scores[p] *= inverse;
}

/// Columns [c, c + kVectors * kLanes) of add_values.
template <class Float, int kHeads, int kVectors, class Cached>
inline void add_columns(const float* scores, std::int64_t scores_stride, const Cached* v, std::int64_t count,
                        std::int64_t C, std::int64_t kv_stride, float* out) {
  constexpr std::int64_t kLanes = Float::kLanes;
  typename Float::V sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) sums[h][i] = Float::load(out + h * C + i * kLanes);
  }
  for (std::int64_t p = 0; p < count; ++p, v += kv_stride) {
    typename Float::V values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = load_cached<Float>(v + i * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const auto share = Float::set(scores[h * scores_stride + p]);
      for (int i = 0; i < kVectors; ++i) sums[h][i] = Float::fma(share, values[i], sums[h][i]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) Float::store(out + h * C + i * kLanes, sums[h][i]);
  }
}

/// out[h * C + c] += sum over `count` positions of scores[h * scores_stride + p] * v[p][c] for kHeads heads.
template <class Float, int kHeads, class Cached>
inline void add_values(const float* scores, std::int64_t scores_stride, const Cached* v, std::int64_t count,
                       std::int64_t C, std::int64_t kv_stride, float* out) {
  constexpr std::int64_t kLanes = Float::kLanes;
  constexpr int kVectors = kSums / kHeads;
  std::int64_t c = 0;
  for (; c + kVectors * kLanes <= C; c += kVectors * kLanes)
    add_columns<Float, kHeads, kVectors>(scores, scores_stride, v + c, count, C, kv_stride, out + c);
  for (; c + kLanes <= C; c += kLanes)
    add_columns<Float, kHeads, 1>(scores, scores_stride, v + c, count, C, kv_stride, out + c);
  for (int h = 0; c < C && h < kHeads; ++h) {
    auto sum = Float::load_n(out + h * C + c, C - c);
    for (std::int64_t p = 0; p < count; ++p) {
      const auto values = load_last_cached<Float>(v + p * kv_stride + c, C - c);
      sum = Float::fma(Float::set(scores[h * scores_stride + p]), values, sum);
    }
    Float::store_n(out + h * C + c, C - c, sum);
  }
}

/// Calls f(first position, count, first head, std::integral_constant of how many) for tiles of positions and,
/// within each, for groups of heads.
template <class F>
inline void for_tiles(std::int64_t n, std::int64_t heads, F f) {
  for (std::int64_t p = 0; p < n; p += kTilePositions) {
    const std::int64_t count = std::min(kTilePositions, n - p);
    std::int64_t h = 0;
    for (; h + 4 <= heads; h += 4) f(p, count, h, std::integral_constant<int, 4>{});
    if (heads - h == 3) f(p, count, h, std::integral_constant<int, 3>{});
    if (heads - h == 2) f(p, count, h, std::integral_constant<int, 2>{});
    if (heads - h == 1) f(p, count, h, std::integral_constant<int, 1>{});
  }
}

/// Fetches the rows of the next tile of positions.
template <class Cached>
inline void prefetch_rows(const Cached* next, std::int64_t count, std::int64_t C, std::int64_t kv_stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch<Fetch::kFar>(reinterpret_cast<const std::byte*>(next + i * kv_stride),
                          C * static_cast<std::int64_t>(sizeof(Cached)));
  }
}

template <class Isa, class Cached>
void attend(const float* q, std::int64_t heads, const Cached* k, const Cached* v, std::int64_t n,
            std::int64_t C, std::int64_t kv_stride, float scale, float* scores, float* out) noexcept {
  using Float = typename Isa::Float;
  for_tiles(n, heads, [=](std::int64_t p, std::int64_t count, std::int64_t h, auto some) {
    if (h == 0) prefetch_rows(k + (p + kTilePositions) * kv_stride, count, C, kv_stride);
    attention_scores<Float, some()>(q + h * C, k + p * kv_stride, count, C, kv_stride, scale,
                                    scores + h * n + p, n);
  });
  for (std::int64_t h = 0; h < heads; ++h) softmax<Float>(n, scores + h * n);
  std::fill_n(out, heads * C, 0.0f);
  for_tiles(n, heads, [=](std::int64_t p, std::int64_t count, std::int64_t h, auto some) {
    if (h == 0) prefetch_rows(v + (p + kTilePositions) * kv_stride, count, C, kv_stride);
    add_values<Float, some()>(scores + h * n + p, n, v + p * kv_stride, count, C, kv_stride, out + h * C);
  });
}

}  // namespace
}  // namespace turbosparse
