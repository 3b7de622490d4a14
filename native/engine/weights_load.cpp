// Weights get their memory: rows of the file are packed for the kernels, signs are taken.
#include <algorithm>

#include "engine/weights.h"

namespace turbosparse {
namespace {

/// Packs the rows of one tensor on all threads.
void pack(const Packing& packing, std::byte* out, ThreadPool& pool) {
  const Matrix& target = *packing.target;
  const std::size_t file_row = ggml_row_bytes(packing.type, target.cols);
  WeightType type;
  const bool native = native_type(packing.type, &type) && type == target.type;
  std::vector<std::vector<float>> rows(static_cast<std::size_t>(pool.size()));
  for (auto& row : rows) row.resize(static_cast<std::size_t>(target.cols));
  pool.run([&](int index) noexcept {
    float* values = rows[static_cast<std::size_t>(index)].data();
    const Range range = split(target.rows, 1, index, pool.size());
    for (std::int64_t r = range.begin; r < range.end; ++r) {
      const std::byte* from = packing.data.data() + static_cast<std::size_t>(r) * file_row;
      std::byte* to = out + static_cast<std::size_t>(r) * target.row_bytes;
      if (native) {
        pack_row(target.type, from, target.cols, to);
      } else {
        ggml_dequantize_row(packing.type, from, target.cols, values);
        quantize_row(target.type, values, target.cols, to);
      }
    }
  });
}

}  // namespace

void Weights::load(const KernelTable& kernels, ThreadPool& pool) {
  take_signs(kernels, pool);
  std::size_t total = 0;
  for (const Packing& packing : packings_)
    total += aligned_bytes(packing.target->row_bytes * static_cast<std::size_t>(packing.target->rows));
  arena_ = Arena(total);
  for (const Packing& packing : packings_) {
    std::byte* out = arena_.take(packing.target->row_bytes * static_cast<std::size_t>(packing.target->rows));
    pack(packing, out, pool);
    packing.target->data = out;
    file_->release(packing.data);
  }
  packings_ = {};
}

std::size_t Weights::sign_bytes() const {
  std::size_t total = 0;
  for (const SignRows& rows : signs_to_take_) total += sign_bytes(*rows.ffn);
  return total;
}

std::size_t Weights::sign_bytes(const FfnWeights& ffn) const {
  return static_cast<std::size_t>(ffn.neurons * sign_rows * sign_words(output.cols)) * sizeof(std::uint64_t);
}

/// Takes the signs of rows as they stand in the file.
void Weights::take_signs(const KernelTable& kernels, ThreadPool& pool) {
  const std::int64_t D = output.cols;
  const std::int64_t words = sign_words(D);
  signs_ = Arena(sign_bytes() + signs_to_take_.size() * kAlignment);
  std::vector<std::vector<float>> buffers(static_cast<std::size_t>(pool.size()));
  for (auto& buffer : buffers) buffer.resize(static_cast<std::size_t>(D));
  for (const SignRows& rows : signs_to_take_) {
    FfnWeights& ffn = *rows.ffn;
    auto* signs = reinterpret_cast<std::uint64_t*>(signs_.take(sign_bytes(ffn)));
    ffn.predictor.signs = signs;
    pool.run([&](int index) noexcept {
      float* values = buffers[static_cast<std::size_t>(index)].data();
      const Range range = split(ffn.neurons, 1, index, pool.size());
      for (std::int64_t r = range.begin; r < range.end; ++r) {
        std::uint64_t* out = signs + r * sign_rows * words;
        for (const SignRows::Part& part : rows.parts) {
          const std::size_t at = static_cast<std::size_t>(r) * ggml_row_bytes(part.type, D);
          ggml_dequantize_row(part.type, part.data.data() + at, D, values);
          kernels.sign_bits(values, D, out);
          out += words;
        }
      }
    });
  }
  signs_to_take_ = {};
}

}  // namespace turbosparse
