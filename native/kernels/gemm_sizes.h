// Sizes of the tiles and chunks of matrix products, and so of their scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbosparse {

inline constexpr int kPanelRows = 16;
inline constexpr int kTileTokens = 6;
inline constexpr std::int64_t kPassTokens =
    40 * kTileTokens;                                // packed at a time; a panel is packed once for them
inline constexpr std::int64_t kChunkBlocks = 32;     // inner dimension at a time, quantised: 18 KiB a panel
inline constexpr std::int64_t kChunkDepth = 256;     // the same, floats: 16 KiB a panel
inline constexpr std::int64_t kTransposedCols = 64;  // columns that gemm_t unpacks at a time

inline constexpr std::int64_t kTransposedBlocks = 24;  // blocks of rows at a time, four panels of 14 KiB

inline constexpr std::size_t kPanelBytes = kTransposedCols * kChunkDepth * sizeof(float);
static_assert(kPanelBytes >=
              kTransposedCols / kPanelRows * kTransposedBlocks * kPanelRows * (32 + sizeof(float)));
inline constexpr std::size_t kTokenBytes =
    kPassTokens * kChunkBlocks * 40;  // 32 q, start and scale per block
static_assert(kPanelBytes >= kChunkBlocks * kPanelRows * (32 + sizeof(float)));
static_assert(kTokenBytes >= kPassTokens * kChunkDepth * sizeof(float));

}  // namespace turbosparse
