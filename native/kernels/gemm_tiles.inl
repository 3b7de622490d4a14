// The middle of a matrix product: 16 outputs by up to 6 tokens in registers, over a chunk of the inner
// dimension. Weights ("panel") and inputs ("tokens") were packed so that both are read in one stream each.
// The sums of an output and a token are added in one order whatever tile they fall into, so a token's result
// does not depend on how many come with it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/gemm_sizes.h"
#include "kernels/packed.h"

namespace turbosparse {
namespace {

/// One block of 32 columns of 16 quantised rows.
struct PanelBlock {
  std::int8_t w[8][kPanelRows][4];
  float scale[kPanelRows];
};

/// One block of 32 columns of a few quantised tokens. start = -offset * (sum of q).
template <int kTokens>
struct TokenBlock {
  std::int8_t q[8][kTokens][4];
  std::int32_t start[kTokens];
  float scale[kTokens];
};

/// Where a tile's result goes: n <= 16 consecutive floats per token.
struct Output {
  float* y;
  std::int64_t stride;
  std::int64_t n;
  bool accumulate;
};

/// Calls f with the number of tokens as a constant.
template <class F>
inline void with_tokens(std::int64_t n, F f) {
  static_assert(kTileTokens == 6);
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 6>{});
  }
}

template <class Float, int kTokens, int kVectors>
inline void store_tile(const typename Float::V (&sums)[kTokens][kVectors], const Output& out) {
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      float* y = out.y + t * out.stride + v * Float::kLanes;
      const std::int64_t n = out.n - v * Float::kLanes;
      if (n >= Float::kLanes) {
        Float::store(y, out.accumulate ? Float::add(Float::load(y), sums[t][v]) : sums[t][v]);
      } else if (n > 0) {
        Float::store_n(y, n, out.accumulate ? Float::add(Float::load_n(y, n), sums[t][v]) : sums[t][v]);
      }
    }
  }
}

template <class Dot, WeightType kType, int kTokens>
inline void tile_quantized(const PanelBlock* panel, const TokenBlock<kTokens>* x, std::int64_t blocks,
                           const Output& out) {
  constexpr int kVectors = kPanelRows / Float8::kLanes;
  Float8::V sums[kTokens][kVectors];
  for (auto& token : sums) {
    for (auto& sum : token) sum = Float8::zero();
  }
  for (std::int64_t b = 0; b < blocks; ++b, ++panel, ++x) {
    typename Dot::V integers[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (auto& sum : integers[t]) sum = Dot::template begin<kType>(&x->start[t]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      typename Dot::V w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = Dot::load(panel->w[k][v * Float8::kLanes]);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          integers[t][v] = Dot::template step<kType>(integers[t][v], w[v], x->q[k][t]);
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const auto w_scale = Float8::load(panel->scale + v * Float8::kLanes);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const auto products = Dot::template finish<kType>(integers[t][v], &x->start[t]);
        sums[t][v] = Float8::fma(products, Float8::mul(w_scale, Float8::set(x->scale[t])), sums[t][v]);
      }
    }
  }
  store_tile<Float8, kTokens>(sums, out);
}

/// panel[k][16], x[k][kTokens].
template <class Float, int kTokens>
inline void tile_float(const float* panel, const float* x, std::int64_t depth, const Output& out) {
  constexpr int kVectors = kPanelRows / Float::kLanes;
  typename Float::V sums[kTokens][kVectors];
  for (auto& token : sums) {
    for (auto& sum : token) sum = Float::zero();
  }
  for (std::int64_t k = 0; k < depth; ++k, panel += kPanelRows, x += kTokens) {
    typename Float::V w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = Float::load(panel + v * Float::kLanes);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const auto token = Float::set(x[t]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[t][v] = Float::fma(w[v], token, sums[t][v]);
    }
  }
  store_tile<Float, kTokens>(sums, out);
}

}  // namespace
}  // namespace turbosparse
