// y = W x for one vector: all rows, or those of a list. A row's sum never depends on its neighbours, so both
// give the same bits.
#pragma once

#include <algorithm>

#include "kernels/weights.inl"

namespace turbosparse {
namespace {

/// How far ahead of their use rows are fetched.
inline constexpr std::int64_t kPrefetchBytes = 4096;

/// Sums of n <= 8 blocks from block `first` on, before scaling; lanes are blocks.
template <class Dot, WeightType kType, bool kFull>
inline auto block_sums(const std::byte* row, const std::int8_t* q, std::int64_t first, std::int64_t n,
                       typename Dot::V correction) {
  typename Dot::V p[8];
  for (int b = 0; b < 8; b += 2) {
    p[b] = p[b + 1] = typename Dot::V{};
    if (!kFull && b >= n) continue;
    const std::int8_t* x = q + (first + b) * kBlock;
    const bool pair = kFull || b + 1 < n;
    if constexpr (kType == WeightType::kQ8_0) {
      const std::byte* w = row + (first + b) * kBlock;
      p[b] = Dot::template products<kType>(Dot::bytes(Dot::load(w)), Dot::load(x));
      if (pair)
        p[b + 1] = Dot::template products<kType>(Dot::bytes(Dot::load(w + kBlock)), Dot::load(x + kBlock));
    } else {
      const auto w = Dot::load(row + (first + b) / 2 * kBlock);
      p[b] = Dot::template products<kType>(Dot::low_nibbles(w), Dot::load(x));
      if (pair) p[b + 1] = Dot::template products<kType>(Dot::high_nibbles(w), Dot::load(x + kBlock));
    }
  }
  return Dot::template sum_each<kType>(p, correction);
}

/// Dot product of a quantised row with input vector 0; `later` is a row to fetch meanwhile.
template <class Isa, WeightType kType, Fetch kTo>
inline float dot_quantized(const Matrix& w, const std::byte* row, const std::byte* later, const Input& x) {
  using Dot = typename Isa::Dot;
  constexpr std::int64_t kGroupBytes = kType == WeightType::kQ8_0 ? 256 : 128;
  const std::int64_t blocks = w.cols / kBlock;
  const std::byte* scales = row + scales_offset(kType, w.cols);
  auto sum = Float8::zero();
  std::int64_t b = 0;
  for (; b + 8 <= blocks; b += 8, later += kGroupBytes) {
    prefetch<kTo>(later, kGroupBytes);
    const auto correction = Dot::template correction<kType>(Dot::load(x.q_sum + b));
    const auto sums = block_sums<Dot, kType, true>(row, x.q, b, 8, correction);
    sum = Float8::fma(sums, Float8::mul(Float8::load_half(scales + 2 * b), Float8::load(x.scale + b)), sum);
  }
  prefetch<kTo>(later, static_cast<std::int64_t>(w.row_bytes) - b / 8 * kGroupBytes);
  if (b < blocks) {
    const std::int64_t n = blocks - b;
    const auto correction = Dot::template correction<kType>(Dot::load_int32_n(x.q_sum + b, n));
    const auto sums = block_sums<Dot, kType, false>(row, x.q, b, n, correction);
    const auto x_scale = Float8::load_n(x.scale + b, n);
    sum = Float8::fma(sums, Float8::mul(Float8::load_half(scales + 2 * b), x_scale), sum);
  }
  return Float8::sum(sum);
}

/// Dot product of a row of floats with input vector 0.
template <class Isa, WeightType kType, Fetch kTo>
inline float dot_float(const Matrix& w, const std::byte* row, const std::byte* later, const Input& x) {
  using Float = typename Isa::Float;
  constexpr std::int64_t kLanes = Float::kLanes, kChains = 4;  // independent sums hide the latency of fma
  constexpr auto kBytes = static_cast<std::int64_t>(float_type_bytes(kType));
  typename Float::V sums[kChains] = {Float::zero(), Float::zero(), Float::zero(), Float::zero()};
  std::int64_t c = 0;
  for (; c + kChains * kLanes <= w.cols; c += kChains * kLanes) {
    prefetch<kTo>(later + c * kBytes, kChains * kLanes * kBytes);
    for (std::int64_t i = 0; i < kChains; ++i) {
      const std::int64_t at = c + i * kLanes;
      sums[i] = Float::fma(load_weights<Float, kType>(row, at), Float::load(x.x + at), sums[i]);
    }
  }
  for (; c + kLanes <= w.cols; c += kLanes) {
    sums[0] = Float::fma(load_weights<Float, kType>(row, c), Float::load(x.x + c), sums[0]);
  }
  if (c < w.cols) {
    const std::int64_t n = w.cols - c;
    sums[1] = Float::fma(load_last_weights<Float, kType>(row, c, n), Float::load_n(x.x + c, n), sums[1]);
  }
  return Float::sum(Float::add(Float::add(sums[0], sums[1]), Float::add(sums[2], sums[3])));
}

template <class Isa, WeightType kType, Fetch kTo>
inline float dot_row(const Matrix& w, const std::byte* row, const std::byte* later, const Input& x) {
  if constexpr (is_quantized(kType)) {
    return dot_quantized<Isa, kType, kTo>(w, row, later, x);
  } else {
    return dot_float<Isa, kType, kTo>(w, row, later, x);
  }
}

inline std::int64_t rows_ahead(const Matrix& w) {
  return std::max<std::int64_t>(1, kPrefetchBytes / static_cast<std::int64_t>(w.row_bytes));
}

template <class Isa, WeightType kType>
void gemv_type(const Matrix& w, const Input& x, std::int64_t row_begin, std::int64_t row_end, float* y) {
  const std::int64_t ahead = rows_ahead(w);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    y[r] = dot_row<Isa, kType, Fetch::kNear>(w, row_data(w, r), row_data(w, std::min(r + ahead, row_end - 1)),
                                             x);
  }
}

template <class Isa, WeightType kType>
void gemv_rows_type(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t n, float* y) {
  const std::int64_t ahead = rows_ahead(w);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t later = rows[std::min(i + ahead, n - 1)];
    y[rows[i]] = dot_row<Isa, kType, Fetch::kFar>(w, row_data(w, rows[i]), row_data(w, later), x);
  }
}

}  // namespace
}  // namespace turbosparse
