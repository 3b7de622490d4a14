// Sixteen floats: the same vocabulary as Float8, with AVX-512F, as far as its users need it.
#pragma once

#include "kernels/isa/float8_avx2.h"

namespace turbosparse {
namespace {

struct Float16 {
  using V = __m512;
  static constexpr int kLanes = 16;

  static V set(float x) { return _mm512_set1_ps(x); }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V load_n(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_n(float* p, std::int64_t n, V v) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static V load_half(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static V load_bf16(const void* p) {
    const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static V load_int8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p))); }
  /// A permutation of the sixteen levels turns the low four bits of each lane into a float in one
  /// instruction.
  static void load_nibbles(const void* p, V* low, V* high) {
    const V levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i bytes = _mm512_cvtepu8_epi32(load16(p));
    *low = _mm512_permutexvar_ps(bytes, levels);
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
  }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

 private:
  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __mmask16 mask(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

}  // namespace
}  // namespace turbosparse
