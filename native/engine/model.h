// A model ready to run: its file, shape, weights, kernels and threads. Sessions share it.
#pragma once

#include <algorithm>
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

/// What a budget has to hold and what it has room for, in bytes, found from the file's header.
struct MemoryPlan {
  std::size_t dense = 0;           // attention, norms, routers, output; without bundles the FFNs as well
  std::size_t gates = 0;           // rows of gate that are in no bundle
  std::size_t predictors = 0;      // of low rank
  std::size_t per_neuron = 0;      // thresholds and hotness
  std::size_t cache = 0;           // keys and values of one session
  std::size_t scratch = 0;         // of the same
  std::size_t all_neurons = 0;     // all rows in bundles, if they are in memory
  std::size_t buffers = 0;         // of reads, where not all neurons are in memory
  std::size_t fewest_neurons = 0;  // what a token needs of one layer, the same
  StoreSplit clusters;             // with room in the budget, the same; else 0
  std::size_t weights() const { return dense + gates + predictors + per_neuron; }
  std::size_t session() const { return cache + scratch; }
  /// The smallest budget that holds all neurons, or if they are in bundles the smallest at all.
  std::size_t everything() const { return weights() + session() + all_neurons; }
  std::size_t least() const {
    return std::min(everything(), weights() + session() + buffers + fewest_neurons);
  }
};

class Model {
 public:
  /// Throws ModelFileError, ConfigError (threads, isa, a budget that is too small, a cache that cannot be).
  Model(const std::string& path, int threads, const std::string& isa, WeightType transcode,
        const MemoryOptions& memory = {});

  /// What `memory` would hold of a file, of which only the header is read. Throws what the constructor
  /// throws, but for a budget that is too small.
  static MemoryPlan plan(const std::string& path, int threads, WeightType transcode,
                         const MemoryOptions& memory);

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
  /// A model whose weights are found but not loaded.
  Model(const std::shared_ptr<const GgufFile>& file, int threads, const std::string& isa,
        WeightType transcode, const MemoryOptions& memory, bool unmapped);
  MemoryPlan plan(const MemoryOptions& memory) const;
  void limit(const MemoryOptions& memory);

  Weights* own_ = nullptr;  // the weights, as long as they are loaded
  mutable std::mutex mutex_;
  std::int64_t budget_ = 0;        // 0: no limit
  mutable std::int64_t left_ = 0;  // of the budget, where nothing is on disk
};

}  // namespace turbosparse
