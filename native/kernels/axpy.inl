// y += sum of rows times coefficients. Several rows are folded per pass over y, which stays in registers for
// a few columns; a column adds its rows in order whatever the passes are, so zeros and splits change no bit.
#pragma once

#include <algorithm>

#include "kernels/weights.inl"

namespace turbosparse {
namespace {

inline constexpr int kAxpyRows = 4;    // per pass; eight make a chain of adds longer than the reorder window
inline constexpr int kAxpyAhead = 16;  // rows fetched ahead

/// The rows of a pass and their coefficients.
template <int kRows>
struct Rows {
  const std::byte* data[kRows];
  const std::byte* later[kRows];  // rows to fetch meanwhile
  float coef[kRows];
};

/// 64 columns of Q4_0: the blocks of the low and of the high nibbles, of which one may be outside the range.
template <class Float, int kRows, bool kLow, bool kHigh>
inline void axpy_nibbles(const Rows<kRows>& rows, std::int64_t pair, const float (&scale)[kRows][8], int lane,
                         float* y) {
  for (std::int64_t j = 0; j < kBlock; j += Float::kLanes) {
    float* at = y + 2 * pair * kBlock + j;
    auto low_sum = kLow ? Float::load(at) : Float::zero();
    auto high_sum = kHigh ? Float::load(at + kBlock) : Float::zero();
    for (int r = 0; r < kRows; ++r) {
      typename Float::V low, high;
      Float::load_nibbles(rows.data[r] + pair * kBlock + j, &low, &high);
      if constexpr (kLow) low_sum = Float::fma(low, Float::set(scale[r][lane]), low_sum);
      if constexpr (kHigh) high_sum = Float::fma(high, Float::set(scale[r][lane + 1]), high_sum);
    }
    if constexpr (kLow) Float::store(at, low_sum);
    if constexpr (kHigh) Float::store(at + kBlock, high_sum);
  }
}

/// One block of 32 columns of Q8_0.
template <class Float, int kRows>
inline void axpy_bytes(const Rows<kRows>& rows, std::int64_t block, const float (&scale)[kRows][8], int lane,
                       float* y) {
  constexpr int kParts = static_cast<int>(kBlock) / Float::kLanes;
  typename Float::V sums[kParts];
  for (int i = 0; i < kParts; ++i) sums[i] = Float::load(y + block * kBlock + i * Float::kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const auto row_scale = Float::set(scale[r][lane]);
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      const auto q = Float::load_int8(rows.data[r] + block * kBlock + i * Float::kLanes);
      sums[i] = Float::fma(q, row_scale, sums[i]);
    }
  }
  for (int i = 0; i < kParts; ++i) Float::store(y + block * kBlock + i * Float::kLanes, sums[i]);
}

/// Fetches a line of every later row: a few at a time, between the products.
template <int kRows>
inline void fetch_line(const Rows<kRows>& rows, std::int64_t at) {
  for (int r = 0; r < kRows; ++r) prefetch<Fetch::kFar>(rows.later[r] + at, 1);
}

/// One pass over the columns of quantised rows, eight blocks at a time: their scales are converted at once.
template <class Float, WeightType kType, int kRows>
inline void axpy_pass_quantized(const Rows<kRows>& rows, std::int64_t cols, std::int64_t col_begin,
                                std::int64_t col_end, float* y) {
  const std::int64_t begin = col_begin / kBlock, end = col_end / kBlock;
  for (std::int64_t group = begin / 8 * 8; group < end; group += 8) {
    float scale[kRows][8];
    for (int r = 0; r < kRows; ++r) {
      const auto scales = Float8::load_half(rows.data[r] + scales_offset(kType, cols) + 2 * group);
      Float8::store(scale[r], Float8::mul(scales, Float8::set(rows.coef[r])));
    }
    const std::int64_t first = std::max(begin, group), last = std::min(end, group + 8);
    if constexpr (kType == WeightType::kQ4_0) {
      for (std::int64_t block = first / 2 * 2; block < last; block += 2) {
        if (block % 4 == 0) fetch_line(rows, block / 2 * kBlock);
        const bool low = block >= first, high = block + 1 < last;
        const int lane = static_cast<int>(block - group);
        const auto run = low && high ? axpy_nibbles<Float, kRows, true, true>
                         : low       ? axpy_nibbles<Float, kRows, true, false>
                                     : axpy_nibbles<Float, kRows, false, true>;
        run(rows, block / 2, scale, lane, y);
      }
    } else {
      for (std::int64_t block = first; block < last; ++block) {
        if (block % 2 == 0) fetch_line(rows, block * kBlock);
        axpy_bytes<Float, kRows>(rows, block, scale, static_cast<int>(block - group), y);
      }
    }
  }
}

template <class Float, WeightType kType, int kRows>
inline void axpy_pass_float(const Rows<kRows>& rows, std::int64_t col_begin, std::int64_t col_end, float* y) {
  std::int64_t c = col_begin;
  for (; c + Float::kLanes <= col_end; c += Float::kLanes) {
    auto sum = Float::load(y + c);
    for (int r = 0; r < kRows; ++r) {
      sum = Float::fma(load_weights<Float, kType>(rows.data[r], c), Float::set(rows.coef[r]), sum);
    }
    Float::store(y + c, sum);
  }
  if (c == col_end) return;
  const std::int64_t n = col_end - c;
  auto sum = Float::load_n(y + c, n);
  for (int r = 0; r < kRows; ++r) {
    sum = Float::fma(load_last_weights<Float, kType>(rows.data[r], c, n), Float::set(rows.coef[r]), sum);
  }
  Float::store_n(y + c, n, sum);
}

template <class Isa, WeightType kType, int kRows>
inline void axpy_pass(const Matrix& w, const std::int32_t* list, std::int64_t left, const float* coef,
                      std::int64_t col_begin, std::int64_t col_end, float* y) {
  Rows<kRows> rows;
  for (int r = 0; r < kRows; ++r) {
    rows.data[r] = row_data(w, list[r]);
    rows.later[r] = row_data(w, list[std::min<std::int64_t>(r + kAxpyAhead, left - 1)]);
    rows.coef[r] = coef[list[r]];
    if constexpr (is_quantized(kType)) {
      prefetch<Fetch::kFar>(rows.later[r] + scales_offset(kType, w.cols), w.cols / kBlock * 2);
    }
  }
  if constexpr (is_quantized(kType)) {
    axpy_pass_quantized<typename Isa::Wide, kType, kRows>(rows, w.cols, col_begin, col_end, y);
  } else {
    axpy_pass_float<typename Isa::Wide, kType, kRows>(rows, col_begin, col_end, y);
  }
}

template <class Isa, WeightType kType>
void axpy_rows_type(const Matrix& w, const std::int32_t* rows, std::int64_t n, const float* coef,
                    std::int64_t col_begin, std::int64_t col_end, float* y) {
  std::int64_t i = 0;
  for (; i + kAxpyRows <= n; i += kAxpyRows) {
    axpy_pass<Isa, kType, kAxpyRows>(w, rows + i, n - i, coef, col_begin, col_end, y);
  }
  for (; i < n; ++i) axpy_pass<Isa, kType, 1>(w, rows + i, n - i, coef, col_begin, col_end, y);
}

}  // namespace
}  // namespace turbosparse
