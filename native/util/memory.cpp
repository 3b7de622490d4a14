#include "util/memory.h"

#include <sys/mman.h>

#include <utility>

namespace turbosparse {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

Arena::Arena(std::size_t bytes) {
  if (bytes == 0) return;
  // Whole huge pages, so that the last one is huge as well; its untouched rest is at most 2 MiB.
  size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* region =
      mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(region);
#if defined(MADV_HUGEPAGE)
  madvise(region, size_, MADV_HUGEPAGE);  // advice: a kernel without huge pages may say no
#endif
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, size_);
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      used_(std::exchange(other.used_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(used_, other.used_);
  return *this;
}

std::byte* Arena::take(std::size_t bytes) {
  const std::size_t padded = aligned_bytes(bytes);
  if (padded > size_ - used_) throw std::bad_alloc();
  std::byte* piece = data_ + used_;
  used_ += padded;
  return piece;
}

void Arena::release(std::size_t begin) {
  const std::size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first < size_) madvise(data_ + first, size_ - first, MADV_DONTNEED);
}

}  // namespace turbosparse
