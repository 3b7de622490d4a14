// Reads through a mapping and the page cache: for files that other processes read too, and for disks that are
// memory. The kernel is told what comes; pages are faulted in by madvise, which returns an error where
// touching them would end the process.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <utility>

#include "io/disk_reader.h"
#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::size_t kDepth = 512;
#if defined(MADV_POPULATE_READ)
constexpr int kPopulate = MADV_POPULATE_READ;
#else
constexpr int kPopulate = 22;  // Linux 5.14; older kernels refuse it with EINVAL
#endif

class MappedReader final : public DiskReader {
 public:
  explicit MappedReader(std::shared_ptr<const DiskFile> file) : file_(std::move(file)) {
    void* const start = ::mmap(nullptr, file_->bytes(), PROT_READ, MAP_SHARED, file_->get(), 0);
    if (start == MAP_FAILED)
      throw ConfigError(std::string("[io mmap] expected a mapping, got ") + std::strerror(errno));
    data_ = static_cast<std::byte*>(start);
    (void)::madvise(data_, file_->bytes(), MADV_RANDOM);
  }
  ~MappedReader() override { ::munmap(data_, file_->bytes()); }

  const char* name() const override { return "mmap"; }
  std::size_t depth() const override { return kDepth; }

  void start(std::span<const DiskRead> reads) override {
    for (const DiskRead& read : reads) {
      if (inside(read)) (void)::madvise(data_ + read.offset, read.bytes, MADV_WILLNEED);
      waiting_.push_back(read);
    }
  }

  std::size_t wait(std::span<DiskDone> done) override {
    if (waiting_.empty() || done.empty()) return 0;
    const DiskRead read = waiting_.front();
    waiting_.pop_front();
    done[0] = {read.tag, copy(read)};
    return 1;
  }

 private:
  bool inside(const DiskRead& read) const {
    return read.offset <= file_->bytes() && read.bytes <= file_->bytes() - read.offset;
  }

  int copy(const DiskRead& read) const {
    if (!inside(read)) return kEndOfFile;
    std::byte* from = data_ + read.offset;
    if (::madvise(from, read.bytes, kPopulate) != 0 && errno != EINVAL) {
      return errno == EFAULT || errno == EHWPOISON ? EIO : errno;
    }
    std::memcpy(read.to, from, read.bytes);
    (void)::madvise(from, read.bytes, MADV_DONTNEED);  // the copy counts, the mapping need not as well
    return 0;
  }

  std::shared_ptr<const DiskFile> file_;
  std::byte* data_ = nullptr;
  std::deque<DiskRead> waiting_;
};

}  // namespace

std::unique_ptr<DiskReader> make_mapped_reader(std::shared_ptr<const DiskFile> file) {
  return std::make_unique<MappedReader>(std::move(file));
}

}  // namespace turbosparse
