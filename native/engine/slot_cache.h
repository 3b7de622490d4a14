// Which cluster of neurons lies in which slot of memory: segmented LRU. What is read once is on probation;
// what is asked for again is protected, in up to four fifths of the slots. So neurons that one token needed
// and no other cannot push out those that many tokens need.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace turbosparse {

class SlotCache {
 public:
  static constexpr std::int32_t kNone = -1;

  SlotCache() = default;
  /// `clusters` are numbered from 0.
  SlotCache(std::int64_t clusters, std::int64_t slots);
  /// Bytes that this takes.
  static std::size_t bytes(std::int64_t clusters, std::int64_t slots);

  std::int64_t slots() const { return slots_; }
  /// Slots at construction.
  std::int64_t most() const { return static_cast<std::int64_t>(capacity_); }
  /// The slot of a cluster, or kNone.
  std::int32_t find(std::int64_t cluster) const { return slot_of_[static_cast<std::size_t>(cluster)]; }

  /// From here on, slots that are touched or taken stay until the next call.
  void begin() { ++turn_; }
  /// The slot's cluster was asked for.
  void touch(std::int32_t slot);
  /// A slot for a cluster that has none: a free one, else that of the cluster longest not asked for, on
  /// probation first. kNone where all slots were touched or taken since begin.
  std::int32_t take(std::int64_t cluster);
  /// Forgets what is in a slot.
  void drop(std::int32_t slot);
  /// Uses the first `slots` only, at most as many as at construction; others are forgotten.
  void resize(std::int64_t slots);

 private:
  enum List : std::uint8_t { kFree = 0, kProbation, kProtected, kUnused };
  void unlink(std::int32_t slot);
  void push_front(std::int32_t slot, List list);
  std::int32_t last(List list) const;
  bool in_turn(std::int32_t slot) const;
  std::int32_t pushed_back() const;
  std::size_t head(List list) const { return capacity_ + list; }

  std::size_t capacity_ = 0;
  std::int64_t slots_ = 0;
  std::uint32_t turn_ = 0;
  std::vector<std::int32_t> slot_of_;          // [clusters]
  std::vector<std::int32_t> owner_;            // [capacity] cluster
  std::vector<std::int32_t> previous_, next_;  // [capacity + 3], rings through each list's head
  std::vector<std::uint32_t> turn_of_;         // [capacity] when last touched or taken
  std::vector<List> list_of_;                  // [capacity]
  std::array<std::int64_t, 4> sizes_{};
};

}  // namespace turbosparse
