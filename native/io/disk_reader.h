// Many reads of one file at a time, around the page cache: O_DIRECT by io_uring, or by a pool of threads that
// call pread; or through a mapping, where the page cache is wanted. Which of them works is found out when a
// file is opened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "io/gguf_file.h"

namespace turbosparse {

/// Offsets, sizes and addresses of reads are multiples of it: what any disk asks of O_DIRECT.
inline constexpr std::size_t kDiskBlock = 4096;

/// A read that was asked for. `to` is aligned to kDiskBlock.
struct DiskRead {
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  std::byte* to = nullptr;
  std::uint64_t tag = 0;  // the asker's
};

/// How a read ended.
struct DiskDone {
  std::uint64_t tag = 0;
  int error = 0;  // 0, an errno, or kEndOfFile
};
inline constexpr int kEndOfFile = -1;
/// "Input/output error", or "the end of the file".
std::string disk_error_text(int error);

/// Not for two threads at once. Reads end in any order. A destructor waits for those that are on their way.
class DiskReader {
 public:
  virtual ~DiskReader() = default;
  DiskReader() = default;
  DiskReader(const DiskReader&) = delete;
  DiskReader& operator=(const DiskReader&) = delete;

  /// "io_uring", "pread" or "mmap".
  virtual const char* name() const = 0;
  /// How many reads may be on their way.
  virtual std::size_t depth() const = 0;
  /// Starts reads. A read ends whole or with an error.
  virtual void start(std::span<const DiskRead> reads) = 0;
  /// Waits for at least one read to end and stores up to done.size(); returns how many, 0 where none is on
  /// its way.
  virtual std::size_t wait(std::span<DiskDone> done) = 0;
};

/// A file open for reading; O_DIRECT where its file system allows.
class DiskFile {
 public:
  /// Throws ModelFileError.
  DiskFile(const std::string& path, bool direct);
  /// The same file once more. Throws ModelFileError where another one has its name now, or it was changed.
  DiskFile(const GgufFile& file, bool direct);
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  int get() const { return descriptor_; }
  std::size_t bytes() const { return state_.bytes; }
  /// Whether O_DIRECT was asked for and its file system has none.
  bool through_cache() const { return through_cache_; }
  /// Whether size and time of modification are those it was opened with. A file that was removed stays
  /// readable and counts as unchanged.
  bool unchanged() const;

 private:
  int descriptor_ = -1;
  bool through_cache_ = false;
  FileState state_;
};

/// Reads at once. 0, an errno, or kEndOfFile.
int read_whole(int descriptor, DiskRead read);

/// A reader, and why it does not read as well as one might ("" where it does).
struct OpenedReader {
  std::unique_ptr<DiskReader> reader;
  std::string note;
};

/// A reader of `file`, which it shares: `name`, or for "" the first of io_uring and pread that works. Throws
/// ConfigError for another name, or one that does not work here.
OpenedReader open_disk_reader(const std::shared_ptr<const DiskFile>& file, std::string_view name);

// One maker per kind. A string says why it does not work here.
std::unique_ptr<DiskReader> make_uring_reader(std::shared_ptr<const DiskFile> file, std::string* why_not);
std::unique_ptr<DiskReader> make_pread_reader(std::shared_ptr<const DiskFile> file);
std::unique_ptr<DiskReader> make_mapped_reader(std::shared_ptr<const DiskFile> file);

}  // namespace turbosparse
