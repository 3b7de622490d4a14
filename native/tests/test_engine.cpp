// The engine on a tiny model: bad files are refused by name, threads and batches do not change results, a
// call that does not finish leaves nothing behind. What it computes is compared with NumPy in tests/golden.
#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/session.h"
#include "tiny_gguf.h"
#include "util/error.h"

namespace turbosparse {
namespace {

using test::TinyGguf;

/// A file that goes away at the end.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<std::byte>& bytes) {
    const int file = mkstemp(path_);
    const bool written =
        file >= 0 && write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
    CHECK(written, "cannot write %s", path_);
    close(file);
  }
  ~TemporaryFile() { std::remove(path_); }
  std::string path() const { return path_; }

 private:
  char path_[32] = "/tmp/turbosparse-test-XXXXXX";
};

std::shared_ptr<const Model> load(const TinyGguf& gguf, int threads, const MemoryOptions& memory = {}) {
  const TemporaryFile file(gguf.bytes());
  return std::make_shared<const Model>(file.path(), threads, "", WeightType::kQ8_0, memory);
}

const std::vector<std::int32_t> kIds{3, 14, 15, 9, 26, 5, 35, 8, 9, 7};

std::vector<float> logits(Session& session, Mode mode, bool one_by_one) {
  const auto V = static_cast<std::size_t>(session.model().config.vocab_size);
  std::vector<float> out(kIds.size() * V);
  const ForwardOptions options{.mode = mode, .logits = WantedLogits::kAll};
  if (!one_by_one) session.forward(kIds, options, out.data());
  for (std::size_t t = 0; one_by_one && t < kIds.size(); ++t) {
    session.forward(std::span(kIds).subspan(t, 1), options, out.data() + t * V);
  }
  return out;
}

void test_refusals() {
  const auto expect = [](const char* text, const std::function<void(TinyGguf&)>& change) {
    TinyGguf gguf = TinyGguf::model();
    change(gguf);
    try {
      load(gguf, 1);
      CHECK(false, "accepted, expected an error with %s", text);
    } catch (const ModelFileError& error) {
      CHECK(std::string(error.what()).find(text) != std::string::npos, "expected %s in: %s", text,
            error.what());
    }
  };
  const std::string arch = "turbosparse-llama.";
  const auto number = [&](const char* name, std::uint32_t value) {
    return [key = arch + name, value](TinyGguf& gguf) { gguf.keys[key] = value; };
  };
  expect("general.architecture", [](TinyGguf& g) { g.keys["general.architecture"] = std::string("falcon"); });
  expect("general.architecture", [](TinyGguf& g) { g.keys.erase("general.architecture"); });
  expect("block_count", number("block_count", 0));
  expect("block_count", number("block_count", 1U << 31));
  expect("predictor.threshold", number("block_count", 3));
  expect("blk.2.attn_norm.weight", [&](TinyGguf& g) {
    g.keys[arch + "block_count"] = std::uint32_t{3};
    g.keys["turbosparse.predictor.threshold"] = std::vector<float>(3);
  });
  expect("embedding_length", [&](TinyGguf& g) { g.keys.erase(arch + "embedding_length"); });
  expect("head_count_kv", number("attention.head_count_kv", 3));
  expect("expert_used_count", number("expert_count", 8));
  expect("rope.dimension_count", number("rope.dimension_count", 7));
  expect("rope.scaling.type", [&](TinyGguf& g) { g.keys[arch + "rope.scaling.type"] = std::string("yarn"); });
  expect("layer_norm_rms_epsilon",
         [&](TinyGguf& g) { g.keys[arch + "attention.layer_norm_rms_epsilon"] = std::nanf(""); });
  expect("turbosparse.activation", [](TinyGguf& g) { g.keys.erase("turbosparse.activation"); });
  expect("turbosparse.activation",
         [](TinyGguf& g) { g.keys["turbosparse.activation"] = std::string("mish"); });
  expect("turbosparse.activation_param",
         [](TinyGguf& g) { g.keys["turbosparse.activation"] = std::string("fatrelu"); });
  expect("turbosparse.version", [](TinyGguf& g) { g.keys["turbosparse.version"] = std::uint32_t{2}; });
  expect("turbosparse.gated", [](TinyGguf& g) { g.keys["turbosparse.gated"] = false; });  // with dReLU
  expect("blk.1.ffn_up.weight", [](TinyGguf& g) { g.shapes.erase("blk.1.ffn_up.weight"); });
  expect("blk.1.attn_k.weight", [](TinyGguf& g) { g.shapes["blk.1.attn_k.weight"] = {64, 32}; });
  expect("blk.1.ffn_threshold", [](TinyGguf& g) { g.shapes.erase("blk.1.ffn_threshold"); });
  expect("predictor.kind", [](TinyGguf& g) { g.keys["turbosparse.predictor.kind"] = std::string("sign"); });
  expect("predictor.kind", [](TinyGguf& g) { g.keys.erase("turbosparse.predictor.kind"); });
  expect("predictor.input", [](TinyGguf& g) { g.keys.erase("turbosparse.predictor.input"); });
  expect("predictor.threshold",
         [](TinyGguf& g) { g.keys["turbosparse.predictor.threshold"] = std::vector<float>{0.0F}; });
  expect("predictor.threshold", [](TinyGguf& g) { g.keys["turbosparse.predictor.threshold"] = 0.0F; });
  expect("blk.1.ffn_pred_a.weight", [](TinyGguf& g) { g.shapes.erase("blk.1.ffn_pred_a.weight"); });
  expect("blk.1.ffn_pred_b.weight", [](TinyGguf& g) { g.shapes["blk.1.ffn_pred_b.weight"] = {96, 9}; });
  expect("blk.1.ffn_pred_a.weight", [](TinyGguf& g) { g.shapes["blk.1.ffn_pred_a.weight"] = {8}; });
  expect("blk.1.ffn_pred_hot", [](TinyGguf& g) { g.shapes["blk.1.ffn_pred_hot"] = {97}; });
  expect("blk.0.attn_q_norm.weight", [](TinyGguf& g) { g.shapes["blk.0.attn_q_norm.weight"] = {16}; });
}

void test_schedules_agree(const TinyGguf& gguf, const std::vector<Mode>& modes) {
  for (const Mode mode : modes) {
    std::vector<float> first[2];
    for (const int threads : {1, 2, 3}) {
      Session batch(load(gguf, threads), 64);
      Session single(load(gguf, threads), 64);
      const std::vector<float> results[2] = {logits(batch, mode, false), logits(single, mode, true)};
      for (int i = 0; i < 2; ++i) {
        if (first[i].empty()) first[i] = results[i];
        CHECK(first[i] == results[i], "mode %s, %d threads, %s", mode_name(mode), threads,
              i ? "single" : "batch");
      }
      double difference = 0;
      double size = 0;
      for (std::size_t i = 0; i < results[0].size(); ++i) {
        difference += std::pow(static_cast<double>(results[0][i] - results[1][i]), 2.0);
        size += std::pow(static_cast<double>(results[0][i]), 2.0);
      }
      CHECK(std::sqrt(difference / size) < 1e-5, "mode %s: %g", mode_name(mode),
            std::sqrt(difference / size));
      for (std::size_t n = 0; n < 2; ++n) {
        const LayerCounts a = batch.counters().layers[n];
        const LayerCounts b = single.counters().layers[n];
        CHECK(a.active == b.active && a.gate_passed == b.gate_passed && a.candidates == b.candidates,
              "mode %s layer %zu: %ld and %ld", mode_name(mode), n, static_cast<long>(a.active),
              static_cast<long>(b.active));
        const auto neurons = static_cast<std::int64_t>(kIds.size()) * 96;
        CHECK((a.candidates < neurons) == (mode == Mode::kPredicted) && a.found <= a.wanted,
              "mode %s layer %zu: %ld candidates", mode_name(mode), n, static_cast<long>(a.candidates));
      }
    }
  }
}

/// Keys and values in 8 bits, and tokens that compute their few candidates alone: threads change no bit.
void test_small_cache_and_few_candidates() {
  TinyGguf gguf = TinyGguf::model();
  gguf.keys["turbosparse-llama.attention.head_count"] = std::uint32_t{2};  // of 32 values
  gguf.keys["turbosparse-llama.attention.head_count_kv"] = std::uint32_t{1};
  const std::size_t neurons = 2 * kIds.size() * 96;
  const auto mask = std::make_unique<bool[]>(neurons);
  for (std::size_t i = 0; i < neurons; i += 7) mask[i] = true;
  const ForwardOptions options{
      .mode = Mode::kPredicted, .logits = WantedLogits::kAll, .candidates = mask.get()};
  std::vector<float> first;
  for (const int threads : {1, 2, 3}) {
    Session session(load(gguf, threads, {0, 0, "", "q8_0"}), 64);
    session.set_skipping(true);
    std::vector<float> out(kIds.size() * static_cast<std::size_t>(session.model().config.vocab_size));
    session.forward(kIds, options, out.data());
    if (first.empty()) first = out;
    CHECK(out == first, "%d threads", threads);
    const LayerCounts counts = session.counters().layers[0];
    CHECK(counts.wanted == 0 && counts.candidates > 0, "%ld wanted", static_cast<long>(counts.wanted));
    CHECK(std::ranges::all_of(logits(session, Mode::kDense, true), [](float x) { return std::isfinite(x); }),
          "%d threads, one by one", threads);
  }
}

void test_rollback() {
  Session session(load(TinyGguf::model(), 2), 16);
  const std::span<const std::int32_t> start = std::span(kIds).first(4);
  const std::span<const std::int32_t> rest = std::span(kIds).subspan(4);
  std::vector<float> before(static_cast<std::size_t>(session.model().config.vocab_size));
  session.forward(start, {}, before.data());
  session.forward(rest, {}, before.data());
  session.truncate(4);
  ForwardOptions stopping{.mode = Mode::kDense, .logits = WantedLogits::kNone};
  stopping.between_layers = [calls = 0]() mutable {
    if (++calls == 2) throw Interrupted();
  };
  bool stopped = false;
  try {
    session.forward(rest, stopping, nullptr);
  } catch (const Interrupted&) {
    stopped = true;
  }
  CHECK(stopped && session.position() == 4, "position %ld", static_cast<long>(session.position()));
  CHECK(session.counters().tokens == 10, "tokens %ld", static_cast<long>(session.counters().tokens));
  std::vector<float> after(before.size());
  session.forward(rest, {}, after.data());
  CHECK(after == before, "logits differ after a rollback");
  bool full = false;
  try {
    session.forward(kIds, {}, after.data());
  } catch (const ContextLengthError&) {
    full = true;
  }
  CHECK(full && session.position() == 10, "position %ld", static_cast<long>(session.position()));
}

}  // namespace
}  // namespace turbosparse

int main() {
  turbosparse::test_refusals();
  using turbosparse::Mode;
  using turbosparse::test::TinyGguf;
  turbosparse::test_schedules_agree(TinyGguf::model(),
                                    {Mode::kDense, Mode::kExact, Mode::kThreshold, Mode::kPredicted});
  turbosparse::test_schedules_agree(TinyGguf::sign_model(), {Mode::kPredicted});
  turbosparse::test_small_cache_and_few_candidates();
  turbosparse::test_rollback();
  return turbosparse::test::report();
}
