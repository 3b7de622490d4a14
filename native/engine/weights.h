// A model's weights, ready for the kernels. F32, F16 and BF16 rows are used where the file is mapped; the
// other types are packed into memory of the engine's own, tensor by tensor, so that file and copy never lie
// in memory together.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/bundles.h"
#include "engine/model_config.h"
#include "engine/neuron_store.h"
#include "io/disk_reader.h"
#include "io/gguf_file.h"
#include "kernels/kernels.h"
#include "util/memory.h"
#include "util/thread_pool.h"

namespace turbosparse {

/// What names the candidates of an FFN.
struct FfnPredictor {
  Matrix a;                              // [R, D], low rank
  Matrix b;                              // [F, R]
  const std::uint64_t* signs = nullptr;  // [F, sign_rows, words of D], signs of the neuron's rows
  std::vector<std::int32_t> hot;         // ascending
  float threshold = 0;
};

/// One feed-forward network: that of a layer, an expert, or a shared expert.
struct FfnWeights {
  std::int64_t neurons = 0;       // F
  std::int64_t first_neuron = 0;  // where its neurons are among those of all FFNs of the layer
  std::int64_t stored = -1;       // its number in the neuron store, if any; then matrices may have no data
  Matrix gate, up;                // [F, D]; gate is empty in a model without
  Matrix down;                    // [D, F], or [F, D] where Weights::neuron_major
  Matrix gate_rest, up_rest, down_rest;  // [F, D], added to the above, or empty
  std::vector<float> threshold;          // [F], or empty
  std::vector<float> gate_threshold;     // [F] where there are thresholds, else empty
  std::vector<float> hotness;            // [F] until the bundles have it, see FfnBundles
  FfnPredictor predictor;

  /// The projection that f is applied to.
  const Matrix& first(bool gated) const { return gated ? gate : up; }
  const Matrix& first_rest(bool gated) const { return gated ? gate_rest : up_rest; }
  bool has_rests() const { return gate_rest.rows + up_rest.rows + down_rest.rows > 0; }
  /// Whether a product reads the 8-bit form of its input.
  bool quantized_input() const {
    return is_quantized(gate.type) || is_quantized(up.type) || is_quantized(predictor.a.type) ||
           is_quantized(gate_rest.type) || is_quantized(up_rest.type);
  }
};

struct LayerWeights {
  std::vector<float> attn_norm;               // [D]
  std::vector<float> ffn_norm;                // [D]
  Matrix q;                                   // [H * C, D]
  Matrix k, v;                                // [K * C, D]
  std::vector<float> q_bias, k_bias, v_bias;  // as many as rows, or empty
  std::vector<float> q_norm, k_norm;          // [C], with QkNorm::kAll as many as rows, or empty
  Matrix o;                                   // [D, H * C]
  std::vector<FfnWeights> ffns;               // one; with a router E experts, then the shared expert if any
  Matrix router;                              // [E, D] F32; empty where the layer has one FFN for all tokens
  std::vector<float> shared_gate;             // [D] scales the shared expert, or empty

  bool has_router() const { return router.rows > 0; }
  /// Whether a product reads the 8-bit form of the FFN's input.
  bool quantized_ffn_input() const { return std::ranges::any_of(ffns, &FfnWeights::quantized_input); }
};

/// A matrix that has to be packed: its rows in the file, and where its view goes.
struct Packing {
  std::uint32_t type;
  std::span<const std::byte> data;
  Matrix* target;
};

/// Rows of an FFN in the file whose signs predict: those of gate, with dReLU those of up as well.
struct SignRows {
  struct Part {
    std::uint32_t type;
    std::span<const std::byte> data;
  };
  FfnWeights* ffn;
  std::vector<Part> parts;
};

class Weights {
 public:
  /// Finds what `config` needs; types without a kernel will be `transcode`. Throws ModelFileError for tensors
  /// that are missing, unknown, or of another shape or type than expected. `unmapped`: keeps nothing of the
  /// file mapped, so that `held_bytes` is all there is. Neurons in bundles are left to a store.
  Weights(std::shared_ptr<const GgufFile> file, const ModelConfig& config, WeightType transcode,
          bool unmapped);
  Weights(const Weights&) = delete;  // matrices are told where their rows lie
  Weights& operator=(const Weights&) = delete;
  /// Reads it, once, on the threads of `pool`.
  void load(const KernelTable& kernels, ThreadPool& pool);
  const GgufFile& file() const { return *file_; }
  /// Gives pages of the file's mapping back that were read.
  void release_file() const { file_->release_all(); }

  /// The embedding of a token as floats; 0 <= id < vocab_size. Throws EngineError where the file cannot be
  /// read.
  void embed(std::int32_t id, float* out) const;
  /// Takes the neurons' rows from a store that holds all of them.
  void take_neurons(const NeuronStore& store);

  std::vector<LayerWeights> layers;
  std::vector<float> output_norm;  // [D]
  Matrix output;                   // [V, D]; the embedding where the file has no other
  Matrix output_rest;              // [V, D], added to it, or empty
  std::vector<float> rope_freqs;   // [rotary / 2], frequencies are divided by it; or empty
  bool neuron_major = false;       // whether `down` has one row per neuron
  bool has_thresholds = false;
  bool has_rests = false;       // whether any matrix has one
  std::int64_t widest_ffn = 0;  // neurons of the largest FFN
  std::int64_t sign_rows = 0;   // per neuron in a sign predictor: one, with dReLU two
  std::size_t bytes = 0;        // of all matrices, as packed
  std::size_t held_bytes = 0;   // of all that stays in memory, mapped or not
  std::optional<Bundles> bundles;
  std::map<std::string, std::string> transcoded;  // type in the file -> type in memory
  std::vector<std::string> ffn_types;             // types of gate, up and down after loading, sorted

 private:
  std::size_t sign_bytes() const;
  std::size_t sign_bytes(const FfnWeights& ffn) const;
  void take_signs(const KernelTable& kernels, ThreadPool& pool);

  std::shared_ptr<const GgufFile> file_;
  std::unique_ptr<const DiskFile> rows_;  // where embeddings are read; null: in the mapping
  const GgufTensor* embedding_ = nullptr;
  std::vector<Packing> packings_;        // until they are loaded
  std::vector<SignRows> signs_to_take_;  // the same
  Arena arena_;
  Arena signs_;
};

}  // namespace turbosparse
