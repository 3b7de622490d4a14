// The feed-forward network of one token: dense, or with neurons skipped in two stages.
#include <algorithm>

#include "engine/step.h"

namespace turbosparse {
namespace {

/// gate[r] = f(gate[r]) and up[r] = g(up[r]) come together: the coefficients of a range of neurons, in
/// `gate`.
void combine(const Step& step, Range rows) {
  float* gate = step.scratch.gate.data();
  const float* up = step.scratch.up.data();
  if (step.config().activation == Activation::kDRelu) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] *= std::max(up[r], 0.0F);
  } else {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) gate[r] *= up[r];
  }
}

/// This thread's columns of the residual: x += sum of coef[i] * down_t[i] over `rows`.
void add_neurons(const Step& step, const Matrix& down, const std::int32_t* rows, std::int64_t n, int index) {
  const Range columns = share(step, down.cols, index);
  float* out = step.scratch.out.data();
  std::fill(out + columns.begin, out + columns.end, 0.0F);
  step.kernels().axpy_rows(down, rows, n, step.scratch.gate.data(), columns.begin, columns.end, out);
  step.kernels().add(out + columns.begin, columns.size(), step.scratch.x.data() + columns.begin);
}

void dense_ffn(const Step& step, const LayerWeights& w, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  Scratch& s = step.scratch;
  const Input input = step.thread(index).input.view();
  const Range rows = share(step, config.intermediate_size, index);
  kernels.gemv(w.gate, input, rows.begin, rows.end, s.gate.data());
  kernels.gemv(w.up, input, rows.begin, rows.end, s.up.data());
  float* gate = s.gate.data() + rows.begin;
  kernels.activate(config.activation, config.activation_parameter, gate, rows.size(), gate);
  combine(step, rows);
  if (step.model.weights->neuron_major) {
    step.barrier();
    add_neurons(step, w.down, s.all.data(), config.intermediate_size, index);
    return;
  }
  std::copy_n(gate, rows.size(), s.ffn_input.row(0, 0) + rows.begin);
  if (is_quantized(w.down.type))
    s.ffn_input.quantize(kernels, 0, config.intermediate_size, rows.begin, rows.end);
  step.barrier();
  const Range outputs = share(step, config.hidden_size, index);
  kernels.gemv(w.down, s.ffn_input.view(), outputs.begin, outputs.end, s.out.data());
  kernels.add(s.out.data() + outputs.begin, outputs.size(), s.x.data() + outputs.begin);
}

/// Meets the other threads and lists what all of them kept in a stage, in order, in this thread's `active`.
/// The two stages have lists of their own, so that a slower thread may still read the first.
std::int64_t gather(const Step& step, KeptNeurons ThreadScratch::* stage, int index) {
  step.barrier();
  std::int32_t* active = step.thread(index).active.data();
  std::int64_t total = 0;
  for (const ThreadScratch& other : step.scratch.threads) {
    const KeptNeurons& kept = other.*stage;
    std::copy_n(kept.rows.data(), kept.count, active + total);
    total += kept.count;
  }
  return total;
}

void sparse_ffn(Step& step, const LayerWeights& w, std::int64_t layer, int index) {
  const KernelTable& kernels = step.kernels();
  const ModelConfig& config = step.config();
  const Thresholds limits = thresholds(step, w);
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  float* gate = s.gate.data();

  const Range rows = share(step, config.intermediate_size, index);
  kernels.gemv(w.gate, thread.input.view(), rows.begin, rows.end, gate);
  kernels.activate(config.activation, config.activation_parameter, gate + rows.begin, rows.size(),
                   gate + rows.begin);
  thread.by_gate.count = 0;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    thread.by_gate.add_if(static_cast<std::int32_t>(r), !below(gate[r], limits.gate[r]));
  }
  const std::int64_t passed = gather(step, &ThreadScratch::by_gate, index);

  // The list, and not the range of neurons, is split: all threads have the same to do.
  const Range part = split(passed, 1, index, step.thread_count());
  const std::int32_t* mine = thread.active.data() + part.begin;
  kernels.gemv_rows(w.up, thread.input.view(), mine, part.size(), s.up.data());
  const bool relu_up = config.activation == Activation::kDRelu;
  thread.by_product.count = 0;
  for (std::int64_t i = 0; i < part.size(); ++i) {
    const std::int32_t r = mine[i];
    gate[r] *=
        relu_up ? std::max(s.up[static_cast<std::size_t>(r)], 0.0F) : s.up[static_cast<std::size_t>(r)];
    thread.by_product.add_if(r, !below(gate[r], limits.neuron[r]));
  }
  const std::int64_t active = gather(step, &ThreadScratch::by_product, index);
  add_neurons(step, w.down, thread.active.data(), active, index);
  if (index == 0) {
    LayerCounts& counts = step.counts[static_cast<std::size_t>(layer)];
    counts.gate_passed += passed;
    counts.active += active;
  }
}

}  // namespace

void decode_ffn(Step& step, std::int64_t layer, int index) noexcept {
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  if (step.mode == Mode::kDense) {
    dense_ffn(step, w, index);
    if (index == 0) {
      LayerCounts& counts = step.counts[static_cast<std::size_t>(layer)];
      counts.gate_passed += step.config().intermediate_size;
      counts.active += step.config().intermediate_size;
    }
  } else {
    sparse_ffn(step, w, layer, index);
  }
  step.barrier();
}

}  // namespace turbosparse
