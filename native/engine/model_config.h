// Hyper-parameters of a model, read from a GGUF file's metadata and checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "io/gguf_file.h"
#include "kernels/kernels.h"

namespace turbosparse {

enum class PredictorKind : std::uint8_t { kNone = 0, kLowRank, kSign };

/// What the keys say of the predictors; docs/format.md has the definitions.
struct PredictorConfig {
  PredictorKind kind = PredictorKind::kNone;
  bool reads_residual = false;    // else the FFN's input, after its norm
  std::vector<float> thresholds;  // per FFN: layer by layer, the experts, then the shared one
};

/// What threshold mode computes with all bits of weights that the file keeps in two parts; see
/// docs/format.md.
struct RefineConfig {
  float neurons = 0;  // kept neurons whose |activation| is at least this times their threshold
  float logits = 0;   // those at most this far below the largest, in nats
};

/// How a layer with experts chooses those of a token; docs/format.md has the formula.
struct RouterConfig {
  std::int64_t experts = 0;          // E; 0: one FFN for all tokens
  std::int64_t used = 0;             // experts per token
  bool sigmoid = false;              // scores are sigmoids of the logits, else their softmax
  bool normalized = false;           // whether the chosen scores are divided by their sum
  float scale = 1;                   // of the chosen scores, after that
  bool reads_layer_input = false;    // the residual before the attention, else the FFN's input
  bool gates_shared_expert = false;  // whether a sigmoid scales the shared expert
};

/// Of what q and k are normalised before they are rotated.
enum class QkNorm : std::uint8_t { kNone = 0, kHeads, kAll };

struct ModelConfig {
  std::string architecture;  // as the file has it: llama or another that is known, or turbosparse- before it
  std::int64_t num_hidden_layers = 0;
  std::int64_t hidden_size = 0;               // D
  std::int64_t intermediate_size = 0;         // F, of an expert where there are experts
  std::int64_t shared_intermediate_size = 0;  // F of the shared expert; 0: there is none
  std::int64_t num_attention_heads = 0;       // H
  std::int64_t num_key_value_heads = 0;       // K
  std::int64_t head_dim = 0;                  // C
  std::int64_t vocab_size = 0;                // V
  std::int64_t context_length = 0;
  float rms_norm_eps = 0;
  std::int64_t rotary_dim = 0;  // values of a head that turn
  double rope_base = 0;
  double rope_scale = 1;  // positions are multiplied by it
  bool rope_neox = false;
  std::int64_t unrotated_layers = 0;  // layers 0, n, 2n ... do not rotate; 0: all do
  QkNorm qk_norm = QkNorm::kNone;
  Activation activation = Activation::kSilu;
  float activation_parameter = 0;
  bool gated = true;
  PredictorConfig predictor;
  RefineConfig refine;
  RouterConfig router;

  bool rotates(std::int64_t layer) const { return unrotated_layers == 0 || layer % unrotated_layers != 0; }
  std::int64_t ffns_per_layer() const {
    return router.experts == 0 ? 1 : router.experts + (shared_intermediate_size > 0 ? 1 : 0);
  }
  /// Neurons of all FFNs of a layer.
  std::int64_t layer_neurons() const {
    return std::max<std::int64_t>(router.experts, 1) * intermediate_size + shared_intermediate_size;
  }
  /// Neurons of a layer that a token has to do with.
  std::int64_t token_neurons() const {
    return std::max<std::int64_t>(router.used, 1) * intermediate_size + shared_intermediate_size;
  }
};

/// Throws ModelFileError for an architecture or a feature that the engine does not compute, and for a value
/// out of range.
ModelConfig read_model_config(const GgufFile& file);

const char* activation_name(Activation activation);

}  // namespace turbosparse
