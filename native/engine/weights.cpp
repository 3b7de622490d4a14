#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::uint32_t kGgmlI32 = 26;

[[noreturn]] void fail(const std::string& place, const std::string& expected, const std::string& got) {
  throw ModelFileError("[" + place + "] expected " + expected + ", got " + got);
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

/// A matrix that has to be packed, and where its view goes.
struct Packing {
  const GgufTensor* tensor;
  Matrix* target;
};

/// Finds tensors in the file, checks them, and notes which matrices still need packing.
class Binder {
 public:
  Binder(const GgufFile& file, WeightType transcode) : file_(file), transcode_(transcode) {}

  const GgufTensor* find(const std::string& name) {
    const GgufTensor* tensor = file_.tensor(name);
    if (tensor != nullptr) known_.insert(tensor->name);
    return tensor;
  }

  const GgufTensor& tensor(const std::string& name, const std::vector<std::int64_t>& shape) {
    const GgufTensor* found = find(name);
    if (found == nullptr) fail(name, "a tensor of shape " + shape_text(shape), "no such tensor");
    if (found->shape != shape) fail(name, "shape " + shape_text(shape), shape_text(found->shape));
    if (!ggml_type_supported(found->type)) {
      fail(name, "a type that can be read (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K)",
           std::string(ggml_type_name(found->type)) + " (" + std::to_string(found->type) + ")");
    }
    return *found;
  }

  void matrix(const std::string& name, std::int64_t rows, std::int64_t cols, Matrix* target) {
    const GgufTensor& found = tensor(name, {rows, cols});
    const bool native = native_type(found.type, &target->type);
    if (!native) target->type = transcode_;
    if (is_quantized(target->type) && cols % kBlock != 0) {
      fail(name, "rows of a multiple of 32 values", std::to_string(cols));
    }
    target->rows = rows;
    target->cols = cols;
    target->row_bytes = packed_row_bytes(target->type, cols);
    if (native && !is_quantized(target->type) && target->row_bytes == ggml_row_bytes(found.type, cols)) {
      target->data = found.data.data();
    } else {
      packings_.push_back({&found, target});
    }
    if (!native) transcoded_[ggml_type_name(found.type)] = weight_type_name(target->type);
    bytes_ += target->row_bytes * static_cast<std::size_t>(rows);
  }

  /// The same where there is such a tensor; returns whether there is.
  bool optional_matrix(const std::string& name, std::int64_t rows, std::int64_t cols, Matrix* target) {
    if (find(name) == nullptr) return false;
    matrix(name, rows, cols, target);
    return true;
  }

  /// Values of a vector, which may have any float type.
  std::vector<float> vector(const std::string& name, std::int64_t size) {
    const GgufTensor& found = tensor(name, {size});
    std::vector<float> values(static_cast<std::size_t>(size));
    ggml_dequantize_row(found.type, found.data.data(), size, values.data());
    return values;
  }

  std::vector<float> optional_vector(const std::string& name, std::int64_t size) {
    return find(name) == nullptr ? std::vector<float>{} : vector(name, size);
  }

  /// Indices below `bound`, strictly ascending; empty where there is no such tensor.
  std::vector<std::int32_t> optional_indices(const std::string& name, std::int64_t bound) {
    const GgufTensor* found = find(name);
    if (found == nullptr) return {};
    const std::string expected = "ascending I32 indices from 0 to " + std::to_string(bound - 1);
    if (found->type != kGgmlI32 || found->shape.size() != 1)
      fail(name, expected, "another type or " + shape_text(found->shape));
    std::vector<std::int32_t> indices(found->data.size() / sizeof(std::int32_t));
    std::memcpy(indices.data(), found->data.data(), found->data.size());
    std::int64_t previous = -1;
    for (const std::int32_t index : indices) {
      if (index <= previous || index >= bound)
        fail(name, expected, std::to_string(index) + " after " + std::to_string(previous));
      previous = index;
    }
    return indices;
  }

  /// Tensors nobody asked for belong to another function than the one computed here.
  void refuse_unknown() const {
    for (const GgufTensor& tensor : file_.tensors()) {
      if (!known_.contains(tensor.name))
        fail(tensor.name, "a tensor that this version uses", "an unknown one");
    }
  }

  const std::vector<Packing>& packings() const { return packings_; }
  std::map<std::string, std::string> transcoded() const { return transcoded_; }
  std::size_t bytes() const { return bytes_; }

 private:
  const GgufFile& file_;
  WeightType transcode_;
  std::unordered_set<std::string_view> known_;
  std::vector<Packing> packings_;
  std::map<std::string, std::string> transcoded_;
  std::size_t bytes_ = 0;
};

void bind_attention(Binder& binder, const std::string& block, const ModelConfig& config,
                    LayerWeights& layer) {
  const std::int64_t D = config.hidden_size;
  const std::int64_t q_rows = config.num_attention_heads * config.head_dim;
  const std::int64_t kv_rows = config.num_key_value_heads * config.head_dim;
  layer.attn_norm = binder.vector(block + "attn_norm.weight", D);
  binder.matrix(block + "attn_q.weight", q_rows, D, &layer.q);
  binder.matrix(block + "attn_k.weight", kv_rows, D, &layer.k);
  binder.matrix(block + "attn_v.weight", kv_rows, D, &layer.v);
  layer.q_bias = binder.optional_vector(block + "attn_q.bias", q_rows);
  layer.k_bias = binder.optional_vector(block + "attn_k.bias", kv_rows);
  layer.v_bias = binder.optional_vector(block + "attn_v.bias", kv_rows);
  if (config.qk_norm) {
    layer.q_norm = binder.vector(block + "attn_q_norm.weight", config.head_dim);
    layer.k_norm = binder.vector(block + "attn_k_norm.weight", config.head_dim);
  }
  binder.matrix(block + "attn_output.weight", D, q_rows, &layer.o);
}

void bind_ffn(Binder& binder, const std::string& block, const ModelConfig& config, bool neuron_major,
              LayerWeights& layer) {
  const std::int64_t D = config.hidden_size;
  const std::int64_t F = config.intermediate_size;
  layer.ffn_norm = binder.vector(block + "ffn_norm.weight", D);
  if (config.gated) binder.matrix(block + "ffn_gate.weight", F, D, &layer.gate);
  binder.matrix(block + "ffn_up.weight", F, D, &layer.up);
  if (neuron_major) {
    binder.matrix(block + "ffn_down_t.weight", F, D, &layer.down);
  } else {
    binder.matrix(block + "ffn_down.weight", D, F, &layer.down);
  }
  layer.threshold = binder.optional_vector(block + "ffn_threshold", F);
  if (config.gated) layer.gate_threshold = binder.optional_vector(block + "ffn_gate_threshold", F);
  const auto usable = [](float value) { return value >= 0 && std::isfinite(value); };
  if (!std::ranges::all_of(layer.threshold, usable) || !std::ranges::all_of(layer.gate_threshold, usable)) {
    fail(block + "ffn_threshold", "finite thresholds of at least 0", "a negative one, NaN or Inf");
  }
  if (!layer.threshold.empty()) layer.gate_threshold.resize(static_cast<std::size_t>(F), 0.0F);
}

/// What is added to the matrices of the FFN; returns whether there is anything.
bool bind_rests(Binder& binder, const std::string& block, const ModelConfig& config, LayerWeights& layer) {
  const std::int64_t D = config.hidden_size;
  const std::int64_t F = config.intermediate_size;
  bool any = config.gated && binder.optional_matrix(block + "ffn_gate_rest.weight", F, D, &layer.gate_rest);
  any |= binder.optional_matrix(block + "ffn_up_rest.weight", F, D, &layer.up_rest);
  any |= binder.optional_matrix(block + "ffn_down_t_rest.weight", F, D, &layer.down_rest);
  return any;
}

void bind_predictor(Binder& binder, const std::string& block, const ModelConfig& config, float threshold,
                    LayerPredictor& predictor) {
  predictor.threshold = threshold;
  predictor.hot = binder.optional_indices(block + "ffn_pred_hot", config.intermediate_size);
  if (config.predictor.kind == PredictorKind::kSign) return;
  const std::string a = block + "ffn_pred_a.weight";
  const GgufTensor* found = binder.find(a);
  if (found == nullptr || found->shape.size() != 2) {
    fail(a, "a matrix of shape [R, " + std::to_string(config.hidden_size) + "]",
         found == nullptr ? "no such tensor" : shape_text(found->shape));
  }
  const std::int64_t rank = found->shape[0];
  binder.matrix(a, rank, config.hidden_size, &predictor.a);
  binder.matrix(block + "ffn_pred_b.weight", config.intermediate_size, rank, &predictor.b);
}

/// Packs the rows of one tensor on all threads.
void pack(const Packing& packing, std::byte* out, ThreadPool& pool) {
  const GgufTensor& tensor = *packing.tensor;
  const Matrix& target = *packing.target;
  const std::size_t file_row = ggml_row_bytes(tensor.type, target.cols);
  WeightType type;
  const bool native = native_type(tensor.type, &type);
  std::vector<std::vector<float>> rows(static_cast<std::size_t>(pool.size()));
  for (auto& row : rows) row.resize(static_cast<std::size_t>(target.cols));
  pool.run([&](int index) noexcept {
    float* values = rows[static_cast<std::size_t>(index)].data();
    const Range range = split(target.rows, 1, index, pool.size());
    for (std::int64_t r = range.begin; r < range.end; ++r) {
      const std::byte* from = tensor.data.data() + static_cast<std::size_t>(r) * file_row;
      std::byte* to = out + static_cast<std::size_t>(r) * target.row_bytes;
      if (native) {
        pack_row(target.type, from, target.cols, to);
      } else {
        ggml_dequantize_row(tensor.type, from, target.cols, values);
        quantize_row(target.type, values, target.cols, to);
      }
    }
  });
}

}  // namespace

Weights::Weights(std::shared_ptr<const GgufFile> file, const ModelConfig& config, const KernelTable& kernels,
                 ThreadPool& pool, WeightType transcode)
    : file_(std::move(file)) {
  Binder binder(*file_, transcode);
  const std::int64_t D = config.hidden_size;
  neuron_major = file_->tensor("blk.0.ffn_down_t.weight") != nullptr;
  layers.resize(static_cast<std::size_t>(config.num_hidden_layers));
  for (std::size_t n = 0; n < layers.size(); ++n) {
    const std::string block = "blk." + std::to_string(n) + ".";
    bind_attention(binder, block, config, layers[n]);
    bind_ffn(binder, block, config, neuron_major, layers[n]);
    if (neuron_major) has_rests |= bind_rests(binder, block, config, layers[n]);
    const bool thresholds = !layers[n].threshold.empty();
    if (n > 0 && thresholds != has_thresholds)
      fail(block + "ffn_threshold", "thresholds in all layers or none", "some");
    has_thresholds = thresholds;
    if (config.predictor.kind != PredictorKind::kNone)
      bind_predictor(binder, block, config, config.predictor.thresholds[n], layers[n].predictor);
  }
  embedding_ = &binder.tensor("token_embd.weight", {config.vocab_size, D});
  const bool tied = file_->tensor("output.weight") == nullptr;
  binder.matrix(tied ? "token_embd.weight" : "output.weight", config.vocab_size, D, &output);
  has_rests |= binder.optional_matrix("output_rest.weight", config.vocab_size, D, &output_rest);
  output_norm = binder.vector("output_norm.weight", D);
  rope_freqs = binder.optional_vector("rope_freqs.weight", config.rotary_dim / 2);
  binder.refuse_unknown();

  const std::size_t sign_bytes =
      config.predictor.kind == PredictorKind::kSign ? take_signs(config, kernels, pool) : 0;
  std::size_t total = 0;
  for (const Packing& packing : binder.packings()) {
    total += aligned_bytes(packing.target->row_bytes * static_cast<std::size_t>(packing.target->rows));
  }
  arena_ = Arena(total);
  for (const Packing& packing : binder.packings()) {
    std::byte* out = arena_.take(packing.target->row_bytes * static_cast<std::size_t>(packing.target->rows));
    pack(packing, out, pool);
    packing.target->data = out;
    file_->release(packing.tensor->data);
  }
  bytes = binder.bytes() + sign_bytes;
  transcoded = binder.transcoded();
  std::set<std::string> types;
  for (const LayerWeights& layer : layers) {
    for (const Matrix* matrix : {&layer.first(config.gated), &layer.up, &layer.down})
      types.insert(weight_type_name(matrix->type));
  }
  ffn_types.assign(types.begin(), types.end());
}

/// Takes the signs of gate, and with dReLU of up, as they stand in the file; returns their bytes.
std::size_t Weights::take_signs(const ModelConfig& config, const KernelTable& kernels, ThreadPool& pool) {
  std::vector<std::string> names{config.gated ? "ffn_gate.weight" : "ffn_up.weight"};
  if (config.activation == Activation::kDRelu) names.emplace_back("ffn_up.weight");
  sign_rows = static_cast<std::int64_t>(names.size());
  const std::int64_t D = config.hidden_size;
  const std::int64_t words = sign_words(D);
  const std::size_t layer_bytes =
      static_cast<std::size_t>(config.intermediate_size * sign_rows * words) * sizeof(std::uint64_t);
  signs_ = Arena(layers.size() * aligned_bytes(layer_bytes));
  std::vector<std::vector<float>> rows(static_cast<std::size_t>(pool.size()));
  for (auto& row : rows) row.resize(static_cast<std::size_t>(D));
  for (std::size_t n = 0; n < layers.size(); ++n) {
    auto* signs = reinterpret_cast<std::uint64_t*>(signs_.take(layer_bytes));
    layers[n].predictor.signs = signs;
    for (std::size_t which = 0; which < names.size(); ++which) {
      const GgufTensor& tensor = *file_->tensor("blk." + std::to_string(n) + "." + names[which]);
      const std::size_t row_bytes = ggml_row_bytes(tensor.type, D);
      pool.run([&](int index) noexcept {
        float* values = rows[static_cast<std::size_t>(index)].data();
        const Range range = split(config.intermediate_size, 1, index, pool.size());
        for (std::int64_t r = range.begin; r < range.end; ++r) {
          ggml_dequantize_row(tensor.type, tensor.data.data() + static_cast<std::size_t>(r) * row_bytes, D,
                              values);
          kernels.sign_bits(values, D, signs + (r * sign_rows + static_cast<std::int64_t>(which)) * words);
        }
      });
    }
  }
  return layers.size() * layer_bytes;
}

void Weights::embed(std::int32_t id, float* out) const noexcept {
  const std::int64_t cols = embedding_->shape[1];
  const std::size_t row_bytes = ggml_row_bytes(embedding_->type, cols);
  ggml_dequantize_row(embedding_->type, embedding_->data.data() + static_cast<std::size_t>(id) * row_bytes,
                      cols, out);
}

}  // namespace turbosparse
