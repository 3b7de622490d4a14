// Timing for the benches.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace turbosparse::bench {

/// Wall times of a run, in seconds. On a busy machine the best twentieth still says what a kernel can do.
struct Times {
  double median, best;
};

/// Runs f(thread, run) on all threads at once, again and again for `seconds`; `run` counts up.
inline Times measure(int threads, double seconds, const std::function<void(int, std::size_t)>& f) {
  using Clock = std::chrono::steady_clock;
  std::atomic<std::size_t> started = 0;  // runs the workers may begin
  std::atomic<int> finished = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (std::size_t run = 0;; ++run) {
        while (started <= run && !stop) std::this_thread::yield();
        if (stop) return;
        f(t, run);
        ++finished;
      }
    });
  }
  std::vector<double> times;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  for (std::size_t run = 0; run < 5 || Clock::now() < end; ++run) {
    const auto start = Clock::now();
    finished = 0;
    ++started;
    f(0, run);
    while (finished < threads - 1) std::this_thread::yield();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  stop = true;
  for (std::thread& worker : workers) worker.join();
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[times.size() / 20]};
}

}  // namespace turbosparse::bench
