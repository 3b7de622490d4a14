// The checks behind GgufFile: one pass over the header, nothing believed before it is compared with the bytes
// left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "io/gguf_file.h"

namespace turbosparse {

/// `text` in quotes, shortened, with control characters and bytes outside ASCII escaped: safe for a message.
std::string quoted(std::string_view text);

class GgufParser {
 public:
  /// Reads `file->bytes_` and fills the rest of `file`.
  explicit GgufParser(GgufFile* file);
  void parse();

 private:
  void parse_header();
  void parse_metadata();
  void parse_tensor_infos();
  void place_tensors();
  void check_overlap() const;
  void check_booleans(std::span<const std::byte> values) const;

  GgufValue read_value(GgufKind kind);
  GgufValue read_array();
  GgufKind read_kind();
  std::string_view read_string(std::size_t longest);
  std::string_view read_name(std::size_t longest);
  std::span<const std::byte> take(std::uint64_t count);
  template <class T>
  T read();

  std::size_t left() const { return bytes_.size() - at_; }
  [[noreturn]] void fail(const std::string& expected, const std::string& got) const;

  GgufFile* file_;
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  std::uint64_t tensor_count_ = 0;
  std::uint64_t metadata_count_ = 0;
  std::string place_ = "header";  // what is being read, for messages
};

}  // namespace turbosparse
