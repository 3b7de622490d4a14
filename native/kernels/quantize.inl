// Floats to int8 in blocks of 32, see KernelTable::quantize_q8.
#pragma once

#include "kernels/kernels.h"

namespace turbosparse {
namespace {

template <class Dot>
inline void quantize_block(const float* x, std::int8_t* q, float* scale, std::int32_t* q_sum) {
  constexpr int kParts = static_cast<int>(kBlock) / Float8::kLanes;
  Float8::V v[kParts];
  auto largest = Float8::zero(), bad = Float8::zero();  // x * 0 is NaN for NaN and Inf
  for (int i = 0; i < kParts; ++i) {
    v[i] = Float8::load(x + i * Float8::kLanes);
    largest = Float8::max(largest, Float8::abs(v[i]));
    bad = Float8::add(bad, Float8::mul(v[i], Float8::zero()));
  }
  const bool finite = !Float8::has_nan(bad);
  const float most = Float8::largest(largest);
  const bool zero = !(finite && most >= 1e-30f);  // below that the inverse could overflow
  *scale = finite ? (zero ? 0.0f : most / 127.0f) : __builtin_nanf("");
  const auto inverse = Float8::set(127.0f / most);
  typename Dot::V n[kParts];
  for (int i = 0; i < kParts; ++i) {
    n[i] = zero ? typename Dot::V{} : Dot::to_integers(Float8::mul(v[i], inverse));
  }
  Dot::store_bytes(q, n);
  *q_sum = Dot::sum(n);
}

template <class Isa>
void quantize_q8(const float* x, std::int64_t n, std::int8_t* q, float* scale, std::int32_t* q_sum) noexcept {
  for (std::int64_t b = 0; b < n / kBlock; ++b) {
    quantize_block<typename Isa::Dot>(x + b * kBlock, q + b * kBlock, scale + b, q_sum + b);
  }
}

}  // namespace
}  // namespace turbosparse
