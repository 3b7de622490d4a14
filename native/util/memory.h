// Memory the engine owns: one large region handed out in 64-byte aligned pieces, and aligned arrays.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace turbosparse {

inline constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

/// Bytes of a piece with its padding.
constexpr std::size_t aligned_bytes(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// A zero-filled region of fixed size, backed by huge pages where the system has them. Pages that are never
/// touched cost nothing.
class Arena {
 public:
  Arena() = default;
  explicit Arena(std::size_t bytes);  // throws std::bad_alloc
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  /// The next `bytes`, 64-byte aligned. Throws std::bad_alloc past the end.
  std::byte* take(std::size_t bytes);
  std::size_t size() const { return size_; }
  /// Gives back whole pages from `begin` on; they read as zero until they are written again.
  void release(std::size_t begin);

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  explicit AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kAlignment}));
  }
  void deallocate(T* p, std::size_t) noexcept { ::operator delete(p, std::align_val_t{kAlignment}); }
  bool operator==(const AlignedAllocator&) const { return true; }
};

template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace turbosparse
