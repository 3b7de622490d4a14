// Keys and values of one sequence, one contiguous [context, C] block per layer and kv head: attention of a
// head reads a single stream. They are kept as IEEE halves, or as floats for a model whose weights are F32,
// where rounding to halves would be the largest error by far (SmolLM2: 3e-4 of the logits' norm instead of
// 1e-6). Pages of positions that were never written cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/model_config.h"
#include "kernels/kernels.h"
#include "util/memory.h"

namespace turbosparse {

class KvCache {
 public:
  KvCache(const ModelConfig& config, std::int64_t context, bool floats)
      : heads_(config.num_key_value_heads),
        head_dim_(config.head_dim),
        context_(context),
        floats_(floats),
        arena_(static_cast<std::size_t>(config.num_hidden_layers * context * position_bytes())),
        data_(arena_.take(0)) {}

  std::int64_t context() const { return context_; }
  /// Bytes of a cache.
  static std::int64_t bytes(const ModelConfig& config, std::int64_t context, bool floats) {
    const auto value = static_cast<std::int64_t>(floats ? sizeof(float) : sizeof(std::uint16_t));
    return config.num_hidden_layers * context * 2 * config.num_key_value_heads * config.head_dim * value;
  }
  /// Bytes of one position in one layer.
  std::int64_t position_bytes() const { return 2 * heads_ * head_bytes(); }

  /// Writes the key and the value [C] of a head.
  void store(const KernelTable& kernels, std::int64_t layer, std::int64_t head, std::int64_t position,
             const float* key, const float* value);
  /// Attention of query heads over the first n positions of the kv head that they share.
  void attend(const KernelTable& kernels, std::int64_t layer, std::int64_t head, const float* queries,
              std::int64_t heads, std::int64_t n, float* scores, float* out) const;

 private:
  std::int64_t head_bytes() const {
    return head_dim_ * static_cast<std::int64_t>(floats_ ? sizeof(float) : sizeof(std::uint16_t));
  }
  std::byte* keys(std::int64_t layer, std::int64_t head) const {
    return data_ + (2 * layer * heads_ + head) * context_ * head_bytes();
  }
  std::byte* values(std::int64_t layer, std::int64_t head) const {
    return data_ + ((2 * layer + 1) * heads_ + head) * context_ * head_bytes();
  }

  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t context_;
  bool floats_;
  Arena arena_;
  std::byte* data_;
};

}  // namespace turbosparse
