// Whole FFNs from the disk, for prompts: three buffers of kStripe neurons each, read ahead in large pieces.
#include <algorithm>

#include "engine/neuron_store.h"

namespace turbosparse {
namespace {

/// A stripe is read in pieces of at least so many bytes.
constexpr std::size_t kStripeRead = std::size_t{256} << 10;

std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

}  // namespace

/// Whether a stripe has to be read; else all of its neurons stay in memory.
bool NeuronStore::streamed(std::int64_t ffn, std::int64_t index) const {
  const Ffn& f = ffns_[count(ffn)];
  return std::min((index + 1) * kStripe, f.bundles.neurons) > f.pinned;
}

void NeuronStore::stream(std::int64_t ffn) noexcept {
  ffn_ = ffn;
  forget_guesses();
  while (reading_ > 0) end_reads();  // stripes lie where the buffers do
  start_stripe(0);
}

void NeuronStore::start_stripe(std::int64_t index) {
  const Ffn& f = ffns_[count(ffn_)];
  const std::int64_t first = index * kStripe;
  if (first >= f.bundles.neurons || !streamed(ffn_, index) || !error_.empty()) return;
  const std::size_t bytes = count(std::min(kStripe, f.bundles.neurons - first)) * layout_.file_bytes;
  const auto buffer = count(index % kStripes);
  std::byte* to = io_memory_ + buffer * count(kStripe) * layout_.file_bytes;
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
  reads_.clear();
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

}  // namespace turbosparse
