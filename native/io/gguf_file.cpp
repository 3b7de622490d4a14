#include "io/gguf_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "io/gguf_parser.h"
#include "util/error.h"

namespace turbosparse {
namespace {

/// An open file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

[[noreturn]] void refuse_file(const std::string& path, const std::string& got) {
  throw ModelFileError("[" + path + "] expected a readable model file, got " + got);
}

std::string describe(const GgufValue& value) {
  if (const auto* text = std::get_if<std::string_view>(&value)) return "the string " + quoted(*text);
  if (const auto* u = std::get_if<std::uint64_t>(&value)) return std::to_string(*u);
  if (const auto* i = std::get_if<std::int64_t>(&value)) return std::to_string(*i);
  if (const auto* d = std::get_if<double>(&value)) return std::to_string(*d);
  if (const auto* b = std::get_if<bool>(&value)) return *b ? "true" : "false";
  return "an array";
}

}  // namespace

std::shared_ptr<const GgufFile> GgufFile::open(const std::string& path) {
  // Non-blocking, so that opening a pipe returns and can be refused; it means nothing for regular files.
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) refuse_file(path, std::strerror(errno));
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) refuse_file(path, std::strerror(errno));
  if (S_ISDIR(status.st_mode)) refuse_file(path, "a directory");
  if (!S_ISREG(status.st_mode)) refuse_file(path, "something that is not a regular file");
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) refuse_file(path, "an empty file");
  void* const start = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (start == MAP_FAILED) refuse_file(path, std::strerror(errno));

  const std::shared_ptr<GgufFile> opened(new GgufFile);
  opened->path_ = path;
  opened->state_ = FileState(status);
  opened->bytes_ = {static_cast<const std::byte*>(start), size};
  opened->mapped_ = true;
  opened->descriptor_ = file.release();
  GgufParser(opened.get()).parse();
  return opened;
}

std::shared_ptr<const GgufFile> GgufFile::parse(std::span<const std::byte> bytes) {
  const std::shared_ptr<GgufFile> parsed(new GgufFile);
  parsed->path_ = "bytes";
  parsed->bytes_ = bytes;
  GgufParser(parsed.get()).parse();
  return parsed;
}

GgufFile::~GgufFile() {
  if (mapped_) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  if (descriptor_ >= 0) ::close(descriptor_);
}

bool GgufFile::whole() const {
  struct stat status{};
  return descriptor_ < 0 ||
         (::fstat(descriptor_, &status) == 0 && static_cast<std::size_t>(status.st_size) >= bytes_.size());
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto found = key_index_.find(key);
  return found == key_index_.end() ? nullptr : &metadata_[found->second].second;
}

const GgufTensor* GgufFile::tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

void GgufFile::refuse(std::string_view key, const char* expected, const GgufValue& got) const {
  throw ModelFileError("[" + path_ + ": key " + quoted(key) + "] expected " + expected + ", got " +
                       describe(got));
}

std::optional<std::int64_t> GgufFile::get_int(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* i = std::get_if<std::int64_t>(value)) return *i;
  const auto* u = std::get_if<std::uint64_t>(value);
  if (u == nullptr) refuse(key, "an integer", *value);
  if (*u > std::uint64_t{std::numeric_limits<std::int64_t>::max()})
    refuse(key, "an integer below 2^63", *value);
  return static_cast<std::int64_t>(*u);
}

std::optional<double> GgufFile::get_float(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* d = std::get_if<double>(value)) return *d;
  if (const auto* u = std::get_if<std::uint64_t>(value)) return static_cast<double>(*u);
  if (const auto* i = std::get_if<std::int64_t>(value)) return static_cast<double>(*i);
  refuse(key, "a number", *value);
}

std::optional<bool> GgufFile::get_bool(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* b = std::get_if<bool>(value)) return *b;
  refuse(key, "true or false", *value);
}

std::optional<std::string_view> GgufFile::get_string(std::string_view key) const {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* text = std::get_if<std::string_view>(value)) return *text;
  refuse(key, "a string", *value);
}

void GgufFile::release(std::span<const std::byte> pages) const {
  if (!mapped_) return;
  // Whole pages inside the span only: a neighbour may still need the pages it shares.
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (static_cast<std::size_t>(pages.data() - bytes_.data()) + page - 1) / page * page;
  const auto end = static_cast<std::size_t>(pages.data() + pages.size() - bytes_.data()) / page * page;
  if (begin >= end) return;
  // Only advice: a refusal changes nothing that the caller could see.
  (void)::madvise(const_cast<std::byte*>(bytes_.data() + begin), end - begin, MADV_DONTNEED);
}

}  // namespace turbosparse
