#include "engine/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <variant>

#include "util/error.h"

namespace turbosparse {
namespace {

constexpr std::string_view kPrefix = "turbosparse-";
constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMostExperts = 1024;
constexpr std::int64_t kSoftmax = 1;  // values of expert_gating_func
constexpr std::int64_t kSigmoid = 2;

constexpr std::array<std::pair<std::string_view, Activation>, 6> kActivations{{
    {"silu", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
    {"fatrelu", Activation::kFatRelu},
    {"drelu", Activation::kDRelu},
}};

/// What a value of general.architecture implies; keys may override the router's.
struct Architecture {
  std::string_view name;
  bool rope_neox = true;
  QkNorm qk_norm = QkNorm::kNone;
  bool may_have_experts = false;
  bool needs_experts = false;
  bool shared_expert = false;
  RouterConfig router = {};
  Activation activation = Activation::kSilu;
};

constexpr std::array kArchitectures{
    Architecture{
        .name = "llama", .rope_neox = false, .may_have_experts = true, .router = {.normalized = true}},
    Architecture{.name = "qwen2"},
    Architecture{.name = "qwen3", .qk_norm = QkNorm::kHeads},
    Architecture{.name = "qwen2moe",
                 .may_have_experts = true,
                 .needs_experts = true,
                 .shared_expert = true,
                 .router = {.gates_shared_expert = true}},
    Architecture{.name = "qwen3moe",
                 .qk_norm = QkNorm::kHeads,
                 .may_have_experts = true,
                 .needs_experts = true,
                 .router = {.normalized = true}},
    Architecture{.name = "olmoe", .qk_norm = QkNorm::kAll, .may_have_experts = true, .needs_experts = true},
    Architecture{.name = "smallthinker",
                 .may_have_experts = true,
                 .needs_experts = true,
                 .router = {.normalized = true, .reads_layer_input = true},
                 .activation = Activation::kRelu},
};

[[noreturn]] void fail(const std::string& place, const std::string& expected, const std::string& got) {
  throw ModelFileError("[" + place + "] expected " + expected + ", got " + got);
}

/// Reads keys under the architecture's prefix.
class Reader {
 public:
  Reader(const GgufFile& file, std::string architecture)
      : file_(file), architecture_(std::move(architecture)) {}

  std::string key(const char* name) const { return architecture_ + "." + name; }

  std::int64_t integer(const char* name, std::int64_t low, std::int64_t high,
                       std::optional<std::int64_t> fallback = std::nullopt) const {
    const std::string full = key(name);
    const std::optional<std::int64_t> value = file_.get_int(full);
    const std::string expected = std::to_string(low) + " to " + std::to_string(high);
    if (!value && !fallback) fail(full, expected, "no such key");
    if (!value) return *fallback;
    if (*value < low || *value > high) fail(full, expected, std::to_string(*value));
    return *value;
  }

  double number(const char* name, double low, double high,
                std::optional<double> fallback = std::nullopt) const {
    const std::string full = key(name);
    const std::optional<double> value = file_.get_float(full);
    const std::string expected = "a number from " + std::to_string(low) + " to " + std::to_string(high);
    if (!value && !fallback) fail(full, expected, "no such key");
    if (!value) return *fallback;
    if (!(*value >= low && *value <= high)) fail(full, expected, std::to_string(*value));
    return *value;
  }

 private:
  const GgufFile& file_;
  std::string architecture_;
};

void read_sizes(const GgufFile& file, const Reader& read, ModelConfig& config) {
  config.num_hidden_layers = read.integer("block_count", 1, 1024);
  config.hidden_size = read.integer("embedding_length", 1, 1 << 16);
  config.intermediate_size = read.integer("feed_forward_length", 1, 1 << 20);
  config.num_attention_heads = read.integer("attention.head_count", 1, 1024);
  config.num_key_value_heads =
      read.integer("attention.head_count_kv", 1, config.num_attention_heads, config.num_attention_heads);
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    fail(read.key("attention.head_count_kv"), "a divisor of " + std::to_string(config.num_attention_heads),
         std::to_string(config.num_key_value_heads));
  }
  const std::int64_t head_dim = config.hidden_size / config.num_attention_heads;
  config.head_dim = read.integer("attention.key_length", 2, 1024, head_dim);
  const std::int64_t value_dim = read.integer("attention.value_length", 2, 1024, config.head_dim);
  if (value_dim != config.head_dim || config.head_dim < 2 || config.head_dim > 1024) {
    fail(read.key("attention.value_length"), "the key length, 2 to 1024", std::to_string(value_dim));
  }
  config.context_length = read.integer("context_length", 1, 1 << 26);
  config.rms_norm_eps = static_cast<float>(read.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0));
  const GgufTensor* embedding = file.tensor("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2) {
    fail("token_embd.weight", "a matrix",
         embedding == nullptr ? "no such tensor" : "another number of dimensions");
  }
  config.vocab_size = embedding->shape[0];
  if (config.vocab_size < 1 || config.vocab_size > 1 << 22) {
    fail("token_embd.weight", "1 to 4194304 rows", std::to_string(config.vocab_size));
  }
}

void read_router(const GgufFile& file, const Reader& read, const Architecture& base, ModelConfig& config) {
  const std::int64_t most = base.may_have_experts ? kMostExperts : 0;
  const std::int64_t experts = read.integer("expert_count", base.needs_experts ? 1 : 0, most, 0);
  if (experts == 0) return;
  RouterConfig& router = config.router;
  router = base.router;
  router.experts = experts;
  router.used = read.integer("expert_used_count", 1, experts);
  config.intermediate_size = read.integer("expert_feed_forward_length", 1, 1 << 20, config.intermediate_size);
  if (base.shared_expert) {
    config.shared_intermediate_size =
        read.integer("expert_shared_feed_forward_length", 1, 1 << 20, config.intermediate_size);
  }
  router.normalized = file.get_bool(read.key("expert_weights_norm")).value_or(router.normalized);
  router.scale = static_cast<float>(read.number("expert_weights_scale", 0, 1e6, 1.0));
  if (router.scale == 0) router.scale = 1;  // as other writers put it
  const std::int64_t function = read.integer("expert_gating_func", 0, 2, kSoftmax);
  router.sigmoid = function == kSigmoid;
}

void read_rope(const GgufFile& file, const Reader& read, ModelConfig& config) {
  config.rope_base = read.number("rope.freq_base", 1.0, 1e12, 10000.0);
  config.rotary_dim = read.integer("rope.dimension_count", 2, config.head_dim, config.head_dim);
  if (config.rotary_dim % 2 != 0) {
    fail(read.key("rope.dimension_count"), "an even number", std::to_string(config.rotary_dim));
  }
  const std::string_view scaling = file.get_string(read.key("rope.scaling.type")).value_or("none");
  if (scaling == "linear") {
    config.rope_scale = 1.0 / read.number("rope.scaling.factor", 1e-3, 1e6);
  } else if (scaling != "none") {
    fail(read.key("rope.scaling.type"), "none or linear", std::string(scaling));
  } else {
    config.rope_scale = 1.0 / read.number("rope.scale_linear", 1e-3, 1e6, 1.0);
  }
}

void read_activation(const GgufFile& file, bool prefixed, ModelConfig& config) {
  const std::optional<std::int64_t> version = file.get_int("turbosparse.version");
  if (version && *version != kVersion)
    fail("turbosparse.version", std::to_string(kVersion), std::to_string(*version));
  const std::optional<std::string_view> name = file.get_string("turbosparse.activation");
  if (!name && prefixed) fail("turbosparse.activation", "the name of an activation", "no such key");
  config.gated = file.get_bool("turbosparse.gated").value_or(true);
  if (!name) return;  // files of other people: what the architecture implies
  bool known = false;
  for (const auto& [candidate, activation] : kActivations) {
    if (candidate != *name) continue;
    config.activation = activation;
    known = true;
  }
  if (!known) fail("turbosparse.activation", "silu, gelu, relu, relu2, fatrelu or drelu", std::string(*name));
  if (config.activation == Activation::kDRelu && !config.gated)
    fail("turbosparse.gated", "true with drelu", "false");
  if (config.activation != Activation::kFatRelu) return;
  const std::optional<double> parameter = file.get_float("turbosparse.activation_param");
  if (!parameter || !(*parameter >= 0 && *parameter <= 1e6)) {
    fail("turbosparse.activation_param", "FATReLU's threshold, 0 to 1e6",
         parameter ? std::to_string(*parameter) : "no such key");
  }
  config.activation_parameter = static_cast<float>(*parameter);
}

std::vector<float> read_predictor_thresholds(const GgufFile& file, const ModelConfig& config) {
  constexpr const char* kKey = "turbosparse.predictor.threshold";
  const std::int64_t ffns = config.num_hidden_layers * config.ffns_per_layer();
  const std::string expected = "an array of " + std::to_string(ffns) + " finite float32, one per " +
                               (config.router.experts > 0 ? "expert" : "layer");
  const GgufValue* value = file.find(kKey);
  if (value == nullptr) fail(kKey, expected, "no such key");
  const auto* array = std::get_if<std::shared_ptr<const GgufArray>>(value);
  if (array == nullptr || (*array)->kind != GgufKind::kFloat32) fail(kKey, expected, "another kind of value");
  if ((*array)->size != static_cast<std::size_t>(ffns)) fail(kKey, expected, std::to_string((*array)->size));
  std::vector<float> thresholds;
  for (std::size_t n = 0; n < (*array)->size; ++n) {
    thresholds.push_back(static_cast<float>(std::get<double>((*array)->at(n))));
    if (!std::isfinite(thresholds.back())) fail(kKey, expected, "NaN or Inf at " + std::to_string(n));
  }
  return thresholds;
}

/// A tensor whose name has that part, or nothing.
std::string tensor_with(const GgufFile& file, const char* part) {
  for (const GgufTensor& tensor : file.tensors()) {
    if (tensor.name.find(part) != std::string::npos) return tensor.name;
  }
  return "";
}

void read_predictor(const GgufFile& file, ModelConfig& config) {
  constexpr std::string_view kKeys = "turbosparse.predictor.";
  constexpr const char* kKind = "turbosparse.predictor.kind";
  constexpr const char* kInput = "turbosparse.predictor.input";
  const std::optional<std::string_view> kind = file.get_string(kKind);
  if (!kind) {
    std::string stray = tensor_with(file, ".ffn_pred_");
    for (const auto& [key, value] : file.metadata()) {
      if (key.starts_with(kKeys)) stray = key;
    }
    if (!stray.empty()) fail(kKind, "low_rank or sign where there is " + stray, "no such key");
    return;
  }
  if (*kind != "low_rank" && *kind != "sign") fail(kKind, "low_rank or sign", std::string(*kind));
  for (const char* part : {".ffn_pred_a.", ".ffn_pred_b."}) {
    const std::string low_rank = tensor_with(file, part);
    if (*kind == "sign" && !low_rank.empty()) fail(kKind, "low_rank where there is " + low_rank, "sign");
  }
  const std::string_view input = file.get_string(kInput).value_or("no such key");
  if (input != "ffn_norm" && input != "residual") fail(kInput, "ffn_norm or residual", std::string(input));
  config.predictor = {.kind = *kind == "sign" ? PredictorKind::kSign : PredictorKind::kLowRank,
                      .reads_residual = input == "residual",
                      .thresholds = read_predictor_thresholds(file, config)};
}

void read_refine(const GgufFile& file, ModelConfig& config) {
  const std::string rest = tensor_with(file, "_rest.");
  const auto read = [&](const std::string& key, double low) {
    const std::optional<double> value = file.get_float(key);
    const std::string expected = "a finite number of at least " + std::to_string(low) + " with " + rest;
    if (value && rest.empty()) fail(key, "no such key where no tensor has a rest", std::to_string(*value));
    if (!value && !rest.empty()) fail(key, expected, "no such key");
    if (value && !(*value >= low && std::isfinite(static_cast<float>(*value))))
      fail(key, expected, std::to_string(*value));
    return static_cast<float>(value.value_or(0));
  };
  config.refine = {.neurons = read("turbosparse.refine.neurons", 1),
                   .logits = read("turbosparse.refine.logits", 0)};
}

}  // namespace

ModelConfig read_model_config(const GgufFile& file) {
  const std::optional<std::string_view> architecture = file.get_string("general.architecture");
  std::string_view name = architecture.value_or("no such key");
  const bool prefixed = name.starts_with(kPrefix);
  if (prefixed) name.remove_prefix(kPrefix.size());
  const auto* base = std::ranges::find(kArchitectures, name, &Architecture::name);
  if (base == kArchitectures.end()) {
    std::string known;
    for (const Architecture& each : kArchitectures) known += std::string(each.name) + ", ";
    fail("general.architecture", known + "or turbosparse- before it",
         std::string(architecture.value_or("no such key")));
  }
  if (const std::int64_t parts = file.get_int("split.count").value_or(1); parts > 1) {
    fail("split.count", "a whole model in one file (llama-gguf-split --merge makes one)",
         "one part of " + std::to_string(parts));
  }
  ModelConfig config;
  config.architecture = *architecture;
  config.rope_neox = base->rope_neox;
  config.qk_norm = base->qk_norm;
  config.activation = base->activation;
  const Reader read(file, config.architecture);
  read_sizes(file, read, config);
  read_router(file, read, *base, config);
  read_rope(file, read, config);
  read_activation(file, prefixed, config);
  read_predictor(file, config);
  read_refine(file, config);
  // Attention over a sliding window equals full attention as long as the window holds everything.
  const std::int64_t window = read.integer("attention.sliding_window", 0, 1 << 26, 0);
  if (window > 0 && window < config.context_length) config.context_length = window;
  if (window > 0 && name == "smallthinker") config.unrotated_layers = 4;
  return config;
}

const char* activation_name(Activation activation) {
  for (const auto& [name, candidate] : kActivations) {
    if (candidate == activation) return name.data();
  }
  return "?";
}

}  // namespace turbosparse
