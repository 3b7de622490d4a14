// 256 bits as two NEON vectors, and how many of them are set: the same vocabulary as BitsAvx2.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace turbosparse {
namespace {

struct BitsNeon {
  struct V {
    uint8x16_t a, b;
  };
  static constexpr std::int64_t kWords = 4;

  static uint32x4_t zero() { return vdupq_n_u32(0); }
  static V load(const std::uint64_t* p) {
    return {vreinterpretq_u8_u64(vld1q_u64(p)), vreinterpretq_u8_u64(vld1q_u64(p + 2))};
  }
  /// The first n < 4 words; the others are zero.
  static V load_n(const std::uint64_t* p, std::int64_t n) {
    std::uint64_t padded[kWords] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof *p);
    return load(padded);
  }
  /// Adds the number of bits that differ to `counts`.
  static uint32x4_t add_differences(V a, V b, uint32x4_t counts) {
    const uint8x16_t bytes = vaddq_u8(vcntq_u8(veorq_u8(a.a, b.a)), vcntq_u8(veorq_u8(a.b, b.b)));
    return vpadalq_u16(counts, vpaddlq_u8(bytes));
  }
  static std::int32_t sum(uint32x4_t counts) { return static_cast<std::int32_t>(vaddvq_u32(counts)); }
};

}  // namespace
}  // namespace turbosparse
