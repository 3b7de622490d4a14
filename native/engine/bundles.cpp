#include "engine/bundles.h"

#include <bit>
#include <memory>
#include <numeric>
#include <variant>

#include "io/disk_reader.h"
#include "util/error.h"

namespace turbosparse {
namespace {

constexpr const char* kParts = "turbosparse.bundle.parts";
constexpr const char* kTypes = "turbosparse.bundle.types";
constexpr const char* kRowBytes = "turbosparse.bundle.bytes";
constexpr const char* kCluster = "turbosparse.bundle.cluster";
constexpr std::array<const char*, 3> kNames{"gate", "up", "down_t"};  // by Projection
constexpr std::uint32_t kGgmlI8 = 24;
constexpr std::int64_t kLargestCluster = 32;

[[noreturn]] void fail(const std::string& place, const std::string& expected, const std::string& got) {
  throw ModelFileError("[" + place + "] expected " + expected + ", got " + got);
}

const std::vector<std::string_view>& strings(const GgufFile& file, const char* key) {
  const GgufValue* value = file.find(key);
  const auto* array = value == nullptr ? nullptr : std::get_if<std::shared_ptr<const GgufArray>>(value);
  if (array == nullptr || (*array)->kind != GgufKind::kString) {
    fail(key, "an array of strings", value == nullptr ? "no such key" : "something else");
  }
  return (*array)->strings;
}

WeightType type_named(std::string_view name) {
  for (int i = 0; i < kWeightTypes; ++i) {
    if (name == weight_type_name(static_cast<WeightType>(i))) return static_cast<WeightType>(i);
  }
  fail(kTypes, "F32, F16, BF16, Q8_0 or Q4_0", std::string(name.substr(0, 16)));
}

}  // namespace

bool has_bundles(const GgufFile& file) { return file.find(kParts) != nullptr; }

BundleLayout read_bundle_layout(const GgufFile& file, std::int64_t hidden_size, bool gated) {
  constexpr std::size_t kPartAlignment = 16;
  BundleLayout layout;
  layout.cols = hidden_size;
  const std::vector<std::string_view>& parts = strings(file, kParts);
  const std::vector<std::string_view>& types = strings(file, kTypes);
  if (types.size() != parts.size()) fail(kTypes, std::to_string(parts.size()), std::to_string(types.size()));
  std::size_t next = 0;
  for (std::size_t p = 0; p < kNames.size(); ++p) {
    if (next == parts.size() || parts[next] != kNames[p]) continue;
    const WeightType type = type_named(types[next++]);
    if (is_quantized(type) && hidden_size % kBlock != 0) {
      fail(kTypes, "rows of a multiple of 32 values", std::to_string(hidden_size));
    }
    layout.parts[p] = {true, type, layout.bytes};
    const std::size_t row = packed_row_bytes(type, hidden_size);
    layout.bytes += (row + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
  }
  const bool complete = layout.part(Projection::kUp).there && layout.part(Projection::kDown).there;
  if (next != parts.size() || !complete || (layout.part(Projection::kGate).there && !gated)) {
    fail(kParts, gated ? "gate, up, down_t or up, down_t" : "up, down_t", "another list");
  }
  layout.cluster = file.get_int(kCluster).value_or(0);
  if (layout.cluster < 1 || layout.cluster > kLargestCluster ||
      !std::has_single_bit(static_cast<std::uint64_t>(layout.cluster))) {
    fail(kCluster, "a power of two up to 32", std::to_string(layout.cluster));
  }
  const std::int64_t file_bytes = file.get_int(kRowBytes).value_or(0);
  constexpr std::int64_t kLargestRow = std::int64_t{1} << 30;
  const auto least = static_cast<std::int64_t>(layout.bytes);
  if (file_bytes < least || file_bytes > kLargestRow ||
      file_bytes * layout.cluster % static_cast<std::int64_t>(kDiskBlock) != 0) {
    fail(kRowBytes,
         "at least " + std::to_string(least) + ", and a cluster of " + std::to_string(layout.cluster) +
             " a multiple of 4096",
         std::to_string(file_bytes));
  }
  layout.file_bytes = static_cast<std::size_t>(file_bytes);
  return layout;
}

std::vector<FfnBundles> split_bundles(const GgufFile& file, const GgufTensor& tensor,
                                      const BundleLayout& layout, std::int64_t ffns, std::int64_t neurons) {
  const std::size_t bytes = static_cast<std::size_t>(neurons) * layout.file_bytes;
  const std::int64_t row = tensor.shape.back();
  if (tensor.type != kGgmlI8 || row != static_cast<std::int64_t>(layout.file_bytes) ||
      tensor.data.size() != static_cast<std::size_t>(ffns) * bytes) {
    fail(tensor.name,
         std::to_string(ffns * neurons) + " bundles of " + std::to_string(layout.file_bytes) + " bytes, I8",
         std::to_string(tensor.data.size() / static_cast<std::size_t>(row)) + " of " + std::to_string(row));
  }
  if (neurons % kBlock != 0) fail(tensor.name, "a multiple of 32 neurons", std::to_string(neurons));
  if (tensor.offset % kDiskBlock != 0) {
    fail(tensor.name, "an offset that is a multiple of 4096", std::to_string(tensor.offset));
  }
  std::vector<FfnBundles> all;
  for (std::size_t i = 0; i < static_cast<std::size_t>(ffns); ++i) {
    all.push_back({tensor.offset + i * bytes, tensor.data.subspan(i * bytes, bytes), &file, neurons, {}});
  }
  return all;
}

}  // namespace turbosparse
