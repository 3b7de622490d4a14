// Integer dot products of blocks of 32 with NEON's SDOT: s8 * s8, four products added to an int32 at once.
#pragma once

#include "kernels/isa/dot_neon.h"

namespace turbosparse {
namespace {

struct DotSdot : DotNeon {
  template <WeightType kType>
  static Products products(V w, V x) {
    const int32x4_t half = vdotq_s32(vdupq_n_s32(0), as_bytes(w.a), as_bytes(x.a));
    return vdotq_s32(half, as_bytes(w.b), as_bytes(x.b));
  }
  template <WeightType kType>
  static V step(V sum, V w, const std::int8_t* four) {
    const int8x16_t x = as_bytes(vdupq_n_s32(load_unaligned<std::int32_t>(four)));
    return {vdotq_s32(sum.a, as_bytes(w.a), x), vdotq_s32(sum.b, as_bytes(w.b), x)};
  }
};

}  // namespace
}  // namespace turbosparse
