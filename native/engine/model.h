// A model ready to run: its file, shape, weights, kernels and threads. Sessions share it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/model_config.h"
#include "engine/neuron_store.h"
#include "engine/weights.h"
#include "kernels/kernels.h"
#include "util/thread_pool.h"

namespace turbosparse {

/// How the FFN is computed; see ARCHITECTURE.md. All but dense skip neurons.
enum class Mode : std::uint8_t { kDense = 0, kExact, kThreshold, kPredicted };

/// Throws ConfigError for an unknown name.
Mode parse_mode(const std::string& name);
const char* mode_name(Mode mode);

/// What the engine may hold, and how it reads what it does not.
struct MemoryOptions {
  std::size_t budget = 0;    // bytes of everything: weights, sessions, neurons; 0: no limit
  std::int64_t context = 0;  // of a session that has to fit
  std::string io;            // "io_uring", "pread" or "mmap"; "": the best that works
  std::string kv_cache;      // "f32", "f16" or "q8_0"; "": f32 where weights are F32, else f16
};

class Model {
 public:
  /// Throws ModelFileError, ConfigError (threads, isa, a budget that is too small, a cache that cannot be).
  Model(const std::string& path, int threads, const std::string& isa, WeightType transcode,
        const MemoryOptions& memory = {});

  /// Modes this file can run in.
  std::vector<Mode> modes() const;
  /// Whether not all neurons are in memory.
  bool on_disk() const { return store != nullptr && !store->resident(); }

  /// Takes `bytes` of the budget for a session, gives them back where negative. Throws ConfigError where they
  /// are too many.
  void reserve(std::int64_t bytes) const;

  ModelConfig config;
  const KernelTable& kernels;
  mutable ThreadPool pool;
  std::unique_ptr<const Weights> weights;
  KvType kv_type = KvType::kF16;       // of the sessions
  std::unique_ptr<NeuronStore> store;  // null in a file without bundles; belongs to the job of the pool
  std::string io_note;                 // why neurons are not read as they might be, or ""

 private:
  void limit(const std::string& path, Weights& loaded, const MemoryOptions& memory);

  mutable std::mutex mutex_;
  std::int64_t budget_ = 0;        // 0: no limit
  mutable std::int64_t left_ = 0;  // of the budget, where nothing is on disk
};

}  // namespace turbosparse
