// The AVX-512 kernels: F, BW, VL, DQ and VNNI, inside target pragmas as in table_avx2.cpp. Vectors have 256
// bits but in axpy_rows, where sixteen lanes were measured to be faster (docs/kernels.md).
#include "kernels/tables.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC before 13 builds "undefined" vectors inside its own intrinsics by reading uninitialised variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/gemm_sizes.h"
#include "kernels/packed.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

#include "kernels/isa/bits_avx512.h"
#include "kernels/isa/dot_vnni.h"
#include "kernels/isa/float16.h"
//
#include "kernels/table.inl"

namespace turbosparse {
namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr bool kRequantize = true;  // gemm_t: integer products are 2.7 times as fast as float ones
  using Float = Float8;
  using Wide = Float16;
  using Dot = DotVnni;
  using Bits = BitsAvx512;
};

constexpr KernelTable kAvx512Table = make_table<Avx512>();

}  // namespace
}  // namespace turbosparse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace turbosparse {

const KernelTable* avx512_table() noexcept {
#if defined(__x86_64__)
  return &kAvx512Table;
#else
  return nullptr;
#endif
}

}  // namespace turbosparse
