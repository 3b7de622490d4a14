#include "engine/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "util/error.h"
#include "util/memory.h"
#include "util/thread_pool.h"

namespace turbosparse {
namespace {

constexpr std::size_t kStreamRow = std::size_t{1} << 20;  // a stream is rows of this size in order
constexpr std::size_t kSmallest = std::size_t{1} << 20;
constexpr std::size_t kLargest = std::size_t{1} << 36;
constexpr std::size_t kLargestGap = 1000;
constexpr std::size_t kAheadBytes = 16384;  // rows are fetched this far ahead of their use

/// Reads n bytes (a multiple of 64) and returns a sum, so that no read can be left out. Fetches the lines of
/// `later`, a row of the same size, meanwhile.
std::uint64_t read_bytes(const std::byte* data, const std::byte* later, std::size_t n) {
  constexpr std::size_t kLanes = 8;  // independent sums: adding must not be the limit
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  std::uint64_t sums[kLanes] = {};
  for (std::size_t i = 0; i < n / sizeof(std::uint64_t); i += kLanes) {
    __builtin_prefetch(later + i * sizeof(std::uint64_t), 0, 2);
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + lane];
  }
  return std::accumulate(std::begin(sums), std::end(sums), std::uint64_t{0});
}

/// Rows in ascending order: of every `one_in` neighbours one, another one in each pass, so that no pass finds
/// rows of the one before in a cache.
class RowSubset {
 public:
  RowSubset(std::size_t groups, std::size_t one_in) : one_in_(one_in), first_(groups) {
    std::mt19937_64 generator(0);
    for (std::size_t& first : first_) first = generator() % one_in;
  }
  std::size_t groups() const { return first_.size(); }
  std::size_t row(std::size_t group, std::size_t pass) const {
    group = std::min(group, first_.size() - 1);
    return group * one_in_ + (first_[group] + pass) % one_in_;
  }

 private:
  std::size_t one_in_;
  std::vector<std::size_t> first_;
};

void check(const ReadPattern& pattern, double seconds) {
  const auto fail = [](const char* place, const std::string& expected, const std::string& got) {
    throw ConfigError(std::string("[") + place + "] expected " + expected + ", got " + got);
  };
  if (pattern.buffer_bytes < kSmallest || pattern.buffer_bytes > kLargest) {
    fail("buffer_bytes", "1 MiB to 64 GiB", std::to_string(pattern.buffer_bytes));
  }
  if (pattern.one_in < 1 || pattern.one_in > kLargestGap) {
    fail("one_in", "1 to " + std::to_string(kLargestGap), std::to_string(pattern.one_in));
  }
  if (pattern.row_bytes > pattern.buffer_bytes / pattern.one_in) {
    fail("row_bytes", "at most the buffer by one_in", std::to_string(pattern.row_bytes));
  }
  if (!(seconds > 0 && seconds <= 60)) {
    fail("seconds", "more than 0, at most 60", std::to_string(seconds));
  }
}

}  // namespace

double read_bandwidth(int threads, const ReadPattern& pattern, double seconds) {
  check(pattern, seconds);
  ThreadPool pool(thread_count(threads));
  const std::size_t row = pattern.row_bytes > 0 ? aligned_bytes(pattern.row_bytes) : kStreamRow;
  const std::size_t one_in = pattern.one_in;
  const RowSubset rows(std::max<std::size_t>(1, pattern.buffer_bytes / (row * one_in)), one_in);
  const std::size_t ahead = std::max<std::size_t>(1, kAheadBytes / row);
  Arena arena(rows.groups() * one_in * row);
  std::byte* data = arena.take(rows.groups() * one_in * row);

  std::atomic<std::uint64_t> total{0};
  std::atomic<std::uint64_t> sum{0};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  double began = 0;
  double ended = 0;
  pool.run([&](int index) noexcept {
    const Range range = split(static_cast<std::int64_t>(rows.groups()), 1, index, pool.size());
    const auto begin = static_cast<std::size_t>(range.begin);
    const auto end = static_cast<std::size_t>(range.end);
    std::fill(data + begin * one_in * row, data + end * one_in * row, std::byte{1});
    pool.barrier();
    if (index == 0) began = elapsed();
    std::uint64_t bytes = 0;
    std::uint64_t local = 0;
    const double stop = elapsed() + seconds;
    for (std::size_t pass = 0; begin < end && elapsed() < stop; ++pass) {
      for (std::size_t group = begin; group < end; ++group) {
        local +=
            read_bytes(data + rows.row(group, pass) * row, data + rows.row(group + ahead, pass) * row, row);
      }
      bytes += (end - begin) * row;
    }
    total += bytes;
    sum += local;
    pool.barrier();
    if (index == 0) ended = elapsed();
  });
  return sum > 0 ? static_cast<double>(total) / (ended - began) : 0.0;
}

}  // namespace turbosparse
