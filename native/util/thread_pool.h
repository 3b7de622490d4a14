// The threads of one model. A job runs on all of them at once, the caller being thread 0; inside a job they
// meet at barriers. Waiting spins for a bounded while and then sleeps: between the phases of a token nobody
// pays for a wake-up, and an idle pool costs nothing. Where the other threads often do not come in time,
// because somebody else has their core, the while shrinks: spinning would only keep them from running.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace turbosparse {

/// Physical cores that this process may run on (siblings of one core count once), at least 1.
int physical_cores();
/// `requested`, or for 0 the physical cores, at most 8. Throws ConfigError for a negative count and for one
/// above four times the cores or above 256.
int thread_count(int requested);
/// The CPUs for so many pinned threads, of those this process may run on: one of each core first, then their
/// siblings, then from the beginning. Empty where the system cannot tell.
std::vector<int> pinned_cpus(int threads);

/// A half-open range of items.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
};

/// Part `index` of `parts` of [0, total), cut at multiples of `grain`; sizes differ by at most one grain.
Range split(std::int64_t total, std::int64_t grain, int index, int parts);

class ThreadPool {
 public:
  /// Throws EngineError where the system does not give so many.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  /// From now on keeps each thread on a CPU of its own, the caller's as long as a job runs. Throws
  /// ConfigError where the system refuses.
  void pin();

  /// Calls job(index) for 0 <= index < size() on as many threads, and returns when all are done. Callers on
  /// several threads take turns. A job must not call run.
  template <class F>
  void run(F&& job) {
    static_assert(std::is_nothrow_invocable_v<F&, int>, "a job cannot throw: other threads wait for it");
    run_job([](void* context,
               int index) noexcept { (*static_cast<std::remove_reference_t<F>*>(context))(index); },
            const_cast<void*>(static_cast<const void*>(&job)));
  }

  /// Inside a job: returns when all threads have called it as often. What was written before is visible
  /// after.
  void barrier() noexcept;

 private:
  using Job = void (*)(void* context, int index) noexcept;
  void run_job(Job job, void* context);
  void work(int index) noexcept;
  void stop_workers() noexcept;

  const int size_;
  std::mutex turn_;
  int callers_cpu_ = -1;  // -1: any
  Job job_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<std::uint32_t> jobs_{0};        // jobs started
  alignas(64) std::atomic<std::uint32_t> arrived_{0};     // threads at the barrier
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // barriers passed
  std::atomic<int> patience_;                             // microseconds to spin at a barrier
  std::vector<std::thread> workers_;
};

}  // namespace turbosparse
