// Reads under the attention: what the layer's FFNs will need is guessed from the state before the attention,
// by the predictors, which see little of what the attention adds. The numbers are not touched: what is read
// in vain is dropped, and what was not guessed is read when it is asked for.
#include "engine/decode_ffn.h"
#include "engine/predictor.h"
#include "engine/router.h"

namespace turbosparse {
namespace {

/// Leaves those neurons of a piece that are not in memory and will perhaps be candidates in `kept`; returns
/// how many.
std::int64_t guess_piece(const Step& step, const Piece& piece, int index) {
  const FfnWeights& w = *piece.ffn.weights;
  Scratch& s = step.scratch;
  const NeuronStore& store = *step.model.store;
  std::int32_t* list = s.kept.data() + piece.at + piece.rows.begin;
  std::int64_t absent = 0;
  for (std::int64_t r = piece.rows.begin; r < piece.rows.end; ++r) {
    list[absent] = static_cast<std::int32_t>(r);
    absent += !store.in_memory(w.stored, r);
  }
  if (!runs_predictor(step, w)) return absent;
  const Matrix& b = w.predictor.b;
  float* scores = s.scores.data() + piece.at;
  step.kernels().gemv_rows(b, s.hidden.view(static_cast<std::int64_t>(piece.slot) * s.rank), list, absent,
                           scores);
  step.thread(index).counts.bytes += absent * static_cast<std::int64_t>(b.row_bytes);
  std::int64_t guessed = 0;
  for (std::int64_t i = 0; i < absent; ++i) {
    const std::int32_t r = list[i];
    list[guessed] = r;
    guessed += scores[r] >= w.predictor.threshold;
  }
  return guessed;
}

/// Puts the guesses of all FFNs into one list, and begins to read them.
void start(Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer) {
  Scratch& s = step.scratch;
  StoredNeurons& stored = s.stored;
  LayerCounts counts{.bytes = router_bytes(step.model.weights->layers[static_cast<std::size_t>(layer)])};
  for (const ActiveFfn& ffn : ffns) {
    const Matrix& a = ffn.weights->predictor.a;
    counts.bytes += a.rows * static_cast<std::int64_t>(a.row_bytes);
  }
  for (const ThreadScratch& other : s.threads) counts.bytes += other.counts.bytes;
  gather_lists(step, ffns);
  counts.disk_bytes = step.model.store->foresee(std::span(stored.lists).first(ffns.size()));
  s.next_piece.store(0, std::memory_order_relaxed);
  step.counts[static_cast<std::size_t>(layer)] += counts;
}

}  // namespace

void foresee_ffns(Step& step, std::int64_t layer, int index) {
  if (!step.predicted() || step.given.mask != nullptr) return;
  const LayerWeights& w = step.model.weights->layers[static_cast<std::size_t>(layer)];
  ThreadScratch& thread = step.thread(index);
  thread.counts = {};
  normalize(step, w.ffn_norm, w.quantized_ffn_input(), attention_stage(layer), 0, thread.input, 0, index);
  const float* normalized = thread.input.row(0, 0);
  if (w.has_router()) {
    const bool known = step.config().router.reads_layer_input;
    score_experts(step, w, known ? step.scratch.x.data() : normalized, index);
    step.finish(index, Part::kRouter);
  }
  const std::span<const ActiveFfn> ffns = choose_ffns(step, w, layer, normalized, index);
  predict_hidden(step, ffns, layer, index);
  take_pieces(step, ffns, [&](const Piece& piece) { return guess_piece(step, piece, index); });
  step.finish(index, Part::kPredictor);
  if (index == 0) start(step, ffns, layer);
}

}  // namespace turbosparse
