// How fast this machine reads memory: the ceiling of decoding, which reads every needed weight once.
#pragma once

#include <cstddef>

namespace turbosparse {

/// What is read, again and again. The buffer should be far larger than the caches.
struct ReadPattern {
  std::size_t buffer_bytes;
  std::size_t row_bytes = 0;  // 0: a stream per thread
  std::size_t one_in = 1;     // rows are read in ascending order, at random one of every `one_in` neighbours
};

/// Bytes per second that `threads` threads together read. Only the bytes of rows asked for count, not what
/// the hardware fetches besides. Runs for about `seconds` after a warm-up. Throws ConfigError for sizes and
/// times out of range.
double read_bandwidth(int threads, const ReadPattern& pattern, double seconds);

}  // namespace turbosparse
