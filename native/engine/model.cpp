#include "engine/model.h"

#include <array>
#include <utility>

#include "engine/session.h"
#include "io/disk_reader.h"
#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::array<const char*, 4> kModeNames{"dense", "exact", "threshold", "predicted"};

/// Rounded up, so that what is asked for is enough.
std::string mebibytes(std::size_t bytes) {
  constexpr std::size_t kMebibyte = std::size_t{1} << 20;
  return std::to_string((bytes + kMebibyte - 1) / kMebibyte) + " MiB";
}

/// See kv_cache.h.
KvType chosen_kv_type(const std::string& name, const ModelConfig& config, WeightType weights) {
  if (name.empty()) return weights == WeightType::kF32 ? KvType::kF32 : KvType::kF16;
  const KvType type = parse_kv_type(name);
  if (type == KvType::kQ8 && config.head_dim % kBlock != 0) {
    throw ConfigError("[kv cache] expected f16 or f32 for heads of " + std::to_string(config.head_dim) +
                      " values (q8_0 takes a multiple of " + std::to_string(kBlock) + "), got " + name);
  }
  return type;
}

bool has_zeros(Activation activation) {
  return activation != Activation::kSilu && activation != Activation::kGelu;
}

}  // namespace

Mode parse_mode(const std::string& name) {
  for (std::size_t i = 0; i < kModeNames.size(); ++i) {
    if (name == kModeNames[i]) return static_cast<Mode>(i);
  }
  throw ConfigError("[mode] expected dense, exact, threshold or predicted, got " + name);
}

const char* mode_name(Mode mode) { return kModeNames[static_cast<std::size_t>(mode)]; }

Model::Model(const std::shared_ptr<const GgufFile>& file, int threads, const std::string& isa,
             WeightType transcode, const MemoryOptions& memory, bool unmapped)
    : config(read_model_config(*file)), kernels(kernel_table(isa)), pool(thread_count(threads)) {
  auto found = std::make_unique<Weights>(file, config, transcode, unmapped);
  own_ = found.get();
  weights = std::move(found);
  kv_type = chosen_kv_type(memory.kv_cache, config, weights->layers[0].k.type);
}

Model::Model(const std::string& path, int threads, const std::string& isa, WeightType transcode,
             const MemoryOptions& memory)
    : Model(GgufFile::open(path), threads, isa, transcode, memory, memory.budget > 0) {
  if (memory.budget > 0) {
    limit(memory);
  } else {
    own_->load(kernels, pool);
    if (const auto& bundles = weights->bundles)
      store = std::make_unique<NeuronStore>(bundles->layout, bundles->ffns, pool);
  }
  if (store && store->resident()) own_->take_neurons(*store);
  own_ = nullptr;
}

MemoryPlan Model::plan(const std::string& path, int threads, WeightType transcode,
                       const MemoryOptions& memory) {
  return Model(GgufFile::open(path), threads, "", transcode, memory, true).plan(memory);
}

MemoryPlan Model::plan(const MemoryOptions& memory) const {
  const auto bytes = [](const Matrix& m) { return m.row_bytes * static_cast<std::size_t>(m.rows); };
  const auto& bundles = weights->bundles;
  MemoryPlan plan;
  for (const LayerWeights& layer : weights->layers) {
    for (const FfnWeights& ffn : layer.ffns) {
      if (bundles && !bundles->layout.part(Projection::kGate).there) plan.gates += bytes(ffn.gate);
      plan.predictors += bytes(ffn.predictor.a) + bytes(ffn.predictor.b);
      plan.per_neuron += (ffn.threshold.size() + ffn.gate_threshold.size()) * sizeof(float);
    }
  }
  plan.cache = static_cast<std::size_t>(Session::cache_bytes(*this, memory.context));
  plan.scratch = static_cast<std::size_t>(Session::bytes(*this, memory.context)) - plan.cache;
  if (bundles) {
    const std::int64_t token = config.token_neurons();
    for (const FfnBundles& ffn : bundles->ffns) plan.per_neuron += ffn.hotness.size() * sizeof(float);
    plan.all_neurons = NeuronStore::resident_bytes(bundles->layout, bundles->ffns);
    plan.buffers = NeuronStore::fixed_bytes(bundles->layout, bundles->ffns);
    plan.fewest_neurons = NeuronStore::minimum_bytes(bundles->layout, bundles->ffns, token) - plan.buffers;
  }
  plan.dense = weights->held_bytes - plan.gates - plan.predictors - plan.per_neuron;
  if (bundles && plan.least() <= memory.budget && memory.budget < plan.everything()) {
    const StoreRoom room{memory.budget - plan.weights(), plan.session()};
    plan.clusters = NeuronStore::split_room(bundles->layout, bundles->ffns, config.token_neurons(), room);
  }
  return plan;
}

/// Finds out whether all neurons fit into the budget, and what of them else.
void Model::limit(const MemoryOptions& memory) {
  const MemoryPlan planned = plan(memory);
  const auto& bundles = weights->bundles;
  if (planned.least() > memory.budget) {
    throw ConfigError(
        "[memory budget] expected at least " + mebibytes(planned.least()) + " (" +
        mebibytes(planned.weights()) + " of weights that stay, " + mebibytes(planned.session()) +
        " for a context of " + std::to_string(memory.context) + ", " +
        (bundles
             ? mebibytes(planned.least() - planned.weights() - planned.session()) + " for neurons"
             : "and the file has no bundles: turbosparse export --layout bundled makes one that needs less") +
        "), got " + mebibytes(memory.budget));
  }
  own_->load(kernels, pool);
  budget_ = static_cast<std::int64_t>(memory.budget);
  if (planned.everything() <= memory.budget) {
    left_ = budget_ - static_cast<std::int64_t>(planned.weights() + planned.all_neurons);
    if (bundles) store = std::make_unique<NeuronStore>(bundles->layout, bundles->ffns, pool);
  } else {
    const auto file = std::make_shared<const DiskFile>(weights->file(), memory.io != "mmap");
    OpenedReader opened = open_disk_reader(file, memory.io);
    io_note = opened.note;
    const StoreRoom room{memory.budget - planned.weights(), planned.session()};
    store = std::make_unique<NeuronStore>(bundles->layout, bundles->ffns, pool, config.token_neurons(), room,
                                          file, std::move(opened.reader));
  }
  weights->release_file();  // what was copied from the mapping is held already
}

void Model::reserve(std::int64_t bytes) const {
  if (budget_ == 0) return;
  const std::lock_guard lock(mutex_);
  if (on_disk()) {
    std::string error;
    pool.run([&](int index) noexcept {
      if (index != 0) return;
      error = store->shrink(bytes);
    });
    if (!error.empty()) throw ConfigError(error);
    return;
  }
  if (bytes > left_) {
    throw ConfigError("[memory budget] expected " + mebibytes(static_cast<std::size_t>(bytes - left_)) +
                      " more for another session, got " + mebibytes(static_cast<std::size_t>(budget_)));
  }
  left_ -= bytes;
}

std::vector<Mode> Model::modes() const {
  std::vector<Mode> modes{Mode::kDense};
  if (weights->neuron_major && has_zeros(config.activation)) modes.push_back(Mode::kExact);
  if (weights->neuron_major && weights->has_thresholds) modes.push_back(Mode::kThreshold);
  if (weights->neuron_major && config.predictor.kind != PredictorKind::kNone)
    modes.push_back(Mode::kPredicted);
  return modes;
}

}  // namespace turbosparse
