// Norm, rotary embedding, activations and the like: cheap next to the matrices, but run by one thread.
#pragma once

#include <cmath>

#include "kernels/kernels.h"

namespace turbosparse {
namespace {

/// e^x within 2 ulp. Below -87 it stays at the smallest normal numbers, above 88 at the largest; NaN stays
/// NaN.
template <class Float>
inline typename Float::V exp(typename Float::V x) {
  x = Float::max(Float::set(-87.0f), Float::min(Float::set(88.0f), x));
  const auto n = Float::round(Float::mul(x, Float::set(1.44269504f)));
  auto r = Float::fma(n, Float::set(-0.693359375f), x);  // ln 2 in two parts (Cody and Waite)
  r = Float::fma(n, Float::set(2.12194440e-4f), r);
  auto p = Float::set(1.9875691500e-4f);  // Cephes expf, degree 7 in all
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f}) {
    p = Float::fma(p, r, Float::set(c));
  }
  return Float::scale_by_power(p, n);
}

template <class Isa>
void rms_norm(const float* x, const float* weight, std::int64_t n, float eps, float* out) noexcept {
  using Float = typename Isa::Float;
  constexpr std::int64_t kLanes = Float::kLanes;
  typename Float::V sums[2] = {Float::zero(), Float::zero()};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const auto a = Float::load(x + i), b = Float::load(x + i + kLanes);
    sums[0] = Float::fma(a, a, sums[0]);
    sums[1] = Float::fma(b, b, sums[1]);
  }
  float squares = Float::sum(Float::add(sums[0], sums[1]));
  for (; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const auto scaled = Float::mul(Float::load(x + i), Float::set(scale));
    Float::store(out + i, Float::mul(scaled, Float::load(weight + i)));
  }
  for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

template <class Isa>
void add(const float* x, std::int64_t n, float* y) noexcept {
  using Float = typename Isa::Float;
  std::int64_t i = 0;
  for (; i + Float::kLanes <= n; i += Float::kLanes) {
    Float::store(y + i, Float::add(Float::load(y + i), Float::load(x + i)));
  }
  for (; i < n; ++i) y[i] += x[i];
}

/// One head: pairs (i, i + rotary / 2).
template <class Float>
inline void rotate_halves(float* x, std::int64_t half, const float* cos, const float* sin) {
  std::int64_t i = 0;
  for (; i + Float::kLanes <= half; i += Float::kLanes) {
    const auto a = Float::load(x + i), b = Float::load(x + half + i);
    const auto c = Float::load(cos + i), s = Float::load(sin + i);
    Float::store(x + i, Float::sub(Float::mul(a, c), Float::mul(b, s)));
    Float::store(x + half + i, Float::add(Float::mul(a, s), Float::mul(b, c)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = a * sin[i] + b * cos[i];
  }
}

/// One head: pairs (2i, 2i + 1).
template <class Float>
inline void rotate_neighbours(float* x, std::int64_t half, const float* cos, const float* sin) {
  std::int64_t i = 0;
  for (; i + Float::kLanes / 2 <= half; i += Float::kLanes / 2) {
    Float::store(x + 2 * i, Float::rotate_pairs(Float::load(x + 2 * i), cos + i, sin + i));
  }
  for (; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

template <class Isa>
void rope(float* x, std::int64_t n_heads, std::int64_t C, std::int64_t rotary, bool neox, const float* cos,
          const float* sin) noexcept {
  const auto rotate = neox ? rotate_halves<typename Isa::Float> : rotate_neighbours<typename Isa::Float>;
  for (std::int64_t h = 0; h < n_heads; ++h) rotate(x + h * C, rotary / 2, cos, sin);
}

template <class Float>
inline typename Float::V activate_vector(Activation f, typename Float::V parameter, typename Float::V x) {
  using V = typename Float::V;
  const V zero = Float::zero(), one = Float::set(1.0f);
  switch (f) {
    case Activation::kSilu:
      return Float::div(x, Float::add(one, exp<Float>(Float::sub(zero, x))));
    case Activation::kGelu: {  // 1 + tanh(u) = 2 / (1 + e^-2u)
      const V cubic = Float::fma(Float::mul(x, x), Float::set(0.044715f), one);
      const V u = Float::mul(Float::mul(x, cubic), Float::set(-2.0f * 0.7978845608f));
      return Float::div(x, Float::add(one, exp<Float>(u)));
    }
    case Activation::kRelu:
    case Activation::kDRelu:
      return Float::zero_where_less(x, zero, x);
    case Activation::kRelu2:
      return Float::zero_where_less(x, zero, Float::mul(x, x));
    case Activation::kFatRelu:
      return Float::zero_where_less(x, parameter, x);
  }
  return x;
}

template <class Isa>
void activate(Activation f, float parameter, const float* gate, std::int64_t n, float* out) noexcept {
  using Float = typename Isa::Float;
  const auto limit = Float::set(parameter);
  std::int64_t i = 0;
  for (; i + Float::kLanes <= n; i += Float::kLanes) {
    Float::store(out + i, activate_vector<Float>(f, limit, Float::load(gate + i)));
  }
  if (i < n) Float::store_n(out + i, n - i, activate_vector<Float>(f, limit, Float::load_n(gate + i, n - i)));
}

template <class Isa>
void to_half(const float* x, std::int64_t n, std::uint16_t* out) noexcept {
  using Float = typename Isa::Float;
  std::int64_t i = 0;
  for (; i + Float::kLanes <= n; i += Float::kLanes) Float::store_half(out + i, Float::load(x + i));
  for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

}  // namespace
}  // namespace turbosparse
