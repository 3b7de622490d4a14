#include "io/gguf_parser.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "io/ggml_types.h"
#include "util/error.h"

namespace turbosparse {
namespace {

static_assert(std::endian::native == std::endian::little,
              "GGUF is read in place, so the host must be little-endian");

constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = std::uint64_t{1} << 30;
constexpr std::size_t kLongestKey = 65535;       // the specification's limit
constexpr std::size_t kLongestTensorName = 127;  // it says 64; some converters write longer ones
constexpr std::uint32_t kMaxDims = 4;
// The least an entry can occupy; a count that needs more than the bytes left is refused before anything is
// kept.
constexpr std::uint64_t kLeastMetadataBytes = 8 + 1 + 4 + 1;  // name length, name, kind, value
constexpr std::uint64_t kLeastTensorBytes =
    8 + 1 + 4 + 8 + 4 + 8;  // name length, name, dims, dim, type, offset

/// Bytes of one value of a kind with fixed size; 0 for strings and arrays.
std::size_t kind_bytes(GgufKind kind) {
  switch (kind) {
    case GgufKind::kUint8:
    case GgufKind::kInt8:
    case GgufKind::kBool:
      return 1;
    case GgufKind::kUint16:
    case GgufKind::kInt16:
      return 2;
    case GgufKind::kUint32:
    case GgufKind::kInt32:
    case GgufKind::kFloat32:
      return 4;
    case GgufKind::kUint64:
    case GgufKind::kInt64:
    case GgufKind::kFloat64:
      return 8;
    case GgufKind::kString:
    case GgufKind::kArray:
      return 0;
  }
  return 0;
}

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

GgufValue load_scalar(GgufKind kind, const std::byte* from) {
  switch (kind) {
    case GgufKind::kUint8:
      return std::uint64_t{load<std::uint8_t>(from)};
    case GgufKind::kInt8:
      return std::int64_t{load<std::int8_t>(from)};
    case GgufKind::kUint16:
      return std::uint64_t{load<std::uint16_t>(from)};
    case GgufKind::kInt16:
      return std::int64_t{load<std::int16_t>(from)};
    case GgufKind::kUint32:
      return std::uint64_t{load<std::uint32_t>(from)};
    case GgufKind::kInt32:
      return std::int64_t{load<std::int32_t>(from)};
    case GgufKind::kFloat32:
      return double{load<float>(from)};
    case GgufKind::kBool:
      return load<std::uint8_t>(from) != 0;
    case GgufKind::kUint64:
      return load<std::uint64_t>(from);
    case GgufKind::kInt64:
      return load<std::int64_t>(from);
    case GgufKind::kFloat64:
      return load<double>(from);
    case GgufKind::kString:
    case GgufKind::kArray:
      break;
  }
  return std::uint64_t{0};  // strings and arrays are read elsewhere
}

/// Whether `text` is well-formed UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF.
bool valid_utf8(std::string_view text) {
  const auto* at = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = at + text.size();
  while (at != end) {
    const unsigned lead = *at++;
    if (lead < 0x80) continue;
    std::ptrdiff_t more = 0;
    unsigned low = 0x80;  // bounds of the second byte; the later ones are 0x80..0xBF
    unsigned high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      more = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      more = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      more = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (end - at < more || *at < low || *at > high) return false;
    if (!std::all_of(at + 1, at + more, [](unsigned char c) { return (c & 0xC0) == 0x80; })) return false;
    at += more;
  }
  return true;
}

std::string number(std::uint64_t value) { return std::to_string(value); }

}  // namespace

std::string quoted(std::string_view text) {
  constexpr std::size_t kShown = 80;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7F) {
      out += c;
    } else {
      out += "\\x";
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    }
  }
  return out + (text.size() > kShown ? "...'" : "'");
}

const char* gguf_kind_name(GgufKind kind) noexcept {
  constexpr const char* kNames[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                    "bool",  "string", "array",  "uint64", "int64",  "float64"};
  const auto index = static_cast<std::size_t>(kind);
  return index < std::size(kNames) ? kNames[index] : "?";
}

GgufValue GgufArray::at(std::size_t index) const {
  if (kind == GgufKind::kString) return strings[index];
  return load_scalar(kind, bytes.data() + index * kind_bytes(kind));
}

GgufParser::GgufParser(GgufFile* file) : file_(file), bytes_(file->bytes_) {}

void GgufParser::fail(const std::string& expected, const std::string& got) const {
  throw ModelFileError("[" + file_->path_ + ": " + place_ + "] expected " + expected + ", got " + got);
}

std::span<const std::byte> GgufParser::take(std::uint64_t count) {
  if (count > left()) {
    fail(number(count) + " more bytes", number(left()) + " before the end of the file");
  }
  const auto taken = bytes_.subspan(at_, static_cast<std::size_t>(count));
  at_ += taken.size();
  return taken;
}

template <class T>
T GgufParser::read() {
  return load<T>(take(sizeof(T)).data());
}

std::string_view GgufParser::read_string(std::size_t longest) {
  const auto length = read<std::uint64_t>();
  if (length > longest) fail("a string of at most " + number(longest) + " bytes", number(length));
  const auto raw = take(length);
  const std::string_view text(reinterpret_cast<const char*>(raw.data()), raw.size());
  if (!valid_utf8(text)) fail("UTF-8", quoted(text));
  return text;
}

std::string_view GgufParser::read_name(std::size_t longest) {
  const auto name = read_string(longest);
  if (name.empty()) fail("a name", "an empty one");
  return name;
}

GgufKind GgufParser::read_kind() {
  const auto kind = read<std::uint32_t>();
  if (kind > static_cast<std::uint32_t>(GgufKind::kFloat64)) fail("a value kind from 0 to 12", number(kind));
  return static_cast<GgufKind>(kind);
}

GgufValue GgufParser::read_array() {
  auto array = std::make_shared<GgufArray>();
  array->kind = read_kind();
  if (array->kind == GgufKind::kArray) fail("an array of numbers, booleans or strings", "an array of arrays");
  const auto count = read<std::uint64_t>();
  const std::uint64_t least = array->kind == GgufKind::kString ? 8 : kind_bytes(array->kind);
  if (count > left() / least) {
    fail("an array that fits the " + number(left()) + " bytes left", number(count) + " elements");
  }
  array->size = static_cast<std::size_t>(count);
  const auto begin = at_;
  if (array->kind == GgufKind::kString) {
    array->strings.reserve(array->size);
    for (std::size_t i = 0; i < array->size; ++i) {
      array->strings.push_back(read_string(std::numeric_limits<std::size_t>::max()));
    }
    array->bytes = bytes_.subspan(begin, at_ - begin);
  } else {
    array->bytes = take(count * least);
    if (array->kind == GgufKind::kBool) check_booleans(array->bytes);
  }
  return array;
}

void GgufParser::check_booleans(std::span<const std::byte> values) const {
  for (const auto value : values) {
    if (value > std::byte{1}) fail("a boolean of 0 or 1", number(std::to_integer<std::uint64_t>(value)));
  }
}

GgufValue GgufParser::read_value(GgufKind kind) {
  if (kind == GgufKind::kString) return read_string(std::numeric_limits<std::size_t>::max());
  if (kind == GgufKind::kArray) return read_array();
  const auto raw = take(kind_bytes(kind));
  if (kind == GgufKind::kBool) check_booleans(raw);
  return load_scalar(kind, raw.data());
}

void GgufParser::parse_header() {
  if (bytes_.empty()) fail("a GGUF file", "an empty file");
  const auto magic_bytes = bytes_.first(std::min<std::size_t>(4, bytes_.size()));
  const std::string_view magic(reinterpret_cast<const char*>(magic_bytes.data()), magic_bytes.size());
  if (magic == "PWRI") {
    fail("magic 'GGUF'", "'PWRI': a PowerInfer file, whose activation and predictors are stored differently");
  }
  if (magic != "GGUF") fail("magic 'GGUF'", quoted(magic));
  take(4);
  file_->version_ = read<std::uint32_t>();
  if (file_->version_ == 0x02000000 || file_->version_ == 0x03000000) {
    fail("a little-endian file", "a big-endian one");
  }
  if (file_->version_ != 2 && file_->version_ != 3) fail("version 2 or 3", number(file_->version_));
  tensor_count_ = read<std::uint64_t>();
  metadata_count_ = read<std::uint64_t>();
  if (metadata_count_ > left() / kLeastMetadataBytes) {
    fail("a metadata count that fits the " + number(left()) + " bytes left", number(metadata_count_));
  }
  const auto after_metadata = left() - metadata_count_ * kLeastMetadataBytes;
  if (tensor_count_ > after_metadata / kLeastTensorBytes) {
    fail("a tensor count that fits the " + number(left()) + " bytes left", number(tensor_count_));
  }
}

void GgufParser::parse_metadata() {
  for (std::uint64_t i = 0; i < metadata_count_; ++i) {
    place_ = "metadata entry " + number(i);
    const auto key = read_name(kLongestKey);
    place_ = "key " + quoted(key);
    const auto kind = read_kind();
    file_->metadata_.emplace_back(std::string(key), read_value(kind));
    file_->kinds_.push_back(kind);
    // Keys of the index point into the file, which neither moves nor changes.
    if (!file_->key_index_.emplace(key, i).second) fail("each key once", "it twice");
  }
}

void GgufParser::parse_tensor_infos() {
  for (std::uint64_t i = 0; i < tensor_count_; ++i) {
    place_ = "tensor entry " + number(i);
    const auto name = read_name(kLongestTensorName);
    place_ = "tensor " + quoted(name);
    GgufTensor tensor;
    tensor.name = name;
    const auto dims = read<std::uint32_t>();
    if (dims < 1 || dims > kMaxDims) fail("1 to 4 dimensions", number(dims));
    tensor.shape.resize(dims);
    for (auto dim = tensor.shape.rbegin(); dim != tensor.shape.rend(); ++dim) {
      const auto extent = read<std::uint64_t>();
      if (extent < 1 || extent > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
        fail("dimensions of 1 or more", number(extent));
      }
      *dim = static_cast<std::int64_t>(extent);
    }
    tensor.type = read<std::uint32_t>();
    tensor.offset = read<std::uint64_t>();
    file_->tensors_.push_back(std::move(tensor));
    if (!file_->tensor_index_.emplace(name, i).second) fail("each tensor once", "it twice");
  }
}

void GgufParser::place_tensors() {
  place_ = "key 'general.alignment'";
  const auto alignment = static_cast<std::uint64_t>(
      file_->get_int("general.alignment").value_or(std::int64_t{kDefaultAlignment}));
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    fail("a power of two up to 2^30", std::to_string(static_cast<std::int64_t>(alignment)));
  }
  const std::uint64_t data_begin = (at_ + alignment - 1) / alignment * alignment;
  const std::uint64_t file_bytes = bytes_.size();
  for (auto& tensor : file_->tensors_) {
    place_ = "tensor " + quoted(tensor.name);
    const auto* type = find_ggml_type(tensor.type);
    if (type == nullptr) fail("a known tensor type", "type code " + number(tensor.type));
    if (tensor.shape.back() % type->block != 0) {
      fail(std::string("rows of a multiple of ") + number(static_cast<std::uint64_t>(type->block)) +
               " values for type " + type->name,
           std::to_string(tensor.shape.back()));
    }
    // Every factor is at least 1, so comparing with the file's size at each step also rules out an overflow.
    std::uint64_t size = static_cast<std::uint64_t>(tensor.shape.back() / type->block);
    bool fits = size <= file_bytes;
    if (fits) size *= static_cast<std::uint64_t>(type->bytes);
    for (auto dim = tensor.shape.rbegin() + 1; fits && dim != tensor.shape.rend(); ++dim) {
      const auto extent = static_cast<std::uint64_t>(*dim);
      fits = extent <= file_bytes / size;
      if (fits) size *= extent;
    }
    if (!fits || size > file_bytes) fail("a size within the file's " + number(file_bytes) + " bytes", "more");
    if (tensor.offset % alignment != 0) {
      fail("an offset aligned to " + number(alignment) + " bytes", number(tensor.offset));
    }
    if (data_begin > file_bytes - size || tensor.offset > file_bytes - size - data_begin) {
      fail(number(size) + " bytes of data inside the file's " + number(file_bytes),
           "an offset of " + number(tensor.offset) + " behind byte " + number(data_begin));
    }
    tensor.offset += data_begin;
    tensor.data = bytes_.subspan(static_cast<std::size_t>(tensor.offset), static_cast<std::size_t>(size));
  }
}

void GgufParser::check_overlap() const {
  const auto& tensors = file_->tensors_;
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return tensors[a].offset < tensors[b].offset; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const auto& before = tensors[order[i - 1]];
    const auto& after = tensors[order[i]];
    if (after.offset - before.offset < before.data.size()) {
      fail("tensors that do not overlap", quoted(before.name) + " and " + quoted(after.name));
    }
  }
}

void GgufParser::parse() {
  parse_header();
  parse_metadata();
  parse_tensor_infos();
  place_tensors();
  place_ = "tensor data";
  check_overlap();
}

}  // namespace turbosparse
