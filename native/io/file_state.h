// Which file an open descriptor is of, and whether it is still what it was.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>

namespace turbosparse {

struct FileState {
  std::uint64_t device = 0, inode = 0;
  std::size_t bytes = 0;
  std::int64_t modified_s = 0, modified_ns = 0;

  FileState() = default;
  explicit FileState(const struct stat& status)
      : device(status.st_dev),
        inode(status.st_ino),
        bytes(static_cast<std::size_t>(status.st_size)),
        modified_s(status.st_mtim.tv_sec),
        modified_ns(status.st_mtim.tv_nsec) {}
  bool operator==(const FileState&) const = default;
};

}  // namespace turbosparse
