// GGUF v3 reader: maps a file, checks every count, offset, size, type and name, and hands out views.
//
// Nothing in the file is trusted. A broken file raises ModelFileError with the place and what was found; it never
// crashes and never allocates more than the file's own size allows. Views stay valid while the GgufFile lives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

namespace turbosparse {

struct GgufArray;
/// A metadata value. Integers keep their sign in one of two widths; strings are views into the file.
using GgufValue = std::variant<std::uint64_t, std::int64_t, double, bool, std::string_view,
                               std::shared_ptr<const GgufArray>>;

struct GgufArray {
  std::vector<GgufValue> values;  // all of one kind; arrays of arrays are refused
};

struct GgufTensor {
  std::string name;
  std::uint32_t type = 0;            // ggml's type code
  std::vector<std::int64_t> shape;   // slowest first: [rows, cols] (the file stores it reversed)
  std::uint64_t offset = 0;          // from the start of the file
  std::span<const std::byte> data;   // exactly the tensor's bytes
};

class GgufFile {
 public:
  /// Throws ModelFileError for a file that cannot be opened or is broken.
  static std::shared_ptr<const GgufFile> open(const std::string& path);
  /// The same checks over bytes in memory that outlive the result (tests and fuzzing).
  static std::shared_ptr<const GgufFile> parse(std::span<const std::byte> bytes);

  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }
  std::size_t file_bytes() const { return bytes_.size(); }
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  const GgufValue* find(std::string_view key) const;
  const GgufTensor* tensor(std::string_view name) const;  // nullptr where absent

  // Typed access: nullopt where the key is absent, ModelFileError where it has another type or range.
  std::optional<std::int64_t> get_int(std::string_view key) const;
  std::optional<double> get_float(std::string_view key) const;
  std::optional<bool> get_bool(std::string_view key) const;
  std::optional<std::string_view> get_string(std::string_view key) const;

  /// Tells the kernel that these mapped pages are not needed again soon (they stay valid).
  void release(std::span<const std::byte> pages) const;

 private:
  GgufFile() = default;
  std::string path_;
  std::span<const std::byte> bytes_;
  bool mapped_ = false;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, std::size_t> key_index_;
  std::unordered_map<std::string_view, std::size_t> tensor_index_;
};

}  // namespace turbosparse
