// What decoding FFNs shares, whether their neurons lie in memory or on disk.
#pragma once

#include <cstdint>
#include <span>

#include "engine/step.h"

namespace turbosparse {

/// Some neurons of a slot.
struct Piece {
  std::int64_t number;
  std::size_t slot;
  const ActiveFfn& ffn;
  std::int64_t at;  // of the slot's first neuron in the scratch
  Range rows;       // of the FFN
};

/// The number of the first neuron of a slot: where its values are in the scratch.
std::int64_t slot_begin(const Step& step, std::size_t slot);
/// Part `part` of the neurons of an FFN.
Range piece_range(const Step& step, std::int64_t neurons, std::int64_t part);
/// Calls work(piece) for pieces that no other thread has, and keeps the count it returns.
template <class F>
void take_pieces(const Step& step, std::span<const ActiveFfn> ffns, F&& work) {
  Scratch& s = step.scratch;
  const std::int64_t pieces = static_cast<std::int64_t>(ffns.size()) * s.pieces;
  for (std::int64_t number; (number = s.next_piece.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
    const auto slot = static_cast<std::size_t>(number / s.pieces);
    const Piece piece{number, slot, ffns[slot], slot_begin(step, slot),
                      piece_range(step, ffns[slot].weights->neurons, number % s.pieces)};
    s.kept_counts[static_cast<std::size_t>(number)] = work(piece);
  }
}

/// What multiplies a neuron's row of down, from f(gate) and up.
float coefficient(const ModelConfig& config, float gate, float up);
/// Bytes of the rows, and their thresholds, that these counts of neurons read.
std::int64_t ffn_bytes(const Step& step, const FfnWeights& w, const LayerCounts& counts);
/// What the predictors compute before they score neurons: their hidden layers, with a barrier where there are
/// any.
void predict_hidden(const Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer, int index);
/// Lists the candidates of a piece.
const KeptNeurons& list_candidates(const Step& step, const Piece& piece, std::int64_t layer, int index);
/// Lists in `passed` which of n neurons have a large enough f(gate), and leaves that in `gate`, and what f
/// was applied to in `raw`.
void pass_gate(const Step& step, const Piece& piece, const std::int32_t* list, std::int64_t n, int index);

/// Puts the neurons that the pieces kept into one list per FFN, one after the other in scratch.stored;
/// returns how many they are.
std::int64_t gather_lists(const Step& step, std::span<const ActiveFfn> ffns);
/// The FFNs of one token whose neurons are in a store that does not hold all of them. Predictors' hidden
/// layers are there.
void decode_stored_ffns(Step& step, std::span<const ActiveFfn> ffns, std::int64_t layer, int index);

}  // namespace turbosparse
