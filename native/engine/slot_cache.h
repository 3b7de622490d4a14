// Which cluster of neurons lies in which slot of memory: W-TinyLFU (Einziger, Friedman and Manes, "TinyLFU: A
// Highly Efficient Cache Admission Policy", 2017), with a counter for every cluster instead of a sketch. What
// is read enters a window, in the order of its last use. What leaves the window gets into the main part only
// if it was asked for more often than what would have to go there, else it is forgotten. The main part is a
// segmented LRU: what is asked for again is protected, in up to four fifths of it. So neurons that few tokens
// need cannot push out those that many need.
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
  /// Clusters asked for, after which all counts are halved.
  std::int64_t period() const;

  /// How often a cluster counts as asked for, of which no more than 255 are kept.
  void expect(std::int64_t cluster, double times);
  /// A free slot for a cluster that has none, though nobody asked for it: hotter ones first. kNone where none
  /// is free.
  std::int32_t fill(std::int64_t cluster);

  /// From here on, slots that are touched or taken stay until the next call.
  void begin() { ++turn_; }
  /// The slot's cluster was asked for.
  void touch(std::int32_t slot);
  /// A slot for a cluster that has none and was asked for: a free one, else that of another cluster. kNone
  /// where all slots were touched or taken since begin.
  std::int32_t take(std::int64_t cluster);
  /// Forgets what is in a slot.
  void drop(std::int32_t slot);
  /// Uses the first `slots` only, at most as many as at construction; others are forgotten.
  void resize(std::int64_t slots);

 private:
  enum List : std::uint8_t { kFree = 0, kWindow, kProbation, kProtected, kUnused };
  static constexpr std::size_t kLists = 5;
  enum class End : std::uint8_t { kFront, kBack };
  void unlink(std::int32_t slot);
  void push(std::int32_t slot, List list, End end = End::kFront);
  void own(std::int32_t slot, std::int64_t cluster);
  void disown(std::int32_t slot);
  void count(std::int64_t cluster);
  std::uint8_t uses(std::int32_t slot) const;
  std::int32_t last(List list) const;
  bool in_turn(std::int32_t slot) const;
  bool window_full() const;
  void admit(std::int32_t slot);
  std::int32_t evictable() const;
  std::int32_t loser();
  std::size_t head(List list) const { return capacity_ + list; }

  std::size_t capacity_ = 0;
  std::int64_t slots_ = 0;
  std::int64_t counted_ = 0;  // since counts were halved
  std::uint32_t turn_ = 0;
  std::vector<std::int32_t> slot_of_;          // [clusters]
  std::vector<std::uint8_t> count_of_;         // [clusters]
  std::vector<std::int32_t> owner_;            // [capacity] cluster
  std::vector<std::int32_t> previous_, next_;  // [capacity + kLists], rings through each list's head
  std::vector<std::uint32_t> turn_of_;         // [capacity] when last touched or taken
  std::vector<List> list_of_;                  // [capacity]
  std::array<std::int64_t, kLists> sizes_{};
};

}  // namespace turbosparse
