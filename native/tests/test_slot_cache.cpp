// The cache of clusters: what it promises about what stays, against a plain model of it.
#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "engine/slot_cache.h"

namespace turbosparse {
namespace {

constexpr std::int32_t kNone = SlotCache::kNone;

/// Asks for clusters as the engine does: those that are there first, then slots for the others.
int ask(SlotCache& cache, const std::vector<std::int64_t>& clusters) {
  cache.begin();
  int hits = 0;
  for (const std::int64_t cluster : clusters) {
    if (cache.find(cluster) == kNone) continue;
    cache.touch(cache.find(cluster));
    ++hits;
  }
  for (const std::int64_t cluster : clusters) {
    if (cache.find(cluster) == kNone) (void)cache.take(cluster);
  }
  return hits;
}

/// However it is used: a slot holds one cluster, what was asked for is there, and it says none when full.
void test_invariants() {
  constexpr std::int64_t kClusters = 60, kSlots = 20;
  SlotCache cache(kClusters, kSlots);
  std::mt19937 random(3);
  for (int turn = 0; turn < 3000; ++turn) {
    if (turn % 50 == 49) cache.resize(turn % 100 == 49 ? 12 : kSlots);
    std::vector<std::int64_t> all(kClusters);
    for (std::int64_t c = 0; c < kClusters; ++c) all[static_cast<std::size_t>(c)] = c;
    std::ranges::shuffle(all, random);
    all.resize(random() % 13);
    ask(cache, all);
    for (const std::int64_t cluster : all) CHECK(cache.find(cluster) != kNone, "turn %d", turn);
    std::map<std::int32_t, int> used;
    for (std::int64_t c = 0; c < kClusters; ++c) ++used[cache.find(c)];
    for (const auto& [slot, count] : used) {
      CHECK(slot == kNone || (count == 1 && slot < cache.slots()), "turn %d slot %d: %d", turn, slot, count);
    }
    if (random() % 4 == 0 && !all.empty()) {
      cache.drop(cache.find(all[0]));
      CHECK(cache.find(all[0]) == kNone, "turn %d", turn);
    }
  }
  cache.resize(kSlots);
  cache.begin();
  int taken = 0;
  for (std::int64_t c = 0; c < kClusters; ++c) {
    if (cache.find(c) != kNone) cache.drop(cache.find(c));
  }
  for (std::int64_t c = 0; c < kClusters; ++c) taken += cache.take(c) != kNone;
  CHECK(taken == kSlots, "%d slots", taken);
}

/// Clusters that are asked for again and again stay when many others pass by once, as soon as the window has
/// room for those of one turn.
void test_scan() {
  SlotCache cache(1000, 16);
  const std::vector<std::int64_t> hot{0, 1, 2, 3, 4, 5};
  const auto scan = [&](std::int64_t first) {
    for (std::int64_t c = first; c < first + 80; c += 4) ask(cache, {c, c + 1, c + 2, c + 3});
  };
  ask(cache, hot);
  CHECK(ask(cache, hot) == 6, "six are there");
  scan(100);
  ask(cache, hot);
  ask(cache, hot);
  scan(400);
  CHECK(ask(cache, hot) == 6, "they are still there");
}

/// What is expected to be asked for often stays, though others were asked for since; until they are asked for
/// more often than it.
void test_expected() {
  SlotCache cache(1000, 20);
  for (std::int64_t c = 0; c < 20; ++c) {
    cache.expect(c, 6.4);
    CHECK(cache.fill(c) == c, "hotter ones in the slots that are given back last");
  }
  CHECK(cache.fill(20) == kNone, "no slot is free");
  for (std::int64_t c = 100; c < 300; c += 2) ask(cache, {c, c + 1});
  int there = 0;
  for (std::int64_t c = 0; c < 20; ++c) there += cache.find(c) != kNone;
  CHECK(there == 18, "%d of 20 are there, beside a window of two", there);
  CHECK(cache.find(19) == kNone && cache.find(18) == kNone, "the least hot ones went");
  for (int times = 0; times < 8; ++times) {
    ask(cache, {400});
    ask(cache, {500 + times, 600 + times});
  }
  CHECK(cache.find(400) != kNone, "asked for more often than others were expected to be");
  SlotCache halved(4, 2);
  halved.expect(0, 255);
  halved.expect(1, 255);
  halved.fill(0);
  halved.fill(1);
  for (std::int64_t turn = 0; turn < 9 * halved.period(); ++turn) ask(halved, {2});
  ask(halved, {3});
  CHECK(halved.find(2) != kNone && halved.find(0) + halved.find(1) <= 0, "what is no longer asked for goes");
}

}  // namespace
}  // namespace turbosparse

int main() {
  turbosparse::test_invariants();
  turbosparse::test_scan();
  turbosparse::test_expected();
  return turbosparse::test::report();
}
