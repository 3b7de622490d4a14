// The thread pool: every thread takes part, barriers hold, callers take turns, bad counts are refused.
#include <sched.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"
#include "util/error.h"
#include "util/thread_pool.h"

namespace turbosparse {
namespace {

void test_split() {
  for (const std::int64_t total : {0, 1, 31, 32, 33, 160, 1000}) {
    for (const int parts : {1, 2, 3, 8}) {
      std::int64_t next = 0;
      for (int index = 0; index < parts; ++index) {
        const Range range = split(total, 32, index, parts);
        CHECK(range.begin == next, "total %ld parts %d index %d", static_cast<long>(total), parts, index);
        CHECK(range.end == total || range.end % 32 == 0, "total %ld parts %d index %d",
              static_cast<long>(total), parts, index);
        next = range.end;
      }
      CHECK(next == total, "total %ld parts %d", static_cast<long>(total), parts);
    }
  }
}

/// Each phase reads what all threads wrote in the phase before: a missing barrier shows as a wrong sum, and
/// under ThreadSanitizer as a race.
void test_barriers(int threads) {
  ThreadPool pool(threads);
  constexpr int kPhases = 500;
  std::vector<std::int64_t> values(static_cast<std::size_t>(threads), 1);
  std::vector<std::int64_t> next(values.size());
  std::atomic<int> wrong{0};
  pool.run([&](int index) noexcept {
    const auto mine = static_cast<std::size_t>(index);
    for (int phase = 0; phase < kPhases; ++phase) {
      const std::int64_t sum = std::accumulate(values.begin(), values.end(), std::int64_t{0});
      wrong += sum != static_cast<std::int64_t>(phase + 1) * threads;
      next[mine] = values[mine] + 1;
      pool.barrier();
      values[mine] = next[mine];
      pool.barrier();
    }
  });
  CHECK(wrong == 0, "%d threads: %d wrong sums", threads, wrong.load());
}

void test_jobs_in_turn() {
  ThreadPool pool(3);
  std::int64_t total = 0;  // only thread 0 of a job writes it: a data race if two jobs ran at once
  const auto submit = [&] {
    for (int job = 0; job < 200; ++job) {
      pool.run([&](int index) noexcept {
        if (index == 0) ++total;
      });
    }
  };
  std::thread other(submit);
  submit();
  other.join();
  CHECK(total == 400, "got %ld", static_cast<long>(total));
}

/// Threads that wait long sleep, and wake up again.
void test_sleep() {
  ThreadPool pool(2);
  std::atomic<int> done{0};
  pool.run([&](int index) noexcept {
    if (index == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    pool.barrier();
    ++done;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  pool.run([&](int) noexcept { ++done; });
  CHECK(done == 4, "got %d", done.load());
}

/// Pinned threads run where they were put, and the caller is free again after the job.
void test_pinning() {
  const std::vector<int> cpus = pinned_cpus(3);
  if (cpus.empty()) return;
  CHECK(pinned_cpus(1) == std::vector<int>{cpus[0]}, "the first of 3 CPUs is not the first of 1");
  cpu_set_t before, after;
  CHECK(sched_getaffinity(0, sizeof before, &before) == 0, "no affinity");
  ThreadPool pool(3);
  pool.pin();
  std::array<int, 3> seen = {-1, -1, -1};
  pool.run([&](int index) noexcept { seen[static_cast<std::size_t>(index)] = sched_getcpu(); });
  for (std::size_t i = 0; i < seen.size(); ++i) {
    CHECK(seen[i] == cpus[i], "thread %d ran on CPU %d", static_cast<int>(i), seen[i]);
  }
  CHECK(sched_getaffinity(0, sizeof after, &after) == 0, "no affinity");
  CHECK(CPU_EQUAL(&before, &after), "the caller stays pinned");
}

void test_counts() {
  CHECK(thread_count(0) >= 1 && thread_count(0) <= 8, "got %d", thread_count(0));
  CHECK(thread_count(1) == 1, "got %d", thread_count(1));
  for (const int bad : {-1, 4 * physical_cores() + 1, 1 << 20}) {
    bool refused = false;
    try {
      thread_count(bad);
    } catch (const ConfigError&) {
      refused = true;
    }
    CHECK(refused, "%d threads", bad);
  }
}

}  // namespace
}  // namespace turbosparse

int main() {
  turbosparse::test_split();
  for (const int threads : {1, 2, 3, 5}) turbosparse::test_barriers(threads);
  turbosparse::test_jobs_in_turn();
  turbosparse::test_sleep();
  turbosparse::test_pinning();
  turbosparse::test_counts();
  return turbosparse::test::report();
}
