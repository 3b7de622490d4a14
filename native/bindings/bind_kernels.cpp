// Weights as the engine reads and keeps them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "kernels/kernels.h"
#include "util/error.h"

namespace nb = nanobind;

namespace turbosparse {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsIn = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

FloatsOut make_floats(std::size_t rows, std::size_t cols) {
  auto data = std::make_unique<float[]>(rows * cols);
  float* values = data.get();
  const nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {values, {rows, cols}, owner};
}

FloatsOut dequantize(std::uint32_t ggml_type, const Bytes& data, std::int64_t cols) {
  const std::size_t row_bytes = ggml_row_bytes(ggml_type, cols);
  if (row_bytes == 0) {
    throw ConfigError("[dequantize] expected a known type and whole blocks, got type " +
                      std::to_string(ggml_type) + " and " + std::to_string(cols) + " columns");
  }
  if (data.shape(0) % row_bytes != 0) {
    throw ConfigError("[dequantize] expected rows of " + std::to_string(row_bytes) + " bytes, got " +
                      std::to_string(data.shape(0)) + " bytes");
  }
  const std::size_t rows = data.shape(0) / row_bytes;
  FloatsOut out = make_floats(rows, static_cast<std::size_t>(cols));
  const auto* bytes = reinterpret_cast<const std::byte*>(data.data());
  for (std::size_t r = 0; r < rows; ++r) {
    ggml_dequantize_row(ggml_type, bytes + r * row_bytes, cols,
                        out.data() + r * static_cast<std::size_t>(cols));
  }
  return out;
}

WeightType parse_type(const char* place, const std::string& name, std::int64_t cols) {
  for (int i = 0; i < kWeightTypes; ++i) {
    const auto type = static_cast<WeightType>(i);
    if (name != weight_type_name(type)) continue;
    if (!is_quantized(type) || cols % kBlock == 0) return type;
    throw ConfigError(std::string(place) + " expected a multiple of 32 columns for " + name + ", got " +
                      std::to_string(cols));
  }
  throw ConfigError(std::string(place) + " expected F32, F16, BF16, Q8_0 or Q4_0, got " + name);
}

FloatsOut requantize(const FloatsIn& values, const std::string& weight_type, const std::string& isa) {
  const auto cols = static_cast<std::int64_t>(values.shape(1));
  const WeightType type = parse_type("[requantize]", weight_type, cols);
  const KernelTable& kernels = kernel_table(isa);
  std::vector<std::byte> packed(packed_row_bytes(type, cols));
  const Matrix row{packed.data(), 1, cols, packed.size(), type};
  FloatsOut out = make_floats(values.shape(0), values.shape(1));
  for (std::size_t r = 0; r < values.shape(0); ++r) {
    quantize_row(type, values.data() + r * values.shape(1), cols, packed.data());
    kernels.dequantize_row(row, 0, out.data() + r * values.shape(1));
  }
  return out;
}

using PackedRows = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<2>>;

PackedRows pack_rows(std::uint32_t ggml_type, const Bytes& data, std::int64_t cols) {
  WeightType type;
  const std::size_t file_row = ggml_row_bytes(ggml_type, cols);
  if (!native_type(ggml_type, &type) || file_row == 0 || data.shape(0) % file_row != 0) {
    throw ConfigError("[pack_rows] expected whole rows of F32, F16, BF16, Q8_0 or Q4_0, got type " +
                      std::to_string(ggml_type) + ", " + std::to_string(data.shape(0)) + " bytes");
  }
  const std::size_t rows = data.shape(0) / file_row;
  const std::size_t row_bytes = packed_row_bytes(type, cols);
  auto packed = std::make_unique<std::uint8_t[]>(rows * row_bytes);
  for (std::size_t r = 0; r < rows; ++r) {
    pack_row(type, reinterpret_cast<const std::byte*>(data.data()) + r * file_row, cols,
             reinterpret_cast<std::byte*>(packed.get()) + r * row_bytes);
  }
  std::uint8_t* const bytes = packed.get();
  const nb::capsule owner(packed.release(), [](void* p) noexcept { delete[] static_cast<std::uint8_t*>(p); });
  return {bytes, {rows, row_bytes}, owner};
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("dequantize", &dequantize, nb::arg("ggml_type"), nb::arg("data"), nb::arg("cols"));
  m.def("pack_rows", &pack_rows, nb::arg("ggml_type"), nb::arg("data"), nb::arg("cols"));
  m.def(
      "packed_row_bytes",
      [](const std::string& weight_type, std::int64_t cols) {
        return packed_row_bytes(parse_type("[packed_row_bytes]", weight_type, cols), cols);
      },
      nb::arg("weight_type"), nb::arg("cols"));
  m.def("requantize", &requantize, nb::arg("values"), nb::arg("weight_type"), nb::arg("isa") = "");
}

}  // namespace turbosparse
