#include "engine/slot_cache.h"

namespace turbosparse {

SlotCache::SlotCache(std::int64_t clusters, std::int64_t slots)
    : capacity_(static_cast<std::size_t>(slots)),
      slots_(slots),
      slot_of_(static_cast<std::size_t>(clusters), kNone),
      owner_(capacity_, kNone),
      previous_(capacity_ + 3),
      next_(capacity_ + 3),
      turn_of_(capacity_),
      list_of_(capacity_, kUnused) {
  for (std::size_t list = capacity_; list < next_.size(); ++list) {
    previous_[list] = next_[list] = static_cast<std::int32_t>(list);
  }
  for (std::size_t slot = capacity_; slot-- > 0;) push_front(static_cast<std::int32_t>(slot), kFree);
}

std::size_t SlotCache::bytes(std::int64_t clusters, std::int64_t slots) {
  constexpr std::size_t kPerSlot = 3 * sizeof(std::int32_t) + sizeof(std::uint32_t) + sizeof(List);
  return static_cast<std::size_t>(clusters) * sizeof(std::int32_t) +
         static_cast<std::size_t>(slots) * kPerSlot;
}

void SlotCache::touch(std::int32_t slot) {
  turn_of_[static_cast<std::size_t>(slot)] = turn_;
  unlink(slot);
  push_front(slot, kProtected);
  if (sizes_[kProtected] * 5 <= slots_ * 4) return;
  const std::int32_t oldest = last(kProtected);
  unlink(oldest);
  push_front(oldest, kProbation);
}

std::int32_t SlotCache::take(std::int64_t cluster) {
  std::int32_t slot = last(kFree);
  for (const List list : {kProbation, kProtected}) {
    if (slot == kNone && last(list) != kNone && !in_turn(last(list))) slot = last(list);
  }
  if (slot == kNone) slot = pushed_back();
  if (slot == kNone) return kNone;
  const auto at = static_cast<std::size_t>(slot);
  if (owner_[at] != kNone) slot_of_[static_cast<std::size_t>(owner_[at])] = kNone;
  unlink(slot);
  push_front(slot, kProbation);
  owner_[at] = static_cast<std::int32_t>(cluster);
  turn_of_[at] = turn_;
  slot_of_[static_cast<std::size_t>(cluster)] = slot;
  return slot;
}

void SlotCache::drop(std::int32_t slot) {
  const auto at = static_cast<std::size_t>(slot);
  if (owner_[at] != kNone) slot_of_[static_cast<std::size_t>(owner_[at])] = kNone;
  owner_[at] = kNone;
  turn_of_[at] = 0;
  unlink(slot);
  push_front(slot, kFree);
}

void SlotCache::resize(std::int64_t slots) {
  for (; slots_ > slots; --slots_) {
    const auto slot = static_cast<std::int32_t>(slots_ - 1);
    drop(slot);
    unlink(slot);
    list_of_[static_cast<std::size_t>(slot)] = kUnused;
  }
  for (; slots_ < slots; ++slots_) push_front(static_cast<std::int32_t>(slots_), kFree);
}

void SlotCache::unlink(std::int32_t slot) {
  const auto at = static_cast<std::size_t>(slot);
  next_[static_cast<std::size_t>(previous_[at])] = next_[at];
  previous_[static_cast<std::size_t>(next_[at])] = previous_[at];
  --sizes_[list_of_[at]];
}

void SlotCache::push_front(std::int32_t slot, List list) {
  const auto at = static_cast<std::size_t>(slot);
  const std::size_t first = head(list);
  previous_[at] = static_cast<std::int32_t>(first);
  next_[at] = next_[first];
  previous_[static_cast<std::size_t>(next_[first])] = slot;
  next_[first] = slot;
  list_of_[at] = list;
  ++sizes_[list];
}

std::int32_t SlotCache::last(List list) const {
  const std::int32_t slot = previous_[head(list)];
  return slot == static_cast<std::int32_t>(head(list)) ? kNone : slot;
}

bool SlotCache::in_turn(std::int32_t slot) const { return turn_of_[static_cast<std::size_t>(slot)] == turn_; }

/// One that lost its protection in this turn without being asked for, and so lies before others that were.
std::int32_t SlotCache::pushed_back() const {
  const auto end = static_cast<std::int32_t>(head(kProbation));
  for (std::int32_t slot = previous_[head(kProbation)]; slot != end;
       slot = previous_[static_cast<std::size_t>(slot)]) {
    if (!in_turn(slot)) return slot;
  }
  return kNone;
}

}  // namespace turbosparse
