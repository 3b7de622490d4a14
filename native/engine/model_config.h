// Hyper-parameters of a model, read from a GGUF file's metadata and checked.
#pragma once

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
  std::vector<float> thresholds;  // per layer
};

/// What threshold mode computes with all bits of weights that the file keeps in two parts; see
/// docs/format.md.
struct RefineConfig {
  float neurons = 0;  // kept neurons whose |activation| is at least this times their threshold
  float logits = 0;   // those at most this far below the largest, in nats
};

struct ModelConfig {
  std::string architecture;  // as the file has it: llama, qwen2, qwen3, or turbosparse- before it
  std::int64_t num_hidden_layers = 0;
  std::int64_t hidden_size = 0;          // D
  std::int64_t intermediate_size = 0;    // F
  std::int64_t num_attention_heads = 0;  // H
  std::int64_t num_key_value_heads = 0;  // K
  std::int64_t head_dim = 0;             // C
  std::int64_t vocab_size = 0;           // V
  std::int64_t context_length = 0;
  float rms_norm_eps = 0;
  std::int64_t rotary_dim = 0;  // values of a head that turn
  double rope_base = 0;
  double rope_scale = 1;  // positions are multiplied by it
  bool rope_neox = false;
  bool qk_norm = false;  // whether each head of q and k is normalised before it is rotated
  Activation activation = Activation::kSilu;
  float activation_parameter = 0;
  bool gated = true;
  PredictorConfig predictor;
  RefineConfig refine;
};

/// Throws ModelFileError for an architecture or a feature that the engine does not compute, and for a value
/// out of range.
ModelConfig read_model_config(const GgufFile& file);

const char* activation_name(Activation activation);

}  // namespace turbosparse
