#include "engine/model.h"

#include <array>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::array<const char*, 4> kModeNames{"dense", "exact", "threshold", "predicted"};

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

Model::Model(const std::string& path, int threads, const std::string& isa, WeightType transcode)
    : kernels(kernel_table(isa)), pool(thread_count(threads)) {
  const std::shared_ptr<const GgufFile> file = GgufFile::open(path);
  config = read_model_config(*file);
  weights = std::make_unique<const Weights>(file, config, kernels, pool, transcode);
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
