// One sequence on a model: its KV cache, its memory and its counters. Not for two threads at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/step.h"

namespace turbosparse {

enum class WantedLogits : std::uint8_t { kNone = 0, kLast, kAll };

/// Throws ConfigError for an unknown name.
WantedLogits parse_wanted_logits(const std::string& name);

/// Given a layer and f(gate) and g(up) of T tokens, each [T, neurons of a layer], writes which neurons are
/// computed.
using Choose = std::function<void(std::int64_t layer, std::int64_t tokens, const float* gate, const float* up,
                                  bool* kept)>;

struct ForwardOptions {
  Mode mode = Mode::kDense;
  WantedLogits logits = WantedLogits::kLast;
  /// Candidates of predicted mode that replace the predictor's: [layers, tokens, F], or null.
  const bool* candidates = nullptr;
  /// Chooses the candidates while layers are computed, each of which costs twice then. Called on the caller's
  /// thread; what it throws leaves forward, with the cache rolled back.
  Choose choose = {};
  /// Called on the caller's thread, between layers of many tokens and between chunks of tokens. What they
  /// throw leaves forward, with the cache rolled back.
  std::function<void()> between_layers = {};
  std::function<void()> between_chunks = {};
};

/// Since the last reset.
struct Counters {
  std::int64_t tokens = 0;
  std::int64_t decode_tokens = 0;   // tokens that came alone
  std::int64_t bytes_read = 0;      // weights and KV cache of those
  std::vector<LayerCounts> layers;  // of all tokens
  // While profiling: nanoseconds per part, mean of the threads, of tokens that came alone and together.
  PartTimes decode_times{};
  PartTimes batch_times{};
};

/// FFN arrays of one layer; see Session.capture in _native.pyi.
struct CapturedLayer {
  std::int64_t layer = 0;
  float* gate = nullptr;            // [T, F]
  float* up = nullptr;              // [T, F]
  float* out = nullptr;             // [T, D]
  float* residual = nullptr;        // [T, D]
  std::int32_t* experts = nullptr;  // [T, used]
};

class Session {
 public:
  /// Throws ConfigError where `context` is below 1 or beyond what the model was trained for, or the model's
  /// memory budget has no room for it.
  Session(std::shared_ptr<const Model> model, std::int64_t context);
  /// Bytes that a session takes.
  static std::int64_t bytes(const Model& model, std::int64_t context);
  /// Those of its keys and values alone.
  static std::int64_t cache_bytes(const Model& model, std::int64_t context);

  const Model& model() const { return *model_; }
  std::int64_t context() const { return cache_.context(); }
  std::int64_t position() const { return position_; }
  /// Throws EngineError, as reset_counters and truncate do, while another call computes.
  Counters counters();
  void reset_counters();
  /// Whether the counters have times from now on.
  void set_profiling(bool on) { profiling_ = on; }
  bool profiling() const { return profiling_; }
  /// Whether tokens that come together compute their candidates alone in predicted mode, where these are few.
  /// What the predictor missed is not known then, and not counted.
  void set_skipping(bool on) { skipping_ = on; }
  bool skipping() const { return skipping_; }

  /// Forgets everything from `position` on. Throws ConfigError for a position that is not in the cache.
  void truncate(std::int64_t position);

  /// Rows of logits that forward writes for `tokens` ids.
  static std::int64_t logit_rows(WantedLogits wanted, std::int64_t tokens);
  /// Appends ids and writes logit_rows x vocab_size floats to `logits`. On any error the cache is as before.
  /// Throws ConfigError (no ids, an id out of range), ContextLengthError, ModelFileError (mode), EngineError
  /// (two calls at once, NaN or Inf, neurons that could not be read, a file that has changed).
  void forward(std::span<const std::int32_t> ids, const ForwardOptions& options, float* logits);
  /// Appends ids densely and fills the arrays of `layers`.
  void capture(std::span<const std::int32_t> ids, std::span<const CapturedLayer> layers,
               const std::function<void()>& between_layers);

 private:
  class Turn;
  class Guard;
  struct ChosenNeurons;
  /// A session's part of the memory budget, as long as it lives.
  class Reservation {
   public:
    Reservation(const Model& model, std::int64_t context);
    ~Reservation();
    Reservation(const Reservation&) = delete;
    Reservation& operator=(const Reservation&) = delete;

   private:
    const Model& model_;
    std::int64_t bytes_;
  };
  void check(std::span<const std::int32_t> ids, Mode mode, bool given_candidates) const;
  void run_decode(Step& step, float* logits);
  void run_layer(Step& step, std::int64_t layer);
  void choose_neurons(Step& step, std::int64_t layer, const Choose& choose, ChosenNeurons& chosen);
  void run_batch(Step& step, std::int64_t first_logit, float* logits,
                 const std::function<void()>& between_layers, const Choose& choose);
  void finish(const Step& step, const float* logits, std::int64_t rows);
  Scratch& scratch(std::int64_t tokens);
  void add_times(PartTimes& times);
  std::int64_t logit_bytes(const Step& step) const;
  std::int64_t token_bytes(const Step& step, const std::vector<LayerCounts>& before) const;

  std::shared_ptr<const Model> model_;
  Reservation reservation_;
  KvCache cache_;
  std::unique_ptr<Scratch> scratch_;
  std::int64_t position_ = 0;
  Counters counters_;
  std::atomic<bool> profiling_{false};
  std::atomic<bool> skipping_{false};
  std::atomic<bool> busy_{false};
};

}  // namespace turbosparse
