#include "engine/kv_cache.h"

#include <cmath>
#include <cstring>

namespace turbosparse {

void KvCache::store(const KernelTable& kernels, std::int64_t layer, std::int64_t head, std::int64_t position,
                    const float* key, const float* value) {
  std::byte* const places[] = {keys(layer, head) + position * head_bytes(),
                               values(layer, head) + position * head_bytes()};
  const float* const vectors[] = {key, value};
  for (int i = 0; i < 2; ++i) {
    if (floats_) {
      std::memcpy(places[i], vectors[i], static_cast<std::size_t>(head_bytes()));
    } else {
      kernels.to_half(vectors[i], head_dim_, reinterpret_cast<std::uint16_t*>(places[i]));
    }
  }
}

void KvCache::attend(const KernelTable& kernels, std::int64_t layer, std::int64_t head, const float* queries,
                     std::int64_t heads, std::int64_t n, float* scores, float* out) const {
  const std::byte* k = keys(layer, head);
  const std::byte* v = values(layer, head);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
  if (floats_) {
    kernels.attend_f32(queries, heads, reinterpret_cast<const float*>(k), reinterpret_cast<const float*>(v),
                       n, head_dim_, head_dim_, scale, scores, out);
  } else {
    kernels.attend(queries, heads, reinterpret_cast<const std::uint16_t*>(k),
                   reinterpret_cast<const std::uint16_t*>(v), n, head_dim_, head_dim_, scale, scores, out);
  }
}

}  // namespace turbosparse
