#include "io/read_bursts.h"

#include <array>
#include <chrono>
#include <random>
#include <span>
#include <vector>

#include "io/disk_reader.h"
#include "util/error.h"
#include "util/memory.h"

namespace turbosparse {
namespace {

/// One burst: at most `places` reads are on their way at a time, each into a place of its own.
void run(DiskReader& reader, std::byte* memory, std::size_t places, const ReadBurst& burst,
         std::mt19937_64& random) {
  std::uniform_int_distribution<std::uint64_t> anywhere(0, (burst.end - burst.begin) / burst.read_bytes - 1);
  const auto read_into = [&](std::size_t place) {
    return DiskRead{burst.begin + anywhere(random) * burst.read_bytes, burst.read_bytes,
                    memory + place * burst.read_bytes, place};
  };
  std::vector<DiskRead> reads;
  for (std::size_t place = 0; place < std::min(places, burst.reads); ++place)
    reads.push_back(read_into(place));
  std::size_t started = reads.size();
  reader.start(reads);
  std::array<DiskDone, 32> done;
  while (const std::size_t ended = reader.wait(done)) {
    reads.clear();
    for (const DiskDone& read : std::span(done).first(ended)) {
      if (read.error != 0)
        throw EngineError("[disk] expected to read the model file, got " + disk_error_text(read.error));
      if (started < burst.reads) {
        reads.push_back(read_into(read.tag));
        ++started;
      }
    }
    if (!reads.empty()) reader.start(reads);
  }
}

}  // namespace

BurstTime time_read_bursts(const std::string& path, std::string_view io, const ReadBurst& burst,
                           double seconds) {
  const auto file = std::make_shared<const DiskFile>(path, io != "mmap");
  const bool aligned = (burst.begin | burst.read_bytes) % kDiskBlock == 0;
  if (!aligned || burst.reads == 0 || burst.read_bytes == 0 || burst.end > file->bytes() ||
      burst.begin + burst.read_bytes > burst.end || !(seconds >= 0 && seconds <= 60)) {
    throw ConfigError("[read bursts] expected reads of whole blocks inside of the file, got " +
                      std::to_string(burst.reads) + " of " + std::to_string(burst.read_bytes) +
                      " bytes from " + std::to_string(burst.begin) + " to " + std::to_string(burst.end));
  }
  Arena arena;  // outlives the reader, which waits for the reads on their way
  const OpenedReader opened = open_disk_reader(file, io);
  const std::size_t places = std::min(burst.reads, opened.reader->depth());
  arena = Arena(places * burst.read_bytes);
  std::byte* memory = arena.take(places * burst.read_bytes);
  std::mt19937_64 random(1);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point began = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - began).count(); };
  int bursts = 0;
  for (; bursts < 3 || elapsed() < seconds; ++bursts) run(*opened.reader, memory, places, burst, random);
  return {elapsed() / bursts, opened.reader->name()};
}

}  // namespace turbosparse
