// Matrix kernels: every ISA against the scalar twin, and the equalities that kernels.h promises to the bit.
#include <algorithm>
#include <limits>

#include "check.h"
#include "kernel_cases.h"

namespace turbosparse {
namespace {

using namespace test;  // NOLINT: the whole file is a test

#define WHERE                                                                         \
  "%s %s %lldx%lld", k.isa, weight_type_name(w.type), static_cast<long long>(w.rows), \
      static_cast<long long>(w.cols)

const KernelTable& scalar() { return kernel_table("scalar"); }

void check_gemv(const KernelTable& k, const Matrix& w) {
  const OwnedInput x(1, w.cols, 11);
  const auto rows = static_cast<std::size_t>(w.rows);
  std::vector<float> expected(rows), y(rows);
  scalar().gemv(w, x.view, 0, w.rows, expected.data());
  k.gemv(w, x.view, 0, w.rows, y.data());
  CHECK(equal_but_for_rounding(y, expected, w.cols), WHERE);
  // Any range and any list of rows give the same bits, and touch nothing else.
  std::vector<float> part(rows, -1.0f);
  k.gemv(w, x.view, w.rows / 2, w.rows, part.data());
  CHECK(std::equal(part.begin() + w.rows / 2, part.end(), y.begin() + w.rows / 2), WHERE);
  CHECK(std::all_of(part.begin(), part.begin() + w.rows / 2, [](float v) { return v == -1.0f; }), WHERE);
  std::vector<std::int32_t> list;
  for (std::int64_t r = w.rows - 1; r >= 0; r -= 3) list.push_back(static_cast<std::int32_t>(r));
  std::vector<float> some(rows, -1.0f);
  k.gemv_rows(w, x.view, list.data(), static_cast<std::int64_t>(list.size()), some.data());
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const bool listed = (w.rows - 1 - r) % 3 == 0;
    const auto i = static_cast<std::size_t>(r);
    CHECK(some[i] == (listed ? y[i] : -1.0f), WHERE);
  }
  k.gemv_rows(w, x.view, list.data(), 0, some.data());
}

void check_dequantize(const KernelTable& k, const Matrix& w) {
  std::vector<float> expected(static_cast<std::size_t>(w.cols)), row(expected.size());
  scalar().dequantize_row(w, w.rows - 1, expected.data());
  k.dequantize_row(w, w.rows - 1, row.data());
  CHECK(row == expected, WHERE);
}

void check_axpy(const KernelTable& k, const Matrix& w) {
  const std::vector<std::int32_t> list = all_rows(w.rows);
  std::vector<float> coef = normal_floats(w.rows, 12);
  for (std::size_t i = 1; i < coef.size(); i += 2) coef[i] = 0.0f;
  const std::vector<float> start = normal_floats(w.cols, 13);
  std::vector<float> expected = start, y = start;
  scalar().axpy_rows(w, list.data(), w.rows, coef.data(), 0, w.cols, expected.data());
  k.axpy_rows(w, list.data(), w.rows, coef.data(), 0, w.cols, y.data());
  CHECK(y == expected, WHERE);  // same order, same fused operations: equal to the bit in every ISA
  std::vector<std::int32_t> nonzero;
  for (std::int32_t r = 0; r < w.rows; r += 2) nonzero.push_back(r);
  std::vector<float> skipped = start;
  k.axpy_rows(w, nonzero.data(), static_cast<std::int64_t>(nonzero.size()), coef.data(), 0, w.cols,
              skipped.data());
  CHECK(skipped == y, WHERE);
  std::vector<float> split = start;
  for (std::int64_t c = 0; c < w.cols; c += 96) {
    k.axpy_rows(w, list.data(), w.rows, coef.data(), c, std::min(c + 96, w.cols), split.data());
  }
  CHECK(split == y, WHERE);
  std::vector<float> part = start;
  k.axpy_rows(w, list.data(), w.rows, coef.data(), 0, std::min(kBlock, w.cols), part.data());
  CHECK(std::equal(part.begin() + std::min(kBlock, w.cols), part.end(),
                   start.begin() + std::min(kBlock, w.cols)),
        WHERE);
}

void check_gemm(const KernelTable& k, const Matrix& w, std::int64_t T) {
  const OwnedInput x(T, w.cols, 14);
  const Scratch scratch(w.cols);
  const std::int64_t stride = w.rows + 3;
  std::vector<float> expected(static_cast<std::size_t>(T * stride), -1.0f), y = expected, split = expected;
  scalar().gemm(w, x.view, T, 0, w.rows, expected.data(), stride, scratch.memory);
  k.gemm(w, x.view, T, 0, w.rows, y.data(), stride, scratch.memory);
  CHECK(equal_but_for_rounding(y, expected, w.cols), WHERE);
  for (std::int64_t r = 0; r < w.rows; r += 5) {
    k.gemm(w, x.view, T, r, std::min(r + 5, w.rows), split.data(), stride, scratch.memory);
  }
  CHECK(split == y, WHERE);
  // A token's result does not depend on the tokens around it.
  std::vector<float> one(static_cast<std::size_t>(w.rows));
  const std::int64_t blocks = w.cols / kBlock, t = T - 1;
  const Input last{x.view.x + t * w.cols, x.view.q + t * w.cols, x.view.scale + t * blocks,
                   x.view.q_sum + t * blocks};
  k.gemm(w, last, 1, 0, w.rows, one.data(), w.rows, scratch.memory);
  CHECK(std::equal(one.begin(), one.end(), y.begin() + t * stride), WHERE);
}

std::vector<float> difference(std::vector<float> a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return a;
}

void check_gemm_t(const KernelTable& k, const Matrix& w, std::int64_t T) {
  const std::int64_t a_stride = w.rows + 1, stride = w.cols + 2;
  const std::vector<float> a = normal_floats(T * a_stride, 15), start = normal_floats(T * stride, 16);
  const Scratch scratch(w.cols);
  std::vector<float> expected = start, y = start, split = start;
  scalar().gemm_t(w, a.data(), a_stride, T, 0, w.cols, expected.data(), stride, scratch.memory);
  k.gemm_t(w, a.data(), a_stride, T, 0, w.cols, y.data(), stride, scratch.memory);
  if (is_quantized(w.type) && w.rows % kBlock == 0) {
    CHECK(relative_error(difference(y, start), difference(expected, start)) <= std::sqrt(5e-4), WHERE);
  } else {
    CHECK(equal_but_for_rounding(y, expected, w.rows), WHERE);
  }
  for (std::int64_t c = 0; c < w.cols; c += 96) {
    k.gemm_t(w, a.data(), a_stride, T, c, std::min(c + 96, w.cols), split.data(), stride, scratch.memory);
  }
  CHECK(split == y, WHERE);
}

/// A column of zeros beside others, and inputs that are no numbers.
void check_gemm_t_extremes(const KernelTable& k, WeightType type) {
  constexpr std::int64_t kRows = 64, kCols = 64;
  std::vector<float> values = normal_floats(kRows * kCols, 18);
  for (std::int64_t r = 0; r < kRows; ++r) std::fill_n(values.begin() + r * kCols, 32, 0.0f);
  const std::size_t row_bytes = packed_row_bytes(type, kCols);
  std::vector<std::byte> packed(kRows * row_bytes);
  for (std::size_t r = 0; r < kRows; ++r)
    quantize_row(type, values.data() + r * kCols, kCols, packed.data() + r * row_bytes);
  const Matrix w{packed.data(), kRows, kCols, row_bytes, type};
  std::vector<float> a = normal_floats(kRows, 19), y(kCols, 0.0f);
  const Scratch scratch(kCols);
  k.gemm_t(w, a.data(), kRows, 1, 0, kCols, y.data(), kCols, scratch.memory);
  CHECK(std::all_of(y.begin(), y.begin() + 32, [](float v) { return v == 0.0f; }), WHERE);
  a[40] = std::numeric_limits<float>::quiet_NaN();
  k.gemm_t(w, a.data(), kRows, 1, 0, kCols, y.data(), kCols, scratch.memory);
  CHECK(std::all_of(y.begin() + 32, y.end(), [](float v) { return std::isnan(v); }), WHERE);
}

/// Quantised products stay close to the product of the floats they stand for.
void check_accuracy(const KernelTable& k, const Matrix& w) {
  const OwnedInput x(1, w.cols, 17);
  std::vector<float> exact(static_cast<std::size_t>(w.rows)), y(exact.size());
  std::vector<float> row(static_cast<std::size_t>(w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    scalar().dequantize_row(w, r, row.data());
    double sum = 0.0;
    for (std::size_t c = 0; c < row.size(); ++c)
      sum += static_cast<double>(row[c]) * static_cast<double>(x.x[c]);
    exact[static_cast<std::size_t>(r)] = static_cast<float>(sum);
  }
  k.gemv(w, x.view, 0, w.rows, y.data());
  const double limit = is_quantized(w.type) ? std::sqrt(5e-4) : 1e-6;
  CHECK(relative_error(y, exact) <= limit, WHERE);
}

void check_all(const KernelTable& k, WeightType type) {
  for (const std::int64_t cols : column_cases(type)) {
    for (const std::int64_t rows : {1, 2, 13, 37}) {
      const OwnedMatrix owned(type, rows, cols, 10);
      check_gemv(k, owned.view);
      check_dequantize(k, owned.view);
      check_axpy(k, owned.view);
      if (cols > 2000 && rows != 13) continue;
      for (const std::int64_t T : {1, 5, 12, 17}) check_gemm(k, owned.view, T);
      for (const std::int64_t T : {1, 8}) check_gemm_t(k, owned.view, T);
    }
  }
  // More tokens than fit the scratch memory; more rows than gemm_t takes at a time.
  check_gemm(k, OwnedMatrix(type, 19, 96, 10).view, 251);
  check_gemm_t(k, OwnedMatrix(type, 301, 96, 10).view, 251);
  for (const std::int64_t rows : {32, 64, 800}) {
    for (const std::int64_t T : {1, 7}) check_gemm_t(k, OwnedMatrix(type, rows, 96, 10).view, T);
  }
  check_gemm_t_extremes(k, type);
  check_accuracy(k, OwnedMatrix(type, 64, 1536, 10).view);
}

}  // namespace
}  // namespace turbosparse

int main() {
  for (const turbosparse::KernelTable* table : turbosparse::test::tables()) {
    for (const turbosparse::WeightType type : turbosparse::test::weight_types())
      turbosparse::check_all(*table, type);
  }
  return turbosparse::test::report();
}
