// Y = W X for many tokens. Loops, outside in: tokens that fit the scratch memory; a
// chunk of the inner dimension, whose inputs are packed; 16 outputs, whose weights are packed; tiles of
// tokens.
#pragma once

#include <algorithm>

#include "kernels/gemm_tiles.inl"
#include "kernels/weights.inl"

namespace turbosparse {
namespace {

struct Scratch {
  explicit Scratch(std::byte* scratch) : panel(scratch), tokens(scratch + kPanelBytes) {}
  std::byte* panel;
  std::byte* tokens;
};

// ---- packing
// -----------------------------------------------------------------------------------------------------

/// Packs blocks [first, first + blocks) of `tokens` tokens, tile after tile.
template <class Dot, WeightType kType>
inline void pack_tokens(const Input& x, std::int64_t cols, std::int64_t token, std::int64_t tokens,
                        std::int64_t first, std::int64_t blocks, std::byte* out) {
  for (std::int64_t t0 = 0; t0 < tokens; t0 += kTileTokens) {
    with_tokens(std::min<std::int64_t>(kTileTokens, tokens - t0), [&](auto count) {
      constexpr int kTokens = decltype(count)::value;
      auto* block = reinterpret_cast<TokenBlock<kTokens>*>(out);
      out += static_cast<std::int64_t>(sizeof(TokenBlock<kTokens>)) * blocks;
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t row = token + t0 + t;
        const std::int8_t* q = x.q + row * cols + first * kBlock;
        const std::int64_t scales = row * (cols / kBlock) + first;
        for (std::int64_t b = 0; b < blocks; ++b) {
          for (int k = 0; k < 8; ++k) std::memcpy(block[b].q[k][t], q + b * kBlock + 4 * k, 4);
          block[b].start[t] = -Dot::offset(kType) * x.q_sum[scales + b];
          block[b].scale[t] = x.scale[scales + b];
        }
      }
    });
  }
}

/// Packs x[t][k] for k in [0, depth), given that token t begins at x + t * stride, tile after tile.
inline void pack_tokens_float(const float* x, std::int64_t stride, std::int64_t tokens, std::int64_t depth,
                              float* out) {
  for (std::int64_t t0 = 0; t0 < tokens; t0 += kTileTokens) {
    const std::int64_t n = std::min<std::int64_t>(kTileTokens, tokens - t0);
    for (std::int64_t t = 0; t < n; ++t) {
      for (std::int64_t k = 0; k < depth; ++k) out[k * n + t] = x[(t0 + t) * stride + k];
    }
    out += n * depth;
  }
}

/// Packs blocks [first, first + blocks) of rows [row, row + 16); rows from row_end on repeat the last.
template <class Dot, WeightType kType>
inline void pack_panel(const Matrix& w, std::int64_t row, std::int64_t row_end, std::int64_t first,
                       std::int64_t blocks, PanelBlock* out) {
  for (int half = 0; half < kPanelRows; half += 8) {
    const std::byte* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = row_data(w, std::min(row + half + i, row_end - 1));
    const auto store = [&](std::int64_t b, auto load) {
      Float8::V v[8];
      for (int i = 0; i < 8; ++i) v[i] = Dot::as_floats(load(rows[i]));
      Float8::transpose(v);
      for (int k = 0; k < 8; ++k) Float8::store(reinterpret_cast<float*>(out[b].w[k][half]), v[k]);
    };
    for (std::int64_t b = 0; b < blocks; ++b) {
      if constexpr (kType == WeightType::kQ8_0) {
        store(b, [&](const std::byte* r) { return Dot::bytes(Dot::load(r + (first + b) * kBlock)); });
      } else if (b % 2 == 0) {
        store(b,
              [&](const std::byte* r) { return Dot::low_nibbles(Dot::load(r + (first + b) / 2 * kBlock)); });
      } else {
        store(b,
              [&](const std::byte* r) { return Dot::high_nibbles(Dot::load(r + (first + b) / 2 * kBlock)); });
      }
    }
    for (std::int64_t b = 0; b < blocks; b += 8) {
      Float8::V v[8];
      for (int i = 0; i < 8; ++i)
        v[i] = Float8::load_half(rows[i] + scales_offset(kType, w.cols) + 2 * (first + b));
      Float8::transpose(v);
      for (int k = 0; k < std::min<std::int64_t>(8, blocks - b); ++k)
        Float8::store(out[b + k].scale + half, v[k]);
    }
  }
}

/// The same for rows of floats: out[k][16] for k in [0, depth).
template <WeightType kType>
inline void pack_panel_float(const Matrix& w, std::int64_t row, std::int64_t row_end, std::int64_t first,
                             std::int64_t depth, float* out) {
  for (int half = 0; half < kPanelRows; half += 8) {
    const std::byte* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = row_data(w, std::min(row + half + i, row_end - 1));
    for (std::int64_t k = 0; k < depth; k += 8) {
      const std::int64_t n = std::min<std::int64_t>(8, depth - k);
      Float8::V v[8];
      for (int i = 0; i < 8; ++i) {
        v[i] = n == 8 ? load_weights<Float8, kType>(rows[i], first + k)
                      : load_last_weights<Float8, kType>(rows[i], first + k, n);
      }
      Float8::transpose(v);
      for (int j = 0; j < n; ++j) Float8::store(out + (k + j) * kPanelRows + half, v[j]);
    }
  }
}

// ---- running tiles
// -----------------------------------------------------------------------------------------------

template <class Dot, WeightType kType>
inline void run_quantized(const std::byte* panel, const std::byte* x, std::int64_t blocks,
                          std::int64_t tokens, Output out) {
  for (std::int64_t t = 0; t < tokens; t += kTileTokens, out.y += kTileTokens * out.stride) {
    with_tokens(std::min<std::int64_t>(kTileTokens, tokens - t), [&](auto count) {
      constexpr int kTokens = decltype(count)::value;
      const auto* block = reinterpret_cast<const TokenBlock<kTokens>*>(x);
      tile_quantized<Dot, kType, kTokens>(reinterpret_cast<const PanelBlock*>(panel), block, blocks, out);
    });
    x += static_cast<std::int64_t>(sizeof(TokenBlock<kTileTokens>)) * blocks;
  }
}

template <class Float>
inline void run_float(const float* panel, const float* x, std::int64_t depth, std::int64_t tokens,
                      Output out) {
  for (std::int64_t t = 0; t < tokens; t += kTileTokens, out.y += kTileTokens * out.stride) {
    with_tokens(std::min<std::int64_t>(kTileTokens, tokens - t),
                [&](auto count) { tile_float<Float, decltype(count)::value>(panel, x, depth, out); });
    x += kTileTokens * depth;
  }
}

// ---- entries
// -----------------------------------------------------------------------------------------------------

template <class Isa, WeightType kType>
void gemm_type(const Matrix& w, const Input& x, std::int64_t T, std::int64_t row_begin, std::int64_t row_end,
               float* y, std::int64_t y_stride, std::byte* memory) {
  using Dot = typename Isa::Dot;
  const Scratch scratch(memory);
  constexpr std::int64_t kChunk = is_quantized(kType) ? kChunkBlocks * kBlock : kChunkDepth;
  for (std::int64_t t = 0; t < T; t += kPassTokens) {
    const std::int64_t tokens = std::min(kPassTokens, T - t);
    for (std::int64_t c = 0; c < w.cols; c += kChunk) {
      const std::int64_t depth = std::min(kChunk, w.cols - c);
      if constexpr (is_quantized(kType)) {
        pack_tokens<Dot, kType>(x, w.cols, t, tokens, c / kBlock, depth / kBlock, scratch.tokens);
      } else {
        pack_tokens_float(x.x + t * w.cols + c, w.cols, tokens, depth,
                          reinterpret_cast<float*>(scratch.tokens));
      }
      for (std::int64_t r = row_begin; r < row_end; r += kPanelRows) {
        const Output out{y + t * y_stride + r, y_stride, std::min<std::int64_t>(kPanelRows, row_end - r),
                         c > 0};
        if constexpr (is_quantized(kType)) {
          auto* panel = reinterpret_cast<PanelBlock*>(scratch.panel);
          pack_panel<Dot, kType>(w, r, row_end, c / kBlock, depth / kBlock, panel);
          run_quantized<Dot, kType>(scratch.panel, scratch.tokens, depth / kBlock, tokens, out);
        } else {
          auto* panel = reinterpret_cast<float*>(scratch.panel);
          pack_panel_float<kType>(w, r, row_end, c, depth, panel);
          run_float<typename Isa::Float>(panel, reinterpret_cast<float*>(scratch.tokens), depth, tokens, out);
        }
      }
    }
  }
}

}  // namespace
}  // namespace turbosparse
