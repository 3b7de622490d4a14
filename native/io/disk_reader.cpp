#include "io/disk_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

[[noreturn]] void refuse(const std::string& path) {
  throw ModelFileError("[" + path + "] expected a file that can be read, got " + std::strerror(errno));
}

}  // namespace

std::string disk_error_text(int error) {
  return error == kEndOfFile ? "the end of the file" : std::strerror(error);
}

int read_whole(int descriptor, DiskRead read) {
  while (read.bytes > 0) {
    const ssize_t got = ::pread(descriptor, read.to, read.bytes, static_cast<off_t>(read.offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kEndOfFile;
    const auto size = static_cast<std::size_t>(got);
    read.offset += size;
    read.to += size;
    read.bytes -= size;
  }
  return 0;
}

DiskFile::DiskFile(const std::string& path, bool direct) {
#if defined(O_DIRECT)
  if (direct) descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
  // Some file systems have no O_DIRECT; what is read then passes through the page cache.
  through_cache_ = direct && descriptor_ < 0;
  if (descriptor_ < 0) descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) refuse(path);
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0) {
    ::close(descriptor_);
    refuse(path);
  }
  state_ = FileState(status);
}

DiskFile::DiskFile(const GgufFile& file, bool direct) : DiskFile(file.path(), direct) {
  if (state_ == file.state()) return;
  throw ModelFileError("[" + file.path() + "] expected it as it was when it was opened, got another file");
}

DiskFile::~DiskFile() { ::close(descriptor_); }

bool DiskFile::unchanged() const {
  struct stat status{};
  return ::fstat(descriptor_, &status) == 0 && FileState(status) == state_;
}

OpenedReader open_disk_reader(const std::shared_ptr<const DiskFile>& file, std::string_view name) {
  std::string note;
  if (file->through_cache()) note = "its file system has no O_DIRECT: reads go through the page cache";
  if (name == "pread") return {make_pread_reader(file), note};
  if (name == "mmap") return {make_mapped_reader(file), ""};
  if (name != "io_uring" && !name.empty()) {
    throw ConfigError("[io] expected io_uring, pread or mmap, got " + std::string(name));
  }
  std::string why_not;
  std::unique_ptr<DiskReader> reader = make_uring_reader(file, &why_not);
  if (reader) return {std::move(reader), note};
  if (!name.empty()) throw ConfigError("[io] expected a kernel that allows io_uring, got " + why_not);
  if (!note.empty()) note += "; ";
  return {make_pread_reader(file),
          note + "io_uring does not work here (" + why_not + "): threads with pread instead"};
}

}  // namespace turbosparse
