// Integer dot products of blocks of 32 with AVX2. A byte product is u8 * s8, summed in pairs to int16, which
// must not overflow: Q4_0 levels are 0..15, so a pair is at most 3,810 and eight pairs fit; Q8_0 weights give
// their sign to the input (|w| <= 128, |x| <= 127: a pair is at most 32,512).
#pragma once

#include <immintrin.h>

#include "kernels/kernels.h"

namespace turbosparse {
namespace {

struct DotAvx2 {
  using V = __m256i;         // 32 bytes, or eight integers
  using Products = __m256i;  // of a block, summed to eight lanes or sixteen

  /// What `bytes` adds to every weight; its part of a dot product is offset * (sum of the input's q).
  static constexpr int offset(WeightType type) { return type == WeightType::kQ4_0 ? 8 : 0; }

  static __m256 as_floats(V v) { return _mm256_castsi256_ps(v); }
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
  /// Rounds to nearest even.
  static V to_integers(__m256 v) { return _mm256_cvtps_epi32(v); }
  /// The low bytes of four vectors, lane by lane.
  static V low_bytes(const V (&v)[4]) {
    const V byte = _mm256_set1_epi32(255);
    const V a =
        _mm256_or_si256(_mm256_and_si256(v[0], byte), _mm256_slli_epi32(_mm256_and_si256(v[1], byte), 8));
    const V b =
        _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(v[2], byte), 16), _mm256_slli_epi32(v[3], 24));
    return _mm256_or_si256(a, b);
  }
  /// 32 integers within int8 as bytes, in order.
  static void store_bytes(std::int8_t* p, const V (&v)[4]) {
    const V bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const V order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within 128-bit lanes
    store(p, _mm256_permutevar8x32_epi32(bytes, order));
  }
  static std::int32_t sum(const V (&v)[4]) {
    const V eight = _mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3]));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  /// 32 weights of a Q8_0 block in the form that `products` and `step` want.
  static V bytes(V w) { return w; }
  static V low_nibbles(V w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
  static V high_nibbles(V w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }

  // ---- a row against a vector: `products` of eight blocks, then `sum_each` of them ----

  template <WeightType kType>
  static Products products(V w, V x) {
    if constexpr (kType == WeightType::kQ4_0) return _mm256_maddubs_epi16(w, x);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), ones());
  }

  /// Lane i = sum of block i, as a float less `correction` (offset * sum of q).
  template <WeightType kType>
  static __m256 sum_each(const Products (&p)[8], V correction) {
    V sums;
    if constexpr (kType == WeightType::kQ4_0) {
      const V a = _mm256_hadd_epi16(_mm256_hadd_epi16(p[0], p[1]), _mm256_hadd_epi16(p[2], p[3]));
      const V b = _mm256_hadd_epi16(_mm256_hadd_epi16(p[4], p[5]), _mm256_hadd_epi16(p[6], p[7]));
      const V c = _mm256_hadd_epi16(a, b);  // lower halves of the eight blocks, then upper halves
      sums = _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(c)),
                              _mm256_cvtepi16_epi32(_mm256_extracti128_si256(c, 1)));
    } else {
      sums = sum_each_int32(p);
    }
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction));
  }

  /// offset * (up to eight sums of q).
  template <WeightType kType>
  static V correction(V q_sum) {
    if constexpr (offset(kType) == 0) return _mm256_setzero_si256();
    return _mm256_slli_epi32(q_sum, 3);
  }

  static V load_int32_n(const std::int32_t* p, std::int64_t n) {
    const V lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes));
  }

  // ---- eight rows against a token: lanes are rows, four columns a step, eight steps a block ----

  template <WeightType kType>
  static V begin(const std::int32_t*) {
    return _mm256_setzero_si256();
  }
  template <WeightType kType>
  static V step(V sum, V w, const std::int8_t* four) {
    const V x = _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(four)));
    if constexpr (kType == WeightType::kQ4_0) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    return _mm256_add_epi32(sum, products<kType>(w, x));
  }
  /// The sum of a block; `start` = -offset * (sum of q).
  template <WeightType kType>
  static __m256 finish(V sum, const std::int32_t* start) {
    if constexpr (kType == WeightType::kQ4_0) {
      sum = _mm256_add_epi32(_mm256_madd_epi16(sum, ones()), _mm256_set1_epi32(*start));
    }
    return _mm256_cvtepi32_ps(sum);
  }

  static V sum_each_int32(const Products (&p)[8]) {
    const V a = _mm256_hadd_epi32(_mm256_hadd_epi32(p[0], p[1]), _mm256_hadd_epi32(p[2], p[3]));
    const V b = _mm256_hadd_epi32(_mm256_hadd_epi32(p[4], p[5]), _mm256_hadd_epi32(p[6], p[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }

 private:
  static V ones() { return _mm256_set1_epi16(1); }
};

}  // namespace
}  // namespace turbosparse
