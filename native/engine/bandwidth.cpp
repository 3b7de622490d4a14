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

/// Reads n bytes (a multiple of 64) and returns a sum, so that no read can be left out.
std::uint64_t read_bytes(const std::byte* data, std::size_t n) {
  constexpr std::size_t kLanes = 8;  // independent sums: adding must not be the limit
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  std::uint64_t sums[kLanes] = {};
  for (std::size_t i = 0; i < n / sizeof(std::uint64_t); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + lane];
  }
  return std::accumulate(std::begin(sums), std::end(sums), std::uint64_t{0});
}

void check(std::size_t buffer_bytes, std::size_t row_bytes, double seconds) {
  if (buffer_bytes < kSmallest || buffer_bytes > kLargest) {
    throw ConfigError("[buffer_bytes] expected 1 MiB to 64 GiB, got " + std::to_string(buffer_bytes));
  }
  if (row_bytes > buffer_bytes) {
    throw ConfigError("[row_bytes] expected at most the buffer, got " + std::to_string(row_bytes));
  }
  if (!(seconds > 0 && seconds <= 60)) {
    throw ConfigError("[seconds] expected more than 0, at most 60, got " + std::to_string(seconds));
  }
}

}  // namespace

double read_bandwidth(int threads, std::size_t buffer_bytes, std::size_t row_bytes, double seconds) {
  check(buffer_bytes, row_bytes, seconds);
  ThreadPool pool(thread_count(threads));
  const std::size_t row = row_bytes > 0 ? aligned_bytes(row_bytes) : kStreamRow;
  const std::size_t rows = buffer_bytes / row;
  Arena arena(rows * row);
  std::byte* data = arena.take(rows * row);
  std::vector<std::size_t> order(rows);
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (row_bytes > 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(0));

  std::atomic<std::uint64_t> total{0};
  std::atomic<std::uint64_t> sum{0};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  double began = 0;
  double ended = 0;
  pool.run([&](int index) noexcept {
    const Range part = split(static_cast<std::int64_t>(rows), 1, index, pool.size());
    for (auto r = part.begin; r < part.end; ++r) {
      std::fill_n(data + static_cast<std::size_t>(r) * row, row, std::byte{1});
    }
    pool.barrier();
    if (index == 0) began = elapsed();
    std::uint64_t bytes = 0;
    std::uint64_t local = 0;
    const double stop = elapsed() + seconds;
    while (part.size() > 0 && elapsed() < stop) {
      for (auto r = part.begin; r < part.end; ++r)
        local += read_bytes(data + order[static_cast<std::size_t>(r)] * row, row);
      bytes += static_cast<std::uint64_t>(part.size()) * row;
    }
    total += bytes;
    sum += local;
    pool.barrier();
    if (index == 0) ended = elapsed();
  });
  return sum > 0 ? static_cast<double>(total) / (ended - began) : 0.0;
}

}  // namespace turbosparse
