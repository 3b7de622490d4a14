#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <span>
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

/// FFNs of a layer whose tensors share names: `fused` ones lie in one tensor, with a first dimension for
/// them.
struct FfnGroup {
  const char* suffix;
  bool fused;
  std::int64_t neurons;
  std::span<FfnWeights> ffns;

  std::string name(const std::string& block, const char* part, const char* end) const {
    return block + "ffn_" + part + suffix + end;
  }
  std::vector<std::int64_t> shape(std::vector<std::int64_t> of_one) const {
    if (fused) of_one.insert(of_one.begin(), static_cast<std::int64_t>(ffns.size()));
    return of_one;
  }
};

std::vector<FfnGroup> ffn_groups(const ModelConfig& config, LayerWeights& layer) {
  const std::span<FfnWeights> ffns = layer.ffns;
  const auto experts = static_cast<std::size_t>(config.router.experts);
  if (experts == 0) return {{"", false, config.intermediate_size, ffns}};
  std::vector<FfnGroup> groups{{"_exps", true, config.intermediate_size, ffns.first(experts)}};
  if (config.shared_intermediate_size > 0)
    groups.push_back({"_shexp", false, config.shared_intermediate_size, ffns.subspan(experts)});
  return groups;
}

/// Finds tensors in the file, checks them, and notes which matrices still need packing.
class Binder {
 public:
  Binder(const GgufFile& file, WeightType transcode, bool unmapped)
      : file_(file), transcode_(transcode), unmapped_(unmapped) {}

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
    place(found, found.data, rows, cols, target);
  }

  /// The same where there is such a tensor; returns whether there is.
  bool optional_matrix(const std::string& name, std::int64_t rows, std::int64_t cols, Matrix* target) {
    if (find(name) == nullptr) return false;
    matrix(name, rows, cols, target);
    return true;
  }

  /// The same with floats as weights, whatever the file has.
  void float_matrix(const std::string& name, std::int64_t rows, std::int64_t cols, Matrix* target) {
    target->type = WeightType::kF32;
    const GgufTensor& found = tensor(name, {rows, cols});
    place(found, found.data, rows, cols, target);
  }

  /// One matrix for each FFN of a group; `target` says where it goes.
  template <class Target>
  void matrices(const std::string& name, const FfnGroup& group, std::int64_t rows, std::int64_t cols,
                Target target) {
    const GgufTensor& found = tensor(name, group.shape({rows, cols}));
    const std::size_t each = found.data.size() / group.ffns.size();
    for (std::size_t i = 0; i < group.ffns.size(); ++i) {
      Matrix* matrix = target(group.ffns[i]);
      if (!native_type(found.type, &matrix->type)) matrix->type = transcode_;
      place(found, found.data.subspan(i * each, each), rows, cols, matrix);
    }
  }

  /// Values of a vector, which may have any float type.
  std::vector<float> vector(const std::string& name, std::int64_t size) {
    const GgufTensor& found = tensor(name, {size});
    std::vector<float> values(static_cast<std::size_t>(size));
    ggml_dequantize_row(found.type, found.data.data(), size, values.data());
    vector_bytes_ += values.size() * sizeof(float);
    return values;
  }

  std::vector<float> optional_vector(const std::string& name, std::int64_t size) {
    return find(name) == nullptr ? std::vector<float>{} : vector(name, size);
  }

  /// One vector for each FFN of a group, or none.
  void optional_vectors(const std::string& name, const FfnGroup& group,
                        std::vector<float> FfnWeights::* target) {
    if (find(name) == nullptr) return;
    const GgufTensor& found = tensor(name, group.shape({group.neurons}));
    const std::size_t each = found.data.size() / group.ffns.size();
    for (std::size_t i = 0; i < group.ffns.size(); ++i) {
      std::vector<float>& values = group.ffns[i].*target;
      values.resize(static_cast<std::size_t>(group.neurons));
      vector_bytes_ += values.size() * sizeof(float);
      ggml_dequantize_row(found.type, found.data.data() + i * each, group.neurons, values.data());
    }
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

  const GgufFile& file() const { return file_; }
  const std::vector<Packing>& packings() const { return packings_; }
  std::map<std::string, std::string> transcoded() const { return transcoded_; }
  std::size_t bytes() const { return bytes_; }
  std::size_t vector_bytes() const { return vector_bytes_; }

 private:
  /// Makes `target`, whose type is set, a view of the file's rows or of rows to be packed.
  void place(const GgufTensor& found, std::span<const std::byte> data, std::int64_t rows, std::int64_t cols,
             Matrix* target) {
    if (is_quantized(target->type) && cols % kBlock != 0) {
      fail(found.name, "rows of a multiple of 32 values", std::to_string(cols));
    }
    target->rows = rows;
    target->cols = cols;
    target->row_bytes = packed_row_bytes(target->type, cols);
    WeightType type;
    const bool native = native_type(found.type, &type) && type == target->type;
    if (!unmapped_ && native && !is_quantized(type) &&
        target->row_bytes == ggml_row_bytes(found.type, cols)) {
      target->data = data.data();
    } else {
      packings_.push_back({found.type, data, target});
    }
    if (!native) transcoded_[ggml_type_name(found.type)] = weight_type_name(target->type);
    bytes_ += target->row_bytes * static_cast<std::size_t>(rows);
  }

  const GgufFile& file_;
  WeightType transcode_;
  bool unmapped_;
  std::unordered_set<std::string_view> known_;
  std::vector<Packing> packings_;
  std::map<std::string, std::string> transcoded_;
  std::size_t bytes_ = 0;
  std::size_t vector_bytes_ = 0;
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
  if (config.qk_norm != QkNorm::kNone) {
    const bool heads = config.qk_norm == QkNorm::kHeads;
    layer.q_norm = binder.vector(block + "attn_q_norm.weight", heads ? config.head_dim : q_rows);
    layer.k_norm = binder.vector(block + "attn_k_norm.weight", heads ? config.head_dim : kv_rows);
  }
  binder.matrix(block + "attn_output.weight", D, q_rows, &layer.o);
}

bool is_finite_amount(float value) { return value >= 0 && std::isfinite(value); }

/// The bundles of a group, and matrices that know type and shape of the rows in them.
void bind_bundles(Binder& binder, const std::string& block, const FfnGroup& group, Bundles& bundles) {
  const std::string name = group.name(block, "bundles", "");
  const GgufTensor* tensor = binder.find(name);
  if (tensor == nullptr) fail(name, "bundles of neurons", "no such tensor");
  const auto count = static_cast<std::int64_t>(group.ffns.size());
  std::vector<FfnBundles> found = split_bundles(binder.file(), *tensor, bundles.layout, count, group.neurons);
  const std::string hotness = group.name(block, "hotness", "");
  binder.optional_vectors(hotness, group, &FfnWeights::hotness);
  const auto view = [&](Projection part) -> Matrix {
    const BundleLayout::Part& p = bundles.layout.part(part);
    if (!p.there) return {};
    return {nullptr, group.neurons, bundles.layout.cols, bundles.layout.bytes, p.type};
  };
  for (std::size_t i = 0; i < found.size(); ++i) {
    FfnWeights& ffn = group.ffns[i];
    ffn.stored = static_cast<std::int64_t>(bundles.ffns.size());
    if (bundles.layout.part(Projection::kGate).there) ffn.gate = view(Projection::kGate);
    ffn.up = view(Projection::kUp);
    ffn.down = view(Projection::kDown);
    if (!std::ranges::all_of(ffn.hotness, is_finite_amount) ||
        !std::ranges::is_sorted(ffn.hotness, std::greater<>()))
      fail(hotness, "finite numbers of at least 0 that never rise", "others");
    found[i].hotness = std::move(ffn.hotness);
    ffn.hotness.clear();
    bundles.ffns.push_back(std::move(found[i]));
  }
}

void bind_ffns(Binder& binder, const std::string& block, const ModelConfig& config, bool neuron_major,
               const FfnGroup& group, std::optional<Bundles>& bundles) {
  const std::int64_t D = config.hidden_size;
  const std::int64_t F = group.neurons;
  const auto gate = [](FfnWeights& ffn) { return &ffn.gate; };
  const auto up = [](FfnWeights& ffn) { return &ffn.up; };
  const auto down = [](FfnWeights& ffn) { return &ffn.down; };
  if (config.gated && !(bundles && bundles->layout.part(Projection::kGate).there))
    binder.matrices(group.name(block, "gate", ".weight"), group, F, D, gate);
  if (!bundles) binder.matrices(group.name(block, "up", ".weight"), group, F, D, up);
  if (bundles) {
    bind_bundles(binder, block, group, *bundles);
  } else if (neuron_major) {
    binder.matrices(group.name(block, "down_t", ".weight"), group, F, D, down);
  } else {
    binder.matrices(group.name(block, "down", ".weight"), group, D, F, down);
  }
  const std::string name = group.name(block, "threshold", "");
  binder.optional_vectors(name, group, &FfnWeights::threshold);
  if (config.gated)
    binder.optional_vectors(group.name(block, "gate_threshold", ""), group, &FfnWeights::gate_threshold);
  for (FfnWeights& ffn : group.ffns) {
    ffn.neurons = F;
    if (!std::ranges::all_of(ffn.threshold, is_finite_amount) ||
        !std::ranges::all_of(ffn.gate_threshold, is_finite_amount))
      fail(name, "finite thresholds of at least 0", "a negative one, NaN or Inf");
    if (!ffn.threshold.empty()) ffn.gate_threshold.resize(static_cast<std::size_t>(F), 0.0F);
  }
}

/// What is added to the matrices of a layer's only FFN; returns whether there is anything.
bool bind_rests(Binder& binder, const std::string& block, const ModelConfig& config, FfnWeights& ffn) {
  const std::int64_t D = config.hidden_size;
  const std::int64_t F = ffn.neurons;
  bool any = config.gated && binder.optional_matrix(block + "ffn_gate_rest.weight", F, D, &ffn.gate_rest);
  any |= binder.optional_matrix(block + "ffn_up_rest.weight", F, D, &ffn.up_rest);
  any |= binder.optional_matrix(block + "ffn_down_t_rest.weight", F, D, &ffn.down_rest);
  return any;
}

/// `hot`: neurons of all FFNs of the group, numbered through.
void bind_predictors(Binder& binder, const std::string& block, const ModelConfig& config,
                     const FfnGroup& group) {
  const auto count = static_cast<std::int64_t>(group.ffns.size());
  const std::string hot = group.name(block, "pred_hot", "");
  for (const std::int32_t neuron : binder.optional_indices(hot, count * group.neurons)) {
    const auto ffn = static_cast<std::size_t>(neuron / group.neurons);
    group.ffns[ffn].predictor.hot.push_back(static_cast<std::int32_t>(neuron % group.neurons));
  }
  if (config.predictor.kind == PredictorKind::kSign) return;
  const std::string a = group.name(block, "pred_a", ".weight");
  const GgufTensor* found = binder.find(a);
  const std::size_t dimensions = group.fused ? 3 : 2;
  if (found == nullptr || found->shape.size() != dimensions) {
    fail(a,
         (group.fused ? "a tensor of shape [" + std::to_string(count) + ", R, " : "a matrix of shape [R, ") +
             std::to_string(config.hidden_size) + "]",
         found == nullptr ? "no such tensor" : shape_text(found->shape));
  }
  const std::int64_t rank = found->shape[dimensions - 2];
  binder.matrices(a, group, rank, config.hidden_size, [](FfnWeights& ffn) { return &ffn.predictor.a; });
  binder.matrices(group.name(block, "pred_b", ".weight"), group, group.neurons, rank,
                  [](FfnWeights& ffn) { return &ffn.predictor.b; });
}

void bind_layer(Binder& binder, const std::string& block, const ModelConfig& config, bool neuron_major,
                LayerWeights& layer, std::optional<Bundles>& bundles) {
  const std::int64_t experts = config.router.experts;
  bind_attention(binder, block, config, layer);
  layer.ffn_norm = binder.vector(block + "ffn_norm.weight", config.hidden_size);
  layer.ffns.resize(static_cast<std::size_t>(config.ffns_per_layer()));
  if (experts > 0)
    binder.float_matrix(block + "ffn_gate_inp.weight", experts, config.hidden_size, &layer.router);
  if (config.router.gates_shared_expert)
    layer.shared_gate = binder.vector(block + "ffn_gate_inp_shexp.weight", config.hidden_size);
  for (const FfnGroup& group : ffn_groups(config, layer)) {
    bind_ffns(binder, block, config, neuron_major, group, bundles);
    if (config.predictor.kind != PredictorKind::kNone) bind_predictors(binder, block, config, group);
  }
  std::int64_t neuron = 0;
  for (FfnWeights& ffn : layer.ffns) {
    ffn.first_neuron = neuron;
    neuron += ffn.neurons;
  }
}

/// Notes the rows whose signs predict.
void bind_signs(const GgufFile& file, const std::string& block, const FfnGroup& group,
                std::span<const char* const> parts, std::vector<SignRows>& signs) {
  for (std::size_t i = 0; i < group.ffns.size(); ++i) {
    SignRows& rows = signs.emplace_back(SignRows{&group.ffns[i], {}});
    for (const char* part : parts) {
      const GgufTensor& tensor = *file.tensor(group.name(block, part, ".weight"));
      const std::size_t each = tensor.data.size() / group.ffns.size();
      rows.parts.push_back({tensor.type, tensor.data.subspan(i * each, each)});
    }
  }
}

}  // namespace

Weights::Weights(std::shared_ptr<const GgufFile> file, const ModelConfig& config, WeightType transcode,
                 bool unmapped)
    : file_(std::move(file)) {
  Binder binder(*file_, transcode, unmapped);
  const std::int64_t D = config.hidden_size;
  neuron_major = file_->tensor("blk.0.ffn_down_t.weight") != nullptr ||
                 file_->tensor("blk.0.ffn_down_t_exps.weight") != nullptr;
  if (has_bundles(*file_)) {
    if (config.predictor.kind == PredictorKind::kSign)
      fail("turbosparse.predictor.kind", "low_rank in a file with bundles", "sign");
    bundles = Bundles{read_bundle_layout(*file_, D, config.gated), {}};
    neuron_major = true;
  }
  layers.resize(static_cast<std::size_t>(config.num_hidden_layers));
  auto predictor_threshold = config.predictor.thresholds.begin();
  for (std::size_t n = 0; n < layers.size(); ++n) {
    const std::string block = "blk." + std::to_string(n) + ".";
    bind_layer(binder, block, config, neuron_major, layers[n], bundles);
    if (neuron_major && !bundles && !layers[n].has_router())
      has_rests |= bind_rests(binder, block, config, layers[n].ffns.front());
    for (FfnWeights& ffn : layers[n].ffns) {
      const bool thresholds = !ffn.threshold.empty();
      const bool first = n == 0 && ffn.first_neuron == 0;
      if (!first && thresholds != has_thresholds)
        fail(block + "ffn_threshold", "thresholds in all layers or none", "some");
      has_thresholds = thresholds;
      widest_ffn = std::max(widest_ffn, ffn.neurons);
      if (config.predictor.kind != PredictorKind::kNone) ffn.predictor.threshold = *predictor_threshold++;
    }
  }
  embedding_ = &binder.tensor("token_embd.weight", {config.vocab_size, D});
  const bool tied = file_->tensor("output.weight") == nullptr;
  binder.matrix(tied ? "token_embd.weight" : "output.weight", config.vocab_size, D, &output);
  has_rests |= binder.optional_matrix("output_rest.weight", config.vocab_size, D, &output_rest);
  output_norm = binder.vector("output_norm.weight", D);
  rope_freqs = binder.optional_vector("rope_freqs.weight", config.rotary_dim / 2);
  binder.refuse_unknown();

  if (config.predictor.kind == PredictorKind::kSign) {
    std::vector<const char*> parts{config.gated ? "gate" : "up"};
    if (config.activation == Activation::kDRelu) parts.push_back("up");
    sign_rows = static_cast<std::int64_t>(parts.size());
    for (std::size_t n = 0; n < layers.size(); ++n) {
      for (const FfnGroup& group : ffn_groups(config, layers[n]))
        bind_signs(*file_, "blk." + std::to_string(n) + ".", group, parts, signs_to_take_);
    }
  }
  packings_ = binder.packings();
  bytes = binder.bytes() + sign_bytes();
  held_bytes = bytes + binder.vector_bytes();
  if (unmapped) rows_ = std::make_unique<const DiskFile>(*file_, false);
  if (bundles) bytes += NeuronStore::resident_bytes(bundles->layout, bundles->ffns);
  transcoded = binder.transcoded();
  std::set<std::string> types;
  for (const LayerWeights& layer : layers) {
    for (const FfnWeights& ffn : layer.ffns) {
      for (const Matrix* matrix : {&ffn.first(config.gated), &ffn.up, &ffn.down})
        types.insert(weight_type_name(matrix->type));
    }
  }
  ffn_types.assign(types.begin(), types.end());
}

void Weights::take_neurons(const NeuronStore& store) {
  for (LayerWeights& layer : layers) {
    for (FfnWeights& ffn : layer.ffns) {
      if (store.layout().part(Projection::kGate).there)
        ffn.gate = store.matrix(ffn.stored, Projection::kGate);
      ffn.up = store.matrix(ffn.stored, Projection::kUp);
      ffn.down = store.matrix(ffn.stored, Projection::kDown);
    }
  }
}

}  // namespace turbosparse
