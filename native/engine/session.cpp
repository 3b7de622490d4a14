#include "engine/session.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::int64_t kChunk =
    256;  // tokens of a step: enough to reuse each weight from cache, and bounded memory
constexpr std::array<const char*, 3> kLogitNames{"none", "last", "all"};

std::int64_t checked_context(const Model& model, std::int64_t context) {
  if (context < 1 || context > model.config.context_length) {
    throw ConfigError("[context] expected 1 to " + std::to_string(model.config.context_length) + ", got " +
                      std::to_string(context));
  }
  return context;
}

std::string stage_name(const ModelConfig& config, std::int64_t stage) {
  if (stage == 0) return "token embedding";
  if (stage > attention_stage(config.num_hidden_layers)) return "output projection";
  const std::int64_t layer = stage / kStagesPerLayer;
  if (stage == attention_stage(layer)) return "FFN of layer " + std::to_string(layer - 1);
  constexpr std::array<const char*, kStagesPerLayer> kParts{"", "attention", "router", "predictor"};
  return std::string(kParts[static_cast<std::size_t>(stage % kStagesPerLayer)]) + " of layer " +
         std::to_string(layer);
}

/// Inside the job that read from disk: the next job may be another session's.
void take_disk_error(Step& step) {
  if (step.on_disk()) step.disk_error = step.model.store->take_error();
}

}  // namespace

WantedLogits parse_wanted_logits(const std::string& name) {
  for (std::size_t i = 0; i < kLogitNames.size(); ++i) {
    if (name == kLogitNames[i]) return static_cast<WantedLogits>(i);
  }
  throw ConfigError("[logits] expected none, last or all, got " + name);
}

/// Marks the session as busy.
class Session::Turn {
 public:
  explicit Turn(Session& session) : busy_(session.busy_) {
    if (busy_.exchange(true)) throw EngineError("[session] expected one call at a time, got two");
  }
  ~Turn() { busy_.store(false); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<bool>& busy_;
};

/// A turn that takes back what a call that did not finish has done.
class Session::Guard {
 public:
  explicit Guard(Session& session)
      : turn_(session), session_(session), position_(session.position_), counters_(session.counters_) {}
  ~Guard() {
    if (done_) return;
    session_.position_ = position_;
    session_.counters_ = std::move(counters_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  void done() { done_ = true; }

 private:
  Turn turn_;
  Session& session_;
  std::int64_t position_;
  Counters counters_;
  bool done_ = false;
};

/// One layer whose neurons are chosen from outside.
struct Session::ChosenNeurons {
  ChosenNeurons(const ModelConfig& config, std::int64_t T)
      : gate(static_cast<std::size_t>(T * config.layer_neurons())),
        up(gate.size()),
        input(static_cast<std::size_t>(T * config.hidden_size)),
        residual(input.size()),
        kept(std::make_unique<bool[]>(gate.size())),
        captures(static_cast<std::size_t>(config.num_hidden_layers)) {}
  std::vector<float> gate, up;         // [T, F]
  std::vector<float> input, residual;  // [T, D]
  std::unique_ptr<bool[]> kept;        // [T, F]
  std::vector<Capture> captures;       // per layer
};

Session::Reservation::Reservation(const Model& model, std::int64_t context)
    : model_(model), bytes_(bytes(model, context)) {
  model_.reserve(bytes_);
}

Session::Reservation::~Reservation() { model_.reserve(-bytes_); }

std::int64_t Session::bytes(const Model& model, std::int64_t context) {
  return cache_bytes(model, context) + Scratch::bytes(model, context, std::min(context, kChunk));
}

std::int64_t Session::cache_bytes(const Model& model, std::int64_t context) {
  return KvCache::bytes(model.config, context, model.kv_type);
}

Session::Session(std::shared_ptr<const Model> model, std::int64_t context)
    : model_(std::move(model)),
      reservation_(*model_, checked_context(*model_, context)),
      cache_(model_->config, context, model_->kv_type) {
  reset_counters();
}

Counters Session::counters() {
  const Turn turn(*this);
  return counters_;
}

void Session::reset_counters() {
  const Turn turn(*this);
  counters_ = {};
  counters_.layers.resize(model_->weights->layers.size());
}

void Session::truncate(std::int64_t position) {
  const Turn turn(*this);
  if (position < 0 || position > position_) {
    throw ConfigError("[truncate] expected 0 to " + std::to_string(position_) + ", got " +
                      std::to_string(position));
  }
  position_ = position;
}

std::int64_t Session::logit_rows(WantedLogits wanted, std::int64_t tokens) {
  if (wanted == WantedLogits::kAll) return tokens;
  return wanted == WantedLogits::kLast ? 1 : 0;
}

void Session::check(std::span<const std::int32_t> ids, Mode mode, bool given_candidates) const {
  const auto tokens = static_cast<std::int64_t>(ids.size());
  if (ids.empty()) throw ConfigError("[ids] expected at least one token, got none");
  if (model_->on_disk() && !model_->store->unchanged())
    throw EngineError(
        "[model file] expected it as it was when it was opened, got one that has changed since");
  if (!model_->weights->file().whole())
    throw EngineError("[model file] expected as many bytes as when it was opened, got fewer");
  if (tokens > context() - position_) {
    throw ContextLengthError("[ids] expected at most " + std::to_string(context() - position_) +
                             " tokens (context " + std::to_string(context()) + ", " +
                             std::to_string(position_) + " used), got " + std::to_string(tokens));
  }
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= model_->config.vocab_size) {
      throw ConfigError("[ids] expected 0 to " + std::to_string(model_->config.vocab_size - 1) + ", got " +
                        std::to_string(id));
    }
  }
  if (given_candidates) {
    if (mode != Mode::kPredicted)
      throw ConfigError(std::string("[candidates] expected mode predicted, got ") + mode_name(mode));
    if (model_->weights->neuron_major) return;  // no predictor is needed
  }
  const std::vector<Mode> modes = model_->modes();
  if (std::ranges::find(modes, mode) == modes.end()) {
    constexpr std::array<const char*, 4> kNeeds{
        "", "ffn_down_t and an activation with zeros",
        "ffn_down_t and thresholds (turbosparse calibrate writes one)",
        "ffn_down_t and predictors (turbosparse export writes one)"};
    throw ModelFileError(std::string("[mode ") + mode_name(mode) + "] expected a file with " +
                         kNeeds[static_cast<std::size_t>(mode)] + ", got one without");
  }
}

Scratch& Session::scratch(std::int64_t tokens) {
  if (!scratch_ || scratch_->capacity < tokens) {
    scratch_.reset();
    scratch_ = std::make_unique<Scratch>(*model_, context(), tokens);
  }
  return *scratch_;
}

void Session::forward(std::span<const std::int32_t> ids, const ForwardOptions& options, float* logits) {
  Guard guard(*this);
  check(ids, options.mode, options.candidates != nullptr || options.choose);
  const auto tokens = static_cast<std::int64_t>(ids.size());
  for (std::int64_t begin = 0; begin < tokens; begin += kChunk) {
    if (options.between_chunks) options.between_chunks();
    const std::int64_t T = std::min(kChunk, tokens - begin);
    const bool last = begin + T == tokens;
    Step step{.model = *model_,
              .cache = cache_,
              .scratch = scratch(T),
              .counts = counters_.layers,
              .mode = options.mode,
              .position = position_,
              .T = T,
              .given = {.mask = options.candidates, .tokens = tokens, .first = begin},
              .profiled = profiling_,
              .skipping = skipping_};
    begin_step(step, ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(T)));
    std::int64_t first_logit = T;
    if (options.logits == WantedLogits::kAll) first_logit = 0;
    if (options.logits == WantedLogits::kLast && last) first_logit = T - 1;
    if (tokens == 1 && !options.choose) {
      run_decode(step, first_logit == 0 ? logits : nullptr);
    } else {
      run_batch(step, first_logit, logits, options.between_layers, options.choose);
    }
    finish(step, logits, T - first_logit);
    if (options.logits == WantedLogits::kAll) logits += T * model_->config.vocab_size;
  }
  guard.done();
}

void Session::capture(std::span<const std::int32_t> ids, std::span<const CapturedLayer> layers,
                      const std::function<void()>& between_layers) {
  Guard guard(*this);
  check(ids, Mode::kDense, false);
  const ModelConfig& config = model_->config;
  const auto tokens = static_cast<std::int64_t>(ids.size());
  std::vector<Capture> captures(static_cast<std::size_t>(config.num_hidden_layers));
  for (std::int64_t begin = 0; begin < tokens; begin += kChunk) {
    const std::int64_t T = std::min(kChunk, tokens - begin);
    for (const CapturedLayer& wanted : layers) {
      const std::int64_t F = config.layer_neurons();
      captures.at(static_cast<std::size_t>(wanted.layer)) = {
          wanted.gate + begin * F, wanted.up + begin * F, wanted.out + begin * config.hidden_size,
          wanted.residual + begin * config.hidden_size, wanted.experts + begin * config.router.used};
    }
    Step step{.model = *model_,
              .cache = cache_,
              .scratch = scratch(T),
              .counts = counters_.layers,
              .mode = Mode::kDense,
              .position = position_,
              .T = T,
              .captures = captures,
              .profiled = profiling_};
    begin_step(step, ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(T)));
    run_batch(step, T, nullptr, between_layers, {});
    finish(step, nullptr, 0);
  }
  guard.done();
}

void Session::run_decode(Step& step, float* logits) {
  const std::vector<LayerCounts> before = counters_.layers;
  const std::int64_t layers = model_->config.num_hidden_layers;
  model_->pool.run([&](int index) noexcept {
    step.thread(index).watch.start(step.profiled);
    for (std::int64_t layer = 0; layer < layers; ++layer) decode_layer(step, layer, index);
    if (logits != nullptr) output_logits(step, 0, logits, index);
    if (index == 0) take_disk_error(step);
  });
  if (step.profiled) add_times(counters_.decode_times);
  counters_.decode_tokens += 1;
  counters_.bytes_read += token_bytes(step, before);
  if (logits != nullptr) {
    counters_.bytes_read += logit_bytes(step);
  }
}

void Session::run_layer(Step& step, std::int64_t layer) {
  model_->pool.run([&](int index) noexcept {
    step.thread(index).watch.start(step.profiled);
    batch_layer(step, layer, index);
    if (index == 0) take_disk_error(step);
  });
  if (!step.disk_error.empty()) throw EngineError(step.disk_error);
}

/// Computes a layer with all neurons, asks which of them count, and leaves the step as it was but for these
/// as candidates.
void Session::choose_neurons(Step& step, std::int64_t layer, const Choose& choose, ChosenNeurons& chosen) {
  Scratch& s = step.scratch;
  const LayerCounts counted = step.counts[static_cast<std::size_t>(layer)];
  const Mode mode = step.mode;
  std::copy_n(s.x.data(), chosen.input.size(), chosen.input.data());
  chosen.captures[static_cast<std::size_t>(layer)] = {
      .gate = chosen.gate.data(), .up = chosen.up.data(), .residual = chosen.residual.data()};
  step.captures = chosen.captures;
  step.mode = Mode::kDense;
  run_layer(step, layer);
  choose(layer, step.T, chosen.gate.data(), chosen.up.data(), chosen.kept.get());
  step.mode = mode;
  step.captures = {};
  step.given = {.mask = chosen.kept.get()};  // 0 tokens: of this layer alone
  std::copy_n(chosen.input.data(), chosen.input.size(), s.x.data());
  step.counts[static_cast<std::size_t>(layer)] = counted;
  chosen.captures[static_cast<std::size_t>(layer)] = {};
}

void Session::run_batch(Step& step, std::int64_t first_logit, float* logits,
                        const std::function<void()>& between_layers, const Choose& choose) {
  std::optional<ChosenNeurons> chosen;
  if (choose) chosen.emplace(model_->config, step.T);
  for (std::int64_t layer = 0; layer < model_->config.num_hidden_layers; ++layer) {
    if (between_layers) between_layers();
    if (choose) choose_neurons(step, layer, choose, *chosen);
    run_layer(step, layer);
  }
  if (first_logit != step.T) {
    model_->pool.run([&](int index) noexcept {
      step.thread(index).watch.start(step.profiled);
      output_logits(step, first_logit, logits, index);
    });
  }
  if (step.profiled) add_times(counters_.batch_times);
}

/// Moves what the stopwatches have into `times`.
void Session::add_times(PartTimes& times) {
  for (ThreadScratch& thread : scratch_->threads) {
    const PartTimes taken = thread.watch.take();
    for (std::size_t part = 0; part < times.size(); ++part) times[part] += taken[part] / model_->pool.size();
  }
}

/// Checks what a step computed and makes it count.
void Session::finish(const Step& step, const float* logits, std::int64_t rows) {
  if (!step.disk_error.empty()) throw EngineError(step.disk_error);
  const ModelConfig& config = model_->config;
  std::int64_t broken = INT64_MAX;
  for (const ThreadScratch& thread : step.scratch.threads) broken = std::min(broken, thread.broken_at);
  const std::int64_t output_stage = attention_stage(config.num_hidden_layers);
  if (broken == INT64_MAX && !all_finite(step.scratch.x.data(), step.T * config.hidden_size))
    broken = output_stage;
  if (broken == INT64_MAX && !all_finite(logits, rows * config.vocab_size)) broken = output_stage + 1;
  if (broken != INT64_MAX) {
    throw EngineError("[" + stage_name(config, broken) +
                      "] expected finite numbers, got NaN or Inf (position " + std::to_string(step.position) +
                      ")");
  }
  position_ += step.T;
  counters_.tokens += step.T;
}

/// Bytes of weights that a decode step's logits have read.
std::int64_t Session::logit_bytes(const Step& step) const {
  const Weights& w = *model_->weights;
  const std::int64_t V = model_->config.vocab_size;
  std::int64_t refined = w.output_rest.rows;
  if (step.refines() && refined > 0) {
    const std::vector<std::int64_t>& counts = step.scratch.refined_logits;
    refined = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  }
  return V * static_cast<std::int64_t>(w.output.row_bytes) +
         refined * static_cast<std::int64_t>(w.output_rest.row_bytes);
}

/// Bytes of weights and cache that a decode step has read up to the last layer.
std::int64_t Session::token_bytes(const Step& step, const std::vector<LayerCounts>& before) const {
  const ModelConfig& config = model_->config;
  std::int64_t bytes = 0;
  for (std::size_t n = 0; n < before.size(); ++n) {
    const LayerWeights& w = model_->weights->layers[n];
    for (const Matrix* matrix : {&w.q, &w.k, &w.v, &w.o})
      bytes += matrix->rows * static_cast<std::int64_t>(matrix->row_bytes);
    bytes += counters_.layers[n].bytes - before[n].bytes;
  }
  return bytes + config.num_hidden_layers * (step.position + 1) * cache_.position_bytes();
}

}  // namespace turbosparse
