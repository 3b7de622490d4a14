// The feed-forward networks of one token: one, or the experts that the router chose, side by side; dense, or
// with neurons skipped. Barriers: 2; in predicted mode with a hidden layer 3; with a router one more.
#include <algorithm>
#include <span>

#include "engine/decode_ffn.h"
#include "engine/predictor.h"
#include "engine/router.h"
#include "engine/step.h"

namespace turbosparse {
namespace {

/// Neurons by number.
struct List {
  const std::int32_t* rows;
  std::int64_t n;
};

/// out += sum of coefficients times rows of down over `neurons`, and of the rest's rows over `refined`; `at`
/// is where the coefficients begin.
void add_neurons(const Step& step, const FfnWeights& w, List neurons, List refined, std::int64_t at,
                 Range columns) {
  const float* coef = step.scratch.gate.data() + at;
  float* out = step.scratch.out.data();
  step.kernels().axpy_rows(w.down, neurons.rows, neurons.n, coef, columns.begin, columns.end, out);
  if (w.down_rest.rows > 0)
    step.kernels().axpy_rows(w.down_rest, refined.rows, refined.n, coef, columns.begin, columns.end, out);
}

/// values[i] = f(raw[list[i]])
void activate_list(const Step& step, const float* raw, const std::int32_t* list, std::int64_t n,
                   float* values) {
  const ModelConfig& config = step.config();
  for (std::int64_t i = 0; i < n; ++i) values[i] = raw[list[i]];
  step.kernels().activate(config.activation, config.activation_parameter, values, n, values);
}

/// gate[r] = f(gate[r]) and up[r] = g(up[r]) come together: the coefficients of a range of neurons, in
/// `gate`.
void combine(const Step& step, float factor, Range rows, float* gate, const float* up) {
  if (!step.config().gated) {
    for (std::int64_t r = rows.begin; factor != 1.0F && r < rows.end; ++r) gate[r] *= factor;
  } else if (step.config().activation == Activation::kDRelu) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] = gate[r] * std::max(up[r], 0.0F) * factor;
  } else {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] = gate[r] * up[r] * factor;
  }
}

}  // namespace

std::int64_t slot_begin(const Step& step, std::size_t slot) {
  return static_cast<std::int64_t>(slot) * step.scratch.slot;
}

float coefficient(const ModelConfig& config, float gate, float up) {
  if (!config.gated) return gate;
  return gate * (config.activation == Activation::kDRelu ? std::max(up, 0.0F) : up);
}

std::int64_t ffn_bytes(const Step& step, const FfnWeights& w, const LayerCounts& counts) {
  const auto row_bytes = [](const Matrix& matrix) {
    return static_cast<std::int64_t>(packed_row_bytes(matrix.type, matrix.cols));
  };
  const bool gated = step.config().gated;
  const bool refines = step.refines(w);
  const std::int64_t down_rows = step.model.weights->neuron_major ? counts.active : w.down.rows;
  std::int64_t bytes = counts.candidates * row_bytes(w.first(gated)) + down_rows * row_bytes(w.down);
  bytes += (refines ? counts.refined : counts.candidates) * row_bytes(w.first_rest(gated));
  bytes += (refines ? counts.refined : counts.active) * row_bytes(w.down_rest);
  if (gated) {
    bytes += counts.gate_passed * row_bytes(w.up);
    bytes += (refines ? counts.refined : counts.gate_passed) * row_bytes(w.up_rest);
  }
  return bytes + (counts.candidates + counts.gate_passed) * threshold_bytes(step);
}

Range piece_range(const Step& step, std::int64_t neurons, std::int64_t part) {
  return split(neurons, kBlock, static_cast<int>(part), static_cast<int>(step.scratch.pieces));
}

const KeptNeurons& list_candidates(const Step& step, const Piece& piece, std::int64_t layer, int index) {
  const FfnWeights& w = *piece.ffn.weights;
  const Range rows = piece.rows;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  float* scores = s.scores.data() + piece.at;
  if (runs_predictor(step, w)) {
    if (has_hidden_layer(w)) {
      step.kernels().gemv(w.predictor.b, s.hidden.view(static_cast<std::int64_t>(piece.slot) * s.rank),
                          rows.begin, rows.end, scores);
    } else {
      std::int32_t* differences = s.differences.data() + piece.at * step.model.weights->sign_rows;
      score_signs(step, w, thread.predictor, 0, rows, differences, scores);
    }
  }
  mark_candidates(step, w, layer, 0, rows, scores, index);
  thread.candidates.count = 0;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    thread.candidates.add_if(static_cast<std::int32_t>(r), scores[r] != 0.0F);
  }
  return thread.candidates;
}

void pass_gate(const Step& step, const Piece& piece, const std::int32_t* list, std::int64_t n, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  const FfnWeights& w = *piece.ffn.weights;
  const Range rows = piece.rows;
  ThreadScratch& thread = step.thread(index);
  float* gate = step.scratch.gate.data() + piece.at;
  const Input input = thread.input.view();
  float* raw = step.scratch.raw.data() + piece.at;
  float* values = thread.values.data();
  if (n == rows.size()) {
    kernels.gemv(w.first(config.gated), input, rows.begin, rows.end, raw);
    if (!step.refines(w)) add_rest(step, w.first_rest(config.gated), input, rows, raw);
    kernels.activate(config.activation, config.activation_parameter, raw + rows.begin, n, values);
  } else {
    kernels.gemv_rows(w.first(config.gated), input, list, n, raw);
    if (!step.refines(w)) add_rest_rows(step, w.first_rest(config.gated), input, list, n, raw);
    activate_list(step, raw, list, n, values);
  }
  const float* limit = thresholds(step, w).gate;
  thread.passed.count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    gate[list[i]] = values[i];
    thread.passed.add_if(list[i], !below(values[i], limit[list[i]]));
  }
}

void predict_hidden(const Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const FfnWeights* prepared = nullptr;
  bool hidden = false;
  for (std::size_t i = 0; i < ffns.size(); ++i) {
    const FfnWeights& w = *ffns[i].weights;
    if (!runs_predictor(step, w)) continue;
    const Matrix& a = w.predictor.a;
    if (prepared == nullptr || prepared->predictor.a.type != a.type)
      prepare_prediction(step, w, layer, 0, thread.input.row(0, 0), thread.predictor, 0, index);
    prepared = &w;
    if (!has_hidden_layer(w)) continue;
    hidden = true;
    const Range rows = share(step, a.rows, index);
    const std::int64_t at = static_cast<std::int64_t>(i) * s.rank;
    step.kernels().gemv(a, predictor_input(step, thread.input, thread.predictor), rows.begin, rows.end,
                        s.hidden.row(0, 0) + at);
    finish_hidden(step, w, at, rows);
  }
  if (hidden) step.finish(index, Part::kPredictor);
}

namespace {

void dense_neurons(const Step& step, const ActiveFfn& ffn, std::int64_t at, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  const FfnWeights& w = *ffn.weights;
  Scratch& s = step.scratch;
  const Input input = step.thread(index).input.view();
  const Range rows = share(step, w.neurons, index);
  float* gate = s.gate.data() + at;
  float* up = s.up.data() + at;
  kernels.gemv(w.first(config.gated), input, rows.begin, rows.end, gate);
  add_rest(step, w.first_rest(config.gated), input, rows, gate);
  kernels.activate(config.activation, config.activation_parameter, gate + rows.begin, rows.size(),
                   gate + rows.begin);
  step.thread(index).watch.lap(Part::kGate);
  if (config.gated) {
    kernels.gemv(w.up, input, rows.begin, rows.end, up);
    add_rest(step, w.up_rest, input, rows, up);
  }
  combine(step, ffn.factor, rows, gate, up);
  if (step.model.weights->neuron_major) return;
  std::copy_n(gate + rows.begin, rows.size(), s.ffn_input.row(0, 0) + at + rows.begin);
  if (is_quantized(w.down.type)) s.ffn_input.quantize(kernels, 0, 0, at + rows.begin, at + rows.end);
}

void dense_ffns(const Step& step, std::span<const ActiveFfn> ffns, int index) {
  const KernelTable& kernels = step.kernels();
  Scratch& s = step.scratch;
  for (std::size_t i = 0; i < ffns.size(); ++i) dense_neurons(step, ffns[i], slot_begin(step, i), index);
  step.finish(index, Part::kUp);
  const Range outputs = share(step, step.config().hidden_size, index);
  float* out = s.out.data();
  const bool neuron_major = step.model.weights->neuron_major;
  if (neuron_major) std::fill(out + outputs.begin, out + outputs.end, 0.0F);
  for (std::size_t i = 0; i < ffns.size(); ++i) {
    const FfnWeights& w = *ffns[i].weights;
    if (neuron_major) {
      const List all{s.all.data(), w.neurons};
      add_neurons(step, w, all, all, slot_begin(step, i), outputs);
    } else {
      kernels.gemv(w.down, s.ffn_input.view(slot_begin(step, i)), outputs.begin, outputs.end, out);
      kernels.add(out + outputs.begin, outputs.size(), s.x.data() + outputs.begin);
    }
  }
  if (neuron_major) kernels.add(out + outputs.begin, outputs.size(), s.x.data() + outputs.begin);
}

/// Adds the rests of gate and up to the neurons of `list` whose coefficients are largest, computes these
/// anew, and lists the neurons at `refined`; returns how many they are.
std::int64_t refine(const Step& step, const Piece& piece, List list, std::int32_t* refined, int index) {
  const ModelConfig& config = step.config();
  const FfnWeights& w = *piece.ffn.weights;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const Input input = thread.input.view();
  float* gate = s.gate.data() + piece.at;
  float* up = s.up.data() + piece.at;
  float* raw = s.raw.data() + piece.at;
  const float* limit = thresholds(step, w).neuron;
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < list.n; ++i) {
    const std::int32_t r = list.rows[i];
    refined[n] = r;
    n += std::fabs(gate[r]) >= config.refine.neurons * limit[r];
  }
  add_rest_rows(step, w.first_rest(config.gated), input, refined, n, raw);
  if (config.gated) add_rest_rows(step, w.up_rest, input, refined, n, up);
  activate_list(step, raw, refined, n, thread.values.data());
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t r = refined[i];
    gate[r] = coefficient(config, thread.values[static_cast<std::size_t>(i)], up[r]);
  }
  return n;
}

/// From the neurons of a piece to their coefficients, in `gate`, and a list of the active ones, in `kept`;
/// returns how many these are.
std::int64_t compute_piece(const Step& step, const Piece& piece, std::int64_t layer, int index) {
  const ModelConfig& config = step.config();
  const FfnWeights& w = *piece.ffn.weights;
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
  pass_gate(step, piece, list, n, index);
  thread.watch.lap(Part::kGate);
  const std::int32_t* passed = thread.passed.rows.data();
  float* gate = s.gate.data() + piece.at;
  float* up = s.up.data() + piece.at;
  if (config.gated) {
    step.kernels().gemv_rows(w.up, thread.input.view(), passed, thread.passed.count, up);
    if (!step.refines(w))
      add_rest_rows(step, w.up_rest, thread.input.view(), passed, thread.passed.count, up);
  }
  const float* limit = thresholds(step, w).neuron;
  std::int32_t* kept = s.kept.data() + piece.at + piece.rows.begin;
  std::int64_t active = 0;
  for (std::int64_t i = 0; i < thread.passed.count; ++i) {
    const std::int32_t r = passed[i];
    gate[r] = coefficient(config, gate[r], up[r]);
    kept[active] = r;
    active += !below(gate[r], limit[r]);
  }
  LayerCounts counts{.candidates = n, .gate_passed = thread.passed.count, .active = active};
  if (step.refines(w)) {
    counts.refined =
        refine(step, piece, {kept, active}, s.refined.data() + piece.at + piece.rows.begin, index);
    s.refined_counts[static_cast<std::size_t>(piece.number)] = counts.refined;
  }
  for (std::int64_t i = 0; piece.ffn.factor != 1.0F && i < active; ++i) gate[kept[i]] *= piece.ffn.factor;
  counts.bytes = ffn_bytes(step, w, counts);
  thread.counts += counts;
  thread.watch.lap(Part::kUp);
  return active;
}

/// This thread's columns of the residual: x += sum of coefficients times rows of down.
void add_kept(const Step& step, std::span<const ActiveFfn> ffns, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const Range columns = share(step, step.config().hidden_size, index);
  float* out = s.out.data();
  std::fill(out + columns.begin, out + columns.end, 0.0F);
  for (std::size_t i = 0; i < ffns.size(); ++i) {
    const FfnWeights& w = *ffns[i].weights;
    const auto gather = [&](const std::vector<std::int32_t>& lists, const std::vector<std::int64_t>& counts,
                            std::int32_t* to) -> List {
      std::int64_t total = 0;
      for (std::int64_t part = 0; part < s.pieces; ++part) {
        const std::int64_t n =
            counts[i * static_cast<std::size_t>(s.pieces) + static_cast<std::size_t>(part)];
        std::copy_n(lists.data() + slot_begin(step, i) + piece_range(step, w.neurons, part).begin, n,
                    to + total);
        total += n;
      }
      return {to, total};
    };
    const List active = gather(s.kept, s.kept_counts, thread.active.data());
    const List refined =
        step.refines(w) ? gather(s.refined, s.refined_counts, thread.refined.rows.data()) : active;
    add_neurons(step, w, active, refined, slot_begin(step, i), columns);
  }
  step.kernels().add(out + columns.begin, columns.size(), s.x.data() + columns.begin);
}

void sparse_ffns(Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  thread.counts = {};
  take_pieces(step, ffns, [&](const Piece& piece) { return compute_piece(step, piece, layer, index); });
  step.finish(index, Part::kUp);
  add_kept(step, ffns, index);
  if (index != 0) return;
  s.next_piece.store(0, std::memory_order_relaxed);  // nobody takes a piece before the next barrier
  for (const ThreadScratch& other : s.threads) {
    step.counts[static_cast<std::size_t>(layer)] += other.counts;
  }
}

/// Counts what dense mode and predictors read whatever the input.
void count_fixed(const Step& step, const LayerWeights& w, std::span<const ActiveFfn> ffns,
                 std::int64_t layer) {
  LayerCounts counts{.bytes = router_bytes(w)};
  for (const ActiveFfn& ffn : ffns) {
    counts.bytes += predictor_bytes(step, *ffn.weights);
    if (step.mode != Mode::kDense) continue;
    const std::int64_t F = ffn.weights->neurons;
    LayerCounts all{.candidates = F, .gate_passed = F, .active = F};
    all.bytes = ffn_bytes(step, *ffn.weights, all);
    counts += all;
  }
  step.counts[static_cast<std::size_t>(layer)] += counts;
}

}  // namespace

void decode_ffn(Step& step, std::int64_t layer, int index) noexcept {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  ThreadScratch& thread = step.thread(index);
  const float* normalized = thread.input.row(0, 0);
  if (w.has_router() && !step.config().router.reads_layer_input) {
    score_experts(step, w, normalized, index);
    step.finish(index, Part::kRouter);
  }
  const std::span<const ActiveFfn> ffns = choose_ffns(step, w, layer, normalized, index);
  if (w.has_router()) thread.watch.lap(Part::kRouter);
  if (index == 0) count_fixed(step, w, ffns, layer);
  if (step.mode != Mode::kDense) predict_hidden(step, ffns, layer, index);
  if (step.on_disk()) {
    decode_stored_ffns(step, ffns, layer, index);
  } else if (step.mode == Mode::kDense) {
    dense_ffns(step, ffns, index);
  } else {
    sparse_ffns(step, ffns, layer, index);
  }
  step.finish(index, Part::kDown);
}

}  // namespace turbosparse
