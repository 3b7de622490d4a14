// From a token's state to the candidates of a layer: what decoding and batches share. See docs/format.md.
#pragma once

#include "engine/step.h"

namespace turbosparse {

/// Whether the FFN's predictor has anything to compute in this step.
bool runs_predictor(const Step& step, const FfnWeights& ffn);
/// Of those that run: whether this one has a hidden layer.
bool has_hidden_layer(const FfnWeights& ffn);
/// Bytes of weights that naming the candidates of one token takes.
std::int64_t predictor_bytes(const Step& step, const FfnWeights& ffn);

/// Takes what the predictor reads of token t, whose normalised state is `normalized`, as token `at` of `to`.
void prepare_prediction(const Step& step, const FfnWeights& ffn, std::int64_t layer, std::int64_t t,
                        const float* normalized, PredictorInput& to, std::int64_t at, int index);
/// What the predictor's first layer reads; `normalized` is the FFN's input.
Input predictor_input(const Step& step, const InputBuffer& normalized, const PredictorInput& input);
/// ReLU of this thread's `rows` of a hidden layer, which begins at value `at` of all of them, and their 8-bit
/// form.
void finish_hidden(const Step& step, const FfnWeights& ffn, std::int64_t at, Range rows);
/// Scores of neurons `rows` from the signs of token `at`, into scores[rows]; `differences` is scratch, of all
/// rows.
void score_signs(const Step& step, const FfnWeights& ffn, const PredictorInput& input, std::int64_t at,
                 Range rows, std::int32_t* differences, float* scores);
/// scores[rows] of token t become 1 for candidates and 0 for others; notes NaN and Inf.
void mark_candidates(const Step& step, const FfnWeights& ffn, std::int64_t layer, std::int64_t t, Range rows,
                     float* scores, int index);

}  // namespace turbosparse
