// Reads by io_uring, spoken to by its three system calls. One thread at a time uses the two rings: plain
// loads and stores, but for the indices that the kernel moves.
#include "io/disk_reader.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

namespace turbosparse {
namespace {

constexpr unsigned kDepth = 512;

/// A part of the rings that kernel and process share.
class SharedPages {
 public:
  SharedPages() = default;
  SharedPages(int ring, std::size_t bytes, std::uint64_t at) : bytes_(bytes) {
    void* const start = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                               static_cast<off_t>(at));
    if (start != MAP_FAILED) data_ = static_cast<std::byte*>(start);
  }
  ~SharedPages() {
    if (data_ != nullptr) ::munmap(data_, bytes_);
  }
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  bool mapped() const { return data_ != nullptr; }
  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

std::uint32_t seen(std::uint32_t* index) { return std::atomic_ref(*index).load(std::memory_order_acquire); }
void publish(std::uint32_t* index, std::uint32_t value) {
  std::atomic_ref(*index).store(value, std::memory_order_release);
}

class UringReader final : public DiskReader {
 public:
  UringReader(int ring, const io_uring_params& setup, std::shared_ptr<const DiskFile> file)
      : ring_(ring),
        setup_(setup),
        file_(std::move(file)),
        queues_(ring,
                std::max(setup.sq_off.array + setup.sq_entries * sizeof(std::uint32_t),
                         setup.cq_off.cqes + setup.cq_entries * sizeof(io_uring_cqe)),
                IORING_OFF_SQ_RING),
        entries_(ring, setup.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
        reads_(kDepth) {
    for (std::uint32_t i = 0; i < kDepth; ++i) free_.push_back(i);
  }
  ~UringReader() override {
    DiskDone done[16];
    while (wait(done) > 0) {
    }
    ::close(ring_);  // cancels what a ring that broke has left
  }

  bool mapped() const { return queues_.mapped() && entries_.mapped(); }
  const char* name() const override { return "io_uring"; }
  std::size_t depth() const override { return kDepth; }

  void start(std::span<const DiskRead> reads) override {
    for (const DiskRead& read : reads) {
      const std::uint32_t place = free_.back();
      free_.pop_back();
      reads_[place] = read;
      push(place);
    }
    submit();
  }

  std::size_t wait(std::span<DiskDone> done) override {
    std::size_t count = 0;
    while (count == 0 && free_.size() < kDepth) {
      if (error_ != 0) return give_up(done);
      count = reap(done);
      if (count == 0) enter(0, 1);
    }
    return count;
  }

 private:
  /// Puts a read into the submission queue.
  void push(std::uint32_t place) {
    auto* const tail = queues_.at<std::uint32_t>(setup_.sq_off.tail);
    const std::uint32_t slot = *tail & *queues_.at<std::uint32_t>(setup_.sq_off.ring_mask);
    const DiskRead& read = reads_[place];
    io_uring_sqe entry{};
    entry.opcode = IORING_OP_READ;
    entry.fd = file_->get();
    entry.off = read.offset;
    entry.addr = reinterpret_cast<std::uint64_t>(read.to);
    entry.len = static_cast<std::uint32_t>(read.bytes);
    entry.user_data = place;
    entries_.at<io_uring_sqe>(0)[slot] = entry;
    queues_.at<std::uint32_t>(setup_.sq_off.array)[slot] = slot;
    publish(tail, *tail + 1);
    ++unsubmitted_;
  }

  void submit() {
    while (unsubmitted_ > 0 && error_ == 0) unsubmitted_ -= enter(unsubmitted_, 0);
  }

  /// How many entries the kernel took. Remembers an error that will not pass.
  std::uint32_t enter(std::uint32_t to_submit, std::uint32_t to_wait_for) {
    const std::uint32_t flags = to_wait_for > 0 ? IORING_ENTER_GETEVENTS : 0;
    const long taken = ::syscall(__NR_io_uring_enter, ring_, to_submit, to_wait_for, flags, nullptr, 0);
    if (taken >= 0) return static_cast<std::uint32_t>(taken);
    if (errno != EINTR && errno != EAGAIN && errno != EBUSY) error_ = errno;
    return 0;
  }

  /// Of a ring that broke: every read that is on its way has failed, and all that come will. One that the
  /// kernel took may still be written to its memory, which is not read again.
  std::size_t give_up(std::span<DiskDone> done) {
    std::size_t count = 0;
    for (std::uint32_t place = 0; place < kDepth && count < done.size(); ++place) {
      if (std::ranges::find(free_, place) != free_.end()) continue;
      done[count++] = {reads_[place].tag, error_};
      free_.push_back(place);
    }
    return count;
  }

  /// Takes what has ended. A read that ended short goes on from where it stopped.
  std::size_t reap(std::span<DiskDone> done) {
    auto* const head = queues_.at<std::uint32_t>(setup_.cq_off.head);
    const std::uint32_t tail = seen(queues_.at<std::uint32_t>(setup_.cq_off.tail));
    const std::uint32_t mask = *queues_.at<std::uint32_t>(setup_.cq_off.ring_mask);
    std::uint32_t at = *head;
    std::size_t count = 0;
    for (; at != tail && count < done.size(); ++at) {
      const io_uring_cqe& ended = queues_.at<io_uring_cqe>(setup_.cq_off.cqes)[at & mask];
      const auto place = static_cast<std::uint32_t>(ended.user_data);
      DiskRead& read = reads_[place];
      const std::int32_t result = ended.res;
      if (result == -EINTR || result == -EAGAIN) {
        push(place);
      } else if (result > 0 && static_cast<std::size_t>(result) < read.bytes) {
        read.offset += static_cast<std::uint32_t>(result);
        read.to += result;
        read.bytes -= static_cast<std::uint32_t>(result);
        push(place);
      } else {
        done[count++] = {read.tag, result < 0 ? -result : (result == 0 ? kEndOfFile : 0)};
        free_.push_back(place);
      }
    }
    publish(head, at);
    submit();
    return count;
  }

  int ring_;
  io_uring_params setup_;
  std::shared_ptr<const DiskFile> file_;
  SharedPages queues_;   // both queues lie in one mapping
  SharedPages entries_;  // what the submission queue points to
  std::vector<DiskRead> reads_;
  std::vector<std::uint32_t> free_;  // places in reads_
  std::uint32_t unsubmitted_ = 0;
  int error_ = 0;  // of the ring: an errno that will not pass
};

}  // namespace

std::unique_ptr<DiskReader> make_uring_reader(std::shared_ptr<const DiskFile> file, std::string* why_not) {
  io_uring_params setup{};
  const long ring = ::syscall(__NR_io_uring_setup, kDepth, &setup);
  if (ring < 0) {
    *why_not = std::strerror(errno);
    return nullptr;
  }
  constexpr std::uint32_t kNeeded =
      IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;  // Linux 5.6: plain reads
  auto reader = std::make_unique<UringReader>(static_cast<int>(ring), setup, std::move(file));
  if (::syscall(__NR_io_uring_enter, ring, 0, 0, 0, nullptr, 0) < 0) {  // may be forbidden on its own
    *why_not = std::strerror(errno);
    return nullptr;
  }
  if ((setup.features & kNeeded) == kNeeded && reader->mapped()) return reader;
  *why_not = reader->mapped() ? "a kernel before 5.6" : "rings that cannot be mapped";
  return nullptr;
}

}  // namespace turbosparse

#else

namespace turbosparse {

std::unique_ptr<DiskReader> make_uring_reader(std::shared_ptr<const DiskFile>, std::string* why_not) {
  *why_not = "a system without it";
  return nullptr;
}

}  // namespace turbosparse

#endif
