// Packed rows: sizes, and how they are made from file rows and from floats.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/packed.h"

namespace turbosparse {
namespace {

constexpr std::int64_t kFileBytesQ8 = 34, kFileBytesQ4 = 18;  // ggml's blocks: fp16 scale, then the integers

void store_scale(WeightType type, std::int64_t cols, std::int64_t block, std::uint16_t scale,
                 std::byte* out) {
  std::memcpy(out + scales_offset(type, cols) + 2 * block, &scale, sizeof scale);
}

/// Puts a block of Q4_0 integers (0..15) into its half of a group.
void store_nibbles(const std::uint8_t* q, std::int64_t block, std::byte* out) {
  std::byte* group = out + block / 2 * kBlock;
  for (int j = 0; j < kBlock; ++j) {
    const auto value = static_cast<std::byte>(q[j]);
    group[j] =
        block % 2 == 0 ? (group[j] & std::byte{0xf0}) | value : (group[j] & std::byte{0x0f}) | value << 4;
  }
}

/// Zeroes padding and scales, and gives the missing block of an odd Q4_0 row its q = 8.
void clear_row(WeightType type, std::int64_t cols, std::byte* out) {
  std::memset(out, 0, packed_row_bytes(type, cols));
  if (type == WeightType::kQ4_0) std::memset(out, 0x88, static_cast<std::size_t>(scales_offset(type, cols)));
}

/// What a block with a NaN gets as its scale: damaged weights must not pass for zeros.
constexpr std::uint16_t kNanHalf = 0x7e00;

bool has_nan(const float* x) {
  bool found = false;
  for (int j = 0; j < kBlock; ++j) found |= x[j] != x[j];
  return found;
}

void quantize_block_q8_0(const float* x, std::int64_t cols, std::int64_t block, std::byte* out) {
  float largest = 0.0f;
  for (int j = 0; j < kBlock; ++j) largest = std::max(largest, std::fabs(x[j]));
  const float scale = largest / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int j = 0; j < kBlock; ++j) {
    const float q = std::clamp(std::round(x[j] * inverse), -127.0f, 127.0f);
    out[block * kBlock + j] = static_cast<std::byte>(q == q ? static_cast<std::int8_t>(q) : 0);
  }
  store_scale(WeightType::kQ8_0, cols, block, has_nan(x) ? kNanHalf : float_to_half(scale), out);
}

void quantize_block_q4_0(const float* x, std::int64_t cols, std::int64_t block, std::byte* out) {
  float extreme = 0.0f;  // the value of largest magnitude gets -8, so all sixteen levels are used
  for (int j = 0; j < kBlock; ++j) {
    if (std::fabs(x[j]) > std::fabs(extreme)) extreme = x[j];
  }
  const float scale = extreme / -8.0f;
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  std::uint8_t q[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const float level = std::clamp(x[j] * inverse + 8.5f, 0.0f, 15.0f);
    q[j] = level == level ? static_cast<std::uint8_t>(level) : 8;
  }
  store_nibbles(q, block, out);
  store_scale(WeightType::kQ4_0, cols, block, has_nan(x) ? kNanHalf : float_to_half(scale), out);
}

}  // namespace

const char* weight_type_name(WeightType t) {
  static constexpr const char* kNames[kWeightTypes] = {"F32", "F16", "BF16", "Q8_0", "Q4_0"};
  return kNames[static_cast<int>(t)];
}

std::size_t packed_row_bytes(WeightType t, std::int64_t cols) {
  if (!is_quantized(t)) return static_cast<std::size_t>(cols) * float_type_bytes(t);
  return static_cast<std::size_t>((scales_offset(t, cols) + 2 * (cols / kBlock) + 15) / 16 * 16);
}

void pack_row(WeightType type, const std::byte* row, std::int64_t cols, std::byte* out) noexcept {
  if (!is_quantized(type)) {
    std::memcpy(out, row, packed_row_bytes(type, cols));
    return;
  }
  clear_row(type, cols, out);
  const std::int64_t file_bytes = type == WeightType::kQ8_0 ? kFileBytesQ8 : kFileBytesQ4;
  for (std::int64_t block = 0; block < cols / kBlock; ++block, row += file_bytes) {
    store_scale(type, cols, block, load_unaligned<std::uint16_t>(row), out);
    if (type == WeightType::kQ8_0) {
      std::memcpy(out + block * kBlock, row + 2, kBlock);
      continue;
    }
    std::uint8_t q[kBlock];
    for (int j = 0; j < kBlock / 2; ++j) {
      q[j] = std::to_integer<std::uint8_t>(row[2 + j] & std::byte{15});
      q[j + kBlock / 2] = std::to_integer<std::uint8_t>(row[2 + j] >> 4);
    }
    store_nibbles(q, block, out);
  }
}

void quantize_row(WeightType type, const float* x, std::int64_t cols, std::byte* out) noexcept {
  switch (type) {
    case WeightType::kF32:
      std::memcpy(out, x, static_cast<std::size_t>(cols) * sizeof(float));
      return;
    case WeightType::kF16:
    case WeightType::kBF16:
      for (std::int64_t c = 0; c < cols; ++c) {
        const std::uint16_t value = type == WeightType::kF16 ? float_to_half(x[c]) : float_to_bfloat16(x[c]);
        std::memcpy(out + 2 * c, &value, sizeof value);
      }
      return;
    case WeightType::kQ8_0:
    case WeightType::kQ4_0:
      clear_row(type, cols, out);
      for (std::int64_t block = 0; block < cols / kBlock; ++block) {
        auto* quantize_block = type == WeightType::kQ8_0 ? quantize_block_q8_0 : quantize_block_q4_0;
        quantize_block(x + block * kBlock, cols, block, out);
      }
      return;
  }
}

}  // namespace turbosparse
