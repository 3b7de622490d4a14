// A KernelTable made from an ISA's primitives: choice of the weight type, then the kernels of the *.inl
// files.
#pragma once

#include "kernels/attention.inl"
#include "kernels/attention_q8.inl"
#include "kernels/axpy.inl"
#include "kernels/gemm.inl"
#include "kernels/gemm_t.inl"
#include "kernels/gemv.inl"
#include "kernels/quantize.inl"
#include "kernels/sign.inl"
#include "kernels/vector_ops.inl"

namespace turbosparse {
namespace {

/// Calls f with the type as a constant.
template <class F>
inline void with_type(WeightType type, F f) {
  switch (type) {
    case WeightType::kF32:
      return f(std::integral_constant<WeightType, WeightType::kF32>{});
    case WeightType::kF16:
      return f(std::integral_constant<WeightType, WeightType::kF16>{});
    case WeightType::kBF16:
      return f(std::integral_constant<WeightType, WeightType::kBF16>{});
    case WeightType::kQ8_0:
      return f(std::integral_constant<WeightType, WeightType::kQ8_0>{});
    case WeightType::kQ4_0:
      return f(std::integral_constant<WeightType, WeightType::kQ4_0>{});
  }
}

template <class Isa>
void dequantize_row(const Matrix& w, std::int64_t row, float* out) noexcept {
  with_type(w.type, [&](auto type) {
    unpack_columns<typename Isa::Float, decltype(type)::value>(row_data(w, row), w.cols, 0, w.cols, out);
  });
}

template <class Isa>
void gemv(const Matrix& w, const Input& x, std::int64_t row_begin, std::int64_t row_end, float* y) noexcept {
  with_type(w.type, [&](auto type) { gemv_type<Isa, decltype(type)::value>(w, x, row_begin, row_end, y); });
}

template <class Isa>
void gemv_rows(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t n, float* y) noexcept {
  with_type(w.type, [&](auto type) { gemv_rows_type<Isa, decltype(type)::value>(w, x, rows, n, y); });
}

template <class Isa>
void axpy_rows(const Matrix& w, const std::int32_t* rows, std::int64_t n, const float* coef,
               std::int64_t col_begin, std::int64_t col_end, float* y) noexcept {
  with_type(w.type, [&](auto type) {
    axpy_rows_type<Isa, decltype(type)::value>(w, rows, n, coef, col_begin, col_end, y);
  });
}

template <class Isa>
void gemm(const Matrix& w, const Input& x, std::int64_t T, std::int64_t row_begin, std::int64_t row_end,
          float* y, std::int64_t y_stride, std::byte* scratch) noexcept {
  with_type(w.type, [&](auto type) {
    gemm_type<Isa, decltype(type)::value>(w, x, T, row_begin, row_end, y, y_stride, scratch);
  });
}

template <class Isa>
void gemm_t(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T, std::int64_t col_begin,
            std::int64_t col_end, float* y, std::int64_t y_stride, std::byte* scratch) noexcept {
  with_type(w.type, [&](auto type) {
    gemm_t_type<Isa, decltype(type)::value>(w, a, a_stride, T, col_begin, col_end, y, y_stride, scratch);
  });
}

template <class Isa>
constexpr KernelTable make_table() {
  return {Isa::kName,         quantize_q8<Isa>,      dequantize_row<Isa>, gemv<Isa>,
          gemv_rows<Isa>,     axpy_rows<Isa>,        gemm<Isa>,           gemm_t<Isa>,
          sign_bits<Isa>,     sign_differences<Isa>, rms_norm<Isa>,       add<Isa>,
          rope<Isa>,          activate<Isa>,         to_half<Isa>,        attend<Isa, std::uint16_t>,
          attend<Isa, float>, attend_q8<Isa>};
}

}  // namespace
}  // namespace turbosparse
