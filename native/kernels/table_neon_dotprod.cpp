// The NEON kernels with integer dot products (SDOT), which came with ARMv8.2.
#if defined(__aarch64__)
#include "kernels/target_region.h"

TURBOSPARSE_BEGIN_TARGET("arch=armv8.2-a+dotprod")

#include "kernels/isa/bits_neon.h"
#include "kernels/isa/dot_sdot.h"
#include "kernels/isa/float8_neon.h"
//
#include "kernels/table.inl"

namespace turbosparse {
namespace {

struct NeonDotprod {
  static constexpr const char* kName = "neon_dotprod";
  static constexpr bool kRequantize = true;  // gemm_t: sixteen products an instruction against four
  using Float = Float8;
  using Wide = Float8;
  using Dot = DotSdot;
  using Bits = BitsNeon;
};

}  // namespace

constinit const KernelTable kNeonDotprodTable = make_table<NeonDotprod>();

}  // namespace turbosparse

TURBOSPARSE_END_TARGET
#endif
