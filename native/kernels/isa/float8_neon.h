// Eight floats as two NEON vectors: the vocabulary of float8_avx2.h with ARMv8's base instruction set. There
// are no masked loads and stores: the last lanes go through memory. max and min keep every NaN.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace turbosparse {
namespace {

struct Float8 {
  struct V {
    float32x4_t a, b;
  };
  static constexpr int kLanes = 8;

  static V zero() { return set(0.0f); }
  static V set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static V load(const void* p) {
    const auto* bytes = static_cast<const std::uint8_t*>(p);  // rows of a mapped file are 2-byte aligned
    return {vreinterpretq_f32_u8(vld1q_u8(bytes)), vreinterpretq_f32_u8(vld1q_u8(bytes + 16))};
  }
  static void store(float* p, V v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
  }
  /// The first n < 8 lanes; the others read as zero and are not touched in memory.
  static V load_n(const float* p, std::int64_t n) {
    float padded[8] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(float));
    return load(padded);
  }
  static void store_n(float* p, std::int64_t n, V v) {
    float padded[8];
    store(padded, v);
    std::memcpy(p, padded, static_cast<std::size_t>(n) * sizeof(float));
  }

  static V load_half(const void* p) {
    const float16x8_t half = vreinterpretq_f16_u8(vld1q_u8(static_cast<const std::uint8_t*>(p)));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
  }
  static V load_bf16(const void* p) {
    const uint16x8_t raw = vreinterpretq_u16_u8(vld1q_u8(static_cast<const std::uint8_t*>(p)));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(raw, 16))};
  }
  static void store_half(std::uint16_t* p, V v) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b)));
  }
  /// Eight signed bytes.
  static V load_int8(const void* p) { return from_int8(vld1_s8(static_cast<const std::int8_t*>(p))); }
  /// Eight bytes of two nibbles each, both less their offset of 8.
  static void load_nibbles(const void* p, V* low, V* high) {
    const uint8x8_t bytes = vld1_u8(static_cast<const std::uint8_t*>(p));
    const int8x8_t eight = vdup_n_s8(8);
    *low = from_int8(vsub_s8(vreinterpret_s8_u8(vand_u8(bytes, vdup_n_u8(15))), eight));
    *high = from_int8(vsub_s8(vreinterpret_s8_u8(vshr_n_u8(bytes, 4)), eight));
  }

  static V add(V a, V b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
  static V sub(V a, V b) { return {vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b)}; }
  static V mul(V a, V b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
  static V div(V a, V b) { return {vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b)}; }
  static V fma(V a, V b, V c) { return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }  // a * b + c
  static V max(V a, V b) { return {vmaxq_f32(a.a, b.a), vmaxq_f32(a.b, b.b)}; }
  static V min(V a, V b) { return {vminq_f32(a.a, b.a), vminq_f32(a.b, b.b)}; }
  static V abs(V a) { return {vabsq_f32(a.a), vabsq_f32(a.b)}; }
  static V round(V a) { return {vrndnq_f32(a.a), vrndnq_f32(a.b)}; }
  /// a < b ? 0 : c
  static V zero_where_less(V a, V b, V c) {
    return {zero_where(vcltq_f32(a.a, b.a), c.a), zero_where(vcltq_f32(a.b, b.b), c.b)};
  }
  /// Bit i = lane i is above 0.
  static int positive(V a) {
    constexpr std::uint32_t kBits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    return static_cast<int>(vaddvq_u32(vorrq_u32(vandq_u32(vcgtzq_f32(a.a), vld1q_u32(kBits)),
                                                 vandq_u32(vcgtzq_f32(a.b), vld1q_u32(kBits + 4)))));
  }
  static bool has_nan(V a) { return vminvq_u32(vandq_u32(vceqq_f32(a.a, a.a), vceqq_f32(a.b, a.b))) == 0; }
  /// a * 2^n for whole n in [-126, 127].
  static V scale_by_power(V a, V n) { return mul(a, {power_of_two(n.a), power_of_two(n.b)}); }
  /// (a0 c0 - a1 s0, a1 c0 + a0 s0, a2 c1 - a3 s1, ...) for four c and four s.
  static V rotate_pairs(V a, const float* c, const float* s) {
    const float32x4_t cc = vld1q_f32(c), ss = vld1q_f32(s), minus = vnegq_f32(ss);
    const V cosines = {vzip1q_f32(cc, cc), vzip2q_f32(cc, cc)};
    const V sines = {vzip1q_f32(minus, ss), vzip2q_f32(minus, ss)};
    return add(mul(a, cosines), mul({vrev64q_f32(a.a), vrev64q_f32(a.b)}, sines));
  }

  static float sum(V v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
  static float largest(V v) { return vmaxvq_f32(vmaxq_f32(v.a, v.b)); }
  /// Lane i = sum of v[i].
  static V sum_each(const V (&v)[8]) {
    const auto four = [&v](int i) {
      const auto all = [&v](int j) { return vaddq_f32(v[j].a, v[j].b); };
      return vpaddq_f32(vpaddq_f32(all(i), all(i + 1)), vpaddq_f32(all(i + 2), all(i + 3)));
    };
    return {four(0), four(4)};
  }
  /// v[i] lane j <-> v[j] lane i.
  static void transpose(V (&v)[8]) {
    float32x4_t upper_left[4], upper_right[4], lower_left[4], lower_right[4];
    for (int i = 0; i < 4; ++i) {
      upper_left[i] = v[i].a;
      upper_right[i] = v[i].b;
      lower_left[i] = v[i + 4].a;
      lower_right[i] = v[i + 4].b;
    }
    transpose4(upper_left);
    transpose4(upper_right);
    transpose4(lower_left);
    transpose4(lower_right);
    for (int i = 0; i < 4; ++i) {
      v[i] = {upper_left[i], lower_left[i]};
      v[i + 4] = {upper_right[i], lower_right[i]};
    }
  }

 private:
  static V from_int8(int8x8_t bytes) {
    const int16x8_t words = vmovl_s8(bytes);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
  }
  static float32x4_t zero_where(uint32x4_t mask, float32x4_t v) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), mask));
  }
  static float32x4_t power_of_two(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static void transpose4(float32x4_t (&v)[4]) {
    const auto wide = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
    const float32x4_t even_01 = vtrn1q_f32(v[0], v[1]), odd_01 = vtrn2q_f32(v[0], v[1]);
    const float32x4_t even_23 = vtrn1q_f32(v[2], v[3]), odd_23 = vtrn2q_f32(v[2], v[3]);
    v[0] = vreinterpretq_f32_f64(vtrn1q_f64(wide(even_01), wide(even_23)));
    v[1] = vreinterpretq_f32_f64(vtrn1q_f64(wide(odd_01), wide(odd_23)));
    v[2] = vreinterpretq_f32_f64(vtrn2q_f64(wide(even_01), wide(even_23)));
    v[3] = vreinterpretq_f32_f64(vtrn2q_f64(wide(odd_01), wide(odd_23)));
  }
};

}  // namespace
}  // namespace turbosparse
