// Mutated model files: whatever the bytes are, reading gives a file whose every byte can be touched, or
// ModelFileError; never a crash, and never more memory than a fixed multiple of the file. Meant for the
// sanitizers.
#include <array>
#include <cstdlib>
#include <new>
#include <random>
#include <string_view>

#include "check.h"
#include "gguf_bytes.h"
#include "io/gguf_file.h"
#include "util/error.h"

namespace {
thread_local std::size_t allocated = 0;  // bytes asked for since it was last reset
}  // namespace

void* operator new(std::size_t size) {
  allocated += size;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace turbosparse::test {
namespace {

constexpr int kMutants = 200'000;
// A key of 14 bytes costs about 300, most of it in the two tables by name; vectors that grow count double.
constexpr std::size_t kMostPerByte = 64;
constexpr std::size_t kMostOnTop = 4096;

template <class T>
auto from(T& bytes, std::size_t at) {
  return bytes.begin() + static_cast<std::ptrdiff_t>(at);
}

class Mutator {
 public:
  explicit Mutator(std::vector<Bytes> seeds) : seeds_(std::move(seeds)) {}

  std::vector<std::byte> next() {
    const auto& seed = seeds_[below(seeds_.size())];
    auto bytes = seed.data;
    const auto changes = 1 + below(3);
    for (std::size_t i = 0; i < changes && !bytes.empty(); ++i) change(bytes, seed);
    return {bytes.begin(), bytes.end()};  // a fresh allocation of exactly this size
  }

 private:
  void change(std::vector<std::byte>& bytes, const Bytes& seed) {
    switch (below(8)) {
      case 0:  // flip a bit
        bytes[below(bytes.size())] ^= std::byte{1} << below(8);
        return;
      case 1:  // any byte
        bytes[below(bytes.size())] = static_cast<std::byte>(below(256));
        return;
      case 2:  // cut
        bytes.resize(below(bytes.size() + 1));
        return;
      case 3: {  // remove a piece
        const auto at = below(bytes.size());
        const auto size = below(std::min<std::size_t>(64, bytes.size() - at) + 1);
        bytes.erase(from(bytes, at), from(bytes, at + size));
        return;
      }
      case 4: {  // splice in a piece of another file
        const auto& other = seeds_[below(seeds_.size())].data;
        const auto at = below(other.size());
        const auto size = below(std::min<std::size_t>(128, other.size() - at) + 1);
        const std::vector<std::byte> piece(from(other, at), from(other, at + size));
        bytes.insert(from(bytes, below(bytes.size() + 1)), piece.begin(), piece.end());
        return;
      }
      default: {  // put an extreme value where an integer was
        const auto& integer = seed.integers[below(seed.integers.size())];
        if (integer.at + integer.width > bytes.size()) return;
        const auto value = extreme(bytes.size());
        std::memcpy(bytes.data() + integer.at, &value, integer.width);
      }
    }
  }

  std::uint64_t extreme(std::size_t file_bytes) {
    const std::array<std::uint64_t, 12> values{0,
                                               1,
                                               2,
                                               31,
                                               32,
                                               64,
                                               file_bytes,
                                               std::uint64_t{1} << 31,
                                               std::uint64_t{1} << 32,
                                               std::uint64_t{1} << 61,
                                               std::uint64_t{1} << 63,
                                               ~std::uint64_t{0}};
    return values[below(values.size())] + below(3) - 1;
  }

  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }

  std::vector<Bytes> seeds_;
  std::mt19937_64 random_{1};
};

std::size_t touch(const GgufValue& value) {
  if (const auto* array = std::get_if<std::shared_ptr<const GgufArray>>(&value)) {
    std::size_t sum = (*array)->bytes.size();
    for (std::size_t i = 0; i < (*array)->size; ++i) sum += touch((*array)->at(i));
    return sum;
  }
  if (const auto* text = std::get_if<std::string_view>(&value)) {
    std::size_t sum = 0;
    for (const char c : *text) sum += static_cast<unsigned char>(c);
    return sum;
  }
  return value.index();
}

/// Uses everything a file offers; the sum keeps the reads alive.
std::size_t touch(const GgufFile& file) {
  std::size_t sum = file.version() + file.kinds().size();
  for (const auto& [key, value] : file.metadata()) {
    CHECK(file.find(key) == &value, "a key finds its own value");
    sum += touch(value);
    try {
      sum += file.get_int(key).has_value();
      sum += file.get_float(key).has_value();
    } catch (const ModelFileError&) {
      ++sum;  // another kind: refused as promised
    }
  }
  for (const auto& tensor : file.tensors()) {
    CHECK(file.tensor(tensor.name) == &tensor, "a name finds its own tensor");
    for (const auto byte : tensor.data) sum += std::to_integer<std::size_t>(byte);
    file.release(tensor.data);
  }
  return sum;
}

std::vector<Bytes> make_seeds() {
  auto aligned = sound_spec();
  aligned.metadata.push_back(entry("general.alignment", GgufKind::kUint32, std::uint32_t{64}));
  aligned.tensors = {{"a", {32, 2}, 2, 0}, {"b", {5}, 30, 64}, {"c", {1, 1, 7}, 24, 128}};
  aligned.alignment = 64;
  aligned.data_bytes = 160;
  auto many = GgufSpec{};
  for (std::uint64_t i = 0; i < 40; ++i) {
    many.metadata.push_back(entry("k" + std::to_string(i), GgufKind::kUint8, static_cast<std::uint8_t>(i)));
    many.tensors.push_back({"t" + std::to_string(i), {8}, 0, 32 * i});
  }
  many.data_bytes = 32 * 40;
  return {sound_spec().build(), aligned.build(), many.build(), GgufSpec{}.build()};
}

void check_mutants() {
  const auto seeds = make_seeds();
  for (const auto& seed : seeds) CHECK(touch(*GgufFile::parse(seed.data)) > 0, "seeds are sound");
  Mutator mutator(seeds);
  int sound = 0;
  std::size_t sum = 0;
  for (int i = 0; i < kMutants; ++i) {
    const auto bytes = mutator.next();
    allocated = 0;
    try {
      const auto file = GgufFile::parse(bytes);
      CHECK(allocated <= kMostPerByte * bytes.size() + kMostOnTop, "mutant %d of %zu bytes took %zu", i,
            bytes.size(), allocated);
      sum += touch(*file);
      ++sound;
    } catch (const ModelFileError& error) {
      CHECK(allocated <= kMostPerByte * bytes.size() + kMostOnTop, "mutant %d of %zu bytes took %zu", i,
            bytes.size(), allocated);
      CHECK(std::string_view(error.what()).starts_with("[bytes: "), "mutant %d: %s", i, error.what());
    }
  }
  std::printf("%d mutants: %d still sound, %d refused (%zu)\n", kMutants, sound, kMutants - sound, sum);
  // Neither branch may go untested because the mutations are too wild or too tame.
  CHECK(sound > kMutants / 50 && sound < kMutants / 2, "%d of %d mutants were sound", sound, kMutants);
}

}  // namespace
}  // namespace turbosparse::test

int main() {
  turbosparse::test::check_mutants();
  return turbosparse::test::report();
}
