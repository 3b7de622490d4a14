// Writes small model files for the native tests: metadata, seeded F32 weights, the documented layout of GGUF
// v3.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace turbosparse::test {

class TinyGguf {
 public:
  using Value =
      std::variant<std::uint32_t, float, bool, std::string, std::vector<float>, std::vector<std::string>>;
  using Shape = std::vector<std::uint64_t>;  // slowest first

  /// A complete model: 2 layers, D 64, F 96, 4 heads of 16, 2 kv heads, 50 tokens, neuron-major, dReLU, with
  /// thresholds and predictors of rank 8.
  static TinyGguf model() {
    TinyGguf file;
    const std::string arch = "turbosparse-llama";
    file.keys["general.architecture"] = arch;
    const std::pair<const char*, std::uint32_t> sizes[] = {
        {"block_count", 2},          {"embedding_length", 64},       {"feed_forward_length", 96},
        {"attention.head_count", 4}, {"attention.head_count_kv", 2}, {"context_length", 128}};
    for (const auto& [name, size] : sizes) file.keys[arch + "." + name] = size;
    file.keys[arch + ".attention.layer_norm_rms_epsilon"] = 1e-5F;
    file.keys["turbosparse.version"] = std::uint32_t{1};
    file.keys["turbosparse.activation"] = std::string("drelu");
    file.keys["turbosparse.predictor.kind"] = std::string("low_rank");
    file.keys["turbosparse.predictor.input"] = std::string("ffn_norm");
    file.keys["turbosparse.predictor.threshold"] = std::vector<float>{0.0F, -0.1F};
    file.shapes["blk.1.ffn_pred_hot"] = {3};
    file.shapes["token_embd.weight"] = {50, 64};
    file.shapes["output_norm.weight"] = {64};
    for (const std::string block : {"blk.0.", "blk.1."}) {
      const std::pair<const char*, Shape> tensors[] = {
          {"attn_norm.weight", {64}},    {"ffn_norm.weight", {64}},      {"attn_q.weight", {64, 64}},
          {"attn_k.weight", {32, 64}},   {"attn_v.weight", {32, 64}},    {"attn_output.weight", {64, 64}},
          {"ffn_gate.weight", {96, 64}}, {"ffn_up.weight", {96, 64}},    {"ffn_down_t.weight", {96, 64}},
          {"ffn_threshold", {96}},       {"ffn_pred_a.weight", {8, 64}}, {"ffn_pred_b.weight", {96, 8}}};
      for (const auto& [name, shape] : tensors) file.shapes[block + name] = shape;
    }
    return file;
  }
  /// The same with a predictor of signs.
  static TinyGguf sign_model() {
    TinyGguf file = model();
    file.keys["turbosparse.predictor.kind"] = std::string("sign");
    for (const std::string block : {"blk.0.", "blk.1."}) {
      file.shapes.erase(block + "ffn_pred_a.weight");
      file.shapes.erase(block + "ffn_pred_b.weight");
    }
    return file;
  }

  /// The model with four experts of F 32 in each layer, two for each token, and a shared one of F 64.
  static TinyGguf expert_model() {
    TinyGguf file = model();
    const std::string arch = "turbosparse-qwen2moe";
    for (auto old = file.keys.begin(); old != file.keys.end();) {
      const auto key = old++;
      if (!key->first.starts_with("turbosparse-llama")) continue;
      auto moved = file.keys.extract(key);
      moved.key() = arch + moved.key().substr(std::string("turbosparse-llama").size());
      file.keys.insert(std::move(moved));
    }
    file.keys["general.architecture"] = arch;
    const std::pair<const char*, std::uint32_t> sizes[] = {{"expert_count", 4},
                                                           {"expert_used_count", 2},
                                                           {"expert_feed_forward_length", 32},
                                                           {"expert_shared_feed_forward_length", 64}};
    for (const auto& [name, size] : sizes) file.keys[arch + "." + name] = size;
    file.keys["turbosparse.predictor.threshold"] = std::vector<float>(10, 0.0F);
    for (const std::string block : {"blk.0.", "blk.1."}) {
      for (const char* name : {"gate.weight", "up.weight", "down_t.weight", "threshold", "pred_a.weight",
                               "pred_b.weight", "pred_hot"})
        file.shapes.erase(block + "ffn_" + name);
      const std::pair<const char*, Shape> tensors[] = {{"gate_inp.weight", {4, 64}},
                                                       {"gate_inp_shexp.weight", {64}},
                                                       {"gate_exps.weight", {4, 32, 64}},
                                                       {"gate_shexp.weight", {64, 64}},
                                                       {"up_exps.weight", {4, 32, 64}},
                                                       {"up_shexp.weight", {64, 64}},
                                                       {"down_t_exps.weight", {4, 32, 64}},
                                                       {"down_t_shexp.weight", {64, 64}},
                                                       {"threshold_exps", {4, 32}},
                                                       {"threshold_shexp", {64}},
                                                       {"pred_a_exps.weight", {4, 8, 64}},
                                                       {"pred_a_shexp.weight", {8, 64}},
                                                       {"pred_b_exps.weight", {4, 32, 8}},
                                                       {"pred_b_shexp.weight", {64, 8}},
                                                       {"pred_hot_exps", {3}}};
      for (const auto& [name, shape] : tensors) file.shapes[block + "ffn_" + name] = shape;
    }
    return file;
  }

  /// A model with gate, up and down_t in bundles, clusters of four neurons.
  static TinyGguf bundled(TinyGguf file) {
    file.alignment = 4096;
    file.keys["general.alignment"] = std::uint32_t{4096};
    file.keys["turbosparse.bundle.parts"] = std::vector<std::string>{"gate", "up", "down_t"};
    file.keys["turbosparse.bundle.types"] = std::vector<std::string>(3, "F32");
    file.keys["turbosparse.bundle.bytes"] = std::uint32_t{1024};
    file.keys["turbosparse.bundle.cluster"] = std::uint32_t{4};
    for (const std::string block : {"blk.0.", "blk.1."}) {
      for (const std::string end : {"", "_exps", "_shexp"}) {
        const auto found = file.shapes.find(block + "ffn_gate" + end + ".weight");
        if (found == file.shapes.end()) continue;
        Shape shape = found->second;
        shape.back() = 1024;
        for (const char* part : {"gate", "up", "down_t"})
          file.shapes.erase(block + "ffn_" + part + end + ".weight");
        file.shapes[block + "ffn_bundles" + end] = shape;
      }
    }
    return file;
  }
  static TinyGguf bundled_model() { return bundled(model()); }
  static TinyGguf bundled_expert_model() { return bundled(expert_model()); }

  std::map<std::string, Value> keys;
  std::map<std::string, Shape> shapes;
  std::size_t alignment = 32;

  /// The file. Weights come from a fixed seed; thresholds are 0.05, hot neurons 0, 1, 2 ...
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> out;
    put(out, std::uint32_t{0x46554747});  // "GGUF"
    put(out, std::uint32_t{3});
    put(out, std::uint64_t{shapes.size()});
    put(out, std::uint64_t{keys.size()});
    for (const auto& [key, value] : keys) put_key(out, key, value);
    std::uint64_t offset = 0;
    for (const auto& [name, shape] : shapes) {
      put_text(out, name);
      put(out, static_cast<std::uint32_t>(shape.size()));
      for (auto size = shape.rbegin(); size != shape.rend(); ++size) put(out, *size);
      put(out, std::uint32_t{is_list(name) ? 26U : is_bytes(name) ? 24U : 0U});  // I32, I8 or F32
      put(out, offset);
      offset += padded(values(name, shape) * sizeof(float));
    }
    out.resize(padded(out.size()));
    std::mt19937 generator(7);
    for (const auto& [name, shape] : shapes) put_tensor(out, name, shape, generator);
    return out;
  }

 private:
  static bool is_list(const std::string& name) { return name.find("ffn_pred_hot") != std::string::npos; }
  /// Bytes that are floats all the same.
  static bool is_bytes(const std::string& name) { return name.find("ffn_bundles") != std::string::npos; }
  static std::size_t values(const std::string& name, const Shape& shape) {
    return count(shape) / (is_bytes(name) ? sizeof(float) : 1);
  }
  std::size_t padded(std::size_t n) const { return (n + alignment - 1) / alignment * alignment; }
  static std::size_t count(const Shape& shape) {
    std::size_t n = 1;
    for (const std::uint64_t size : shape) n *= size;
    return n;
  }
  template <class T>
  static void put(std::vector<std::byte>& out, T value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    for (std::size_t i = 0; i < sizeof value; ++i) out.push_back(bytes[i]);  // insert: GCC 12 warns on ARM
  }
  static void put_text(std::vector<std::byte>& out, const std::string& text) {
    put(out, std::uint64_t{text.size()});
    for (const char c : text) out.push_back(static_cast<std::byte>(c));
  }
  static void put_key(std::vector<std::byte>& out, const std::string& key, const Value& value) {
    constexpr std::uint32_t kKinds[] = {4, 6, 7, 8, 9, 9};  // uint32, float32, bool, string, arrays
    put_text(out, key);
    put(out, kKinds[value.index()]);
    if (const auto* number = std::get_if<std::uint32_t>(&value)) put(out, *number);
    if (const auto* real = std::get_if<float>(&value)) put(out, *real);
    if (const auto* flag = std::get_if<bool>(&value)) put(out, static_cast<std::uint8_t>(*flag));
    if (const auto* text = std::get_if<std::string>(&value)) put_text(out, *text);
    if (const auto* list = std::get_if<std::vector<float>>(&value)) {
      put(out, kKinds[1]);
      put(out, std::uint64_t{list->size()});
      for (const float number : *list) put(out, number);
    }
    if (const auto* list = std::get_if<std::vector<std::string>>(&value)) {
      put(out, kKinds[3]);
      put(out, std::uint64_t{list->size()});
      for (const std::string& word : *list) put_text(out, word);
    }
  }
  void put_tensor(std::vector<std::byte>& out, const std::string& name, const Shape& shape,
                  std::mt19937& generator) const {
    const float width = is_bytes(name) ? 64.0F : static_cast<float>(shape.back());
    std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(width));
    for (std::size_t i = 0; i < values(name, shape); ++i) {
      if (is_list(name)) {
        put(out, static_cast<std::int32_t>(i));
        continue;
      }
      if (name.find("threshold") != std::string::npos) {
        put(out, 0.05F);
        continue;
      }
      put(out, shape.size() == 1 ? 1.0F : normal(generator));
    }
    out.resize(padded(out.size()));
  }
};

}  // namespace turbosparse::test
