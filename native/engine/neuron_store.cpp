#include "engine/neuron_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

/// Of the neurons that have room, the share that stays for good. The others follow the text.
constexpr double kPinnedShare = 0.5;
/// Clusters on their way: at least so many, and more where stripes take the memory anyway.
constexpr std::size_t kFewestBuffers = 128;
constexpr std::size_t kMostBuffers = 512;
/// Clusters that lie side by side are read together, up to so many bytes.
constexpr std::size_t kLargestRead = std::size_t{64} << 10;
/// Neurons that stay are copied from the file's mapping so many bytes at a time.
constexpr std::size_t kLoadBytes = std::size_t{1} << 20;

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
    ffns_.push_back(
        {.bundles = std::move(ffn), .pinned = neurons, .loaded = neurons, .first_row = pinned_rows_});
    pinned_rows_ += neurons;
  }
  arena_ = Arena(bytes_);
  memory_ = arena_.take(bytes_);
  load_hottest(pool);
}

NeuronStore::NeuronStore(BundleLayout layout, std::vector<FfnBundles> ffns, ThreadPool& pool,
                         std::int64_t token_neurons, const StoreRoom& room,
                         std::shared_ptr<const DiskFile> file, std::unique_ptr<DiskReader> reader)
    : layout_(layout),
      bytes_(room.bytes),
      fewest_slots_(token_neurons / layout.cluster),
      file_(std::move(file)),
      io_(io_bytes(layout)),
      reader_(std::move(reader)) {
  const std::int64_t all = all_clusters(layout_, ffns);
  const StoreSplit split = split_room(layout_, ffns, token_neurons, room);
  std::int64_t first_cluster = 0;
  for (FfnBundles& ffn : ffns) {
    const std::int64_t clusters = clusters_of(layout_, ffn);
    ffns_.push_back({.bundles = std::move(ffn), .first_cluster = first_cluster});
    first_cluster += clusters;
  }
  {
    const std::vector<Hot> hottest = pin(split.pinned);  // gone before the neurons are loaded
    const std::int64_t pinned = pinned_rows_ / layout_.cluster;
    cache_ = SlotCache(all, std::min(split.fits, all) - pinned);
    fill(hottest, std::min(split.kept, all) - pinned);
  }
  const std::int64_t rows = pinned_rows_ + cache_.slots() * layout_.cluster;
  lent_ = (rows / layout_.cluster - split.fits) * static_cast<std::int64_t>(cluster_bytes(layout_));
  arena_ = Arena(count(rows) * layout_.bytes);
  memory_ = arena_.take(count(rows) * layout_.bytes);
  gate_.resize(count(rows));
  up_.resize(count(rows));
  io_memory_ = io_.take(io_bytes(layout_));
  misses_.reserve(count(token_neurons));
  buffers_.resize(
      std::min(io_bytes(layout_) / layout_.read_bytes(), std::min(kMostBuffers, reader_->depth())));
  reads_.reserve(std::max(buffers_.size(), kStripeReads + 1));
  guesses_.reserve(buffers_.size());
  there_.reserve(count(token_neurons));
  load_hottest(pool);
}

std::size_t NeuronStore::io_bytes(const BundleLayout& layout) {
  return std::max(kFewestBuffers * layout.read_bytes(), count(kStripes * kStripe) * layout.file_bytes);
}

/// What room for a cluster costs: its rows, what gate and up come to, and its entries in the cache.
std::size_t NeuronStore::cluster_bytes(const BundleLayout& layout) {
  return count(layout.cluster) * (layout.bytes + 2 * sizeof(float)) + SlotCache::bytes(0, 1);
}

std::size_t NeuronStore::minimum_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns,
                                       std::int64_t token_neurons) {
  return fixed_bytes(layout, ffns) + count(token_neurons / layout.cluster + 1) * cluster_bytes(layout);
}

std::size_t NeuronStore::fixed_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns) {
  return io_bytes(layout) + SlotCache::bytes(all_clusters(layout, ffns), 0);
}

StoreSplit NeuronStore::split_room(const BundleLayout& layout, const std::vector<FfnBundles>& ffns,
                                   std::int64_t token_neurons, const StoreRoom& room) {
  const auto fitting = [&](std::size_t bytes) {
    return static_cast<std::int64_t>((bytes - fixed_bytes(layout, ffns)) / cluster_bytes(layout));
  };
  StoreSplit split{.fits = fitting(room.bytes), .kept = fitting(room.bytes - room.lent) - 1, .pinned = 0};
  const auto share = static_cast<std::int64_t>(kPinnedShare * static_cast<double>(split.kept));
  split.pinned = std::max<std::int64_t>(std::min(split.kept - token_neurons / layout.cluster, share), 0);
  return split;
}

std::size_t NeuronStore::resident_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns) {
  return count(all_clusters(layout, ffns) * layout.cluster) * layout.bytes;
}

/// Chooses what stays in memory: the hottest clusters of all FFNs, or as large a part of each where the file
/// does not say how hot they are. Returns the others, hottest first.
std::vector<NeuronStore::Hot> NeuronStore::pin(std::int64_t clusters) {
  std::vector<Hot> all;
  for (std::size_t number = 0; number < ffns_.size(); ++number) {
    const FfnBundles& bundles = ffns_[number].bundles;
    const std::int64_t own = clusters_of(layout_, bundles);
    for (std::int64_t c = 0; c < own; ++c) {
      const float rank = 1.0F - static_cast<float>(c) / static_cast<float>(own);
      const float hotness = bundles.hotness.empty() ? rank : bundles.hotness[count(c * layout_.cluster)];
      all.push_back({hotness, static_cast<std::int32_t>(number), static_cast<std::int32_t>(c)});
    }
  }
  std::ranges::stable_sort(all, [](const Hot& a, const Hot& b) { return a.hotness > b.hotness; });
  const auto others = all.begin() + std::min<std::int64_t>(clusters, std::ssize(all));
  for (auto hot = all.begin(); hot != others; ++hot) ffns_[count(hot->ffn)].pinned += layout_.cluster;
  for (Ffn& ffn : ffns_) {
    ffn.first_row = pinned_rows_;
    ffn.loaded = ffn.pinned;
    pinned_rows_ += ffn.pinned;
  }
  all.erase(all.begin(), others);
  return all;
}

/// Where the file says how hot neurons are, lets the cache begin with the hottest clusters, and with counts
/// as they would be after a period of tokens.
void NeuronStore::fill(std::span<const Hot> hottest, std::int64_t slots) {
  double asked = 0;  // clusters per token
  for (const Hot& hot : hottest) asked += hot.hotness;
  const double tokens = asked > 0 ? static_cast<double>(cache_.period()) / asked : 0;
  for (const Hot& hot : hottest) {
    Ffn& ffn = ffns_[count(hot.ffn)];
    const std::int64_t number = cache_number({hot.ffn, hot.number});
    if (ffn.bundles.hotness.empty() || hot.hotness <= 0) continue;
    cache_.expect(number, tokens * hot.hotness);
    if (slots-- <= 0) continue;
    cache_.fill(number);
    ffn.loaded += layout_.cluster;
  }
}

/// Some neurons at a time, whose pages of the mapping are then given back: beside the copy they would count
/// twice.
void NeuronStore::load_hottest(ThreadPool& pool) {
  const auto at_once = static_cast<std::int64_t>(kLoadBytes / layout_.file_bytes + 1);
  pool.run([&](int index) noexcept {
    for (std::size_t number = 0; number < ffns_.size(); ++number) {
      const Ffn& ffn = ffns_[number];
      const Range range = split(ffn.loaded, 1, index, pool.size());
      for (std::int64_t r = range.begin; r < range.end; ++r) {
        const std::byte* from = ffn.bundles.data.data() + count(r) * layout_.file_bytes;
        std::memcpy(row(row_of(static_cast<std::int64_t>(number), r)), from, layout_.bytes);
        const std::int64_t copied = (r - range.begin) % at_once + 1;
        if (copied < at_once && r + 1 < range.end) continue;
        const std::size_t bytes = count(copied) * layout_.file_bytes;
        ffn.bundles.file->release({from + layout_.file_bytes - bytes, bytes});
      }
    }
  });
  for (const Ffn& ffn : ffns_) {  // a fault maps pages around it too
    if (ffn.loaded > 0) ffn.bundles.file->release(ffn.bundles.data);
  }
}

/// Of a neuron that is in memory.
std::int64_t NeuronStore::row_of(std::int64_t ffn, std::int64_t neuron) const {
  const Ffn& f = ffns_[count(ffn)];
  if (neuron < f.pinned) return f.first_row + neuron;
  const std::int64_t slot = cache_.find(cache_number({ffn, neuron / layout_.cluster}));
  return pinned_rows_ + slot * layout_.cluster + neuron % layout_.cluster;
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

/// A guess is no better than its place in a queue: real misses have buffers left, and are not behind too
/// many.
std::int64_t NeuronStore::foresee(std::span<const NeuronList> lists) noexcept {
  forget_guesses();
  const std::size_t most = buffers_.size() * 3 / 4;
  for (const NeuronList& list : lists) {
    for (std::int64_t i = 0; i < list.n && guesses_.size() < most; ++i) {
      const Cluster cluster{list.ffn, list.neurons[i] / layout_.cluster};
      const bool same = !guesses_.empty() && guesses_.back().cluster == cluster;
      if (!same && !in_memory(list.ffn, list.neurons[i])) guesses_.push_back({.cluster = cluster});
    }
  }
  std::ranges::sort(guesses_, {}, &Guess::cluster);
  for (std::size_t at = 0; at < guesses_.size();) {
    std::size_t end = at + 1;
    while (end < guesses_.size() && guesses_[end].cluster.follows(guesses_[end - 1].cluster)) ++end;
    const BufferRange buffers = take_buffers(static_cast<std::int64_t>(end - at));
    if (buffers.size == 0) {
      guesses_.resize(at);
      break;
    }
    read_later(guesses_[at].cluster, buffers);
    for (std::int32_t i = 0; i < buffers.size; ++i) guesses_[at++].buffer = buffers.begin + i;
  }
  start_reads();
  return static_cast<std::int64_t>(guesses_.size() * layout_.read_bytes());
}

/// Whether the miss was guessed; then it has a buffer from here on.
bool NeuronStore::foreseen(Miss& miss, std::int32_t number) {
  const auto guess = std::ranges::lower_bound(guesses_, miss.cluster, {}, &Guess::cluster);
  if (guess == guesses_.end() || guess->cluster != miss.cluster || guess->buffer == kNone) return false;
  Buffer& buffer = buffers_[count(guess->buffer)];
  const bool good = buffer.state != Buffer::State::kFree;  // else its read has failed
  if (good) {
    miss.buffer = std::exchange(guess->buffer, kNone);
    buffer.miss = number;
    if (buffer.state == Buffer::State::kThere) there_.push_back(number);
  }
  return good;
}

void NeuronStore::forget_guesses() {
  for (const Guess& guess : guesses_) {
    if (guess.buffer == kNone) continue;
    Buffer& buffer = buffers_[count(guess.buffer)];
    buffer.wanted = false;
    if (buffer.state == Buffer::State::kThere) release(guess.buffer);
  }
  guesses_.clear();
}

FetchCounts NeuronStore::fetch(std::span<const NeuronList> lists, std::int32_t* rows,
                               std::int32_t* ready) noexcept {
  const auto k = static_cast<std::int32_t>(layout_.cluster);
  const auto slots_begin = static_cast<std::int32_t>(pinned_rows_);
  FetchCounts counts;
  misses_.clear();
  there_.clear();
  started_ = 0;
  cache_.begin();
  std::int32_t place = 0;
  for (const NeuronList& list : lists) {
    const Ffn& f = ffns_[count(list.ffn)];
    for (std::int64_t i = 0; i < list.n; ++i, ++place) {
      const std::int32_t neuron = list.neurons[i];
      const Cluster cluster{list.ffn, neuron / k};
      const std::int32_t slot = neuron < f.pinned ? SlotCache::kNone : cache_.find(cache_number(cluster));
      if (neuron < f.pinned) {
        rows[place] = static_cast<std::int32_t>(f.first_row) + neuron;
      } else if (slot != SlotCache::kNone) {
        cache_.touch(slot);
        rows[place] = slots_begin + slot * k + neuron % k;
      } else {
        rows[place] = neuron % k;  // the slot is chosen when all that is there has been touched
        const bool same = !misses_.empty() && misses_.back().cluster == cluster;
        if (!same) misses_.push_back({.cluster = cluster, .list = {place, place}});
        misses_.back().list.end = place + 1;
        ++counts.missed;
        continue;
      }
      ready[counts.cached++] = place;
    }
  }
  for (std::size_t i = 0; i < misses_.size(); ++i) {
    Miss& miss = misses_[i];
    miss.slot = cache_.take(cache_number(miss.cluster));
    for (std::int32_t at = miss.list.begin; at < miss.list.end; ++at) rows[at] += slots_begin + miss.slot * k;
    if (foreseen(miss, static_cast<std::int32_t>(i))) {
      counts.foreseen += miss.list.end - miss.list.begin;
    } else {
      counts.bytes += static_cast<std::int64_t>(layout_.read_bytes());
    }
  }
  expected_ = static_cast<std::int64_t>(misses_.size());
  forget_guesses();
  start_misses();
  return counts;
}

std::int64_t NeuronStore::cache_number(const Cluster& cluster) const {
  return ffns_[count(cluster.ffn)].first_cluster + cluster.number;
}

std::uint64_t NeuronStore::offset(const Cluster& cluster) const {
  return ffns_[count(cluster.ffn)].bundles.offset + count(cluster.number) * layout_.read_bytes();
}

/// Up to `most` free buffers side by side, fewer where there are no more or one read would be too large.
NeuronStore::BufferRange NeuronStore::take_buffers(std::int64_t most) {
  const auto all = static_cast<std::int32_t>(buffers_.size());
  const auto longest =
      static_cast<std::int64_t>(std::max<std::size_t>(kLargestRead / layout_.read_bytes(), 1));
  const auto is_free = [&](std::int32_t i) { return buffers_[count(i)].state == Buffer::State::kFree; };
  std::int32_t begin = next_buffer_;
  for (std::int32_t tried = 0; tried < all && !is_free(begin); ++tried) begin = (begin + 1) % all;
  if (!is_free(begin)) return {};
  BufferRange range{begin, 0};
  for (; range.size < std::min(most, longest) && begin + range.size < all && is_free(begin + range.size);
       ++range.size) {
    buffers_[count(begin + range.size)] = {.state = Buffer::State::kReading, .wanted = true};
  }
  next_buffer_ = (begin + range.size) % all;
  return range;
}

void NeuronStore::release(std::int32_t buffer) { buffers_[count(buffer)] = {}; }

/// One read for clusters that lie side by side, as many as there are buffers.
void NeuronStore::read_later(const Cluster& first, BufferRange buffers) {
  buffers_[count(buffers.begin)].read = buffers.size;
  reads_.push_back({.offset = offset(first),
                    .bytes = count(buffers.size) * layout_.read_bytes(),
                    .to = io_memory_ + count(buffers.begin) * layout_.read_bytes(),
                    .tag = count(buffers.begin)});
}

void NeuronStore::start_reads() {
  if (!reads_.empty()) reader_->start(reads_);
  reading_ += static_cast<std::int64_t>(reads_.size());
  reads_.clear();
}

/// Asks for as many misses as there are buffers; after an error for none.
void NeuronStore::start_misses() {
  while (started_ < misses_.size()) {
    if (misses_[started_].buffer != kNone) {
      ++started_;
      continue;
    }
    if (!error_.empty()) {
      fail_miss(misses_[started_++]);
      continue;
    }
    std::size_t end = started_ + 1;
    while (end < misses_.size() && misses_[end].buffer == kNone &&
           misses_[end].cluster.follows(misses_[end - 1].cluster)) {
      ++end;
    }
    const BufferRange buffers = take_buffers(static_cast<std::int64_t>(end - started_));
    if (buffers.size == 0) break;
    read_later(misses_[started_].cluster, buffers);
    for (std::int32_t i = 0; i < buffers.size; ++i, ++started_) {
      misses_[started_].buffer = buffers.begin + i;
      buffers_[count(buffers.begin + i)].miss = static_cast<std::int32_t>(started_);
    }
  }
  start_reads();
}

/// Waits for at least one read.
void NeuronStore::end_reads() {
  std::array<DiskDone, 32> done;
  const std::size_t ended = reader_->wait(done);
  reading_ = ended == 0 ? 0 : reading_ - static_cast<std::int64_t>(ended);
  for (const DiskDone& read : std::span(done).first(ended)) {
    const auto begin = static_cast<std::int32_t>(read.tag);
    const std::int32_t end = begin + buffers_[count(begin)].read;
    for (std::int32_t i = begin; i < end; ++i) {
      Buffer& buffer = buffers_[count(i)];
      const std::int32_t miss = buffer.miss;
      if (buffer.wanted && read.error == 0) {
        buffer.state = Buffer::State::kThere;
        if (miss != kNone) there_.push_back(miss);
        continue;
      }
      release(i);
      if (miss == kNone) continue;  // a guess: nobody has to know
      fail(offset(misses_[count(miss)].cluster), layout_.read_bytes(), read.error);
      fail_miss(misses_[count(miss)]);
    }
  }
}

void NeuronStore::fail_miss(const Miss& miss) {
  cache_.drop(miss.slot);
  --expected_;
}

std::int64_t NeuronStore::arrived(std::span<ListRange> parts) noexcept {
  const std::lock_guard lock(mutex_);
  while (there_.empty()) {
    if (expected_ == 0) return 0;
    end_reads();
    start_misses();
  }
  std::size_t came = 0;
  for (; came < parts.size() && !there_.empty(); ++came) {
    const Miss& miss = misses_[count(there_.back())];
    there_.pop_back();
    keep(miss);
    release(miss.buffer);
    parts[came] = miss.list;
    --expected_;
  }
  start_misses();
  return static_cast<std::int64_t>(came);
}

/// From the buffer, where bundles are padded, to the rows of the slot.
void NeuronStore::keep(const Miss& miss) {
  const std::byte* from = io_memory_ + count(miss.buffer) * layout_.read_bytes();
  const std::int64_t first = pinned_rows_ + miss.slot * layout_.cluster;
  for (std::int64_t i = 0; i < layout_.cluster; ++i) {
    std::memcpy(row(first + i), from + count(i) * layout_.file_bytes, layout_.bytes);
  }
}

void NeuronStore::fail(std::uint64_t offset, std::size_t bytes, int error) {
  if (!error_.empty()) return;
  error_ = "[disk] expected to read " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
           " of the model file, got " + disk_error_text(error);
}

std::string NeuronStore::take_error() { return std::exchange(error_, {}); }

}  // namespace turbosparse
