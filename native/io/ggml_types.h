// Every tensor type that GGUF files use, readable by us or not, so that any sound file can be inspected.
#pragma once

#include <cstdint>

namespace turbosparse {

/// `block` values are stored in `bytes` bytes. A row holds a whole number of blocks.
struct GgmlType {
  std::uint32_t code;
  const char* name;
  std::int64_t block;
  std::int64_t bytes;
};

/// The entry of ggml's type code; nullptr where no file may hold that code.
const GgmlType* find_ggml_type(std::uint32_t code) noexcept;

}  // namespace turbosparse
