// The feed-forward network of one token: dense, or with neurons skipped. Barriers: 2; in predicted mode with
// a hidden layer 3.
#include <algorithm>

#include "engine/predictor.h"
#include "engine/step.h"

namespace turbosparse {
namespace {

/// gate[r] = f(gate[r]) and up[r] = g(up[r]) come together: the coefficients of a range of neurons, in
/// `gate`.
void combine(const Step& step, Range rows) {
  float* gate = step.scratch.gate.data();
  const float* up = step.scratch.up.data();
  if (!step.config().gated) return;
  if (step.config().activation == Activation::kDRelu) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] *= std::max(up[r], 0.0F);
  } else {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] *= up[r];
  }
}

/// Neurons by number.
struct List {
  const std::int32_t* rows;
  std::int64_t n;
};

/// This thread's columns of the residual: x += sum of coef[i] * down_t[i] over `neurons`, and of the rest's
/// rows over `refined`.
void add_neurons(const Step& step, const LayerWeights& w, List neurons, List refined, int index) {
  const Range columns = share(step, w.down.cols, index);
  const float* coef = step.scratch.gate.data();
  float* out = step.scratch.out.data();
  std::fill(out + columns.begin, out + columns.end, 0.0F);
  step.kernels().axpy_rows(w.down, neurons.rows, neurons.n, coef, columns.begin, columns.end, out);
  if (w.down_rest.rows > 0)
    step.kernels().axpy_rows(w.down_rest, refined.rows, refined.n, coef, columns.begin, columns.end, out);
  step.kernels().add(out + columns.begin, columns.size(), step.scratch.x.data() + columns.begin);
}

/// What multiplies a neuron's row of down, from f(gate) and up.
float coefficient(const ModelConfig& config, float gate, float up) {
  if (!config.gated) return gate;
  return gate * (config.activation == Activation::kDRelu ? std::max(up, 0.0F) : up);
}

/// values[i] = f(raw[list[i]])
void activate_list(const Step& step, const std::int32_t* list, std::int64_t n, float* values) {
  const ModelConfig& config = step.config();
  for (std::int64_t i = 0; i < n; ++i) values[i] = step.scratch.raw[static_cast<std::size_t>(list[i])];
  step.kernels().activate(config.activation, config.activation_parameter, values, n, values);
}

void dense_ffn(const Step& step, const LayerWeights& w, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  Scratch& s = step.scratch;
  const Input input = step.thread(index).input.view();
  const Range rows = share(step, config.intermediate_size, index);
  float* gate = s.gate.data() + rows.begin;
  kernels.gemv(w.first(config.gated), input, rows.begin, rows.end, s.gate.data());
  add_rest(step, w.first_rest(config.gated), input, rows, s.gate.data());
  kernels.activate(config.activation, config.activation_parameter, gate, rows.size(), gate);
  step.thread(index).watch.lap(Part::kGate);
  if (config.gated) {
    kernels.gemv(w.up, input, rows.begin, rows.end, s.up.data());
    add_rest(step, w.up_rest, input, rows, s.up.data());
  }
  combine(step, rows);
  if (step.model.weights->neuron_major) {
    step.finish(index, Part::kUp);
    const List all{s.all.data(), config.intermediate_size};
    add_neurons(step, w, all, all, index);
    return;
  }
  std::copy_n(gate, rows.size(), s.ffn_input.row(0, 0) + rows.begin);
  if (is_quantized(w.down.type))
    s.ffn_input.quantize(kernels, 0, config.intermediate_size, rows.begin, rows.end);
  step.finish(index, Part::kUp);
  const Range outputs = share(step, config.hidden_size, index);
  kernels.gemv(w.down, s.ffn_input.view(), outputs.begin, outputs.end, s.out.data());
  kernels.add(s.out.data() + outputs.begin, outputs.size(), s.x.data() + outputs.begin);
}

/// What the predictor computes before it scores neurons.
void predict_hidden(const Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  if (!runs_predictor(step, w)) return;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  prepare_prediction(step, w, layer, 0, thread.input.row(0, 0), thread.predictor, 0, index);
  if (!has_hidden_layer(w)) return;
  const Matrix& a = w.predictor.a;
  const Range rows = share(step, a.rows, index);
  step.kernels().gemv(a, predictor_input(step, thread.input, thread.predictor), rows.begin, rows.end,
                      s.hidden.row(0, 0));
  finish_hidden(step, w, 0, rows);
  step.finish(index, Part::kPredictor);
}

/// Lists the candidates among `rows`.
const KeptNeurons& list_candidates(const Step& step, const LayerWeights& w, std::int64_t layer, Range rows,
                                   int index) {
  ThreadScratch& thread = step.thread(index);
  float* scores = step.scratch.scores.data();
  if (runs_predictor(step, w)) {
    if (has_hidden_layer(w)) {
      step.kernels().gemv(w.predictor.b, step.scratch.hidden.view(), rows.begin, rows.end, scores);
    } else {
      score_signs(step, w, thread.predictor, 0, rows, scores);
    }
  }
  mark_candidates(step, w, layer, 0, rows, scores, index);
  thread.candidates.count = 0;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    thread.candidates.add_if(static_cast<std::int32_t>(r), scores[r] != 0.0F);
  }
  return thread.candidates;
}

/// Lists in `passed` which of n neurons have a large enough f(gate), and leaves that in `gate`, and what f
/// was applied to in `raw`.
void pass_gate(const Step& step, const LayerWeights& w, Range rows, const std::int32_t* list, std::int64_t n,
               int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  ThreadScratch& thread = step.thread(index);
  const Input input = thread.input.view();
  float* gate = step.scratch.gate.data();
  float* raw = step.scratch.raw.data();
  float* values = thread.values.data();
  if (n == rows.size()) {
    kernels.gemv(w.first(config.gated), input, rows.begin, rows.end, raw);
    if (!step.refines()) add_rest(step, w.first_rest(config.gated), input, rows, raw);
    kernels.activate(config.activation, config.activation_parameter, raw + rows.begin, n, values);
  } else {
    kernels.gemv_rows(w.first(config.gated), input, list, n, raw);
    if (!step.refines()) add_rest_rows(step, w.first_rest(config.gated), input, list, n, raw);
    activate_list(step, list, n, values);
  }
  const float* limit = thresholds(step, w).gate;
  thread.passed.count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    gate[list[i]] = values[i];
    thread.passed.add_if(list[i], !below(values[i], limit[list[i]]));
  }
}

/// Adds the rests of gate and up to the neurons of `list` whose coefficients are largest, computes these
/// anew, and lists the neurons at `refined`; returns how many they are.
std::int64_t refine(const Step& step, const LayerWeights& w, List list, std::int32_t* refined, int index) {
  const ModelConfig& config = step.config();
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const float* limit = thresholds(step, w).neuron;
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < list.n; ++i) {
    const std::int32_t r = list.rows[i];
    refined[n] = r;
    n += std::fabs(s.gate[static_cast<std::size_t>(r)]) >= config.refine.neurons * limit[r];
  }
  add_rest_rows(step, w.first_rest(config.gated), thread.input.view(), refined, n, s.raw.data());
  if (config.gated) add_rest_rows(step, w.up_rest, thread.input.view(), refined, n, s.up.data());
  activate_list(step, refined, n, thread.values.data());
  for (std::int64_t i = 0; i < n; ++i) {
    const auto r = static_cast<std::size_t>(refined[i]);
    s.gate[r] = coefficient(config, thread.values[static_cast<std::size_t>(i)], s.up[r]);
  }
  return n;
}

/// From the neurons `rows` to their coefficients, in `gate`, and a list of the active ones, in `kept`;
/// returns how many these are.
std::int64_t compute_piece(const Step& step, const LayerWeights& w, std::int64_t layer, std::int64_t piece,
                           Range rows, int index) {
  const ModelConfig& config = step.config();
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const std::int32_t* list = s.all.data() + rows.begin;
  std::int64_t n = rows.size();
  if (step.predicted()) {
    const KeptNeurons& candidates = list_candidates(step, w, layer, rows, index);
    list = candidates.rows.data();
    n = candidates.count;
    thread.watch.lap(Part::kPredictor);
  }
  pass_gate(step, w, rows, list, n, index);
  thread.watch.lap(Part::kGate);
  const std::int32_t* passed = thread.passed.rows.data();
  if (config.gated) {
    step.kernels().gemv_rows(w.up, thread.input.view(), passed, thread.passed.count, s.up.data());
    if (!step.refines())
      add_rest_rows(step, w.up_rest, thread.input.view(), passed, thread.passed.count, s.up.data());
  }
  const float* limit = thresholds(step, w).neuron;
  std::int32_t* kept = s.kept.data() + rows.begin;
  std::int64_t active = 0;
  for (std::int64_t i = 0; i < thread.passed.count; ++i) {
    const std::int32_t r = passed[i];
    float& value = s.gate[static_cast<std::size_t>(r)];
    value = coefficient(config, value, s.up[static_cast<std::size_t>(r)]);
    kept[active] = r;
    active += !below(value, limit[r]);
  }
  std::int64_t refined = 0;
  if (step.refines()) refined = refine(step, w, {kept, active}, s.refined.data() + rows.begin, index);
  s.refined_counts[static_cast<std::size_t>(piece)] = refined;
  thread.counts +=
      {.candidates = n, .gate_passed = thread.passed.count, .active = active, .refined = refined};
  thread.watch.lap(Part::kUp);
  return active;
}

void sparse_ffn(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  const auto pieces = static_cast<std::int64_t>(s.kept_counts.size());
  const auto range_of = [&](std::int64_t piece) {
    return split(step.config().intermediate_size, kBlock, static_cast<int>(piece), static_cast<int>(pieces));
  };
  thread.counts = {};
  for (std::int64_t piece; (piece = s.next_piece.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
    s.kept_counts[static_cast<std::size_t>(piece)] =
        compute_piece(step, w, layer, piece, range_of(piece), index);
  }
  step.finish(index, Part::kUp);
  const auto gather = [&](const std::vector<std::int32_t>& lists, const std::vector<std::int64_t>& counts,
                          std::int32_t* to) -> List {
    std::int64_t total = 0;
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      const std::int64_t n = counts[static_cast<std::size_t>(piece)];
      std::copy_n(lists.data() + range_of(piece).begin, n, to + total);
      total += n;
    }
    return {to, total};
  };
  const List active = gather(s.kept, s.kept_counts, thread.active.data());
  const List refined =
      step.refines() ? gather(s.refined, s.refined_counts, thread.refined.rows.data()) : active;
  add_neurons(step, w, active, refined, index);
  if (index != 0) return;
  s.next_piece.store(0, std::memory_order_relaxed);  // nobody takes a piece before the next barrier
  for (const ThreadScratch& other : s.threads) {
    step.counts[static_cast<std::size_t>(layer)] += other.counts;
  }
}

}  // namespace

void decode_ffn(Step& step, std::int64_t layer, int index) noexcept {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  if (step.mode == Mode::kDense) {
    const std::int64_t F = step.config().intermediate_size;
    dense_ffn(step, w, index);
    if (index == 0)
      step.counts[static_cast<std::size_t>(layer)] += {.candidates = F, .gate_passed = F, .active = F};
  } else {
    predict_hidden(step, w, layer, index);
    sparse_ffn(step, w, layer, index);
  }
  step.finish(index, Part::kDown);
}

}  // namespace turbosparse
