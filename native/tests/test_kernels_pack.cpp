// File formats and packed rows: the documented layouts, byte by byte, and round trips.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/packed.h"

namespace turbosparse {
namespace {

constexpr std::uint32_t kFileQ4_0 = 2, kFileQ8_0 = 8;

std::vector<float> random_floats(std::int64_t n, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& value : x) value = normal(generator);
  return x;
}

std::vector<float> dequantize(WeightType type, const std::vector<std::byte>& packed, std::int64_t cols) {
  std::vector<float> out(static_cast<std::size_t>(cols));
  const Matrix w{packed.data(), 1, cols, packed.size(), type};
  kernel_table("scalar").dequantize_row(w, 0, out.data());
  return out;
}

void test_halves() {
  for (std::uint32_t h = 0; h < 65536; ++h) {
    const float f = half_to_float(static_cast<std::uint16_t>(h));
    const std::uint16_t back = float_to_half(f);
    const bool nan = (h & 0x7fffu) > 0x7c00u;
    CHECK(nan ? std::isnan(f) && (back & 0x7fffu) > 0x7c00u : back == h, "half %04x -> %g -> %04x", h,
          static_cast<double>(f), back);
  }
  CHECK(float_to_half(1.0f + 0x1p-11f) == 0x3c00, "a tie goes to the even neighbour");
  CHECK(float_to_half(1.0f + 0x1.8p-10f) == 0x3c02, "a tie goes to the even neighbour");
  CHECK(float_to_half(65520.0f) == 0x7c00 && float_to_half(65519.0f) == 0x7bff, "overflow");
  CHECK(float_to_half(0x1p-25f) == 0 && float_to_half(0x1.8p-25f) == 1, "underflow");
  CHECK(float_to_bfloat16(1.0f + 0x1p-8f) == 0x3f80, "bf16 tie");
}

/// One block of each 32-wide type with integers 0, 1, 2 ..., where ggml's layout puts them.
void test_file_layout() {
  std::vector<std::byte> q8(34), q4(18);
  const std::uint16_t two = float_to_half(2.0f);
  std::memcpy(q8.data(), &two, 2);
  std::memcpy(q4.data(), &two, 2);
  for (int j = 0; j < 32; ++j) q8[2 + j] = static_cast<std::byte>(j - 16);
  for (int j = 0; j < 16; ++j) q4[2 + j] = static_cast<std::byte>(j | (15 - j) << 4);
  float out[32];
  ggml_dequantize_row(kFileQ8_0, q8.data(), 32, out);
  for (int j = 0; j < 32; ++j) CHECK(out[j] == 2.0f * static_cast<float>(j - 16), "Q8_0 weight %d", j);
  ggml_dequantize_row(kFileQ4_0, q4.data(), 32, out);
  for (int j = 0; j < 32; ++j) {
    const int level = j < 16 ? j : 15 - (j - 16);
    CHECK(out[j] == 2.0f * static_cast<float>(level - 8), "Q4_0 weight %d", j);
  }
}

/// Packing file rows changes no weight and leaves no byte undefined.
void test_pack_is_lossless() {
  std::mt19937 generator(1);
  for (const std::int64_t cols : {32, 64, 96, 288, 576, 1536}) {
    for (const std::uint32_t file_type : {kFileQ4_0, kFileQ8_0}) {
      WeightType type;
      CHECK(native_type(file_type, &type), "type %u", file_type);
      std::vector<std::byte> row(ggml_row_bytes(file_type, cols));
      for (std::byte& b : row) b = static_cast<std::byte>(generator());
      const std::size_t block_bytes = row.size() / static_cast<std::size_t>(cols / 32);
      for (std::size_t at = 0; at < row.size(); at += block_bytes) {
        const std::uint16_t scale = float_to_half(0.01f * static_cast<float>(at + 1));
        std::memcpy(row.data() + at, &scale, 2);
      }
      std::vector<float> expected(static_cast<std::size_t>(cols));
      ggml_dequantize_row(file_type, row.data(), cols, expected.data());
      std::vector<std::byte> first(packed_row_bytes(type, cols), std::byte{0x55}), second(first.size());
      pack_row(type, row.data(), cols, first.data());
      pack_row(type, row.data(), cols, second.data());
      CHECK(first == second, "%s: padding must be defined", weight_type_name(type));
      CHECK(dequantize(type, first, cols) == expected, "%s, %lld columns", weight_type_name(type),
            static_cast<long long>(cols));
    }
  }
}

void test_quantize_row() {
  const std::int64_t cols = 96;
  const std::vector<float> x = random_floats(cols, 2);
  const double tolerance[kWeightTypes] = {0.0, 1e-7, 1e-5, 5e-5, 1e-2};  // NMSE
  for (int t = 0; t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    std::vector<std::byte> packed(packed_row_bytes(type, cols));
    quantize_row(type, x.data(), cols, packed.data());
    const std::vector<float> back = dequantize(type, packed, cols);
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      error += std::pow(static_cast<double>(x[i] - back[i]), 2);
      norm += std::pow(static_cast<double>(x[i]), 2);
    }
    CHECK(error <= tolerance[t] * norm, "%s: NMSE %g", weight_type_name(type), error / norm);
  }
  const std::vector<float> zeros(cols, 0.0f);
  for (const WeightType type : {WeightType::kQ8_0, WeightType::kQ4_0}) {
    std::vector<std::byte> packed(packed_row_bytes(type, cols));
    quantize_row(type, zeros.data(), cols, packed.data());
    for (const float value : dequantize(type, packed, cols)) CHECK(value == 0.0f, "zeros stay zeros");
    std::vector<float> hostile(cols, std::numeric_limits<float>::quiet_NaN());
    hostile[40] = std::numeric_limits<float>::infinity();
    quantize_row(type, hostile.data(), cols, packed.data());  // must not trap; values are unspecified
  }
}

void test_sizes() {
  CHECK(packed_row_bytes(WeightType::kQ4_0, 576) == 336,
        "18 blocks: 9 groups, 36 bytes of scales, 12 of padding");
  CHECK(packed_row_bytes(WeightType::kQ8_0, 32) == 48, "32 + 2 rounded up to 16");
  CHECK(packed_row_bytes(WeightType::kBF16, 7) == 14, "float rows have no padding");
  CHECK(ggml_row_bytes(14, 512) == 420, "Q6_K");
  CHECK(ggml_row_bytes(14, 288) == 0, "Q6_K needs multiples of 256");
  CHECK(ggml_row_bytes(kFileQ4_0, 48) == 0 && ggml_row_bytes(kFileQ4_0, 0) == 0, "whole blocks only");
  CHECK(ggml_row_bytes(99, 256) == 0 && !ggml_type_supported(99), "unknown type");
  CHECK(std::strcmp(ggml_type_name(12), "Q4_K") == 0 && std::strcmp(ggml_type_name(99), "?") == 0, "names");
}

}  // namespace
}  // namespace turbosparse

int main() {
  turbosparse::test_halves();
  turbosparse::test_file_layout();
  turbosparse::test_pack_is_lossless();
  turbosparse::test_quantize_row();
  turbosparse::test_sizes();
  return turbosparse::test::report();
}
