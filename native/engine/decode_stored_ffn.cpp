// FFNs of one token whose neurons are partly on disk: all that the token needs is asked for at once; what is
// in memory is computed while the rest is on its way, and each of the rest as it comes. Coefficients are
// summed up in the order of the neurons, so that the result is that of an engine with everything in memory.
#include <algorithm>
#include <array>
#include <chrono>

#include "engine/decode_ffn.h"

namespace turbosparse {
namespace {

/// Neurons in memory that a thread takes at a time.
constexpr std::int64_t kReadyAtOnce = 64;

bool gate_in_memory(const Step& step) {
  return step.config().gated && !step.model.store->has(Projection::kGate);
}

/// Leaves the neurons of a piece that the token needs in `kept`; returns how many. Where gate is in memory,
/// they have passed it.
std::int64_t want_piece(const Step& step, const Piece& piece, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const std::int32_t* list = s.all.data() + piece.rows.begin;
  std::int64_t n = piece.rows.size();
  if (step.predicted()) {
    const KeptNeurons& candidates = list_candidates(step, piece, layer, index);
    list = candidates.rows.data();
    n = candidates.count;
    thread.watch.lap(Part::kPredictor);
  }
  thread.counts.candidates += n;
  if (gate_in_memory(step)) {
    pass_gate(step, piece, list, n, index);
    thread.watch.lap(Part::kGate);
    list = thread.passed.rows.data();
    n = thread.passed.count;
  }
  std::copy_n(list, n, s.kept.data() + piece.at + piece.rows.begin);
  return n;
}

/// Asks for the wanted neurons of all FFNs.
void ask(Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer) {
  Scratch& s = step.scratch;
  StoredNeurons& stored = s.stored;
  const std::int64_t n = gather_lists(step, ffns);
  std::fill_n(stored.active.data(), n, std::uint8_t{0});
  const FetchCounts fetched = step.model.store->fetch(std::span(stored.lists).first(ffns.size()),
                                                      stored.rows.data(), stored.ready.data());
  stored.ready_count = fetched.cached;
  stored.next_ready.store(0, std::memory_order_relaxed);
  s.next_piece.store(0, std::memory_order_relaxed);
  step.counts[static_cast<std::size_t>(layer)] += {.cached = fetched.cached,
                                                   .missed = fetched.missed,
                                                   .foreseen = fetched.foreseen,
                                                   .disk_bytes = fetched.bytes};
}

/// gate and up of n neurons of an FFN, given by their places in the list, become coefficients.
void compute(const Step& step, const ActiveFfn& ffn, std::size_t slot, const std::int32_t* places,
             std::int64_t n, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  const FfnWeights& w = *ffn.weights;
  NeuronStore& store = *step.model.store;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const StoredNeurons& stored = s.stored;
  const Input input = thread.input.view();
  const Thresholds limits = thresholds(step, w);
  float* gate = store.gate();
  float* values = thread.values.data();
  std::int32_t* rows = thread.candidates.rows.data();
  for (std::int64_t i = 0; i < n; ++i) rows[i] = stored.rows[static_cast<std::size_t>(places[i])];
  if (gate_in_memory(step)) {
    const float* known = s.gate.data() + slot_begin(step, slot);
    for (std::int64_t i = 0; i < n; ++i)
      values[i] = known[stored.neurons[static_cast<std::size_t>(places[i])]];
  } else {
    kernels.gemv_rows(store.rows(config.gated ? Projection::kGate : Projection::kUp), input, rows, n, gate);
    for (std::int64_t i = 0; i < n; ++i) values[i] = gate[rows[i]];
    kernels.activate(config.activation, config.activation_parameter, values, n, values);
  }
  std::int32_t* passed = thread.passed.rows.data();  // places
  std::int64_t passed_count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t row = rows[i];
    gate[row] = values[i];
    passed[passed_count] = places[i];
    rows[passed_count] = row;
    passed_count += !below(values[i], limits.gate[stored.neurons[static_cast<std::size_t>(places[i])]]);
  }
  thread.watch.lap(Part::kGate);
  const float* up = store.up();
  if (config.gated) kernels.gemv_rows(store.rows(Projection::kUp), input, rows, passed_count, store.up());
  std::int64_t active = 0;
  for (std::int64_t i = 0; i < passed_count; ++i) {
    const auto place = static_cast<std::size_t>(passed[i]);
    const float value = coefficient(config, gate[rows[i]], up[rows[i]]);
    const bool keeps = !below(value, limits.neuron[stored.neurons[place]]);
    s.stored.active[place] = keeps;
    active += keeps;
    gate[rows[i]] = value * ffn.factor;
  }
  thread.counts += {.gate_passed = passed_count, .active = active};
  thread.watch.lap(Part::kUp);
}

/// What is in memory, in turn.
void compute_ready(const Step& step, std::span<const ActiveFfn> ffns, int index) {
  StoredNeurons& stored = step.scratch.stored;
  for (std::int64_t begin;
       (begin = stored.next_ready.fetch_add(kReadyAtOnce, std::memory_order_relaxed)) < stored.ready_count;) {
    const std::int64_t end = std::min(begin + kReadyAtOnce, stored.ready_count);
    for (std::size_t slot = 0; slot < ffns.size() && begin < end; ++slot) {
      std::int64_t next = begin;
      while (next < end && stored.ready[static_cast<std::size_t>(next)] < stored.begin[slot + 1]) ++next;
      compute(step, ffns[slot], slot, stored.ready.data() + begin, next - begin, index);
      begin = next;
    }
  }
}

/// What comes from disk, as it comes.
void compute_arriving(const Step& step, std::span<const ActiveFfn> ffns, int index) {
  using Clock = std::chrono::steady_clock;
  StoredNeurons& stored = step.scratch.stored;
  ThreadScratch& thread = step.thread(index);
  std::array<ListRange, 16> parts;
  while (true) {
    const Clock::time_point asked = Clock::now();
    const std::int64_t count = step.model.store->arrived(parts);
    thread.counts.disk_wait_ns += std::chrono::nanoseconds(Clock::now() - asked).count();
    thread.watch.lap(Part::kDisk);
    if (count == 0) return;
    for (std::int64_t i = 0; i < count; ++i) {
      const ListRange part = parts[static_cast<std::size_t>(i)];
      std::size_t slot = 0;
      while (part.begin >= stored.begin[slot + 1]) ++slot;
      compute(step, ffns[slot], slot, stored.places.data() + part.begin, part.end - part.begin, index);
    }
  }
}

/// This thread's columns of the residual: x += sum of coefficients times rows of down.
void add_active(const Step& step, std::span<const ActiveFfn> ffns, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const StoredNeurons& stored = s.stored;
  const Range columns = share(step, step.config().hidden_size, index);
  float* out = s.out.data();
  std::fill(out + columns.begin, out + columns.end, 0.0F);
  for (std::size_t slot = 0; slot < ffns.size(); ++slot) {
    std::int64_t active = 0;
    for (std::int64_t i = stored.begin[slot]; i < stored.begin[slot + 1]; ++i) {
      thread.active[static_cast<std::size_t>(active)] = stored.rows[static_cast<std::size_t>(i)];
      active += stored.active[static_cast<std::size_t>(i)];
    }
    NeuronStore& store = *step.model.store;
    step.kernels().axpy_rows(store.rows(Projection::kDown), thread.active.data(), active, store.gate(),
                             columns.begin, columns.end, out);
  }
  step.kernels().add(out + columns.begin, columns.size(), s.x.data() + columns.begin);
}

/// Adds up what the threads counted. In dense mode the neurons are counted already.
void count_all(Step& step, const FfnWeights& w, std::int64_t layer) {
  LayerCounts& counts = step.counts[static_cast<std::size_t>(layer)];
  LayerCounts sum;
  for (const ThreadScratch& other : step.scratch.threads) sum += other.counts;
  if (step.mode == Mode::kDense) sum = {.disk_wait_ns = sum.disk_wait_ns};
  sum.bytes = ffn_bytes(step, w, sum);
  sum.disk_wait_ns /= step.thread_count();
  counts += sum;
}

}  // namespace

std::int64_t gather_lists(const Step& step, std::span<const ActiveFfn> ffns) {
  Scratch& s = step.scratch;
  StoredNeurons& stored = s.stored;
  std::int64_t n = 0;
  for (std::size_t slot = 0; slot < ffns.size(); ++slot) {
    const FfnWeights& w = *ffns[slot].weights;
    const std::int64_t begin = n;
    for (std::int64_t part = 0; part < s.pieces; ++part) {
      const std::int64_t count =
          s.kept_counts[static_cast<std::size_t>(static_cast<std::int64_t>(slot) * s.pieces + part)];
      const std::int32_t* from =
          s.kept.data() + slot_begin(step, slot) + piece_range(step, w.neurons, part).begin;
      std::copy_n(from, count, stored.neurons.data() + n);
      n += count;
    }
    stored.begin[slot + 1] = n;
    stored.lists[slot] = {w.stored, stored.neurons.data() + begin, n - begin};
  }
  return n;
}

void decode_stored_ffns(Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer, int index) {
  ThreadScratch& thread = step.thread(index);
  thread.counts = {};
  take_pieces(step, ffns, [&](const Piece& piece) { return want_piece(step, piece, layer, index); });
  step.finish(index, Part::kPredictor);
  if (index == 0) ask(step, ffns, layer);
  step.finish(index, Part::kDisk);
  compute_ready(step, ffns, index);
  compute_arriving(step, ffns, index);
  step.finish(index, Part::kUp);
  add_active(step, ffns, index);
  if (index == 0) count_all(step, *ffns.front().weights, layer);
}

}  // namespace turbosparse
