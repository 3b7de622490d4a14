// 256 bits and how many of them are set, with AVX2: a table of sixteen counts, looked up per nibble.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace turbosparse {
namespace {

struct BitsAvx2 {
  using V = __m256i;
  static constexpr std::int64_t kWords = 4;

  static V zero() { return _mm256_setzero_si256(); }
  static V load(const std::uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
  /// The first n < 4 words; the others are zero.
  static V load_n(const std::uint64_t* p, std::int64_t n) {
    const V mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), mask);
  }
  /// Adds the number of bits that differ in each word to `counts`.
  static V add_differences(V a, V b, V counts) {
    const V table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                     0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const V nibble = _mm256_set1_epi8(15), bits = _mm256_xor_si256(a, b);
    const V low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble));
    const V high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
    return _mm256_add_epi64(counts, _mm256_sad_epu8(_mm256_add_epi8(low, high), zero()));
  }
  static std::int32_t sum(V counts) {
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(counts), _mm256_extracti128_si256(counts, 1));
    return _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
  }
};

}  // namespace
}  // namespace turbosparse
