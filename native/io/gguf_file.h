// GGUF reader (versions 2 and 3, little-endian): maps a file, checks every count, offset, size, type and
// name, and hands out views.
//
// Nothing in the file is trusted. A broken file raises ModelFileError with the place and what was found; it
// never crashes, and what it allocates is bounded by a small multiple of the file's own size. Views stay
// valid while the GgufFile lives. (A file that somebody else truncates while its pages are read is the one
// thing that cannot be caught; `whole` tells before.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "io/file_state.h"

namespace turbosparse {

/// GGUF's own numbering of value kinds.
enum class GgufKind : std::uint32_t {
  kUint8 = 0,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};
/// "uint8" ... "float64", "bool", "string", "array".
const char* gguf_kind_name(GgufKind kind) noexcept;

struct GgufArray;
/// A metadata value. Integers keep their sign in one of two widths; strings are views into the file, valid
/// UTF-8.
using GgufValue = std::variant<std::uint64_t, std::int64_t, double, bool, std::string_view,
                               std::shared_ptr<const GgufArray>>;

/// An array of one kind; arrays of arrays are refused.
struct GgufArray {
  GgufKind kind = GgufKind::kUint8;       // of every element
  std::size_t size = 0;                   // elements
  std::span<const std::byte> bytes;       // the elements as they lie in the file
  std::vector<std::string_view> strings;  // the elements of an array of strings

  GgufValue at(std::size_t index) const;  // index < size
};

struct GgufTensor {
  std::string name;
  std::uint32_t type = 0;  // ggml's type code, one that find_ggml_type knows
  std::vector<std::int64_t>
      shape;                 // slowest first: [rows, cols] (the file stores it reversed); 1 to 4, all > 0
  std::uint64_t offset = 0;  // from the start of the file
  std::span<const std::byte> data;  // exactly the tensor's bytes
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
  /// Of the file when it was opened.
  const FileState& state() const { return state_; }
  /// Whether it is still as long.
  bool whole() const;
  std::uint32_t version() const { return version_; }
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
  /// Kind of each metadata entry as stored, in the order of metadata(); kArray for arrays.
  const std::vector<GgufKind>& kinds() const { return kinds_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  const GgufValue* find(std::string_view key) const;
  const GgufTensor* tensor(std::string_view name) const;  // nullptr where absent

  // Typed access: nullopt where the key is absent, ModelFileError where it has another type or range. A float
  // may be stored as an integer.
  std::optional<std::int64_t> get_int(std::string_view key) const;
  std::optional<double> get_float(std::string_view key) const;
  std::optional<bool> get_bool(std::string_view key) const;
  std::optional<std::string_view> get_string(std::string_view key) const;

  /// Tells the kernel that these mapped pages are not needed again soon (they stay valid).
  void release(std::span<const std::byte> pages) const;
  /// The same of all pages.
  void release_all() const { release(bytes_); }

 private:
  friend class GgufParser;
  GgufFile() = default;
  [[noreturn]] void refuse(std::string_view key, const char* expected, const GgufValue& got) const;

  std::string path_;
  FileState state_;
  std::span<const std::byte> bytes_;
  int descriptor_ = -1;
  bool mapped_ = false;
  std::uint32_t version_ = 0;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufKind> kinds_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, std::size_t> key_index_;
  std::unordered_map<std::string_view, std::size_t> tensor_index_;
};

}  // namespace turbosparse
