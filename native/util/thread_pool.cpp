#include "util/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <string>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kDefaultThreads = 8;
// A phase of a token takes 5 to 500 us and threads differ by a tenth of it; who waits longer than this at a
// barrier has lost its partner to somebody else. Every time that happens the patience is halved, down to
// nothing; every barrier that is met in time gives a microsecond back.
constexpr int kPatience = 100;
// Sampling and detokenising between two tokens takes about as long.
constexpr int kIdlePatience = 500;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Returns when `value` is no longer `old`: spins for so many microseconds, then sleeps. Whether spinning
/// did.
bool wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t old, int patience) {
  constexpr int kChecksPerClock = 32;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(patience);
  do {
    for (int i = 0; i < kChecksPerClock; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  value.wait(old, std::memory_order_acquire);
  return false;
}

/// The CPUs that this process may run on, by core; none where the system cannot tell.
std::vector<std::vector<int>> allowed_cores() {
  std::vector<std::vector<int>> cores;
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return cores;
  std::map<std::string, std::size_t> core_of;  // by the list of its CPUs
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream topology("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                           "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(topology, siblings)) siblings = std::to_string(cpu);
    const std::size_t core = core_of.try_emplace(siblings, cores.size()).first->second;
    if (core == cores.size()) cores.emplace_back();
    cores[core].push_back(cpu);
  }
#endif
  return cores;
}

/// Keeps the calling thread on a CPU while it lives, and lets it go where it could before after; a CPU below
/// 0 stands for any.
class StayOn {
 public:
#if defined(__linux__)
  explicit StayOn(int cpu) : moved_(cpu >= 0 && sched_getaffinity(0, sizeof before_, &before_) == 0) {
    if (moved_) move_to(cpu);
  }
  ~StayOn() {
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
  }
  static bool move_to(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return sched_setaffinity(0, sizeof one, &one) == 0;
  }

 private:
  cpu_set_t before_;
  bool moved_;
#else
  explicit StayOn(int) {}
  static bool move_to(int) { return false; }
#endif
};

}  // namespace

int physical_cores() {
  const auto cores = static_cast<int>(allowed_cores().size());
  return cores > 0 ? cores : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::vector<int> pinned_cpus(int threads) {
  const std::vector<std::vector<int>> cores = allowed_cores();
  std::vector<int> order;
  for (std::size_t sibling = 0, found = 1; found > 0; ++sibling) {
    found = 0;
    for (const std::vector<int>& cpus : cores) {
      if (sibling >= cpus.size()) continue;
      order.push_back(cpus[sibling]);
      ++found;
    }
  }
  const std::size_t there = order.size();
  for (std::size_t i = there; there > 0 && i < static_cast<std::size_t>(threads); ++i) {
    order.push_back(order[i - there]);
  }
  order.resize(std::min(order.size(), static_cast<std::size_t>(threads)));
  return order;
}

int thread_count(int requested) {
  const int cores = physical_cores();
  if (requested == 0) return std::min(cores, kDefaultThreads);
  const int limit = std::min(4 * cores, kMaxThreads);
  if (requested < 0 || requested > limit) {
    throw ConfigError("[threads] expected 0 (automatic) to " + std::to_string(limit) + ", got " +
                      std::to_string(requested));
  }
  return requested;
}

Range split(std::int64_t total, std::int64_t grain, int index, int parts) {
  const std::int64_t grains = (total + grain - 1) / grain;
  const auto cut = [&](std::int64_t part) { return std::min(total, grains * part / parts * grain); };
  return {cut(index), cut(index + 1)};
}

ThreadPool::ThreadPool(int threads) : size_(threads), patience_(kPatience) {
  workers_.reserve(static_cast<std::size_t>(size_ - 1));
  try {
    for (int index = 1; index < size_; ++index) workers_.emplace_back([this, index] { work(index); });
  } catch (...) {
    stop_workers();
    throw EngineError("[threads] expected a system that gives " + std::to_string(size_) + ", got " +
                      std::to_string(workers_.size() + 1));
  }
}

ThreadPool::~ThreadPool() { stop_workers(); }

void ThreadPool::stop_workers() noexcept {
  stop_ = true;
  jobs_.fetch_add(1, std::memory_order_release);
  jobs_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::pin() {
  const std::vector<int> cpus = pinned_cpus(size_);
  std::atomic<bool> moved{!cpus.empty()};
  run([&](int index) noexcept {
    if (index > 0 && moved && !StayOn::move_to(cpus[static_cast<std::size_t>(index)])) moved = false;
  });
  if (!moved)
    throw ConfigError("[pin] expected a system that keeps threads on their CPUs, got one that refuses");
  const std::lock_guard lock(turn_);
  callers_cpu_ = cpus[0];
}

void ThreadPool::run_job(Job job, void* context) {
  const std::lock_guard lock(turn_);
  const StayOn stay(callers_cpu_);
  job_ = job;
  context_ = context;
  jobs_.fetch_add(1, std::memory_order_release);
  jobs_.notify_all();
  job(context, 0);
  barrier();
}

void ThreadPool::work(int index) noexcept {
  for (std::uint32_t seen = 0;; ++seen) {
    wait_while(jobs_, seen, kIdlePatience);
    if (stop_) return;
    job_(context_, index);
    barrier();
  }
}

void ThreadPool::barrier() noexcept {
  const std::uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    return;
  }
  const int patience = patience_.load(std::memory_order_relaxed);
  const bool in_time = wait_while(generation_, generation, patience);
  if (in_time && patience == kPatience) return;
  patience_.store(in_time ? patience + 1 : patience / 2, std::memory_order_relaxed);
}

}  // namespace turbosparse
