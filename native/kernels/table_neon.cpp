// The NEON kernels: ARMv8's base instruction set, which every 64-bit ARM has; so there is no target region.
#if defined(__aarch64__)
#include "kernels/target_region.h"
//
#include "kernels/isa/bits_neon.h"
#include "kernels/isa/dot_neon.h"
#include "kernels/isa/float8_neon.h"
//
#include "kernels/table.inl"

namespace turbosparse {
namespace {

struct Neon {
  static constexpr const char* kName = "neon";
  static constexpr bool kRequantize = false;  // gemm_t: integer products take as many instructions as float
  using Float = Float8;
  using Wide = Float8;
  using Dot = DotNeon;
  using Bits = BitsNeon;
};

}  // namespace

constinit const KernelTable kNeonTable = make_table<Neon>();

}  // namespace turbosparse
#endif
