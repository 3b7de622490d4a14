// What the kernel tests and benches share: random matrices and inputs, and how far results may differ.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/kernels.h"

namespace turbosparse::test {

inline std::vector<float> normal_floats(std::int64_t n, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& value : x) value = normal(generator);
  return x;
}

/// A packed matrix in memory of exactly its size, so that a sanitizer sees every read past the end.
struct OwnedMatrix {
  OwnedMatrix(WeightType type, std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
    const std::size_t row_bytes = packed_row_bytes(type, cols);
    bytes.resize(static_cast<std::size_t>(rows) * row_bytes);
    const std::vector<float> values = normal_floats(rows * cols, seed);
    for (std::int64_t r = 0; r < rows; ++r) {
      quantize_row(type, values.data() + r * cols, cols,
                   bytes.data() + static_cast<std::size_t>(r) * row_bytes);
    }
    view = {bytes.data(), rows, cols, row_bytes, type};
  }
  std::vector<std::byte> bytes;
  Matrix view;
};

/// T random vectors, quantised by the scalar kernel where cols allow it.
struct OwnedInput {
  OwnedInput(std::int64_t T, std::int64_t cols, std::uint32_t seed)
      : x(normal_floats(T * cols, seed)), q(x.size()), scale(x.size() / 32), q_sum(x.size() / 32) {
    if (cols % kBlock == 0) {
      kernel_table("scalar").quantize_q8(x.data(), T * cols, q.data(), scale.data(), q_sum.data());
    }
    view = {x.data(), q.data(), scale.data(), q_sum.data()};
  }
  std::vector<float> x;
  std::vector<std::int8_t> q;
  std::vector<float> scale;
  std::vector<std::int32_t> q_sum;
  Input view;
};

struct Scratch {
  explicit Scratch(std::int64_t cols)
      : memory(static_cast<std::byte*>(std::aligned_alloc(64, (gemm_scratch_bytes(cols) + 63) / 64 * 64))) {}
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::byte* memory;
};

inline std::vector<std::int32_t> all_rows(std::int64_t rows) {
  std::vector<std::int32_t> list(static_cast<std::size_t>(rows));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

/// |a - b| / |b| (Euclidean norms).
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return norm == 0.0 ? std::sqrt(error) : std::sqrt(error / norm);
}

/// Whether a and b are sums of n products of normal values that differ by no more than rounding: such sums
/// are of size sqrt(n), each rounding of one is eps times that, and roundings add up as a random walk.
inline bool equal_but_for_rounding(const std::vector<float>& a, const std::vector<float>& b, std::int64_t n) {
  double error = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  }
  const auto products = static_cast<double>(n), sums = static_cast<double>(a.size());
  return std::sqrt(error / sums / products) <= 0x1p-23 * (4.0 + std::sqrt(products));
}

/// Numbers of columns worth testing: block remainders, and any number at all for rows of floats.
inline std::vector<std::int64_t> column_cases(WeightType type) {
  std::vector<std::int64_t> cases = {32, 64, 96, 288, 576, 1536, 8960};
  if (!is_quantized(type)) cases.insert(cases.end(), {1, 7, 33});
  return cases;
}

inline std::vector<WeightType> weight_types() {
  return {WeightType::kF32, WeightType::kF16, WeightType::kBF16, WeightType::kQ8_0, WeightType::kQ4_0};
}

/// The tables that this CPU can run, the scalar one last.
inline std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> list;
  for (const std::string& isa : available_isas()) list.push_back(&kernel_table(isa));
  return list;
}

}  // namespace turbosparse::test
