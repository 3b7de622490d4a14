#include "engine/slot_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace turbosparse {
namespace {

/// The window's part of the slots. What one turn asks for stays whatever this is.
constexpr std::int64_t kWindowOneIn = 16;
/// Counts are halved when so many times as many clusters as there are slots were asked for.
constexpr std::int64_t kPeriodSlots = 10;
constexpr std::uint8_t kMostCounted = std::numeric_limits<std::uint8_t>::max();

}  // namespace

SlotCache::SlotCache(std::int64_t clusters, std::int64_t slots)
    : capacity_(static_cast<std::size_t>(slots)),
      slots_(slots),
      slot_of_(static_cast<std::size_t>(clusters), kNone),
      count_of_(static_cast<std::size_t>(clusters)),
      owner_(capacity_, kNone),
      previous_(capacity_ + kLists),
      next_(capacity_ + kLists),
      turn_of_(capacity_),
      list_of_(capacity_, kUnused) {
  for (std::size_t list = capacity_; list < next_.size(); ++list) {
    previous_[list] = next_[list] = static_cast<std::int32_t>(list);
  }
  for (std::size_t slot = capacity_; slot-- > 0;) push(static_cast<std::int32_t>(slot), kFree);
}

std::size_t SlotCache::bytes(std::int64_t clusters, std::int64_t slots) {
  constexpr std::size_t kPerCluster = sizeof(std::int32_t) + sizeof(std::uint8_t);
  constexpr std::size_t kPerSlot = 3 * sizeof(std::int32_t) + sizeof(std::uint32_t) + sizeof(List);
  return static_cast<std::size_t>(clusters) * kPerCluster + static_cast<std::size_t>(slots) * kPerSlot;
}

std::int64_t SlotCache::period() const { return kPeriodSlots * std::max<std::int64_t>(slots_, 1); }

void SlotCache::expect(std::int64_t cluster, double times) {
  const double counted = std::clamp(std::round(times), 0.0, double{kMostCounted});
  count_of_[static_cast<std::size_t>(cluster)] = static_cast<std::uint8_t>(counted);
}

std::int32_t SlotCache::fill(std::int64_t cluster) {
  if (last(kFree) == kNone) return kNone;
  const std::int32_t slot = next_[head(kFree)];
  unlink(slot);
  push(slot, kProbation, End::kBack);
  own(slot, cluster);
  return slot;
}

void SlotCache::touch(std::int32_t slot) {
  const auto at = static_cast<std::size_t>(slot);
  count(owner_[at]);
  turn_of_[at] = turn_;
  const List list = list_of_[at] == kWindow ? kWindow : kProtected;
  unlink(slot);
  push(slot, list);
  if (sizes_[kProtected] * 5 <= (slots_ - sizes_[kWindow]) * 4) return;
  const std::int32_t oldest = last(kProtected);
  unlink(oldest);
  push(oldest, kProbation);
}

std::int32_t SlotCache::take(std::int64_t cluster) {
  count(cluster);
  std::int32_t slot = last(kFree);
  if (slot == kNone) {
    slot = loser();
  } else if (window_full()) {
    admit(last(kWindow));
  }
  if (slot == kNone) return kNone;
  disown(slot);
  unlink(slot);
  push(slot, kWindow);
  turn_of_[static_cast<std::size_t>(slot)] = turn_;
  own(slot, cluster);
  return slot;
}

bool SlotCache::window_full() const { return sizes_[kWindow] * kWindowOneIn >= slots_; }

void SlotCache::admit(std::int32_t slot) {
  unlink(slot);
  push(slot, kProbation);
}

/// The slot whose cluster has to go: of the oldest in the window and the oldest in the main part that which
/// was asked for less often. If that is the latter, the other one gets into the main part.
std::int32_t SlotCache::loser() {
  const std::int32_t candidate = last(kWindow);
  const std::int32_t victim = evictable();
  if (victim != kNone && !window_full()) return victim;
  if (candidate == kNone || in_turn(candidate)) return victim;
  if (victim == kNone || uses(candidate) <= uses(victim)) return candidate;
  admit(candidate);
  return victim;
}

void SlotCache::drop(std::int32_t slot) {
  disown(slot);
  turn_of_[static_cast<std::size_t>(slot)] = 0;
  unlink(slot);
  push(slot, kFree);
}

void SlotCache::resize(std::int64_t slots) {
  for (; slots_ > slots; --slots_) {
    const auto slot = static_cast<std::int32_t>(slots_ - 1);
    drop(slot);
    unlink(slot);
    list_of_[static_cast<std::size_t>(slot)] = kUnused;
  }
  for (; slots_ < slots; ++slots_) push(static_cast<std::int32_t>(slots_), kFree);
}

void SlotCache::own(std::int32_t slot, std::int64_t cluster) {
  owner_[static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(cluster);
  slot_of_[static_cast<std::size_t>(cluster)] = slot;
}

void SlotCache::disown(std::int32_t slot) {
  std::int32_t& owner = owner_[static_cast<std::size_t>(slot)];
  if (owner != kNone) slot_of_[static_cast<std::size_t>(owner)] = kNone;
  owner = kNone;
}

void SlotCache::count(std::int64_t cluster) {
  std::uint8_t& times = count_of_[static_cast<std::size_t>(cluster)];
  if (times < kMostCounted) ++times;
  if (++counted_ < period()) return;
  for (std::uint8_t& each : count_of_) each = static_cast<std::uint8_t>(each / 2);
  counted_ = 0;
}

std::uint8_t SlotCache::uses(std::int32_t slot) const {
  return count_of_[static_cast<std::size_t>(owner_[static_cast<std::size_t>(slot)])];
}

void SlotCache::unlink(std::int32_t slot) {
  const auto at = static_cast<std::size_t>(slot);
  next_[static_cast<std::size_t>(previous_[at])] = next_[at];
  previous_[static_cast<std::size_t>(next_[at])] = previous_[at];
  --sizes_[list_of_[at]];
}

void SlotCache::push(std::int32_t slot, List list, End end) {
  const auto at = static_cast<std::size_t>(slot);
  const auto before = end == End::kFront ? head(list) : static_cast<std::size_t>(previous_[head(list)]);
  const auto behind = static_cast<std::size_t>(next_[before]);
  previous_[at] = static_cast<std::int32_t>(before);
  next_[at] = static_cast<std::int32_t>(behind);
  next_[before] = previous_[behind] = slot;
  list_of_[at] = list;
  ++sizes_[list];
}

std::int32_t SlotCache::last(List list) const {
  const std::int32_t slot = previous_[head(list)];
  return slot == static_cast<std::int32_t>(head(list)) ? kNone : slot;
}

bool SlotCache::in_turn(std::int32_t slot) const { return turn_of_[static_cast<std::size_t>(slot)] == turn_; }

/// The oldest slot of the main part that was not touched or taken in this turn.
std::int32_t SlotCache::evictable() const {
  for (const List list : {kProbation, kProtected}) {
    if (last(list) != kNone && !in_turn(last(list))) return last(list);
  }
  // One that was let in lately may lie before others that lost their protection in this turn.
  const auto end = static_cast<std::int32_t>(head(kProbation));
  std::int32_t slot = previous_[head(kProbation)];
  while (slot != end && in_turn(slot)) slot = previous_[static_cast<std::size_t>(slot)];
  return slot == end ? kNone : slot;
}

}  // namespace turbosparse
