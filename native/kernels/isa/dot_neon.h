// Integer dot products of blocks of 32 with NEON: s8 * s8 to int16, of which two fit without overflow (|w| <=
// 128, |x| <= 127: a pair is at most 32,512), then summed in pairs to int32.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/isa/float8_neon.h"
#include "kernels/kernels.h"

namespace turbosparse {
namespace {

struct DotNeon {
  struct V {  // 32 bytes, or eight integers
    int32x4_t a, b;
  };
  using Products = int32x4_t;  // of a block, summed to four lanes

  /// What `bytes` adds to every weight; its part of a dot product is offset * (sum of the input's q).
  static constexpr int offset(WeightType type) { return type == WeightType::kQ4_0 ? 8 : 0; }

  static Float8::V as_floats(V v) { return {vreinterpretq_f32_s32(v.a), vreinterpretq_f32_s32(v.b)}; }
  static void store(void* p, V v) {
    vst1q_s8(static_cast<std::int8_t*>(p), as_bytes(v.a));
    vst1q_s8(static_cast<std::int8_t*>(p) + 16, as_bytes(v.b));
  }
  /// Rounds to nearest even.
  static V to_integers(Float8::V v) { return {vcvtnq_s32_f32(v.a), vcvtnq_s32_f32(v.b)}; }
  /// The low bytes of four vectors, lane by lane.
  static V low_bytes(const V (&v)[4]) {
    const auto merge = [](int32x4_t x, int32x4_t y, int32x4_t z, int32x4_t t) {
      return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(x, y, 8), z, 16), t, 24);
    };
    return {merge(v[0].a, v[1].a, v[2].a, v[3].a), merge(v[0].b, v[1].b, v[2].b, v[3].b)};
  }
  /// 32 integers within int8 as bytes, in order.
  static void store_bytes(std::int8_t* p, const V (&v)[4]) {
    const auto narrow = [](V x) { return vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b)); };
    vst1q_s8(p, vcombine_s8(vmovn_s16(narrow(v[0])), vmovn_s16(narrow(v[1]))));
    vst1q_s8(p + 16, vcombine_s8(vmovn_s16(narrow(v[2])), vmovn_s16(narrow(v[3]))));
  }
  static std::int32_t sum(const V (&v)[4]) {
    const auto four = [](V x) { return vaddq_s32(x.a, x.b); };
    return vaddvq_s32(vaddq_s32(vaddq_s32(four(v[0]), four(v[1])), vaddq_s32(four(v[2]), four(v[3]))));
  }
  static V load(const void* p) {
    const auto* bytes = static_cast<const std::int8_t*>(p);
    return {as_integers(vld1q_s8(bytes)), as_integers(vld1q_s8(bytes + 16))};
  }
  /// 32 weights of a Q8_0 block in the form that `products` and `step` want.
  static V bytes(V w) { return w; }
  static V low_nibbles(V w) {
    const int8x16_t nibble = vdupq_n_s8(15);
    return {as_integers(vandq_s8(as_bytes(w.a), nibble)), as_integers(vandq_s8(as_bytes(w.b), nibble))};
  }
  static V high_nibbles(V w) { return {high_nibbles(w.a), high_nibbles(w.b)}; }

  // ---- a row against a vector: `products` of eight blocks, then `sum_each` of them ----

  template <WeightType kType>
  static Products products(V w, V x) {
    return vpadalq_s16(vpaddlq_s16(pairs(w.a, x.a)), pairs(w.b, x.b));
  }

  /// Lane i = sum of block i, as a float less `correction` (offset * sum of q).
  template <WeightType kType>
  static Float8::V sum_each(const Products (&p)[8], V correction) {
    const auto four = [&p](int i) {
      return vpaddq_s32(vpaddq_s32(p[i], p[i + 1]), vpaddq_s32(p[i + 2], p[i + 3]));
    };
    return {vcvtq_f32_s32(vsubq_s32(four(0), correction.a)), vcvtq_f32_s32(vsubq_s32(four(4), correction.b))};
  }

  /// offset * (up to eight sums of q).
  template <WeightType kType>
  static V correction(V q_sum) {
    return {vmulq_n_s32(q_sum.a, offset(kType)), vmulq_n_s32(q_sum.b, offset(kType))};
  }

  static V load_int32_n(const std::int32_t* p, std::int64_t n) {
    std::int32_t padded[8] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(std::int32_t));
    return load(padded);
  }

  // ---- eight rows against a token: lanes are rows, four columns a step, eight steps a block ----

  /// `start` = -offset * (sum of q).
  template <WeightType kType>
  static V begin(const std::int32_t* start) {
    return {vdupq_n_s32(*start), vdupq_n_s32(*start)};
  }
  template <WeightType kType>
  static V step(V sum, V w, const std::int8_t* four) {
    const int8x8_t x = vreinterpret_s8_s32(vdup_n_s32(load_unaligned<std::int32_t>(four)));
    return {step(sum.a, as_bytes(w.a), x), step(sum.b, as_bytes(w.b), x)};
  }
  template <WeightType kType>
  static Float8::V finish(V sum, const std::int32_t*) {
    return {vcvtq_f32_s32(sum.a), vcvtq_f32_s32(sum.b)};
  }

 protected:
  static int8x16_t as_bytes(int32x4_t v) { return vreinterpretq_s8_s32(v); }
  static int32x4_t as_integers(int8x16_t v) { return vreinterpretq_s32_s8(v); }

 private:
  static int32x4_t high_nibbles(int32x4_t w) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w), 4));
  }
  /// Lane i = w[i] x[i] + w[i + 8] x[i + 8].
  static int16x8_t pairs(int32x4_t w, int32x4_t x) {
    const int8x16_t ww = as_bytes(w), xx = as_bytes(x);
    return vmlal_high_s8(vmull_s8(vget_low_s8(ww), vget_low_s8(xx)), ww, xx);
  }
  /// Four rows, four columns each.
  static int32x4_t step(int32x4_t sum, int8x16_t w, int8x8_t x) {
    const int16x8_t first = vmull_s8(vget_low_s8(w), x), last = vmull_high_s8(w, vcombine_s8(x, x));
    return vpadalq_s16(sum, vpaddq_s16(first, last));
  }
};

}  // namespace
}  // namespace turbosparse
