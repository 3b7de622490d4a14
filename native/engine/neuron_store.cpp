#include "engine/neuron_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

/// Of the neurons that have room, the share that stays for good. The others follow the text.
constexpr double kPinnedShare = 0.5;
/// A stripe is read in pieces of at least so many bytes, and at most so many pieces: two stripes are on their
/// way at once, and every reader takes twice as many.
constexpr std::size_t kStripeRead = std::size_t{256} << 10;
constexpr std::size_t kStripeReads = 24;
/// Reads on their way, at most: buffers for them.
constexpr std::size_t kMostReads = 128;

std::int64_t clusters_of(const BundleLayout& layout, const FfnBundles& ffn) {
  return ffn.neurons / layout.cluster;
}

std::int64_t all_clusters(const BundleLayout& layout, const std::vector<FfnBundles>& ffns) {
  std::int64_t count = 0;
  for (const FfnBundles& ffn : ffns) count += clusters_of(layout, ffn);
  return count;
}

std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

}  // namespace

NeuronStore::NeuronStore(BundleLayout layout, std::vector<FfnBundles> ffns, ThreadPool& pool)
    : layout_(layout), bytes_(resident_bytes(layout, ffns)) {
  for (FfnBundles& ffn : ffns) {
    const std::int64_t neurons = ffn.neurons;
    ffns_.push_back({std::move(ffn), neurons, pinned_rows_, 0});
    pinned_rows_ += neurons;
  }
  arena_ = Arena(bytes_);
  memory_ = arena_.take(bytes_);
  load_pinned(pool);
}

NeuronStore::NeuronStore(BundleLayout layout, std::vector<FfnBundles> ffns, ThreadPool& pool,
                         std::int64_t token_neurons, const StoreRoom& room,
                         std::shared_ptr<const DiskFile> file, std::unique_ptr<DiskReader> reader)
    : layout_(layout),
      bytes_(room.bytes),
      fewest_slots_(token_neurons / layout.cluster),
      file_(std::move(file)),
      reader_(std::move(reader)),
      io_(io_bytes(layout)) {
  const std::int64_t all = all_clusters(layout_, ffns);
  const std::size_t fixed = io_bytes(layout_) + SlotCache::bytes(all, 0);
  const auto fitting = [&](std::size_t bytes) {
    return static_cast<std::int64_t>((bytes - fixed) / cluster_bytes(layout_));
  };
  const std::int64_t fits = fitting(room.bytes);
  const std::int64_t stays = fitting(room.bytes - room.lent) - 1;  // giving back is in whole clusters
  const std::int64_t pinned =
      std::min(stays - fewest_slots_, static_cast<std::int64_t>(kPinnedShare * static_cast<double>(stays)));
  std::int64_t first_cluster = 0;
  for (FfnBundles& ffn : ffns) {
    const std::int64_t clusters = clusters_of(layout_, ffn);
    ffns_.push_back({std::move(ffn), 0, 0, first_cluster});
    first_cluster += clusters;
  }
  pin(std::max<std::int64_t>(pinned, 0));
  const std::int64_t slots = std::min(fits, all) - pinned_rows_ / layout_.cluster;
  const std::int64_t rows = pinned_rows_ + slots * layout_.cluster;
  lent_ = (rows / layout_.cluster - fits) * static_cast<std::int64_t>(cluster_bytes(layout_));
  arena_ = Arena(count(rows) * layout_.bytes);
  memory_ = arena_.take(count(rows) * layout_.bytes);
  gate_.resize(count(rows));
  up_.resize(count(rows));
  cache_ = SlotCache(all, slots);
  io_memory_ = io_.take(io_bytes(layout_));
  misses_.reserve(count(token_neurons));
  reads_.reserve(kMostReads);
  for (std::size_t buffer = 0; buffer < std::min(kMostReads, reader_->depth()); ++buffer) {
    free_buffers_.push_back(buffer);
  }
  load_pinned(pool);
}

std::size_t NeuronStore::io_bytes(const BundleLayout& layout) {
  return std::max(kMostReads * layout.read_bytes(), count(kStripes * kStripe) * layout.file_bytes);
}

/// What room for a cluster costs: its rows, what gate and up come to, and its entries in the cache.
std::size_t NeuronStore::cluster_bytes(const BundleLayout& layout) {
  return count(layout.cluster) * (layout.bytes + 2 * sizeof(float)) + SlotCache::bytes(0, 1);
}

std::size_t NeuronStore::minimum_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns,
                                       std::int64_t token_neurons) {
  return io_bytes(layout) + SlotCache::bytes(all_clusters(layout, ffns), 0) +
         count(token_neurons / layout.cluster + 1) * cluster_bytes(layout);
}

std::size_t NeuronStore::resident_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns) {
  return count(all_clusters(layout, ffns) * layout.cluster) * layout.bytes;
}

/// Chooses what stays in memory: the hottest clusters of all FFNs, or as large a part of each where the file
/// does not say how hot they are.
void NeuronStore::pin(std::int64_t clusters) {
  struct Candidate {
    float hotness;
    std::size_t ffn;
  };
  std::vector<Candidate> candidates;
  for (std::size_t number = 0; number < ffns_.size(); ++number) {
    const FfnBundles& bundles = ffns_[number].bundles;
    const std::int64_t own = clusters_of(layout_, bundles);
    for (std::int64_t c = 0; c < own; ++c) {
      const float rank = 1.0F - static_cast<float>(c) / static_cast<float>(own);
      candidates.push_back(
          {bundles.hotness.empty() ? rank : bundles.hotness[count(c * layout_.cluster)], number});
    }
  }
  std::ranges::stable_sort(candidates,
                           [](const Candidate& a, const Candidate& b) { return a.hotness > b.hotness; });
  candidates.resize(std::min(candidates.size(), count(clusters)));
  for (const Candidate& candidate : candidates) ffns_[candidate.ffn].pinned += layout_.cluster;
  for (Ffn& ffn : ffns_) {
    ffn.first_row = pinned_rows_;
    pinned_rows_ += ffn.pinned;
  }
}

void NeuronStore::load_pinned(ThreadPool& pool) {
  pool.run([&](int index) noexcept {
    for (const Ffn& ffn : ffns_) {
      const Range range = split(ffn.pinned, 1, index, pool.size());
      for (std::int64_t r = range.begin; r < range.end; ++r) {
        std::memcpy(row(ffn.first_row + r), ffn.bundles.data.data() + count(r) * layout_.file_bytes,
                    layout_.bytes);
      }
    }
  });
}

Matrix NeuronStore::view(const std::byte* base, Projection part, std::int64_t rows,
                         std::size_t row_bytes) const {
  const BundleLayout::Part& at = layout_.parts[static_cast<std::size_t>(part)];
  if (!at.there) return {};
  return {base + at.offset, rows, layout_.cols, row_bytes, at.type};
}

Matrix NeuronStore::matrix(std::int64_t ffn, Projection part) const {
  const Ffn& f = ffns_[count(ffn)];
  return view(row(f.first_row), part, f.bundles.neurons, layout_.bytes);
}

Matrix NeuronStore::rows(Projection part) const {
  return view(memory_, part, static_cast<std::int64_t>(gate_.size()), layout_.bytes);
}

std::string NeuronStore::shrink(std::int64_t bytes) noexcept {
  const auto each = static_cast<std::int64_t>(cluster_bytes(layout_));
  const std::int64_t lent = std::max<std::int64_t>(lent_ + bytes, 0);
  const std::int64_t slots = cache_.most() - (lent + each - 1) / each;
  if (slots < fewest_slots_) {
    return "[memory budget] expected " + std::to_string((fewest_slots_ - slots) * each) +
           " bytes more for another session beside the neurons of one layer, got none";
  }
  lent_ += bytes;
  cache_.resize(slots);
  arena_.release(count(pinned_rows_ + cache_.slots() * layout_.cluster) * layout_.bytes);
  return "";
}

// ---- neurons one by one
// ------------------------------------------------------------------------------------------

FetchCounts NeuronStore::fetch(std::span<const NeuronList> lists, std::int32_t* rows,
                               std::int32_t* ready) noexcept {
  const auto k = static_cast<std::int32_t>(layout_.cluster);
  const auto slots_begin = static_cast<std::int32_t>(pinned_rows_);
  FetchCounts counts;
  misses_.clear();
  started_ = 0;
  cache_.begin();
  std::int32_t place = 0;
  for (const NeuronList& list : lists) {
    const Ffn& f = ffns_[count(list.ffn)];
    for (std::int64_t i = 0; i < list.n; ++i, ++place) {
      const std::int32_t neuron = list.neurons[i];
      const std::int64_t cluster = neuron / k;
      const std::int32_t slot = neuron < f.pinned ? SlotCache::kNone : cache_.find(f.first_cluster + cluster);
      if (neuron < f.pinned) {
        rows[place] = static_cast<std::int32_t>(f.first_row) + neuron;
      } else if (slot != SlotCache::kNone) {
        cache_.touch(slot);
        rows[place] = slots_begin + slot * k + neuron % k;
      } else {
        rows[place] = neuron % k;  // the slot is chosen when all that is there has been touched
        const bool same =
            !misses_.empty() && misses_.back().ffn == list.ffn && misses_.back().cluster == cluster;
        if (!same) misses_.push_back({.ffn = list.ffn, .cluster = cluster, .list = {place, place}});
        misses_.back().list.end = place + 1;
        ++counts.missed;
        continue;
      }
      ready[counts.cached++] = place;
    }
  }
  for (Miss& miss : misses_) {
    miss.slot = cache_.take(ffns_[count(miss.ffn)].first_cluster + miss.cluster);
    for (std::int32_t i = miss.list.begin; i < miss.list.end; ++i) rows[i] += slots_begin + miss.slot * k;
  }
  counts.bytes = static_cast<std::int64_t>(misses_.size() * layout_.read_bytes());
  start_misses();
  return counts;
}

std::uint64_t NeuronStore::offset(const Miss& miss) const {
  return ffns_[count(miss.ffn)].bundles.offset + count(miss.cluster) * layout_.read_bytes();
}

/// Asks for as many misses as there are buffers; after an error for none.
void NeuronStore::start_misses() {
  reads_.clear();
  for (; started_ < misses_.size() && !free_buffers_.empty(); ++started_) {
    Miss& miss = misses_[started_];
    if (!error_.empty()) {
      cache_.drop(miss.slot);
      continue;
    }
    miss.buffer = free_buffers_.back();
    free_buffers_.pop_back();
    reads_.push_back({.offset = offset(miss),
                      .bytes = layout_.read_bytes(),
                      .to = io_memory_ + miss.buffer * layout_.read_bytes(),
                      .tag = started_});
  }
  if (!reads_.empty()) reader_->start(reads_);
}

std::int64_t NeuronStore::arrived(std::span<ListRange> parts) noexcept {
  constexpr std::size_t kAtOnce = 32;
  std::array<DiskDone, kAtOnce> done;
  const std::lock_guard lock(mutex_);
  std::int64_t came = 0;
  while (came == 0) {
    const std::size_t ended = reader_->wait(std::span(done).first(std::min(kAtOnce, parts.size())));
    if (ended == 0) return 0;
    for (std::size_t i = 0; i < ended; ++i) {
      const Miss& miss = misses_[done[i].tag];
      free_buffers_.push_back(miss.buffer);
      if (done[i].error != 0) {
        fail(offset(miss), layout_.read_bytes(), done[i].error);
        cache_.drop(miss.slot);
        continue;
      }
      keep(miss);
      parts[count(came++)] = miss.list;
    }
    start_misses();
  }
  return came;
}

/// From the buffer, where bundles are padded, to the rows of the slot.
void NeuronStore::keep(const Miss& miss) {
  const std::byte* from = io_memory_ + miss.buffer * layout_.read_bytes();
  const std::int64_t first = pinned_rows_ + miss.slot * layout_.cluster;
  for (std::int64_t i = 0; i < layout_.cluster; ++i) {
    std::memcpy(row(first + i), from + count(i) * layout_.file_bytes, layout_.bytes);
  }
}

// ---- whole FFNs
// --------------------------------------------------------------------------------------------------

/// Whether a stripe has to be read; else all of its neurons stay in memory.
bool NeuronStore::streamed(std::int64_t ffn, std::int64_t index) const {
  const Ffn& f = ffns_[count(ffn)];
  return std::min((index + 1) * kStripe, f.bundles.neurons) > f.pinned;
}

void NeuronStore::stream(std::int64_t ffn) noexcept {
  ffn_ = ffn;
  start_stripe(0);
}

void NeuronStore::start_stripe(std::int64_t index) {
  const Ffn& f = ffns_[count(ffn_)];
  const std::int64_t first = index * kStripe;
  if (first >= f.bundles.neurons || !streamed(ffn_, index) || !error_.empty()) return;
  const std::size_t bytes = count(std::min(kStripe, f.bundles.neurons - first)) * layout_.file_bytes;
  const auto buffer = count(index % kStripes);
  std::byte* to = io_memory_ + buffer * count(kStripe) * layout_.file_bytes;
  reads_.clear();
  const std::size_t blocks = (bytes / kStripeReads + kDiskBlock) / kDiskBlock;
  const std::size_t piece = std::max(kStripeRead, blocks * kDiskBlock);
  for (std::size_t at = 0; at < bytes; at += piece) {
    reads_.push_back({.offset = f.bundles.offset + count(first) * layout_.file_bytes + at,
                      .bytes = std::min(piece, bytes - at),
                      .to = to + at,
                      .tag = buffer});
  }
  stripe_reads_[buffer] = static_cast<std::int64_t>(reads_.size());
  reader_->start(reads_);
}

std::int64_t NeuronStore::stripe(std::int64_t index) noexcept {
  const Ffn& f = ffns_[count(ffn_)];
  start_stripe(index + 1);
  std::array<DiskDone, 32> done;
  const auto buffer = count(index % kStripes);
  while (stripe_reads_[buffer] > 0) {
    const std::size_t ended = reader_->wait(done);
    for (std::size_t i = 0; i < ended; ++i) {
      --stripe_reads_[done[i].tag];
      if (done[i].error != 0) {
        fail(f.bundles.offset, count(f.bundles.neurons) * layout_.file_bytes, done[i].error);
      }
    }
  }
  if (!streamed(ffn_, index)) return 0;
  return std::min(kStripe, f.bundles.neurons - index * kStripe) *
         static_cast<std::int64_t>(layout_.file_bytes);
}

Matrix NeuronStore::stripe_matrix(std::int64_t ffn, std::int64_t index, Projection part) const {
  const Ffn& f = ffns_[count(ffn)];
  const std::int64_t first = index * kStripe;
  const std::int64_t rows = std::min(kStripe, f.bundles.neurons - first);
  if (!streamed(ffn, index)) return view(row(f.first_row + first), part, rows, layout_.bytes);
  const std::byte* buffer = io_memory_ + count(index % kStripes * kStripe) * layout_.file_bytes;
  return view(buffer, part, rows, layout_.file_bytes);
}

void NeuronStore::fail(std::uint64_t offset, std::size_t bytes, int error) {
  if (!error_.empty()) return;
  error_ = "[disk] expected to read " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
           " of the model file, got " + disk_error_text(error);
}

std::string NeuronStore::take_error() { return std::exchange(error_, {}); }

}  // namespace turbosparse
