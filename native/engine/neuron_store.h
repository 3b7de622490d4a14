// Neurons of all FFNs where memory does not hold them: the hottest stay in memory, of the others those that
// are needed most, and the rest is read when a token asks for it. What lies together in the file is a
// bundle, the rows of gate, up and down_t of one neuron; docs/format.md has the layout.
//
// Belongs to the job that runs on the thread pool: one FFN at a time, `foresee`, `fetch` and `stream` by one
// thread, `arrived` by all.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/bundles.h"
#include "engine/slot_cache.h"
#include "io/disk_reader.h"
#include "kernels/kernels.h"
#include "util/memory.h"
#include "util/thread_pool.h"

namespace turbosparse {

/// Neurons of one FFN, ascending.
struct NeuronList {
  std::int64_t ffn = 0;
  const std::int32_t* neurons = nullptr;
  std::int64_t n = 0;
};

/// Bytes for a store, all in, of which it will have to give some back.
struct StoreRoom {
  std::size_t bytes = 0;
  std::size_t lent = 0;
};

/// Clusters of neurons that have room.
struct StoreSplit {
  std::int64_t fits = 0;
  std::int64_t kept = 0;    // of these, when what was lent is given back
  std::int64_t pinned = 0;  // of these, in memory for good
};

/// Places begin ... end - 1 of a list.
struct ListRange {
  std::int32_t begin = 0;
  std::int32_t end = 0;
};

/// What asking for neurons came to.
struct FetchCounts {
  std::int64_t cached = 0;  // neurons that were in memory
  std::int64_t missed = 0;
  std::int64_t foreseen = 0;  // of the missed: whose read had begun before
  std::int64_t bytes = 0;     // read from disk for the others
};

class NeuronStore {
 public:
  /// Neurons that prefill reads at a time: what one pass of the transposed product takes.
  static constexpr std::int64_t kStripe = 768;

  /// Everything in memory. What was copied of the file's mapping is given back at once, here and below.
  NeuronStore(BundleLayout layout, std::vector<FfnBundles> ffns, ThreadPool& pool);
  /// As many neurons as the room allows, which is at least `minimum_bytes`. A token needs up to
  /// `token_neurons` of a layer at once.
  NeuronStore(BundleLayout layout, std::vector<FfnBundles> ffns, ThreadPool& pool, std::int64_t token_neurons,
              const StoreRoom& room, std::shared_ptr<const DiskFile> file,
              std::unique_ptr<DiskReader> reader);
  static std::size_t minimum_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns,
                                   std::int64_t token_neurons);
  /// What of it does not depend on how many neurons there is room for: buffers, and where neurons are.
  static std::size_t fixed_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns);
  /// How a room of at least `minimum_bytes` is used.
  static StoreSplit split_room(const BundleLayout& layout, const std::vector<FfnBundles>& ffns,
                               std::int64_t token_neurons, const StoreRoom& room);
  /// What holds everything, read or not.
  static std::size_t resident_bytes(const BundleLayout& layout, const std::vector<FfnBundles>& ffns);

  const BundleLayout& layout() const { return layout_; }
  bool resident() const { return reader_ == nullptr; }
  /// Whether a projection's rows are in the bundles.
  bool has(Projection part) const { return layout_.part(part).there; }
  std::size_t bytes() const { return bytes_; }
  /// Neurons that stay in memory, and those that have room beside them.
  std::int64_t pinned_neurons() const { return pinned_rows_; }
  std::int64_t cached_neurons() const { return cache_.slots() * layout_.cluster; }
  const char* reader_name() const { return resident() ? "" : reader_->name(); }
  /// Whether the file is as it was opened.
  bool unchanged() const { return resident() || file_->unchanged(); }

  /// Gives `bytes` back to the system, or takes them again where negative. Says what is wrong where less than
  /// the minimum would be left, "" for nothing.
  std::string shrink(std::int64_t bytes) noexcept;

  /// Where all is in memory: the rows of an FFN, row r for neuron r.
  Matrix matrix(std::int64_t ffn, Projection part) const;
  /// Rows of all FFNs, as `fetch` numbers them.
  Matrix rows(Projection part) const;
  /// Values per row: what gate and up come to.
  float* gate() { return gate_.data(); }
  float* up() { return up_.data(); }

  /// Whether a neuron's rows are in memory.
  bool in_memory(std::int64_t ffn, std::int64_t neuron) const {
    const Ffn& f = ffns_[static_cast<std::size_t>(ffn)];
    return neuron < f.pinned || cache_.find(f.first_cluster + neuron / layout_.cluster) != SlotCache::kNone;
  }
  /// Begins to read what is not in memory of neurons that `fetch` will perhaps ask for next. Returns the
  /// bytes.
  std::int64_t foresee(std::span<const NeuronList> lists) noexcept;
  /// Asks for neurons of some FFNs, whose lists follow each other: rows[i] is where the i-th of all lies or
  /// will lie, until the next call. ready[0 ... cached) are the i whose row is there already; others arrive.
  FetchCounts fetch(std::span<const NeuronList> lists, std::int32_t* rows, std::int32_t* ready) noexcept;
  /// Waits for neurons that were asked for: parts of the list whose rows are there now. Returns how many
  /// parts, 0 where no more come. For all threads.
  std::int64_t arrived(std::span<ListRange> parts) noexcept;

  /// Begins to read an FFN from start to end; then `stripe` gives its neurons, kStripe at a time, in order.
  void stream(std::int64_t ffn) noexcept;
  /// Waits for stripe `index` and begins to read the next one; the one before stays valid. Returns the bytes
  /// that it took.
  std::int64_t stripe(std::int64_t index) noexcept;
  /// Rows of the stripe, row 0 for its first neuron.
  Matrix stripe_matrix(std::int64_t ffn, std::int64_t index, Projection part) const;

  /// What went wrong since the last call, "" for nothing. Cached rows that were not read are forgotten.
  std::string take_error();

 private:
  static constexpr std::int64_t kStripes = 3;
  /// A stripe is read in so many pieces at most: two stripes are on their way at once, and every reader takes
  /// twice as many.
  static constexpr std::size_t kStripeReads = 24;
  struct Ffn {
    FfnBundles bundles;
    std::int64_t pinned = 0;         // neurons
    std::int64_t loaded = 0;         // the pinned ones and those that are in memory from the start
    std::int64_t first_row = 0;      // of the pinned ones
    std::int64_t first_cluster = 0;  // in the cache's numbers
  };
  static constexpr std::int32_t kNone = -1;
  /// A cluster of an FFN.
  struct Cluster {
    std::int64_t ffn = 0;
    std::int64_t number = 0;
    bool follows(const Cluster& other) const { return ffn == other.ffn && number == other.number + 1; }
    auto operator<=>(const Cluster&) const = default;
  };
  /// A cluster and the share of tokens that need it.
  struct Hot {
    float hotness = 0.0F;
    std::int32_t ffn = 0;
    std::int32_t number = 0;
  };
  /// A cluster to be read for part of the list.
  struct Miss {
    Cluster cluster;
    std::int32_t slot = 0;
    ListRange list;
    std::int32_t buffer = kNone;
  };
  /// A cluster that is read before anybody asks for it.
  struct Guess {
    Cluster cluster;
    std::int32_t buffer = kNone;
  };
  /// Room for one cluster on its way.
  struct Buffer {
    enum class State : std::uint8_t { kFree, kReading, kThere };
    State state = State::kFree;
    bool wanted = false;        // by a guess or a miss; else free when its read has ended
    std::int32_t miss = kNone;  // that it was read for
    std::int32_t read = 1;      // clusters of the read that begins here
  };
  /// Consecutive buffers.
  struct BufferRange {
    std::int32_t begin = 0;
    std::int32_t size = 0;
  };

  static std::size_t io_bytes(const BundleLayout& layout);
  static std::size_t cluster_bytes(const BundleLayout& layout);
  std::vector<Hot> pin(std::int64_t clusters);
  void fill(std::span<const Hot> hottest, std::int64_t slots);
  void load_hottest(ThreadPool& pool);
  std::int64_t row_of(std::int64_t ffn, std::int64_t neuron) const;
  Matrix view(const std::byte* base, Projection part, std::int64_t rows, std::size_t row_bytes) const;
  std::byte* row(std::int64_t index) const {
    return memory_ + static_cast<std::size_t>(index) * layout_.bytes;
  }
  bool foreseen(Miss& miss, std::int32_t number);
  void forget_guesses();
  BufferRange take_buffers(std::int64_t most);
  void release(std::int32_t buffer);
  void read_later(const Cluster& first, BufferRange buffers);
  void start_reads();
  void start_misses();
  void end_reads();
  void fail_miss(const Miss& miss);
  void keep(const Miss& miss);
  void start_stripe(std::int64_t index);
  std::int64_t cache_number(const Cluster& cluster) const;
  std::uint64_t offset(const Cluster& cluster) const;
  void fail(std::uint64_t offset, std::size_t bytes, int error);
  bool streamed(std::int64_t ffn, std::int64_t index) const;

  BundleLayout layout_;
  std::vector<Ffn> ffns_;
  std::size_t bytes_ = 0;
  std::int64_t pinned_rows_ = 0;
  std::int64_t fewest_slots_ = 0;
  std::int64_t lent_ = 0;  // bytes given back; negative: that no neuron needs
  Arena arena_;
  std::byte* memory_ = nullptr;
  std::vector<float> gate_, up_;  // [rows]
  SlotCache cache_;

  std::shared_ptr<const DiskFile> file_;
  Arena io_;  // outlives the reader, which waits for the reads on their way
  std::unique_ptr<DiskReader> reader_;
  std::byte* io_memory_ = nullptr;
  std::mutex mutex_;
  std::vector<Buffer> buffers_;
  std::int32_t next_buffer_ = 0;     // where the search for free ones begins
  std::int64_t reading_ = 0;         // reads on their way
  std::vector<Guess> guesses_;       // ascending
  std::vector<Miss> misses_;         // of the lists at hand
  std::size_t started_ = 0;          // of the misses
  std::int64_t expected_ = 0;        // misses that `arrived` has not given yet
  std::vector<std::int32_t> there_;  // misses whose bytes are in their buffers
  std::vector<DiskRead> reads_;
  std::int64_t ffn_ = 0;                               // that is streamed
  std::array<std::int64_t, kStripes> stripe_reads_{};  // on their way
  std::string error_;
};

}  // namespace turbosparse
