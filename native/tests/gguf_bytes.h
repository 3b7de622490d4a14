// Builds the bytes of GGUF files, sound ones and broken ones, for the tests of the reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/gguf_file.h"

namespace turbosparse::test {

/// Little-endian bytes, with the places of all integers in them (where a mutation hurts most).
struct Bytes {
  std::vector<std::byte> data;
  struct Integer {
    std::size_t at;
    std::size_t width;
  };
  std::vector<Integer> integers;

  template <class T>
  Bytes& put(T value) {
    if constexpr (sizeof(T) >= 4) integers.push_back({data.size(), sizeof(T)});
    const auto at = data.size();
    data.resize(at + sizeof value);
    std::memcpy(data.data() + at, &value, sizeof value);
    return *this;
  }
  Bytes& raw(std::string_view text) {
    const auto* from = reinterpret_cast<const std::byte*>(text.data());
    data.insert(data.end(), from, from + text.size());
    return *this;
  }
  Bytes& string(std::string_view text) { return put(std::uint64_t{text.size()}).raw(text); }
  Bytes& append(const Bytes& other) {
    for (const auto& integer : other.integers) integers.push_back({integer.at + data.size(), integer.width});
    data.insert(data.end(), other.data.begin(), other.data.end());
    return *this;
  }
};

inline Bytes entry(std::string_view key, GgufKind kind) {
  Bytes bytes;
  bytes.string(key).put(static_cast<std::uint32_t>(kind));
  return bytes;
}
template <class T>
Bytes entry(std::string_view key, GgufKind kind, T value) {
  return entry(key, kind).put(value);
}
inline Bytes string_entry(std::string_view key, std::string_view value) {
  return entry(key, GgufKind::kString).string(value);
}
inline Bytes array_entry(std::string_view key, GgufKind kind, std::uint64_t count) {
  return entry(key, GgufKind::kArray).put(static_cast<std::uint32_t>(kind)).put(count);
}

struct TensorEntry {
  std::string name;
  std::vector<std::uint64_t> dims;  // fastest first, as in the file
  std::uint32_t type = 0;
  std::uint64_t offset = 0;
};

/// What to write; each count can be made to lie.
struct GgufSpec {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::optional<std::uint64_t> tensor_count;
  std::optional<std::uint64_t> metadata_count;
  std::vector<Bytes> metadata;
  std::vector<TensorEntry> tensors;
  std::size_t alignment = 32;
  std::size_t data_bytes = 0;

  Bytes build() const {
    Bytes out;
    out.raw(magic).put(version);
    out.put(tensor_count.value_or(tensors.size())).put(metadata_count.value_or(metadata.size()));
    for (const auto& one : metadata) out.append(one);
    for (const auto& tensor : tensors) {
      out.string(tensor.name).put(static_cast<std::uint32_t>(tensor.dims.size()));
      for (const auto dim : tensor.dims) out.put(dim);
      out.put(tensor.type).put(tensor.offset);
    }
    if (data_bytes != 0) {
      out.data.resize((out.data.size() + alignment - 1) / alignment * alignment);
      for (std::size_t i = 0; i < data_bytes; ++i) out.data.push_back(static_cast<std::byte>(i * 7 + 1));
    }
    return out;
  }
};

/// A sound file with every kind of value and several tensors.
inline GgufSpec sound_spec() {
  GgufSpec spec;
  spec.metadata = {
      string_entry("general.architecture", "llama"),
      entry("a.uint8", GgufKind::kUint8, std::uint8_t{255}),
      entry("a.int8", GgufKind::kInt8, std::int8_t{-128}),
      entry("a.uint16", GgufKind::kUint16, std::uint16_t{65535}),
      entry("a.int16", GgufKind::kInt16, std::int16_t{-32768}),
      entry("a.uint32", GgufKind::kUint32, std::uint32_t{7}),
      entry("a.int32", GgufKind::kInt32, std::int32_t{-7}),
      entry("a.float32", GgufKind::kFloat32, 0.5f),
      entry("a.bool", GgufKind::kBool, std::uint8_t{1}),
      entry("a.uint64", GgufKind::kUint64, ~std::uint64_t{0}),
      entry("a.int64", GgufKind::kInt64, std::int64_t{-1}),
      entry("a.float64", GgufKind::kFloat64, 0.25),
      array_entry("list.string", GgufKind::kString, 3)
          .string("ab")
          .string("")
          .string("\xC3\xA4\xF0\x9F\x99\x82"),
      array_entry("list.int32", GgufKind::kInt32, 2).put(std::int32_t{-3}).put(std::int32_t{4}),
      array_entry("list.bool", GgufKind::kBool, 2).put(std::uint8_t{0}).put(std::uint8_t{1}),
      array_entry("list.float64", GgufKind::kFloat64, 1).put(1.5),
      array_entry("list.empty", GgufKind::kUint8, 0),
  };
  spec.tensors = {
      {"blk.0.ffn_up.weight", {64, 3}, 8, 0},    // Q8_0: 2 blocks of 34 bytes per row, 204 bytes
      {"blk.0.ffn_threshold", {3}, 0, 224},      // F32: 12 bytes
      {"blk.0.experts", {2, 2, 2, 2}, 1, 256},   // F16: 32 bytes
      {"token_embd.weight", {256, 1}, 12, 288},  // Q4_K: 144 bytes
  };
  spec.data_bytes = 288 + 144;
  return spec;
}

}  // namespace turbosparse::test
