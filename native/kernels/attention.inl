// One query head over the cache: scores, softmax, weighted sum of values. Keys and values are half or float.
#pragma once

#include <algorithm>
#include <limits>

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

/// scores[p] = q . k[p] * scale for all positions; returns the largest.
template <class Float, class Cached>
inline float attention_scores(const float* q, const Cached* k, std::int64_t n, std::int64_t C,
                              std::int64_t kv_stride, float scale, float* scores) {
  constexpr std::int64_t kLanes = Float::kLanes;
  auto largest = Float8::set(-std::numeric_limits<float>::infinity());
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
  return Float8::largest(largest);
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

/// out[0 .. kVectors * kLanes) = sum of scores[p] * v[p] * inverse.
template <class Float, int kVectors, class Cached>
inline void weighted_values(const float* scores, const Cached* v, std::int64_t n, std::int64_t kv_stride,
                            float inverse, float* out) {
  typename Float::V sums[kVectors];
  for (auto& sum : sums) sum = Float::zero();
  for (std::int64_t p = 0; p < n; ++p, v += kv_stride) {
    const auto share = Float::set(scores[p]);
    for (int i = 0; i < kVectors; ++i) {
      sums[i] = Float::fma(share, load_cached<Float>(v + i * Float::kLanes), sums[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i)
    Float::store(out + i * Float::kLanes, Float::mul(sums[i], Float::set(inverse)));
}

template <class Isa, class Cached>
void attend(const float* q, const Cached* k, const Cached* v, std::int64_t n, std::int64_t C,
            std::int64_t kv_stride, float scale, float* scores, float* out) noexcept {
  using Float = typename Isa::Float;
  constexpr std::int64_t kLanes = Float::kLanes;
  const float largest = attention_scores<Float>(q, k, n, C, kv_stride, scale, scores);
  const float inverse = 1.0f / exponentials<Float>(n, largest, scores);
  std::int64_t c = 0;
  for (; c + 8 * kLanes <= C; c += 8 * kLanes) {
    weighted_values<Float, 8>(scores, v + c, n, kv_stride, inverse, out + c);
  }
  for (; c + kLanes <= C; c += kLanes)
    weighted_values<Float, 1>(scores, v + c, n, kv_stride, inverse, out + c);
  if (c == C) return;
  auto sum = Float::zero();
  for (std::int64_t p = 0; p < n; ++p) {
    sum = Float::fma(Float::set(scores[p]), load_last_cached<Float>(v + p * kv_stride + c, C - c), sum);
  }
  Float::store_n(out + c, C - c, Float::mul(sum, Float::set(inverse)));
}

}  // namespace
}  // namespace turbosparse
