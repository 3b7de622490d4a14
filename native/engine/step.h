// One step of a sequence: T tokens through all layers. What its phases share, and the phases themselves.
//
// A step runs as a job of the thread pool. Phases split output rows, columns, heads or tokens over the
// threads, so that every number is computed by one thread in one order: results do not depend on the number
// of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/profile.h"
#include "util/memory.h"

namespace turbosparse {

/// T vectors of up to `cols` values as input of a product: floats, and their 8-bit form where a weight needs
/// it.
class InputBuffer {
 public:
  InputBuffer(std::int64_t T, std::int64_t cols);
  float* row(std::int64_t t, std::int64_t cols) { return x_.data() + t * cols; }
  const float* row(std::int64_t t, std::int64_t cols) const { return x_.data() + t * cols; }
  /// Fills the 8-bit form of values [begin, end) of row t; both multiples of 32.
  void quantize(const KernelTable& kernels, std::int64_t t, std::int64_t cols, std::int64_t begin,
                std::int64_t end);
  /// From value `at` on, a multiple of 32.
  Input view(std::int64_t at = 0) const {
    return {x_.data() + at, q_.data() + at, scale_.data() + at / kBlock, q_sum_.data() + at / kBlock};
  }
  /// Row t alone.
  Input view(std::int64_t t, std::int64_t cols) const { return view(t * cols); }
  /// Row `to` becomes row t of another buffer, with its 8-bit form.
  void copy_row(const InputBuffer& from, std::int64_t t, std::int64_t to, std::int64_t cols);

 private:
  AlignedVector<float> x_;
  AlignedVector<std::int8_t> q_;
  AlignedVector<float> scale_;
  AlignedVector<std::int32_t> q_sum_;
};

/// What the predictors read of T tokens, as far as it is not the FFN's input. Empty without predictors.
struct PredictorInput {
  PredictorInput(const ModelConfig& config, std::int64_t T);
  InputBuffer residual;                // [T, D]
  AlignedVector<std::uint64_t> signs;  // [T, words of D]
};

/// Neurons that passed a test, ascending.
struct KeptNeurons {
  std::vector<std::int32_t> rows;  // [F]
  std::int64_t count = 0;
  /// Without a branch: which neurons pass is hard to predict.
  void add_if(std::int32_t row, bool keep) {
    rows[static_cast<std::size_t>(count)] = row;
    count += keep;
  }
};

/// An FFN that a token goes through: its output, times `factor`, is added to the residual.
struct ActiveFfn {
  const FfnWeights* weights = nullptr;
  float factor = 1;
};

/// An expert that a token is sent to.
struct ExpertRoute {
  std::int32_t expert = 0;
  float factor = 0;  // of its output
};

/// The routes of T tokens, sorted by expert: those of expert e are [begin[e], begin[e + 1]), their tokens
/// ascending.
struct ExpertGroups {
  ExpertGroups(const RouterConfig& config, std::int64_t T);
  std::vector<std::int64_t> begin, next;  // [E + 1], and where the next token goes
  std::vector<std::int32_t> tokens;       // [T * used]
  std::vector<float> factors;             // [T * used]
};

/// What happened to the neurons of a layer, summed over tokens.
struct LayerCounts {
  std::int64_t candidates = 0;   // whose row of gate (without a gate: of up) was needed
  std::int64_t gate_passed = 0;  // whose row of up was needed
  std::int64_t active = 0;       // whose row of down was needed
  std::int64_t refined = 0;      // of which the rests were needed too, where the weights have any
  // In predicted mode, tokens that came together: there every neuron is computed, so that one can tell.
  std::int64_t wanted = 0;  // that the mode's thresholds keep, candidates or not
  std::int64_t found = 0;   // those of them that were candidates
  // Tokens that came alone.
  std::int64_t bytes = 0;  // of weights of router, predictors and FFNs that were read
  // Where neurons are on disk.
  std::int64_t cached = 0;        // neurons asked for that were in memory
  std::int64_t missed = 0;        // neurons asked for that were not
  std::int64_t foreseen = 0;      // of the missed: whose read had begun before they were asked for
  std::int64_t disk_bytes = 0;    // read
  std::int64_t disk_wait_ns = 0;  // mean of the threads
  LayerCounts& operator+=(const LayerCounts& other);
};

/// What a token needs of a layer whose neurons are partly on disk: the lists of its FFNs one after the other.
struct StoredNeurons {
  StoredNeurons(std::int64_t neurons, std::int64_t slots);
  std::vector<std::int32_t> neurons;  // ascending in each FFN
  std::vector<std::int32_t> rows;     // where they lie in the store
  std::vector<std::uint8_t> active;   // whether their row of down is needed
  std::vector<std::int32_t> ready;    // places in the lists whose rows are in memory
  std::vector<std::int32_t> places;   // 0, 1, 2 ...
  std::vector<std::int64_t> begin;    // [slots + 1] where the list of each FFN begins
  std::vector<NeuronList> lists;      // [slots]
  std::int64_t ready_count = 0;
  std::atomic<std::int64_t> next_ready = 0;
};

/// Memory of one thread.
struct ThreadScratch {
  ThreadScratch(const Model& model, std::int64_t context, std::int64_t capacity);
  InputBuffer input;                   // one vector
  AlignedVector<float> scores;         // [heads that share a kv head, context]
  AlignedVector<float> out;            // [max(D, H * C)]
  KeptNeurons candidates;              // of the piece of neurons at hand
  KeptNeurons passed;                  // those whose |f(gate)| was enough
  AlignedVector<float> values;         // [F] f(gate) of a list of neurons
  std::vector<std::int32_t> active;    // [F] what all threads kept
  KeptNeurons refined;                 // of the piece of neurons at hand; of all, when `down` is computed
  AlignedVector<float> slab;           // [T, kSlab] outputs of a rest
  PredictorInput predictor;            // one token
  AlignedVector<float> expert_scores;  // [E] of one token
  std::vector<ExpertRoute> routes;     // [used] of one token
  std::vector<ActiveFfn> ffns;         // [slots] of one token
  AlignedVector<std::byte> gemm;       // scratch of the kernels
  Stopwatch watch;
  LayerCounts counts;                  // of this thread's neurons in the layer at hand
  std::int64_t marked = 0;             // candidates among them, all tokens of a group
  std::int64_t broken_at = INT64_MAX;  // first stage with NaN or Inf in its input that this thread saw
};

/// Memory of up to `capacity` tokens that all threads share.
struct Scratch {
  Scratch(const Model& model, std::int64_t context, std::int64_t capacity);
  /// What one takes, but for what is small beside it.
  static std::int64_t bytes(const Model& model, std::int64_t context, std::int64_t capacity);
  std::int64_t capacity;
  AlignedVector<float> x;     // [T, D] residual stream
  InputBuffer q;              // [T, H * C], its 8-bit form where the cache has 8 bits
  AlignedVector<float> k, v;  // [T, K * C]
  // Decoding, the FFNs of the token lie in slots beside one another, `slot` neurons each.
  std::int64_t slot;                        // F of the widest FFN, rounded up to cache lines
  AlignedVector<float> gate, up;            // [T, F] or [slots, slot]
  AlignedVector<float> out;                 // [T, D]
  AlignedVector<float> cos, sin;            // [T, rotary / 2]
  InputBuffer input;                        // [T, max(D, H * C)]
  InputBuffer ffn_input;                    // as gate; before that, T > 1: scores of the predictor
  PredictorInput predictor;                 // T tokens
  std::int64_t rank;                        // the largest R
  InputBuffer hidden;                       // [T, R] or [slots, rank]
  AlignedVector<float> scores;              // [slots, slot]
  AlignedVector<std::int32_t> differences;  // [F, sign rows]
  AlignedVector<float> expert_logits;       // [T, E]
  std::vector<ExpertRoute> routes;          // [T, used]
  ExpertGroups groups;
  std::vector<float> shared_factors;  // [T]
  InputBuffer expert_input;           // [T, D] input of a group's tokens
  AlignedVector<float> ffn_sum;       // [T, D] of the experts' outputs
  std::vector<ThreadScratch> threads;
  // Decoding, the neurons are cut into pieces that threads take in turn.
  std::atomic<std::int64_t> next_piece = 0;
  std::int64_t pieces;                    // of an FFN
  std::vector<std::int32_t> kept;         // [slots, slot] active neurons of a piece, from where it begins
  std::vector<std::int64_t> kept_counts;  // [slots, pieces]
  AlignedVector<float> raw;               // [slots, slot] of one token: what f is applied to
  // Weights with rests.
  AlignedVector<float> rest;                 // [max(F, V)] of one token: products of a rest
  std::vector<std::int32_t> refined;         // [T, F] refined neurons of a piece or a thread, like `kept`
  std::vector<std::int64_t> refined_counts;  // [T, pieces or threads]
  std::vector<float> largest;                // [T, threads] largest logit of each thread's share
  std::vector<std::int64_t> refined_logits;  // [threads] how many of the last token's were refined
  std::vector<std::int32_t> all;             // [max(F, T)] 0, 1, 2 ...
  std::vector<float> zeros;                  // [F] thresholds of the exact mode
  StoredNeurons stored;                      // empty where all neurons are in memory
};

/// Where `capture` wants the FFN of one layer; row t of the step is row `first + t`.
struct Capture {
  float* gate = nullptr;            // [*, F], null: not asked for
  float* up = nullptr;              // [*, F]
  float* out = nullptr;             // [*, D]
  float* residual = nullptr;        // [*, D], before the FFN's norm
  std::int32_t* experts = nullptr;  // [*, used] the token's experts, ascending
};

/// Candidates from outside instead of a predictor's, of all tokens of a call.
struct GivenCandidates {
  const bool* mask = nullptr;  // [layers, tokens, neurons of a layer], or null
  std::int64_t tokens = 0;
  std::int64_t first = 0;  // token of the call that is token 0 of the step
};

struct Step {
  const Model& model;
  KvCache& cache;
  Scratch& scratch;
  std::vector<LayerCounts>& counts;  // per layer; added to by thread 0
  Mode mode = Mode::kDense;
  std::int64_t position = 0;  // of the first token
  std::int64_t T = 1;
  std::span<Capture> captures = {};  // per layer, or empty
  GivenCandidates given = {};
  bool profiled = false;
  bool skipping = false;  // see Session::set_skipping

  std::string disk_error = {};  // what went wrong; the step's numbers mean nothing then

  bool predicted() const { return mode == Mode::kPredicted; }
  /// Whether rests count only where it matters; else they are always added.
  bool refines() const { return mode == Mode::kThreshold && model.weights->has_rests; }
  bool refines(const FfnWeights& ffn) const { return refines() && ffn.has_rests(); }
  /// Whether not all neurons are in memory.
  bool on_disk() const { return model.on_disk(); }
  const ModelConfig& config() const { return model.config; }
  const KernelTable& kernels() const { return model.kernels; }
  int thread_count() const { return model.pool.size(); }
  /// Ends a phase: books its time as `part`, and waits for the other threads.
  void finish(int index, Part part) const {
    thread(index).watch.lap(part);
    model.pool.barrier();
    thread(index).watch.lap(Part::kBarrier);
  }
  ThreadScratch& thread(int index) const { return scratch.threads[static_cast<std::size_t>(index)]; }
};

/// Fills the residual with the tokens' embeddings, and the rotation of their positions.
void begin_step(Step& step, std::span<const std::int32_t> ids);

// Each is called by every thread of the pool inside one job, and ends with a barrier.

/// One layer for one token: products of a matrix and a vector, neurons skipped one by one.
void decode_layer(Step& step, std::int64_t layer, int index) noexcept;
/// One layer for T tokens: products of two matrices; thresholds are masks.
void batch_layer(Step& step, std::int64_t layer, int index) noexcept;
/// Logits of tokens [first, T), [T - first, V].
void output_logits(Step& step, std::int64_t first, float* logits, int index) noexcept;

// ---- shared by the phases
// ---------------------------------------------------------------------------------------
/// The part of `total` outputs that a thread computes; 32 floats are two cache lines and one block.
inline Range share(const Step& step, std::int64_t total, int index) {
  return split(total, kBlock, index, step.thread_count());
}
/// Stages at which numbers are looked at, in order: what the attention reads, what the FFN reads, and what
/// router and predictor computed.
constexpr std::int64_t kStagesPerLayer = 4;
constexpr std::int64_t attention_stage(std::int64_t layer) { return kStagesPerLayer * layer; }
constexpr std::int64_t ffn_stage(std::int64_t layer) { return kStagesPerLayer * layer + 1; }
constexpr std::int64_t router_stage(std::int64_t layer) { return kStagesPerLayer * layer + 2; }
constexpr std::int64_t predictor_stage(std::int64_t layer) { return kStagesPerLayer * layer + 3; }
inline void note_broken(ThreadScratch& thread, std::int64_t stage) {
  thread.broken_at = std::min(thread.broken_at, stage);
}
/// Normalises token t into row `to` of `input`, with its 8-bit form where `quantized`; notes NaN and Inf.
void normalize(const Step& step, const std::vector<float>& weight, bool quantized, std::int64_t stage,
               std::int64_t t, InputBuffer& input, std::int64_t to, int index);
/// Normalises each, where heads have a norm, and rotates n_heads heads of q or k of token t, in place.
void place_heads(const Step& step, const std::vector<float>& norm, std::int64_t layer, std::int64_t t,
                 std::int64_t n_heads, float* heads);
bool all_finite(const float* x, std::int64_t n);
/// y[r] += dot(rest[r], x) for the rows of a range, or of a list; nothing where there is no rest.
void add_rest(const Step& step, const Matrix& rest, const Input& x, Range rows, float* y);
void add_rest_rows(const Step& step, const Matrix& rest, const Input& x, const std::int32_t* rows,
                   std::int64_t n, float* y);
/// y[t * y_stride + r] += dot(rest[r], x[t]) for T tokens.
void add_rest_batch(const Step& step, const Matrix& rest, const Input& x, std::int64_t T, Range rows,
                    float* y, std::int64_t y_stride, int index);
/// Whether neurons with this value are skipped; false for NaN, which must not vanish. Without a branch: a
/// mispredicted one costs more than reading two of these.
inline bool below(float value, float threshold) {
  return static_cast<bool>(static_cast<int>(std::fabs(value) < threshold) | static_cast<int>(value == 0.0F));
}
/// The thresholds of an FFN in the mode of the step: predicted mode has those of the file, if any.
struct Thresholds {
  const float* gate;
  const float* neuron;
};
Thresholds thresholds(const Step& step, const FfnWeights& ffn);
/// Bytes of a threshold, and whether the mode of the step reads them.
std::int64_t threshold_bytes(const Step& step);

/// Begins to read what the FFNs of the layer will perhaps need, by its input: the reads run under the
/// attention. Ends with a barrier, where it does anything.
void foresee_ffns(Step& step, std::int64_t layer, int index);

// FFNs of one token, of which every thread has normalised the input into its own scratch.
void decode_ffn(Step& step, std::int64_t layer, int index) noexcept;

}  // namespace turbosparse
