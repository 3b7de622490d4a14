// 512 bits: the same vocabulary as BitsAvx2, with AVX-512BW. (Not every CPU with VNNI counts bits itself.)
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace turbosparse {
namespace {

struct BitsAvx512 {
  using V = __m512i;
  static constexpr std::int64_t kWords = 8;

  static V zero() { return _mm512_setzero_si512(); }
  static V load(const std::uint64_t* p) { return _mm512_loadu_si512(p); }
  static V load_n(const std::uint64_t* p, std::int64_t n) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << n) - 1u), p);
  }
  static V add_differences(V a, V b, V counts) {
    const V table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const V nibble = _mm512_set1_epi8(15), bits = _mm512_xor_si512(a, b);
    const V low = _mm512_shuffle_epi8(table, _mm512_and_si512(bits, nibble));
    const V high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bits, 4), nibble));
    return _mm512_add_epi64(counts, _mm512_sad_epu8(_mm512_add_epi8(low, high), zero()));
  }
  static std::int32_t sum(V counts) { return static_cast<std::int32_t>(_mm512_reduce_add_epi64(counts)); }
};

}  // namespace
}  // namespace turbosparse
