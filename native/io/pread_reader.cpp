// Reads by threads that wait for the disk, one read each.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "io/disk_reader.h"
#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::size_t kThreads = 16;  // asleep nearly always
constexpr std::size_t kDepth = 512;

class PreadReader final : public DiskReader {
 public:
  explicit PreadReader(std::shared_ptr<const DiskFile> file) : file_(std::move(file)) {
    threads_.reserve(kThreads);
    try {
      for (std::size_t i = 0; i < kThreads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
      if (!threads_.empty()) return;  // fewer read as well, with less in flight
      throw EngineError("[io pread] expected a system that gives a thread to read with, got none");
    }
  }

  ~PreadReader() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    asked_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "pread"; }
  std::size_t depth() const override { return kDepth; }

  void start(std::span<const DiskRead> reads) override {
    {
      const std::lock_guard lock(mutex_);
      for (const DiskRead& read : reads) waiting_.push_back(read);
      outstanding_ += reads.size();
    }
    if (reads.size() == 1) {
      asked_.notify_one();
    } else {
      asked_.notify_all();
    }
  }

  std::size_t wait(std::span<DiskDone> done) override {
    std::unique_lock lock(mutex_);
    if (outstanding_ == 0) return 0;
    ended_.wait(lock, [this] { return !done_.empty(); });
    std::size_t count = 0;
    for (; count < done.size() && !done_.empty(); ++count) {
      done[count] = done_.front();
      done_.pop_front();
    }
    outstanding_ -= count;
    return count;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      asked_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      const DiskRead read = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      const int error = read_whole(file_->get(), read);
      lock.lock();
      done_.push_back({read.tag, error});
      ended_.notify_one();
    }
  }

  std::shared_ptr<const DiskFile> file_;
  std::mutex mutex_;
  std::condition_variable asked_, ended_;
  std::deque<DiskRead> waiting_;
  std::deque<DiskDone> done_;
  std::size_t outstanding_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<DiskReader> make_pread_reader(std::shared_ptr<const DiskFile> file) {
  return std::make_unique<PreadReader>(std::move(file));
}

}  // namespace turbosparse
