// The AVX-512 kernels: F, BW, VL, DQ and VNNI. Vectors have 256 bits but in axpy_rows, where sixteen lanes
// were measured to be faster (docs/kernels.md).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC before 13 builds "undefined" vectors inside its own intrinsics by reading uninitialised variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "kernels/target_region.h"

TURBOSPARSE_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "kernels/isa/bits_avx512.h"
#include "kernels/isa/dot_vnni.h"
#include "kernels/isa/float16_avx512.h"
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

}  // namespace

constinit const KernelTable kAvx512Table = make_table<Avx512>();

}  // namespace turbosparse

TURBOSPARSE_END_TARGET
#endif
