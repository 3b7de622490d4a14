// How fast a disk answers when many places of a file are asked for at once: what a token waits for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace turbosparse {

/// Reads at random places of a part of a file.
struct ReadBurst {
  std::uint64_t begin = 0;     // a multiple of kDiskBlock
  std::uint64_t end = 0;       // at least one read behind begin, and in the file
  std::size_t read_bytes = 0;  // a multiple of kDiskBlock
  std::size_t reads = 0;
};

/// What was found, and by which reader.
struct BurstTime {
  double seconds = 0;  // mean, from the first read asked for to the end of the last
  std::string reader;
};

/// Makes bursts for about `seconds`, at least three, by the reader that `io` names (see open_disk_reader).
/// Throws ModelFileError (no such file), ConfigError (io, sizes out of range), EngineError (a read failed).
BurstTime time_read_bursts(const std::string& path, std::string_view io, const ReadBurst& burst,
                           double seconds);

}  // namespace turbosparse
