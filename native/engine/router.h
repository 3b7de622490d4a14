// Which FFNs a token goes through, and with which factors. docs/format.md has the formula.
#pragma once

#include <span>

#include "engine/step.h"

namespace turbosparse {

/// Computes this thread's share of the logits of the experts from the state of a token that decodes. A
/// barrier must follow.
void score_experts(const Step& step, const LayerWeights& w, const float* state, int index);
/// The FFNs of a token that decodes, in the order of the layer: the experts chosen, then the shared one.
/// `normalized` is their input. Called by every thread for itself.
std::span<const ActiveFfn> choose_ffns(const Step& step, const LayerWeights& w, std::int64_t layer,
                                       const float* normalized, int index);

/// Routes tokens of a batch: from their states, [T, D], to their experts in scratch.routes.
void route_tokens(const Step& step, const LayerWeights& w, std::int64_t layer, const float* states,
                  Range tokens, int index);
/// Sorts the routes by expert, into scratch.groups. Called by one thread, with barriers around it.
void group_tokens(const Step& step);
/// What the shared expert's output is multiplied by.
float shared_factor(const Step& step, const LayerWeights& w, const float* normalized);

/// Bytes of weights that routing one token reads.
std::int64_t router_bytes(const LayerWeights& w);

}  // namespace turbosparse
