// y = W x for one vector: all rows, or those of a list. A row's sum never depends on its neighbours, so both
// give the same bits.
#pragma once

#include <algorithm>

#include "kernels/weights.inl"

namespace turbosparse {
namespace {

/// How rows in sequence are fetched ahead of their use. Rows of floats are long, and fetching them to L1 is
/// up to three times as slow (docs/experiments.md).
template <WeightType kType>
inline constexpr Fetch kSequenceFetch = is_quantized(kType) ? Fetch::kNear : Fetch::kFar;
template <WeightType kType>
inline constexpr std::int64_t kSequenceAheadBytes = is_quantized(kType) ? 4096 : 32768;
/// Rows of a list are computed side by side, for more misses at a time than one row has, and fetched this
/// many ahead.
inline constexpr int kListRows = 4;
inline constexpr std::int64_t kListAhead = 16;

/// Sums of n <= 8 blocks from block `first` on, before scaling; lanes are blocks.
template <class Dot, WeightType kType, bool kFull>
inline auto block_sums(const std::byte* row, const std::int8_t* q, std::int64_t first, std::int64_t n,
                       typename Dot::V correction) {
  typename Dot::Products p[8];
  for (int b = 0; b < 8; b += 2) {
    p[b] = p[b + 1] = typename Dot::Products{};
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

/// Rows that are computed side by side, and rows to fetch meanwhile.
template <int kRows>
struct RowGroup {
  const std::byte* row[kRows];
  const std::byte* later[kRows];
};

/// Dot products of quantised rows with input vector 0, to sums[0..kRows).
template <class Isa, WeightType kType, Fetch kTo, int kRows>
inline void dot_quantized(const Matrix& w, const RowGroup<kRows>& group, const Input& x, float* out) {
  using Dot = typename Isa::Dot;
  constexpr std::int64_t kGroupBytes = kType == WeightType::kQ8_0 ? 256 : 128;
  const std::int64_t blocks = w.cols / kBlock, scales = scales_offset(kType, w.cols);
  Float8::V sums[kRows];
  for (auto& sum : sums) sum = Float8::zero();
  std::int64_t b = 0;
  for (; b + 8 <= blocks; b += 8) {
    const auto correction = Dot::template correction<kType>(Dot::load(x.q_sum + b));
    const auto x_scale = Float8::load(x.scale + b);
    for (int r = 0; r < kRows; ++r) {
      prefetch<kTo>(group.later[r] + b / 8 * kGroupBytes, kGroupBytes);
      const auto products = block_sums<Dot, kType, true>(group.row[r], x.q, b, 8, correction);
      const auto scale = Float8::load_half(group.row[r] + scales + 2 * b);
      sums[r] = Float8::fma(products, Float8::mul(scale, x_scale), sums[r]);
    }
  }
  const std::int64_t fetched = b / 8 * kGroupBytes;
  for (const std::byte* later : group.later) {
    prefetch<kTo>(later + fetched, scales + 2 * blocks - fetched);
  }
  if (b < blocks) {
    const std::int64_t n = blocks - b;
    const auto correction = Dot::template correction<kType>(Dot::load_int32_n(x.q_sum + b, n));
    const auto x_scale = Float8::load_n(x.scale + b, n);
    for (int r = 0; r < kRows; ++r) {
      const auto products = block_sums<Dot, kType, false>(group.row[r], x.q, b, n, correction);
      const auto scale = Float8::load_half(group.row[r] + scales + 2 * b);
      sums[r] = Float8::fma(products, Float8::mul(scale, x_scale), sums[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = Float8::sum(sums[r]);
}

/// Dot product of a row of floats with input vector 0; `later` is a row to fetch meanwhile.
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

template <class Isa, WeightType kType, Fetch kTo, int kRows>
inline void dot_rows(const Matrix& w, const RowGroup<kRows>& group, const Input& x, float* out) {
  if constexpr (is_quantized(kType)) {
    dot_quantized<Isa, kType, kTo>(w, group, x, out);
  } else {
    for (int r = 0; r < kRows; ++r) out[r] = dot_float<Isa, kType, kTo>(w, group.row[r], group.later[r], x);
  }
}

template <class Isa, WeightType kType>
void gemv_type(const Matrix& w, const Input& x, std::int64_t row_begin, std::int64_t row_end, float* y) {
  const std::int64_t ahead =
      std::max<std::int64_t>(1, kSequenceAheadBytes<kType> / static_cast<std::int64_t>(w.row_bytes));
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const RowGroup<1> group{{row_data(w, r)}, {row_data(w, std::min(r + ahead, row_end - 1))}};
    dot_rows<Isa, kType, kSequenceFetch<kType>>(w, group, x, y + r);
  }
}

template <class Isa, WeightType kType, int kRows>
inline void gemv_row_group(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t left,
                           float* y) {
  RowGroup<kRows> group;
  for (int r = 0; r < kRows; ++r) {
    group.row[r] = row_data(w, rows[r]);
    group.later[r] = row_data(w, rows[std::min(r + kListAhead, left - 1)]);
  }
  float out[kRows];
  dot_rows<Isa, kType, Fetch::kFar>(w, group, x, out);
  for (int r = 0; r < kRows; ++r) y[rows[r]] = out[r];
}

template <class Isa, WeightType kType>
void gemv_rows_type(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t n, float* y) {
  std::int64_t i = 0;
  for (; i + kListRows <= n; i += kListRows) gemv_row_group<Isa, kType, kListRows>(w, x, rows + i, n - i, y);
  for (; i < n; ++i) gemv_row_group<Isa, kType, 1>(w, x, rows + i, n - i, y);
}

}  // namespace
}  // namespace turbosparse
