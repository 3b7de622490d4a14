#include "engine/kv_cache.h"

#include <array>
#include <cmath>
#include <cstring>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::array<const char*, 3> kTypeNames{"f32", "f16", "q8_0"};

}  // namespace

KvType parse_kv_type(const std::string& name) {
  for (std::size_t i = 0; i < kTypeNames.size(); ++i) {
    if (name == kTypeNames[i]) return static_cast<KvType>(i);
  }
  throw ConfigError("[kv cache] expected f32, f16 or q8_0, got " + name);
}

const char* kv_type_name(KvType type) { return kTypeNames[static_cast<std::size_t>(type)]; }

std::int64_t KvCache::vector_bytes(KvType type, std::int64_t head_dim) {
  if (type == KvType::kQ8) return cached_tile_bytes(head_dim) / kBlock;
  return head_dim * static_cast<std::int64_t>(type == KvType::kF32 ? sizeof(float) : sizeof(std::uint16_t));
}

std::int64_t KvCache::head_bytes(KvType type, std::int64_t context, std::int64_t head_dim) {
  const std::int64_t whole_tiles = (context + kBlock - 1) / kBlock * kBlock;
  return (type == KvType::kQ8 ? whole_tiles : context) * vector_bytes(type, head_dim);
}

void KvCache::store(const KernelTable& kernels, std::int64_t layer, std::int64_t head, std::int64_t position,
                    const float* key, const float* value) {
  std::byte* k = keys(layer, head);
  std::byte* v = values(layer, head);
  const std::int64_t at = position * vector_bytes(type_, head_dim_);
  switch (type_) {
    case KvType::kF32:
      std::memcpy(k + at, key, static_cast<std::size_t>(head_dim_) * sizeof(float));
      std::memcpy(v + at, value, static_cast<std::size_t>(head_dim_) * sizeof(float));
      return;
    case KvType::kF16:
      kernels.to_half(key, head_dim_, reinterpret_cast<std::uint16_t*>(k + at));
      kernels.to_half(value, head_dim_, reinterpret_cast<std::uint16_t*>(v + at));
      return;
    case KvType::kQ8:
      store_key_q8(kernels, key, head_dim_, position, k);
      store_value_q8(kernels, value, head_dim_, position, v);
      return;
  }
}

void KvCache::attend(const KernelTable& kernels, std::int64_t layer, std::int64_t head, const Input& queries,
                     std::int64_t heads, std::int64_t n, float* scores, float* out) const {
  const std::byte* k = keys(layer, head);
  const std::byte* v = values(layer, head);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
  switch (type_) {
    case KvType::kF32:
      kernels.attend_f32(queries.x, heads, reinterpret_cast<const float*>(k),
                         reinterpret_cast<const float*>(v), n, head_dim_, head_dim_, scale, scores, out);
      return;
    case KvType::kF16:
      kernels.attend(queries.x, heads, reinterpret_cast<const std::uint16_t*>(k),
                     reinterpret_cast<const std::uint16_t*>(v), n, head_dim_, head_dim_, scale, scores, out);
      return;
    case KvType::kQ8:
      kernels.attend_q8(queries, heads, k, v, n, head_dim_, scale, scores, out);
      return;
  }
}

}  // namespace turbosparse
