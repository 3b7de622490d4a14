// The kernels: what the engine calls, what each entry promises, and how packed weights lie in memory.
//
// Kernels know pointers and sizes only. They are noexcept, allocate nothing and keep no state. Every
// algorithm is written once (*.inl) over a small set of vector primitives; the primitives exist per
// instruction set (ISA, isa/*.h). A table of function pointers per ISA is chosen when an engine is
// constructed. The scalar table is written separately, in plain loops: it is the twin that all others are
// tested against.
//
// Shape letters as in docs/notation.md. Blocks are 32 columns. Quantised matrices have cols % 32 == 0.
//
// Packed rows (each row in one piece, `row_bytes` apart, so that one neuron is one contiguous read):
//   F32, F16, BF16  cols values, as in the file: rows are used where they are mapped.
//   Q8_0            cols int8, then cols/32 fp16 scales.                         row_bytes rounded up to 16
//   Q4_0            ceil(blocks/2) groups of 32 bytes, then `blocks` fp16 scales. row_bytes rounded up to 16
//                   group g, byte j = q[2g][j] | q[2g+1][j] << 4 where q is 0..15 and the weight is
//                   (q - 8) * scale; with an odd number of blocks the missing one holds q = 8.
// Planar scales let eight blocks be finished with one vector conversion and one vector product.
//
// Cached keys or values in 8 bits (of a head of C values, C % 32 == 0) lie in tiles of 32 positions, so that
// four factors of 16 sums are one read, whatever the products run over: columns for keys, positions for
// values.
//   keys    2 halves of 16 positions: [C / 4][16 positions][4 columns] int8; then the scales
//   values  C / 16 strips of 16 columns: [8][16 columns][4 positions] int8; then the scales
//   scales  [C / 32][32 positions] fp16, of 32 columns of a position each
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace turbosparse {

enum class WeightType : std::uint8_t { kF32 = 0, kF16, kBF16, kQ8_0, kQ4_0 };
inline constexpr int kWeightTypes = 5;
inline constexpr std::int64_t kBlock = 32;

constexpr bool is_quantized(WeightType t) { return t == WeightType::kQ8_0 || t == WeightType::kQ4_0; }
const char* weight_type_name(WeightType t);  // "F32", "F16", "BF16", "Q8_0", "Q4_0"
/// Bytes from one packed row to the next.
std::size_t packed_row_bytes(WeightType t, std::int64_t cols);

/// A packed [rows, cols] matrix somebody else owns.
struct Matrix {
  const std::byte* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::size_t row_bytes = 0;
  WeightType type = WeightType::kF32;
};

/// T input vectors, row t at `x + t * cols`. Kernels of float weights read `x`; kernels of quantised weights
/// read `q`, `scale` and `q_sum`, filled by `quantize_q8`: x[i] ~ q[i] * scale[i / 32], |q| <= 127,
/// q_sum[b] = sum of q in block b (what an offset of the weights adds to a dot product, exactly).
struct Input {
  const float* x = nullptr;             // [T, cols]
  const std::int8_t* q = nullptr;       // [T, cols]
  const float* scale = nullptr;         // [T, cols / 32]
  const std::int32_t* q_sum = nullptr;  // [T, cols / 32]
};

/// FFN activation. A gated FFN computes f(gate) * g(up): drelu has f = g = relu, the others g = identity.
/// A plain FFN computes f(up). gelu is the tanh form, as in ggml; fatrelu keeps x >= threshold; relu2 is
/// relu(x)^2. NaN stays NaN in all of them.
enum class Activation : std::uint8_t { kSilu = 0, kGelu, kRelu, kRelu2, kFatRelu, kDRelu };

struct KernelTable {
  const char* isa;

  // ---- weights
  // ----------------------------------------------------------------------------------------------
  /// Quantises one vector of n floats (n % 32 == 0). A block of zeros gets scale 0; a block with a NaN or an
  /// Inf gets scale NaN, so that products show it.
  void (*quantize_q8)(const float* x, std::int64_t n, std::int8_t* q, float* scale,
                      std::int32_t* q_sum) noexcept;
  /// out[0..cols) = row `row` of w as float.
  void (*dequantize_row)(const Matrix& w, std::int64_t row, float* out) noexcept;
  /// y[r] = dot(w[r], x) for row_begin <= r < row_end; one input vector. Result of a row does not depend on
  /// the range it was computed in.
  void (*gemv)(const Matrix& w, const Input& x, std::int64_t row_begin, std::int64_t row_end,
               float* y) noexcept;
  /// y[rows[i]] = dot(w[rows[i]], x) for 0 <= i < n; other entries of y are left alone. Bit-equal to gemv.
  void (*gemv_rows)(const Matrix& w, const Input& x, const std::int32_t* rows, std::int64_t n,
                    float* y) noexcept;
  /// y[c] += sum_i coef[rows[i]] * w[rows[i], c] for col_begin <= c < col_end, both multiples of 32 (col_end
  /// may also be cols). Adds in the order of `rows`, with one running sum per column, so that a zero
  /// coefficient changes nothing and the result does not depend on how columns are split.
  void (*axpy_rows)(const Matrix& w, const std::int32_t* rows, std::int64_t n, const float* coef,
                    std::int64_t col_begin, std::int64_t col_end, float* y) noexcept;
  /// y[t * y_stride + r] = dot(w[r], x[t]) for t < T and row_begin <= r < row_end. `scratch` holds at least
  /// gemm_scratch_bytes(w.cols) bytes, 64-byte aligned, one per thread.
  void (*gemm)(const Matrix& w, const Input& x, std::int64_t T, std::int64_t row_begin, std::int64_t row_end,
               float* y, std::int64_t y_stride, std::byte* scratch) noexcept;
  /// Transposed use of neuron-major weights: y[t * y_stride + c] += sum_r a[t * a_stride + r] * w[r, c] for
  /// col_begin <= c < col_end (multiples of 32, or cols), all rows r, t < T. Scratch as for gemm. With
  /// quantised weights an ISA may quantise both sides to int8 in blocks of 32 rows: the error is that of
  /// gemm.
  void (*gemm_t)(const Matrix& w, const float* a, std::int64_t a_stride, std::int64_t T,
                 std::int64_t col_begin, std::int64_t col_end, float* y, std::int64_t y_stride,
                 std::byte* scratch) noexcept;

  // ---- signs
  // ----------------------------------------------------------------------------------------------
  /// Bit i % 64 of bits[i / 64] = x[i] > 0 for i < n; the last of sign_words(n) words is filled up with
  /// zeros.
  void (*sign_bits)(const float* x, std::int64_t n, std::uint64_t* bits) noexcept;
  /// out[r] = number of bits in which row r and x differ, for row_begin <= r < row_end; each row has `words`
  /// words.
  void (*sign_differences)(const std::uint64_t* rows, std::int64_t words, const std::uint64_t* x,
                           std::int64_t row_begin, std::int64_t row_end, std::int32_t* out) noexcept;

  // ---- vectors
  // ----------------------------------------------------------------------------------------------
  /// out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]. out may be x.
  void (*rms_norm)(const float* x, const float* weight, std::int64_t n, float eps, float* out) noexcept;
  /// y[i] += x[i]
  void (*add)(const float* x, std::int64_t n, float* y) noexcept;
  /// Rotates n_heads heads of C values in place. `neox` pairs (i, i + rotary/2), else (2i, 2i + 1). cos and
  /// sin hold rotary / 2 values; values past `rotary` in a head stay.
  void (*rope)(float* x, std::int64_t n_heads, std::int64_t C, std::int64_t rotary, bool neox,
               const float* cos, const float* sin) noexcept;
  /// out[i] = f(gate[i]); `parameter` is the FATReLU threshold. out may be gate.
  void (*activate)(Activation f, float parameter, const float* gate, std::int64_t n, float* out) noexcept;
  /// Float to IEEE half, round to nearest even.
  void (*to_half)(const float* x, std::int64_t n, std::uint16_t* out) noexcept;
  /// Attention of query heads that share n cached positions: out = softmax(q . k * scale) v, each for itself.
  /// k and v are half, position p at k + p * kv_stride; q and out hold heads * C floats; `scores` has room
  /// for heads * n. A head's result does not depend on the others.
  void (*attend)(const float* q, std::int64_t heads, const std::uint16_t* k, const std::uint16_t* v,
                 std::int64_t n, std::int64_t C, std::int64_t kv_stride, float scale, float* scores,
                 float* out) noexcept;
  /// The same with keys and values that are float.
  void (*attend_f32)(const float* q, std::int64_t heads, const float* k, const float* v, std::int64_t n,
                     std::int64_t C, std::int64_t kv_stride, float scale, float* scores, float* out) noexcept;
  /// The same with keys and values in tiles of 8 bits and `q` in int8 form, row h for head h. What is past
  /// position n of the last tile counts for nothing. The shares of softmax, times the scales of the values,
  /// are rounded to int8 in blocks of 32 positions: the error is that of gemm_t.
  void (*attend_q8)(const Input& q, std::int64_t heads, const std::byte* k, const std::byte* v,
                    std::int64_t n, std::int64_t C, float scale, float* scores, float* out) noexcept;
};

/// Bytes of 32 cached positions in 8 bits.
constexpr std::int64_t cached_tile_bytes(std::int64_t C) { return kBlock * (C + C / kBlock * 2); }
/// Writes the key, or the value, of a head's position into its tiles. C % 32 == 0.
void store_key_q8(const KernelTable& kernels, const float* key, std::int64_t C, std::int64_t position,
                  std::byte* tiles) noexcept;
void store_value_q8(const KernelTable& kernels, const float* value, std::int64_t C, std::int64_t position,
                    std::byte* tiles) noexcept;

/// 64-bit words that hold the signs of n values.
constexpr std::int64_t sign_words(std::int64_t n) { return (n + 63) / 64; }

/// Scratch that gemm and gemm_t need per thread for an inner dimension of `cols`.
std::size_t gemm_scratch_bytes(std::int64_t cols);

// ---- choice of the instruction set
// ----------------------------------------------------------------------------
/// Names this build and this CPU both have, best first; the last is always "scalar".
std::vector<std::string> available_isas();
/// The table of that name; an empty name means TURBOSPARSE_ISA where set, else the best. Throws ConfigError
/// for an unknown name or one the CPU lacks.
const KernelTable& kernel_table(const std::string& isa = "");

// ---- from file formats to packed rows (pack.cpp; scalar, run once at load)
// ---------------------------------------
/// ggml's numeric type codes that can be read: native ones and those that are transcoded.
bool ggml_type_supported(std::uint32_t ggml_type);
const char* ggml_type_name(std::uint32_t ggml_type);  // "Q4_K", or "?" where unknown
/// Bytes of `cols` values in the file. 0 for unknown types or where cols is no multiple of the block.
std::size_t ggml_row_bytes(std::uint32_t ggml_type, std::int64_t cols);
/// Whether that type has a kernel, and which.
bool native_type(std::uint32_t ggml_type, WeightType* type);
/// Dequantises one file row to floats.
void ggml_dequantize_row(std::uint32_t ggml_type, const std::byte* row, std::int64_t cols,
                         float* out) noexcept;
/// Repacks one file row of a native type into a packed row of the same type, without loss.
void pack_row(WeightType type, const std::byte* row, std::int64_t cols, std::byte* out) noexcept;
/// Quantises (or converts) one row of floats into a packed row.
void quantize_row(WeightType type, const float* x, std::int64_t cols, std::byte* out) noexcept;

}  // namespace turbosparse
