// The model-file reader: what a sound file gives, and one case per way in which a file can be bad.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <string>

#include "check.h"
#include "gguf_bytes.h"
#include "io/ggml_types.h"
#include "io/gguf_file.h"
#include "util/error.h"

namespace turbosparse::test {
namespace {

constexpr std::uint64_t kHuge = ~std::uint64_t{0};

void check_sound() {
  const auto bytes = sound_spec().build();
  const auto file = GgufFile::parse(bytes.data);
  CHECK(file->version() == 3, "version %u", file->version());
  CHECK(file->metadata().size() == 17 && file->kinds().size() == 17, "%zu keys", file->metadata().size());
  CHECK(file->get_string("general.architecture") == "llama", "architecture");
  CHECK(file->get_int("a.uint8") == 255 && file->get_int("a.int8") == -128, "8 bits");
  CHECK(file->get_int("a.uint16") == 65535 && file->get_int("a.int16") == -32768, "16 bits");
  CHECK(file->get_int("a.uint32") == 7 && file->get_int("a.int32") == -7, "32 bits");
  CHECK(file->get_int("a.int64") == -1, "64 bits");
  CHECK(file->get_float("a.float32") == 0.5 && file->get_float("a.float64") == 0.25, "floats");
  CHECK(file->get_float("a.int32") == -7.0, "an integer where a float is asked for");
  CHECK(file->get_bool("a.bool") == true, "boolean");
  CHECK(!file->get_int("absent") && !file->get_bool("absent") && !file->get_string("absent"), "absent keys");
  CHECK(file->find("absent") == nullptr && file->tensor("absent") == nullptr, "absent names");

  const auto& strings = *std::get<std::shared_ptr<const GgufArray>>(*file->find("list.string"));
  CHECK(strings.kind == GgufKind::kString && strings.size == 3, "array of strings");
  CHECK(std::get<std::string_view>(strings.at(0)) == "ab", "first string");
  CHECK(std::get<std::string_view>(strings.at(2)).size() == 6, "third string");
  const auto& integers = *std::get<std::shared_ptr<const GgufArray>>(*file->find("list.int32"));
  CHECK(std::get<std::int64_t>(integers.at(0)) == -3 && integers.bytes.size() == 8, "array of integers");

  CHECK(file->tensors().size() == 4, "%zu tensors", file->tensors().size());
  const auto* up = file->tensor("blk.0.ffn_up.weight");
  CHECK(up != nullptr && up->shape == (std::vector<std::int64_t>{3, 64}), "slowest dimension first");
  CHECK(up->data.size() == 204 && up->data[0] == std::byte{1}, "%zu bytes of Q8_0", up->data.size());
  const auto* threshold = file->tensor("blk.0.ffn_threshold");
  CHECK(threshold->offset == up->offset + 224, "offset from the start of the file");
  CHECK(threshold->data.data() == bytes.data.data() + threshold->offset, "a view, not a copy");
}

/// Runs `use` and checks that it throws ModelFileError with `text` in the message.
void check_refused(const char* name, const char* text, const std::function<void()>& use) {
  try {
    use();
  } catch (const ModelFileError& error) {
    const std::string message = error.what();
    CHECK(message.find(text) != std::string::npos, "%s: \"%s\" lacks \"%s\"", name, message.c_str(), text);
    CHECK(message.front() == '[' && message.find("] expected ") != std::string::npos, "%s", message.c_str());
    CHECK(message.find('\n') == std::string::npos, "%s: more than one line", name);
    return;
  }
  CHECK(false, "%s was not refused", name);
}

void check_broken(const char* name, const char* text, const std::function<void(GgufSpec&)>& change) {
  auto spec = sound_spec();
  change(spec);
  const auto bytes = spec.build();
  check_refused(name, text, [&] { GgufFile::parse(bytes.data); });
}

void check_broken_headers() {
  check_broken("magic", "expected magic 'GGUF', got 'GGML'", [](GgufSpec& s) { s.magic = "GGML"; });
  check_broken("binary magic", "got '\\x7fELF'", [](GgufSpec& s) {
    s.magic =
        "\x7f"
        "ELF";
  });
  check_broken("PowerInfer", "PowerInfer", [](GgufSpec& s) { s.magic = "PWRI"; });
  check_broken("version 1", "expected version 2 or 3, got 1", [](GgufSpec& s) { s.version = 1; });
  check_broken("version 4", "got 4", [](GgufSpec& s) { s.version = 4; });
  check_broken("big-endian", "little-endian", [](GgufSpec& s) { s.version = 0x03000000; });
  check_broken("tensor count", "tensor count", [](GgufSpec& s) { s.tensor_count = 1000; });
  check_broken("huge tensor count", "tensor count", [](GgufSpec& s) { s.tensor_count = kHuge; });
  check_broken("metadata count", "metadata count", [](GgufSpec& s) { s.metadata_count = kHuge / 14 + 1; });
  check_broken("one key too many", "[bytes: ", [](GgufSpec& s) { s.metadata_count = s.metadata.size() + 1; });
}

void check_broken_metadata() {
  const auto add = [](const char* name, const char* text, const Bytes& one) {
    check_broken(name, text, [&](GgufSpec& s) { s.metadata.insert(s.metadata.begin(), one); });
  };
  add("duplicate key", "expected each key once", string_entry("general.architecture", "llama"));
  add("empty key", "expected a name", string_entry("", "x"));
  add("key with bad UTF-8", "expected UTF-8, got 'a\\xff'", string_entry("a\xff", "x"));
  add("overlong UTF-8", "expected UTF-8", string_entry("k", "\xC0\x80"));
  add("surrogate", "expected UTF-8", string_entry("k", "\xED\xA0\x80"));
  add("cut-off UTF-8", "expected UTF-8", string_entry("k", "\xE2\x82"));
  add("above Unicode", "expected UTF-8", string_entry("k", "\xF4\x90\x80\x80"));
  add("long key", "at most 65535 bytes", string_entry(std::string(65536, 'k'), "x"));
  add("kind", "value kind from 0 to 12, got 13", Bytes{}.string("k").put(std::uint32_t{13}));
  add("array of arrays", "array of arrays", array_entry("k", GgufKind::kArray, 1));
  add("array kind", "value kind", array_entry("k", static_cast<GgufKind>(99), 1));
  add("array count", "expected an array that fits",
      array_entry("k", GgufKind::kUint64, std::uint64_t{1} << 61));
  add("string count", "expected an array that fits",
      array_entry("k", GgufKind::kString, std::uint64_t{1} << 40));
  add("string length", "before the end of the file",
      entry("k", GgufKind::kString).put(std::uint64_t{1} << 63));
  add("boolean", "boolean of 0 or 1, got 2", entry("k", GgufKind::kBool, std::uint8_t{2}));
  add("boolean in an array", "boolean", array_entry("k", GgufKind::kBool, 1).put(std::uint8_t{9}));
  const auto alignment = [&](std::uint32_t value) {
    add("alignment", "power of two", entry("general.alignment", GgufKind::kUint32, value));
  };
  alignment(0);
  alignment(48);
  alignment(std::uint32_t{1} << 31);
  add("negative alignment", "got -32", entry("general.alignment", GgufKind::kInt32, std::int32_t{-32}));
  add("alignment of another kind", "expected an integer, got the string 'x'",
      string_entry("general.alignment", "x"));
}

void check_broken_tensors() {
  check_broken("duplicate tensor", "expected each tensor once",
               [](GgufSpec& s) { s.tensors[1].name = s.tensors[0].name; });
  check_broken("empty name", "expected a name", [](GgufSpec& s) { s.tensors[0].name = ""; });
  check_broken("long name", "at most 127", [](GgufSpec& s) { s.tensors[0].name = std::string(128, 'x'); });
  check_broken("control character", "'a\\x1b[31m'", [](GgufSpec& s) {
    s.tensors[0].name = "a\x1b[31m";
    s.tensors[0].type = 99;
  });
  check_broken("no dimension", "1 to 4 dimensions, got 0", [](GgufSpec& s) { s.tensors[0].dims.clear(); });
  check_broken("five dimensions", "got 5", [](GgufSpec& s) { s.tensors[0].dims = {1, 1, 1, 1, 1}; });
  check_broken("zero", "dimensions of 1 or more, got 0", [](GgufSpec& s) { s.tensors[0].dims = {64, 0}; });
  check_broken("negative", "dimensions of 1 or more", [](GgufSpec& s) { s.tensors[0].dims = {64, kHuge}; });
  check_broken("overflow", "a size within the file",
               [](GgufSpec& s) { s.tensors[1].dims = {std::uint64_t{1} << 32, std::uint64_t{1} << 32}; });
  check_broken("overflow of one row", "a size within", [](GgufSpec& s) { s.tensors[1].dims = {kHuge / 2}; });
  check_broken("type", "type code 4", [](GgufSpec& s) { s.tensors[0].type = 4; });
  check_broken("block", "multiple of 32 values for type Q8_0, got 65",
               [](GgufSpec& s) { s.tensors[0].dims[0] = 65; });
  check_broken("unaligned", "aligned to 32", [](GgufSpec& s) { s.tensors[1].offset = 225; });
  check_broken("past the end", "inside the file", [](GgufSpec& s) { s.tensors[3].offset = 320; });
  check_broken("far past the end", "inside the file", [](GgufSpec& s) { s.tensors[3].offset = kHuge - 31; });
  check_broken("overlap", "do not overlap, got 'blk.0.ffn_up.weight' and 'blk.0.ffn_threshold'",
               [](GgufSpec& s) { s.tensors[1].offset = 192; });
  check_broken("same place", "do not overlap",
               [](GgufSpec& s) { s.tensors[1].offset = s.tensors[2].offset; });
  check_broken("no data", "inside the file", [](GgufSpec& s) { s.data_bytes = 0; });
}

void check_truncated() {
  const auto bytes = sound_spec().build();
  for (std::size_t size = 0; size < bytes.data.size(); ++size) {
    // Its own allocation, so that the sanitizer sees the end.
    const std::vector<std::byte> cut(bytes.data.begin(),
                                     bytes.data.begin() + static_cast<std::ptrdiff_t>(size));
    check_refused("truncated", "[bytes: ", [&] { GgufFile::parse(cut); });
  }
}

void check_tolerated() {
  auto spec = sound_spec();
  spec.version = 2;
  std::swap(spec.tensors[0], spec.tensors[3]);              // any order
  spec.tensors[1].name = std::string(127, 'x');             // longer than the specification allows
  spec.tensors.push_back({"gap", {1}, 0, 288 + 160 + 64});  // space between tensors
  spec.data_bytes = 288 + 160 + 64 + 4 + 1000;              // bytes behind the last tensor
  spec.metadata.push_back(entry("general.alignment", GgufKind::kUint64, std::uint64_t{32}));
  const auto bytes = spec.build();
  CHECK(GgufFile::parse(bytes.data)->tensors().size() == 5, "tolerated");
  const auto none = GgufSpec{}.build();
  CHECK(GgufFile::parse(none.data)->tensors().empty(), "an empty header is a file without tensors");
}

void check_typed_access() {
  const auto bytes = sound_spec().build();
  const auto file = GgufFile::parse(bytes.data);
  check_refused("int", "an integer, got the string 'llama'", [&] { file->get_int("general.architecture"); });
  check_refused("int", "an integer below 2^63", [&] { file->get_int("a.uint64"); });
  check_refused("float", "a number, got true", [&] { file->get_float("a.bool"); });
  check_refused("bool", "true or false, got 7", [&] { file->get_bool("a.uint32"); });
  check_refused("string", "a string, got an array", [&] { file->get_string("list.string"); });
  check_refused("string", "a string, got 0.5", [&] { file->get_string("a.float32"); });
}

void check_opening() {
  char folder[] = "/tmp/turbosparse-test-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr, "temporary folder");
  const std::string base = folder;
  const std::string path = base + "/model.gguf";
  check_refused("absent", "No such file", [&] { GgufFile::open(path); });
  check_refused("folder", "a directory", [&] { GgufFile::open(base); });
  check_refused("device", "not a regular file", [] { GgufFile::open("/dev/null"); });
  const std::string pipe = base + "/pipe";
  CHECK(mkfifo(pipe.c_str(), 0600) == 0, "pipe");
  check_refused("pipe", "not a regular file", [&] { GgufFile::open(pipe); });

  const auto write = [&](const std::vector<std::byte>& bytes) {
    std::FILE* out = std::fopen(path.c_str(), "wb");
    CHECK(bytes.empty() || std::fwrite(bytes.data(), bytes.size(), 1, out) == 1, "write");
    std::fclose(out);
  };
  write({});
  check_refused("empty", "an empty file", [&] { GgufFile::open(path); });

  auto spec = sound_spec();
  spec.tensors.push_back({"big", {64 * 1024}, 0, 448});  // many pages
  spec.data_bytes = 448 + 4 * 64 * 1024;
  const auto bytes = spec.build();
  write(bytes.data);
  const auto file = GgufFile::open(path);
  CHECK(file->path() == path && file->file_bytes() == bytes.data.size(), "path and size");
  const auto* big = file->tensor("big");
  const auto first = big->data.front();
  const auto last = big->data.back();
  file->release(big->data);
  file->release(big->data.first(1));
  CHECK(big->data.front() == first && big->data.back() == last, "released pages come back from the file");

  std::remove(path.c_str());
  std::remove(pipe.c_str());
  rmdir(folder);
}

void check_types() {
  CHECK(find_ggml_type(2)->bytes == 18 && find_ggml_type(14)->block == 256, "known types");
  CHECK(find_ggml_type(5) == nullptr && find_ggml_type(1000) == nullptr, "unknown types");
}

}  // namespace
}  // namespace turbosparse::test

int main() {
  using namespace turbosparse::test;
  check_sound();
  check_broken_headers();
  check_broken_metadata();
  check_broken_tensors();
  check_truncated();
  check_tolerated();
  check_typed_access();
  check_opening();
  check_types();
  return report();
}
