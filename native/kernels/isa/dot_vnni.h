// Integer dot products of blocks of 32 with AVX-512 VNNI at 256 bits: u8 * s8, four products added to an
// int32 at once. Q8_0 weights are made unsigned by an offset of 128, which the input's sums take out again.
#pragma once

#include "kernels/isa/dot_avx2.h"

namespace turbosparse {
namespace {

struct DotVnni : DotAvx2 {
  static constexpr int offset(WeightType type) { return type == WeightType::kQ4_0 ? 8 : 128; }

  static V bytes(V w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }

  template <WeightType kType>
  static Products products(V w, V x) {
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x);
  }
  template <WeightType kType>
  static __m256 sum_each(const Products (&p)[8], V correction) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum_each_int32(p), correction));
  }
  template <WeightType kType>
  static V correction(V q_sum) {
    return _mm256_slli_epi32(q_sum, kType == WeightType::kQ4_0 ? 3 : 7);
  }

  template <WeightType kType>
  static V begin(const std::int32_t* start) {
    return _mm256_set1_epi32(*start);
  }
  template <WeightType kType>
  static V step(V sum, V w, const std::int8_t* four) {
    return _mm256_dpbusd_epi32(sum, w, _mm256_set1_epi32(load_unaligned<std::int32_t>(four)));
  }
  template <WeightType kType>
  static __m256 finish(V sum, const std::int32_t*) {
    return _mm256_cvtepi32_ps(sum);
  }
};

}  // namespace
}  // namespace turbosparse
