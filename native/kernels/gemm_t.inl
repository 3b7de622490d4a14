// Y += W^T A for many tokens: neuron-major weights, whose rows are the inner dimension. Rows are unpacked to
// floats, 64 columns at a time. Where integer products are much faster than float ones, quantised weights are
// then quantised anew, in blocks of 32 rows of a column, as are the inputs.
#pragma once

#include <algorithm>

#include "kernels/gemm.inl"
#include "kernels/quantize.inl"

namespace turbosparse {
namespace {

template <class Isa, WeightType kType>
void gemm_t_float(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T,
                  std::int64_t col_begin, std::int64_t col_end, float* y, std::int64_t y_stride,
                  std::byte* memory) {
  using Float = typename Isa::Float;
  const Scratch scratch(memory);
  auto* panels = reinterpret_cast<float*>(scratch.panel);  // [64 / 16][depth][16]
  auto* packed = reinterpret_cast<float*>(scratch.tokens);
  for (std::int64_t t = 0; t < T; t += kPassTokens) {
    const std::int64_t tokens = std::min(kPassTokens, T - t);
    for (std::int64_t r = 0; r < w.rows; r += kChunkDepth) {
      const std::int64_t depth = std::min(kChunkDepth, w.rows - r);
      pack_tokens_float(a + t * a_stride + r, a_stride, tokens, depth, packed);
      for (std::int64_t c = col_begin / kTransposedCols * kTransposedCols; c < col_end;
           c += kTransposedCols) {
        const std::int64_t n = std::min(kTransposedCols, w.cols - c);
        for (std::int64_t k = 0; k < depth; ++k) {
          float columns[kTransposedCols] = {};
          unpack_columns<Float, kType>(row_data(w, r + k), w.cols, c, n, columns);
          for (int p = 0; p < kTransposedCols / kPanelRows; ++p) {
            std::memcpy(panels + (p * depth + k) * kPanelRows, columns + p * kPanelRows,
                        kPanelRows * sizeof(float));
          }
        }
        for (std::int64_t p = 0; p < n; p += kPanelRows) {
          if (c + p < col_begin || c + p >= col_end) continue;
          const std::int64_t width = std::min<std::int64_t>(kPanelRows, col_end - c - p);
          const Output out{y + t * y_stride + c + p, y_stride, width, true};
          run_float<Float>(panels + p * depth, packed, depth, tokens, out);
        }
      }
    }
  }
}

// ---- the same in integers
// ----------------------------------------------------------------------------------------

/// Quantises a[t][first * 32 ...] for blocks of 32 rows, tile after tile.
template <class Dot>
inline void quantize_tokens(const float* a, std::int64_t a_stride, std::int64_t tokens, std::int64_t blocks,
                            std::byte* out) {
  for (std::int64_t t0 = 0; t0 < tokens; t0 += kTileTokens) {
    with_tokens(std::min<std::int64_t>(kTileTokens, tokens - t0), [&](auto count) {
      constexpr int kTokens = decltype(count)::value;
      auto* block = reinterpret_cast<TokenBlock<kTokens>*>(out);
      out += static_cast<std::int64_t>(sizeof(TokenBlock<kTokens>)) * blocks;
      for (int t = 0; t < kTokens; ++t) {
        for (std::int64_t b = 0; b < blocks; ++b) {
          std::int8_t q[kBlock];
          std::int32_t sum;
          quantize_block<Dot>(a + (t0 + t) * a_stride + b * kBlock, q, &block[b].scale[t], &sum);
          for (int k = 0; k < 8; ++k) std::memcpy(block[b].q[k][t], q + 4 * k, 4);
          block[b].start[t] = -Dot::offset(WeightType::kQ8_0) * sum;
        }
      }
    });
  }
}

/// Quantises 32 rows of 8 columns, `stride` floats apart, into their place in a panel.
template <class Dot>
inline void quantize_columns(const float* w, std::int64_t stride, std::int64_t column, PanelBlock* out) {
  auto largest = Float8::zero();
  for (int k = 0; k < kBlock; ++k) largest = Float8::max(largest, Float8::abs(Float8::load(w + k * stride)));
  Float8::store(out->scale + column, Float8::mul(largest, Float8::set(1.0f / 127.0f)));
  // The smallest divisor keeps the inverse of a column of zeros finite.
  const auto inverse = Float8::div(Float8::set(127.0f), Float8::max(Float8::set(1e-30f), largest));
  for (int k = 0; k < 8; ++k) {
    typename Dot::V four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = Dot::to_integers(Float8::mul(Float8::load(w + (4 * k + i) * stride), inverse));
    }
    Dot::store(out->w[k][column], Dot::bytes(Dot::low_bytes(four)));
  }
}

/// Rows are a multiple of 32.
template <class Isa, WeightType kType>
void gemm_t_integer(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T,
                    std::int64_t col_begin, std::int64_t col_end, float* y, std::int64_t y_stride,
                    std::byte* memory) {
  using Dot = typename Isa::Dot;
  const Scratch scratch(memory);
  PanelBlock* panels = reinterpret_cast<PanelBlock*>(scratch.panel);  // [64 / 16][blocks]
  for (std::int64_t t = 0; t < T; t += kPassTokens) {
    const std::int64_t tokens = std::min(kPassTokens, T - t);
    for (std::int64_t r = 0; r < w.rows; r += kTransposedBlocks * kBlock) {
      const std::int64_t blocks = std::min(kTransposedBlocks, (w.rows - r) / kBlock);
      quantize_tokens<Dot>(a + t * a_stride + r, a_stride, tokens, blocks, scratch.tokens);
      for (std::int64_t c = col_begin / kTransposedCols * kTransposedCols; c < col_end;
           c += kTransposedCols) {
        const std::int64_t n = std::min(kTransposedCols, w.cols - c);
        for (std::int64_t b = 0; b < blocks; ++b) {
          float columns[kBlock][kTransposedCols];
          for (std::int64_t k = 0; k < kBlock; ++k) {
            const std::byte* row = row_data(w, r + b * kBlock + k);
            unpack_columns<typename Isa::Float, kType>(row, w.cols, c, n, columns[k]);
          }
          for (std::int64_t p = 0; p < n; p += Float8::kLanes) {
            PanelBlock* panel = panels + p / kPanelRows * blocks + b;
            quantize_columns<Dot>(columns[0] + p, kTransposedCols, p % kPanelRows, panel);
          }
        }
        for (std::int64_t p = 0; p < n; p += kPanelRows) {
          if (c + p < col_begin || c + p >= col_end) continue;
          const Output out{y + t * y_stride + c + p, y_stride, kPanelRows, true};
          const auto* panel = reinterpret_cast<const std::byte*>(panels + p / kPanelRows * blocks);
          run_quantized<Dot, WeightType::kQ8_0>(panel, scratch.tokens, blocks, tokens, out);
        }
      }
    }
  }
}

template <class Isa, WeightType kType>
void gemm_t_type(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T,
                 std::int64_t col_begin, std::int64_t col_end, float* y, std::int64_t y_stride,
                 std::byte* memory) {
  if constexpr (is_quantized(kType) && Isa::kRequantize) {
    if (w.rows % kBlock == 0) {
      gemm_t_integer<Isa, kType>(w, a, a_stride, T, col_begin, col_end, y, y_stride, memory);
      return;
    }
  }
  gemm_t_float<Isa, kType>(w, a, a_stride, T, col_begin, col_end, y, y_stride, memory);
}

}  // namespace
}  // namespace turbosparse
