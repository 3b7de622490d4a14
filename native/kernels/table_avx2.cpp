// The AVX2 kernels: AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels/target_region.h"

TURBOSPARSE_BEGIN_TARGET("avx2,fma,f16c")

#include "kernels/isa/bits_avx2.h"
#include "kernels/isa/dot_avx2.h"
#include "kernels/isa/float8_avx2.h"
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

}  // namespace

constinit const KernelTable kAvx2Table = make_table<Avx2>();

}  // namespace turbosparse

TURBOSPARSE_END_TARGET
#endif
