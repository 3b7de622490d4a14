// Dequantisation of ggml's file formats, one block at a time. Runs once per weight, when a model is loaded.
#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace turbosparse {
namespace {

using Byte = std::uint8_t;

float half_at(const Byte* p) { return half_to_float(load_unaligned<std::uint16_t>(p)); }

void read_f32(const Byte* in, float* out) { *out = load_unaligned<float>(in); }
void read_f16(const Byte* in, float* out) { *out = half_at(in); }
void read_bf16(const Byte* in, float* out) { *out = bfloat16_to_float(load_unaligned<std::uint16_t>(in)); }

// Blocks of 32 whose byte j holds weight j in its low and weight j + 16 in its high nibble.

void read_q4_0(const Byte* in, float* out) {
  const float d = half_at(in);
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<float>((in[2 + j] & 15) - 8) * d;
    out[j + 16] = static_cast<float>((in[2 + j] >> 4) - 8) * d;
  }
}

void read_q4_1(const Byte* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<float>(in[4 + j] & 15) * d + m;
    out[j + 16] = static_cast<float>(in[4 + j] >> 4) * d + m;
  }
}

int fifth_bit(std::uint32_t bits, int j) { return static_cast<int>(bits >> j & 1u) << 4; }

void read_q5_0(const Byte* in, float* out) {
  const float d = half_at(in);
  const auto high = load_unaligned<std::uint32_t>(in + 2);
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<float>(((in[6 + j] & 15) | fifth_bit(high, j)) - 16) * d;
    out[j + 16] = static_cast<float>(((in[6 + j] >> 4) | fifth_bit(high, j + 16)) - 16) * d;
  }
}

void read_q5_1(const Byte* in, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  const auto high = load_unaligned<std::uint32_t>(in + 4);
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<float>((in[8 + j] & 15) | fifth_bit(high, j)) * d + m;
    out[j + 16] = static_cast<float>((in[8 + j] >> 4) | fifth_bit(high, j + 16)) * d + m;
  }
}

void read_q8_0(const Byte* in, float* out) {
  const float d = half_at(in);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(static_cast<std::int8_t>(in[2 + j])) * d;
}

void read_iq4_nl(const Byte* in, float* out) {
  static constexpr float kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};
  const float d = half_at(in);
  for (int j = 0; j < 16; ++j) {
    out[j] = kValues[in[2 + j] & 15] * d;
    out[j + 16] = kValues[in[2 + j] >> 4] * d;
  }
}

// Super-blocks of 256 ("K"): small integer scales per 16 or 32 weights, one or two fp16 for all of them.

void read_q2_k(const Byte* in, float* out) {
  const Byte *scales = in, *qs = in + 16;
  const float d = half_at(in + 80), m = half_at(in + 82);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, shift = i % 128 / 32 * 2;
    const Byte scale = scales[i / 16];
    const int q = qs[32 * half + i % 32] >> shift & 3;
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(q) - m * static_cast<float>(scale >> 4);
  }
}

void read_q3_k(const Byte* in, float* out) {
  const Byte *high = in, *qs = in + 32, *scales = in + 96;
  const float d = half_at(in + 108);
  for (int i = 0; i < 256; ++i) {
    const int j = i / 16;  // scale: four low bits in bytes 0..7, two high bits in bytes 8..11
    const int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4;
    const int scale = (low | (scales[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32;
    const int half = i / 128, shift = i % 128 / 32 * 2;
    const int third_bit = high[i % 32] >> (i / 32) & 1;
    const int q = (qs[32 * half + i % 32] >> shift & 3) - (third_bit != 0 ? 0 : 4);
    out[i] = d * static_cast<float>(scale) * static_cast<float>(q);
  }
}

/// Scale and minimum j of eight, six bits each, in the twelve bytes that Q4_K and Q5_K share.
void scale_and_min(const Byte* s, int j, float* scale, float* minimum) {
  const int a = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
  const int b = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
  *scale = static_cast<float>(a);
  *minimum = static_cast<float>(b);
}

/// Q4_K, and Q5_K where `high` holds a fifth bit per weight.
void read_q45_k(const Byte* in, const Byte* high, const Byte* qs, float* out) {
  const float d = half_at(in), m = half_at(in + 2);
  for (int j = 0; j < 8; ++j) {
    float scale, minimum;
    scale_and_min(in + 4, j, &scale, &minimum);
    const float ds = d * scale, ms = m * minimum;
    for (int l = 0; l < 32; ++l) {
      int q = qs[j / 2 * 32 + l] >> (j % 2 * 4) & 15;
      if (high != nullptr) q |= (high[l] >> j & 1) << 4;
      out[32 * j + l] = ds * static_cast<float>(q) - ms;
    }
  }
}

void read_q4_k(const Byte* in, float* out) { read_q45_k(in, nullptr, in + 16, out); }
void read_q5_k(const Byte* in, float* out) { read_q45_k(in, in + 16, in + 48, out); }

void read_q6_k(const Byte* in, float* out) {
  const Byte *low = in, *high = in + 128, *scales = in + 192;
  const float d = half_at(in + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
    const int four = low[64 * half + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    const int two = high[32 * half + l] >> (2 * quarter) & 3;
    const auto scale = static_cast<std::int8_t>(scales[8 * half + 2 * quarter + l / 16]);
    out[i] = d * static_cast<float>(scale) * static_cast<float>((four | two << 4) - 32);
  }
}

struct Format {
  std::uint32_t code;
  const char* name;
  std::int64_t block;  // weights per block
  std::int64_t bytes;  // per block
  void (*read)(const Byte* in, float* out);
};

constexpr Format kFormats[] = {
    {0, "F32", 1, 4, read_f32},          {1, "F16", 1, 2, read_f16},        {2, "Q4_0", 32, 18, read_q4_0},
    {3, "Q4_1", 32, 20, read_q4_1},      {6, "Q5_0", 32, 22, read_q5_0},    {7, "Q5_1", 32, 24, read_q5_1},
    {8, "Q8_0", 32, 34, read_q8_0},      {10, "Q2_K", 256, 84, read_q2_k},  {11, "Q3_K", 256, 110, read_q3_k},
    {12, "Q4_K", 256, 144, read_q4_k},   {13, "Q5_K", 256, 176, read_q5_k}, {14, "Q6_K", 256, 210, read_q6_k},
    {20, "IQ4_NL", 32, 18, read_iq4_nl}, {30, "BF16", 1, 2, read_bf16},
};

const Format* find_format(std::uint32_t code) {
  for (const Format& format : kFormats) {
    if (format.code == code) return &format;
  }
  return nullptr;
}

}  // namespace

bool ggml_type_supported(std::uint32_t ggml_type) { return find_format(ggml_type) != nullptr; }

const char* ggml_type_name(std::uint32_t ggml_type) {
  const Format* format = find_format(ggml_type);
  return format == nullptr ? "?" : format->name;
}

std::size_t ggml_row_bytes(std::uint32_t ggml_type, std::int64_t cols) {
  const Format* format = find_format(ggml_type);
  constexpr std::int64_t kMostColumns = std::int64_t{1} << 40;  // sizes of rows stay far from overflow
  if (format == nullptr || cols <= 0 || cols > kMostColumns || cols % format->block != 0) return 0;
  return static_cast<std::size_t>(cols / format->block) * static_cast<std::size_t>(format->bytes);
}

bool native_type(std::uint32_t ggml_type, WeightType* type) {
  switch (ggml_type) {
    case 0:
      *type = WeightType::kF32;
      return true;
    case 1:
      *type = WeightType::kF16;
      return true;
    case 2:
      *type = WeightType::kQ4_0;
      return true;
    case 8:
      *type = WeightType::kQ8_0;
      return true;
    case 30:
      *type = WeightType::kBF16;
      return true;
    default:
      return false;
  }
}

void ggml_dequantize_row(std::uint32_t ggml_type, const std::byte* row, std::int64_t cols,
                         float* out) noexcept {
  const Format* format = find_format(ggml_type);
  if (format == nullptr) return;
  const Byte* in = reinterpret_cast<const Byte*>(row);
  for (std::int64_t c = 0; c + format->block <= cols; c += format->block, in += format->bytes) {
    format->read(in, out + c);
  }
}

}  // namespace turbosparse
