// The AVX2 kernels. Everything between the target pragmas is compiled for AVX2, FMA and F16C whatever the
// compiler's flags; headers that others also use come before, so that none of their code needs these.
#include "kernels/tables.h"

#if defined(__x86_64__)
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels/isa/bits_avx2.h"
#include "kernels/isa/dot_avx2.h"
#include "kernels/isa/float8.h"
//
#include "kernels/table.inl"

namespace turbosparse {
namespace {

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr bool kRequantize =
      false;  // gemm_t: integer products are 1.2 times as fast as float ones, too little
  using Float = Float8;
  using Wide = Float8;
  using Dot = DotAvx2;
  using Bits = BitsAvx2;
};

constexpr KernelTable kAvx2Table = make_table<Avx2>();

}  // namespace
}  // namespace turbosparse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace turbosparse {

const KernelTable* avx2_table() noexcept {
#if defined(__x86_64__)
  return &kAvx2Table;
#else
  return nullptr;
#endif
}

}  // namespace turbosparse
