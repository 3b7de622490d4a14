// The embedding of a token: from the mapped file, or where nothing is to stay mapped by a read.
#include <string>
#include <vector>

#include "engine/weights.h"
#include "util/error.h"

namespace turbosparse {

void Weights::embed(std::int32_t id, float* out) const {
  const std::int64_t cols = embedding_->shape[1];
  const std::size_t row_bytes = ggml_row_bytes(embedding_->type, cols);
  const std::size_t begin = static_cast<std::size_t>(id) * row_bytes;
  if (rows_ == nullptr) {
    ggml_dequantize_row(embedding_->type, embedding_->data.data() + begin, cols, out);
    return;
  }
  std::vector<std::byte> row(row_bytes);
  if (const int error = read_whole(rows_->get(), {embedding_->offset + begin, row_bytes, row.data(), 0})) {
    throw EngineError("[token embedding] expected a row of the model file, got " + disk_error_text(error));
  }
  ggml_dequantize_row(embedding_->type, row.data(), cols, out);
}

}  // namespace turbosparse
