// Mutated models: a file whose header or weights are damaged is refused, or runs and gives finite logits; in
// every mode, never a crash; with experts too. (The reader alone, on wilder bytes, is test_gguf_mutation.)
// Meant for the sanitizers.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/model.h"
#include "engine/session.h"
#include "tiny_gguf.h"
#include "util/error.h"

namespace turbosparse::test {
namespace {

class Mutator {
 public:
  /// Damages `bytes`, most often in the first `header` bytes, where one wrong byte changes most.
  void damage(std::vector<std::byte>& bytes, std::size_t header) {
    for (std::size_t changes = 1 + below(2); changes > 0; --changes) {
      switch (below(8)) {
        case 0:
          bytes[below(header)] ^= std::byte{1} << below(8);
          break;
        case 1:
          bytes[below(header)] = static_cast<std::byte>(below(256));
          break;
        case 2:
          put(bytes, below(header), extreme<std::uint32_t>());
          break;
        case 3:
          put(bytes, below(header), extreme<std::uint64_t>());
          break;
        case 4:
        case 5:
        case 6:  // an odd value in the weights: NaN, infinity, huge, a denormal
          put(bytes, header + below(bytes.size() - header) / 4 * 4,
              std::array<std::uint32_t, 4>{0x7FC00000, 0x7F800000, 0x7F7FFFFF, 1}[below(4)]);
          break;
        default: {  // letters: keys, names and activations turn into others
          const auto at = below(header);
          const auto from = below(header);
          std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(from),
                      std::min<std::size_t>(4, header - from),
                      bytes.begin() + static_cast<std::ptrdiff_t>(at));
        }
      }
    }
  }

 private:
  template <class T>
  T extreme() {
    constexpr std::array<std::uint64_t, 10> kValues{0, 1, 2, 3, 31, 64, 96, 1u << 20, 1u << 31, ~0ull};
    return static_cast<T>(kValues[below(kValues.size())]);
  }
  template <class T>
  static void put(std::vector<std::byte>& bytes, std::size_t at, T value) {
    if (at + sizeof value <= bytes.size()) std::memcpy(bytes.data() + at, &value, sizeof value);
  }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }

  std::mt19937_64 random_{2};
};

/// A file that is gone with the object.
class TemporaryFile {
 public:
  TemporaryFile() {
    const int file = mkstemp(path_.data());
    CHECK(file >= 0, "temporary file");
    close(file);
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  const std::string& path() const { return path_; }
  void write(const std::vector<std::byte>& bytes) const {
    std::FILE* out = std::fopen(path_.c_str(), "wb");
    CHECK(out != nullptr && std::fwrite(bytes.data(), bytes.size(), 1, out) == 1, "write");
    if (out != nullptr) std::fclose(out);
  }

 private:
  std::string path_ = "/tmp/turbosparse-mutant-XXXXXX";
};

/// Loads the file and runs three tokens in every mode it has: two together, then one alone.
void run(const std::string& path) {
  const auto model = std::make_shared<const Model>(path, 1, "", WeightType::kQ8_0);
  const auto vocab = static_cast<std::size_t>(model->config.vocab_size);
  std::vector<float> logits(vocab);
  for (const Mode mode : model->modes()) {
    Session session(model, std::min<std::int64_t>(3, model->config.context_length));
    const std::array<std::int32_t, 2> ids{0, static_cast<std::int32_t>(vocab) - 1};
    session.forward(ids, {.mode = mode}, logits.data());
    session.forward(std::span(ids).first(1), {.mode = mode}, logits.data());
    CHECK(std::all_of(logits.begin(), logits.end(), [](float value) { return std::isfinite(value); }),
          "finite logits in mode %s", mode_name(mode));
  }
}

void check_mutants(const TinyGguf& gguf, int mutants) {
  const auto sound = gguf.bytes();
  std::size_t weights = 0;
  for (const auto& [name, shape] : gguf.shapes) {
    std::size_t count = 1;
    for (const auto size : shape) count *= size;
    weights += (count * sizeof(float) + 31) / 32 * 32;
  }
  const TemporaryFile file;
  file.write(sound);
  run(file.path());
  Mutator mutator;
  int refused = 0;
  for (int i = 0; i < mutants; ++i) {
    auto bytes = sound;
    mutator.damage(bytes, sound.size() - weights);
    file.write(bytes);
    try {
      run(file.path());
    } catch (const Error& error) {
      ++refused;
      CHECK(std::string_view(error.what()).starts_with("["), "mutant %d: %s", i, error.what());
    }
  }
  std::printf("%d mutants: %d still run, %d refused\n", mutants, mutants - refused, refused);
  // Neither branch may go untested because the damage is too wild or too tame.
  CHECK(refused > mutants / 4 && refused < mutants * 19 / 20, "%d of %d refused", refused, mutants);
}

}  // namespace
}  // namespace turbosparse::test

int main() {
  turbosparse::test::check_mutants(turbosparse::test::TinyGguf::model(), 3000);
  turbosparse::test::check_mutants(turbosparse::test::TinyGguf::sign_model(), 1000);
  turbosparse::test::check_mutants(turbosparse::test::TinyGguf::expert_model(), 2000);
  return turbosparse::test::report();
}
