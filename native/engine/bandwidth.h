// How fast this machine reads memory: the ceiling of decoding, which reads every needed weight once.
#pragma once

#include <cstddef>

namespace turbosparse {

/// Bytes per second that `threads` threads together read from a buffer of `buffer_bytes`: as a stream each,
/// or, with row_bytes > 0, rows of that size in random order. Runs for about `seconds` after a warm-up.
/// Throws ConfigError for sizes and times out of range.
double read_bandwidth(int threads, std::size_t buffer_bytes, std::size_t row_bytes, double seconds);

}  // namespace turbosparse
