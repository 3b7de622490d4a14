// A model ready to run: its file, shape, weights, kernels and threads. Sessions share it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/weights.h"
#include "kernels/kernels.h"
#include "util/thread_pool.h"

namespace turbosparse {

/// How the FFN is computed; see ARCHITECTURE.md. All but dense skip neurons.
enum class Mode : std::uint8_t { kDense = 0, kExact, kThreshold, kPredicted };

/// Throws ConfigError for an unknown name.
Mode parse_mode(const std::string& name);
const char* mode_name(Mode mode);

struct Model {
  /// Throws ModelFileError, ConfigError (threads, isa).
  Model(const std::string& path, int threads, const std::string& isa, WeightType transcode);

  /// Modes this file can run in.
  std::vector<Mode> modes() const;

  ModelConfig config;
  const KernelTable& kernels;
  mutable ThreadPool pool;
  std::unique_ptr<const Weights> weights;
};

}  // namespace turbosparse
