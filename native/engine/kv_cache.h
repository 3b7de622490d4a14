// Keys and values of one sequence, one contiguous block of [context, C] per layer and kv head: attention of a
// head reads a single stream. They are kept as IEEE halves, as floats for a model whose weights are F32,
// where rounding to halves would be the largest error by far (SmolLM2: 3e-4 of the logits' norm instead of
// 1e-6), or on request as 8-bit integers with a scale for every 32 (kernels.h has the tiles that these lie
// in). Pages of positions that were never written cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/model_config.h"
#include "kernels/kernels.h"
#include "util/memory.h"

namespace turbosparse {

enum class KvType : std::uint8_t { kF32 = 0, kF16, kQ8 };

/// Throws ConfigError for an unknown name.
KvType parse_kv_type(const std::string& name);
const char* kv_type_name(KvType type);  // "f32", "f16", "q8_0"

class KvCache {
 public:
  KvCache(const ModelConfig& config, std::int64_t context, KvType type)
      : heads_(config.num_key_value_heads),
        head_dim_(config.head_dim),
        context_(context),
        type_(type),
        arena_(static_cast<std::size_t>(bytes(config, context, type))),
        data_(arena_.take(0)) {}

  std::int64_t context() const { return context_; }
  /// Whether queries are needed in their 8-bit form.
  bool quantized() const { return type_ == KvType::kQ8; }
  /// Bytes of a cache.
  static std::int64_t bytes(const ModelConfig& config, std::int64_t context, KvType type) {
    return config.num_hidden_layers * 2 * config.num_key_value_heads *
           head_bytes(type, context, config.head_dim);
  }
  /// Bytes of one position in one layer.
  std::int64_t position_bytes() const { return 2 * heads_ * vector_bytes(type_, head_dim_); }

  /// Writes the key and the value [C] of a head.
  void store(const KernelTable& kernels, std::int64_t layer, std::int64_t head, std::int64_t position,
             const float* key, const float* value);
  /// Attention of query heads over the first n positions of the kv head that they share.
  void attend(const KernelTable& kernels, std::int64_t layer, std::int64_t head, const Input& queries,
              std::int64_t heads, std::int64_t n, float* scores, float* out) const;

 private:
  static std::int64_t vector_bytes(KvType type, std::int64_t head_dim);
  /// Of the keys, or the values, of all positions of a head.
  static std::int64_t head_bytes(KvType type, std::int64_t context, std::int64_t head_dim);
  std::byte* keys(std::int64_t layer, std::int64_t head) const {
    return data_ + (2 * layer * heads_ + head) * head_bytes(type_, context_, head_dim_);
  }
  std::byte* values(std::int64_t layer, std::int64_t head) const { return keys(layer, head + heads_); }

  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t context_;
  KvType type_;
  Arena arena_;
  std::byte* data_;
};

}  // namespace turbosparse
