// Where the time of a token goes: each thread has a stopwatch whose laps are booked on the parts of a layer.
// A stopwatch that is off costs one branch per lap, some twenty per layer.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace turbosparse {

enum class Part : std::uint8_t {
  kNorm = 0,   // norms, and inputs quantised to 8 bits
  kQkv,        // projections of queries, keys and values
  kCache,      // rotation, and writing keys and values
  kAttention,  // scores, softmax and sums of values
  kOut,        // the attention's output projection
  kRouter,     // choosing experts
  kPredictor,  // naming candidates
  kGate,       // gate projection and activation; without a gate those of up
  kUp,         // up projection, product, and what the thresholds drop
  kDown,       // down projection
  kDisk,       // waiting for neurons from disk
  kLmHead,     // logits
  kBarrier,    // waiting for other threads
};
inline constexpr std::array<const char*, 13> kPartNames{
    "norm", "qkv", "kv_cache", "attention", "out",     "router", "predictor",
    "gate", "up",  "down",     "disk",      "lm_head", "barrier"};
/// Nanoseconds per part.
using PartTimes = std::array<std::int64_t, kPartNames.size()>;

class Stopwatch {
 public:
  /// Begins a job; `on` holds for its laps.
  void start(bool on) {
    on_ = on;
    if (on) last_ = Clock::now();
  }
  /// Books the time since the last lap.
  void lap(Part part) {
    if (!on_) return;
    const Clock::time_point now = Clock::now();
    times_[static_cast<std::size_t>(part)] += std::chrono::nanoseconds(now - last_).count();
    last_ = now;
  }
  /// The times since this was called last.
  PartTimes take() {
    const PartTimes taken = times_;
    times_ = {};
    return taken;
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool on_ = false;
  Clock::time_point last_;
  PartTimes times_{};
};

}  // namespace turbosparse
