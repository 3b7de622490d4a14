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

Model::Model(const std::string& path, int threads, const std::string& isa, WeightType transcode,
             const MemoryOptions& memory)
    : kernels(kernel_table(isa)), pool(thread_count(threads)) {
  const std::shared_ptr<const GgufFile> file = GgufFile::open(path);
  config = read_model_config(*file);
  auto loaded = std::make_unique<Weights>(file, config, kernels, pool, transcode, memory.budget > 0);
  Weights& mutable_weights = *loaded;
  weights = std::move(loaded);
  kv_type = chosen_kv_type(memory.kv_cache, config, weights->layers[0].k.type);
  if (memory.budget > 0) {
    limit(path, mutable_weights, memory);
  } else if (mutable_weights.bundles) {
    store =
        std::make_unique<NeuronStore>(mutable_weights.bundles->layout, mutable_weights.bundles->ffns, pool);
  }
  if (store && store->resident()) mutable_weights.take_neurons(*store);
  if (memory.budget > 0) file->release_all();  // what was copied from the mapping is held already
}

/// Finds out whether all neurons fit into the budget, and what of them else.
void Model::limit(const std::string& path, Weights& loaded, const MemoryOptions& memory) {
  const auto session = static_cast<std::size_t>(Session::bytes(*this, memory.context));
  const std::size_t fixed = loaded.held_bytes + session;
  const auto& bundles = loaded.bundles;
  const std::size_t all = bundles ? NeuronStore::resident_bytes(bundles->layout, bundles->ffns) : 0;
  budget_ = static_cast<std::int64_t>(memory.budget);
  if (fixed + all <= memory.budget) {
    left_ = budget_ - static_cast<std::int64_t>(loaded.held_bytes + all);
    if (bundles) store = std::make_unique<NeuronStore>(bundles->layout, bundles->ffns, pool);
    return;
  }
  const std::int64_t token = config.token_neurons();
  const std::size_t least = bundles ? NeuronStore::minimum_bytes(bundles->layout, bundles->ffns, token) : 0;
  if (!bundles || fixed + least > memory.budget) {
    throw ConfigError(
        "[memory budget] expected at least " + mebibytes(fixed + least) + " (" +
        mebibytes(loaded.held_bytes) + " of weights that stay, " + mebibytes(session) + " for a context of " +
        std::to_string(memory.context) + ", " +
        (bundles
             ? mebibytes(least) + " for neurons"
             : "and the file has no bundles: turbosparse export --layout bundled makes one that needs less") +
        "), got " + mebibytes(memory.budget));
  }
  const bool direct = memory.io != "mmap";
  const auto file = std::make_shared<const DiskFile>(path, direct);
  OpenedReader opened = open_disk_reader(file, memory.io);
  io_note = opened.note;
  store = std::make_unique<NeuronStore>(bundles->layout, bundles->ffns, pool, token,
                                        StoreRoom{memory.budget - loaded.held_bytes, session}, file,
                                        std::move(opened.reader));
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
