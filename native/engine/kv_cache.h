// Keys and values of one sequence in IEEE half, one contiguous [context, C] block per layer and kv head:
// attention of a head reads a single stream. Pages of positions that were never written cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/model_config.h"
#include "util/memory.h"

namespace turbosparse {

class KvCache {
 public:
  KvCache(const ModelConfig& config, std::int64_t context)
      : heads_(config.num_key_value_heads),
        head_dim_(config.head_dim),
        context_(context),
        arena_(static_cast<std::size_t>(2 * config.num_hidden_layers * heads_ * context * head_dim_) *
               sizeof(std::uint16_t)),
        data_(reinterpret_cast<std::uint16_t*>(arena_.take(0))) {}

  std::int64_t context() const { return context_; }
  std::int64_t stride() const { return head_dim_; }
  std::uint16_t* keys(std::int64_t layer, std::int64_t head) { return block(layer, 0, head); }
  std::uint16_t* values(std::int64_t layer, std::int64_t head) { return block(layer, 1, head); }

 private:
  std::uint16_t* block(std::int64_t layer, std::int64_t which, std::int64_t head) {
    return data_ + ((layer * 2 + which) * heads_ + head) * context_ * head_dim_;
  }

  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t context_;
  Arena arena_;
  std::uint16_t* data_;
};

}  // namespace turbosparse
