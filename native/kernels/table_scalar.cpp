// The scalar twin: every kernel as a plain loop. It is what the others are tested against and what runs on a
// CPU without a table of its own. It shares no code with the *.inl files.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cached_tile.h"
#include "kernels/packed.h"
#include "kernels/tables.h"

namespace turbosparse {
namespace {

void quantize_q8(const float* x, std::int64_t n, std::int8_t* q, float* scale, std::int32_t* q_sum) noexcept {
  for (std::int64_t b = 0; b < n / kBlock; ++b, x += kBlock, q += kBlock) {
    float largest = 0.0f;
    bool finite = true;
    for (int j = 0; j < kBlock; ++j) {
      largest = std::max(largest, std::fabs(x[j]));
      finite = finite && std::isfinite(x[j]);
    }
    // Below 1e-30 the inverse could overflow; such a block is zero for every purpose.
    const float inverse = finite && largest >= 1e-30f ? 127.0f / largest : 0.0f;
    scale[b] = finite ? (inverse > 0.0f ? largest / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
    q_sum[b] = 0;
    for (int j = 0; j < kBlock; ++j) {
      q[j] = static_cast<std::int8_t>(finite ? std::nearbyint(x[j] * inverse) : 0.0f);
      q_sum[b] += q[j];
    }
  }
}

void dequantize_row(const Matrix& w, std::int64_t row, float* out) noexcept {
  for (std::int64_t c = 0; c < w.cols; c += kBlock) {
    load_block(w.type, row_data(w, row), w.cols, c, std::min(kBlock, w.cols - c), out + c);
  }
}

/// Dot product of a row with input vector t.
float dot(const Matrix& w, std::int64_t row, const Input& x, std::int64_t t) noexcept {
  const std::byte* data = row_data(w, row);
  float sum = 0.0f;
  if (is_quantized(w.type)) {
    const std::int64_t blocks = w.cols / kBlock;
    const std::int8_t* q = x.q + t * w.cols;
    const float* scale = x.scale + t * blocks;
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::int8_t weights[kBlock];
      load_block_integers(w.type, data, b, weights);
      int products = 0;
      for (int j = 0; j < kBlock; ++j) products += weights[j] * q[b * kBlock + j];
      sum += static_cast<float>(products) * (block_scale(w.type, data, w.cols, b) * scale[b]);
    }
    return sum;
  }
  for (std::int64_t c = 0; c < w.cols; c += kBlock) {
    const std::int64_t n = std::min(kBlock, w.cols - c);
    float weights[kBlock];
    load_block(w.type, data, w.cols, c, n, weights);
    for (std::int64_t j = 0; j < n; ++j) sum = std::fma(weights[j], x.x[t * w.cols + c + j], sum);
  }
  return sum;
}

void gemv(const Matrix& w, const Input& x, std::int64_t row_begin, std::int64_t row_end, float* y) noexcept {
  for (std::int64_t r = row_begin; r < row_end; ++r) y[r] = dot(w, r, x, 0);
}

void gemv_rows(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t n, float* y) noexcept {
  for (std::int64_t i = 0; i < n; ++i) y[rows[i]] = dot(w, rows[i], x, 0);
}

void gemm(const Matrix& w, const Input& x, std::int64_t T, std::int64_t row_begin, std::int64_t row_end,
          float* y, std::int64_t y_stride, std::byte*) noexcept {
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    for (std::int64_t t = 0; t < T; ++t) y[t * y_stride + r] = dot(w, r, x, t);
  }
}

/// y[c] += a * w[row, c] for one block of columns.
void add_block(const Matrix& w, std::int64_t row, float a, std::int64_t c, std::int64_t n,
               float* y) noexcept {
  const std::byte* data = row_data(w, row);
  float weights[kBlock];
  if (is_quantized(w.type)) {
    std::int8_t q[kBlock];
    load_block_integers(w.type, data, c / kBlock, q);
    const float scaled = a * block_scale(w.type, data, w.cols, c / kBlock);
    for (int j = 0; j < kBlock; ++j) y[c + j] = std::fma(static_cast<float>(q[j]), scaled, y[c + j]);
    return;
  }
  load_block(w.type, data, w.cols, c, n, weights);
  for (std::int64_t j = 0; j < n; ++j) y[c + j] = std::fma(weights[j], a, y[c + j]);
}

void axpy_rows(const Matrix& w, const std::int32_t* rows, std::int64_t n, const float* coef,
               std::int64_t col_begin, std::int64_t col_end, float* y) noexcept {
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t c = col_begin; c < col_end; c += kBlock) {
      add_block(w, rows[i], coef[rows[i]], c, std::min(kBlock, col_end - c), y);
    }
  }
}

void gemm_t(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T, std::int64_t col_begin,
            std::int64_t col_end, float* y, std::int64_t y_stride, std::byte*) noexcept {
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t r = 0; r < w.rows; ++r) {
      for (std::int64_t c = col_begin; c < col_end; c += kBlock) {
        add_block(w, r, a[t * a_stride + r], c, std::min(kBlock, col_end - c), y + t * y_stride);
      }
    }
  }
}

void sign_bits(const float* x, std::int64_t n, std::uint64_t* bits) noexcept {
  std::fill_n(bits, sign_words(n), std::uint64_t{0});
  for (std::int64_t i = 0; i < n; ++i) bits[i / 64] |= static_cast<std::uint64_t>(x[i] > 0.0f) << (i % 64);
}

void sign_differences(const std::uint64_t* rows, std::int64_t words, const std::uint64_t* x,
                      std::int64_t row_begin, std::int64_t row_end, std::int32_t* out) noexcept {
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    out[r] = 0;
    for (std::int64_t i = 0; i < words; ++i) out[r] += std::popcount(rows[r * words + i] ^ x[i]);
  }
}

void rms_norm(const float* x, const float* weight, std::int64_t n, float eps, float* out) noexcept {
  double squares = 0.0;
  for (std::int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float scale = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + eps);
  for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void add(const float* x, std::int64_t n, float* y) noexcept {
  for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}

void rope(float* x, std::int64_t n_heads, std::int64_t C, std::int64_t rotary, bool neox, const float* cos,
          const float* sin) noexcept {
  for (std::int64_t h = 0; h < n_heads; ++h, x += C) {
    for (std::int64_t i = 0; i < rotary / 2; ++i) {
      float& first = x[neox ? i : 2 * i];
      float& second = x[neox ? i + rotary / 2 : 2 * i + 1];
      const float a = first, b = second;
      first = a * cos[i] - b * sin[i];
      second = a * sin[i] + b * cos[i];
    }
  }
}

float activate_one(Activation f, float parameter, float x) noexcept {
  switch (f) {
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
    case Activation::kDRelu:
      return x < 0.0f ? 0.0f : x;
    case Activation::kRelu2:
      return x < 0.0f ? 0.0f : x * x;
    case Activation::kFatRelu:
      return x < parameter ? 0.0f : x;
  }
  return x;
}

void activate(Activation f, float parameter, const float* gate, std::int64_t n, float* out) noexcept {
  for (std::int64_t i = 0; i < n; ++i) out[i] = activate_one(f, parameter, gate[i]);
}

void to_half(const float* x, std::int64_t n, std::uint16_t* out) noexcept {
  for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
}

float cached(std::uint16_t value) { return half_to_float(value); }
float cached(float value) { return value; }

/// scores = softmax(scores)
void softmax(std::int64_t n, float* scores) noexcept {
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t p = 0; p < n; ++p) largest = std::max(largest, scores[p]);
  float total = 0.0f;
  for (std::int64_t p = 0; p < n; ++p) {
    scores[p] = std::exp(scores[p] - largest);
    total += scores[p];
  }
  for (std::int64_t p = 0; p < n; ++p) scores[p] /= total;
}

template <class Cached>
void attend_one(const float* q, const Cached* k, const Cached* v, std::int64_t n, std::int64_t C,
                std::int64_t kv_stride, float scale, float* scores, float* out) noexcept {
  for (std::int64_t p = 0; p < n; ++p) {
    float sum = 0.0f;
    for (std::int64_t c = 0; c < C; ++c) sum = std::fma(q[c], cached(k[p * kv_stride + c]), sum);
    scores[p] = sum * scale;
  }
  softmax(n, scores);
  std::fill_n(out, C, 0.0f);
  for (std::int64_t p = 0; p < n; ++p) {
    for (std::int64_t c = 0; c < C; ++c) out[c] = std::fma(scores[p], cached(v[p * kv_stride + c]), out[c]);
  }
}

template <class Cached>
void attend(const float* q, std::int64_t heads, const Cached* k, const Cached* v, std::int64_t n,
            std::int64_t C, std::int64_t kv_stride, float scale, float* scores, float* out) noexcept {
  for (std::int64_t h = 0; h < heads; ++h) {
    attend_one(q + h * C, k, v, n, C, kv_stride, scale, scores + h * n, out + h * C);
  }
}

float cached_scale(const std::byte* tile, std::int64_t p, std::int64_t b, std::int64_t C) {
  return half_to_float(load_unaligned<std::uint16_t>(tile + cached_scale_offset(p, b, C)));
}

/// Products of head h with the key at position p of a tile.
float score_q8(const Input& q, std::int64_t h, const std::byte* tile, std::int64_t p, std::int64_t C) {
  float sum = 0.0f;
  for (std::int64_t b = 0; b < C / kBlock; ++b) {
    int products = 0;
    for (std::int64_t c = b * kBlock; c < (b + 1) * kBlock; ++c)
      products += std::to_integer<std::int8_t>(tile[key_offset(p, c, C)]) * q.q[h * C + c];
    sum += static_cast<float>(products) * (cached_scale(tile, p, b, C) * q.scale[h * C / kBlock + b]);
  }
  return sum;
}

/// out[c] += sum over the first `count` positions of a tile of shares[p] * value[p][c]
void add_values_q8(const float* shares, const std::byte* tile, std::int64_t count, std::int64_t C,
                   float* out) {
  for (std::int64_t b = 0; b < C / kBlock; ++b) {
    float scaled[kTilePositions] = {};
    for (std::int64_t p = 0; p < count; ++p) scaled[p] = shares[p] * cached_scale(tile, p, b, C);
    std::int8_t q[kTilePositions];
    float scale;
    std::int32_t q_sum;
    quantize_q8(scaled, kTilePositions, q, &scale, &q_sum);
    for (std::int64_t c = b * kBlock; c < (b + 1) * kBlock; ++c) {
      int products = 0;
      for (std::int64_t p = 0; p < count; ++p)
        products += std::to_integer<std::int8_t>(tile[value_offset(p, c)]) * q[p];
      out[c] = std::fma(static_cast<float>(products), scale, out[c]);
    }
  }
}

void attend_q8(const Input& q, std::int64_t heads, const std::byte* k, const std::byte* v, std::int64_t n,
               std::int64_t C, float scale, float* scores, float* out) noexcept {
  const std::int64_t tile_bytes = cached_tile_bytes(C);
  for (std::int64_t h = 0; h < heads; ++h, scores += n, out += C) {
    for (std::int64_t p = 0; p < n; ++p)
      scores[p] = scale * score_q8(q, h, k + p / kTilePositions * tile_bytes, p % kTilePositions, C);
    softmax(n, scores);
    std::fill_n(out, C, 0.0f);
    for (std::int64_t p = 0; p < n; p += kTilePositions) {
      const std::byte* tile = v + p / kTilePositions * tile_bytes;
      add_values_q8(scores + p, tile, std::min(kTilePositions, n - p), C, out);
    }
  }
}

}  // namespace

constinit const KernelTable kScalarTable = {
    "scalar",      quantize_q8,      dequantize_row, gemv,
    gemv_rows,     axpy_rows,        gemm,           gemm_t,
    sign_bits,     sign_differences, rms_norm,       add,
    rope,          activate,         to_half,        attend<std::uint16_t>,
    attend<float>, attend_q8};

}  // namespace turbosparse
