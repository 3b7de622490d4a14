// Vector kernels against the scalar twin, attention against its formula, and values that are not numbers.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "kernel_cases.h"
#include "kernels/cached_tile.h"
#include "util/error.h"

namespace turbosparse {
namespace {

using namespace test;  // NOLINT: the whole file is a test

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

const KernelTable& scalar() { return kernel_table("scalar"); }

void check_quantize(const KernelTable& k, const std::vector<float>& x) {
  std::vector<std::int8_t> q(x.size()), expected_q(x.size());
  std::vector<float> scale(x.size() / 32), expected_scale(scale.size());
  std::vector<std::int32_t> sum(scale.size()), expected_sum(scale.size());
  const auto n = static_cast<std::int64_t>(x.size());
  scalar().quantize_q8(x.data(), n, expected_q.data(), expected_scale.data(), expected_sum.data());
  k.quantize_q8(x.data(), n, q.data(), scale.data(), sum.data());
  for (std::size_t b = 0; b < scale.size(); ++b) {
    const bool same =
        scale[b] == expected_scale[b] || (std::isnan(scale[b]) && std::isnan(expected_scale[b]));
    CHECK(same && sum[b] == expected_sum[b], "%s block %zu", k.isa, b);
  }
  CHECK(q == expected_q, "%s", k.isa);
  CHECK(std::all_of(q.begin(), q.end(), [](std::int8_t v) { return v >= -127; }), "%s", k.isa);
}

void check_quantize_cases(const KernelTable& k) {
  std::vector<float> x = normal_floats(12 * 32, 1);
  std::fill_n(x.begin() + 32, 32, 0.0f);
  std::fill_n(x.begin() + 64, 32, 1e-40f);
  std::fill_n(x.begin() + 96, 32, 3e38f);
  x[130] = kNan;
  x[170] = -kInf;
  x[200] = 127.0f;  // a tie must round to even in every ISA
  x[201] = 0.5f;
  x[202] = 1.5f;
  check_quantize(k, x);
  std::vector<std::int8_t> q(x.size());
  std::vector<float> scale(12);
  std::vector<std::int32_t> sum(12);
  k.quantize_q8(x.data(), 12 * 32, q.data(), scale.data(), sum.data());
  CHECK(scale[1] == 0.0f && sum[1] == 0, "%s: a block of zeros", k.isa);
  CHECK(std::isnan(scale[4]) && std::isnan(scale[5]), "%s: NaN and Inf must show", k.isa);
}

void check_elementwise(const KernelTable& k, std::int64_t n) {
  const std::vector<float> x = normal_floats(n, 2), weight = normal_floats(n, 3);
  std::vector<float> expected(x.size()), y(x.size());
  scalar().rms_norm(x.data(), weight.data(), n, 1e-5f, expected.data());
  k.rms_norm(x.data(), weight.data(), n, 1e-5f, y.data());
  CHECK(relative_error(y, expected) < 1e-6, "%s rms_norm %lld", k.isa, static_cast<long long>(n));
  std::vector<float> in_place = x;
  k.rms_norm(in_place.data(), weight.data(), n, 1e-5f, in_place.data());
  CHECK(in_place == y, "%s rms_norm in place", k.isa);
  expected = y = weight;
  scalar().add(x.data(), n, expected.data());
  k.add(x.data(), n, y.data());
  CHECK(y == expected, "%s add %lld", k.isa, static_cast<long long>(n));
  std::vector<std::uint16_t> half(x.size()), expected_half(x.size());
  scalar().to_half(x.data(), n, expected_half.data());
  k.to_half(x.data(), n, half.data());
  CHECK(half == expected_half, "%s to_half %lld", k.isa, static_cast<long long>(n));
}

void check_activations(const KernelTable& k, std::int64_t n) {
  std::vector<float> x = normal_floats(n, 4);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= i % 3 == 0 ? 40.0f : 1.0f;
  for (int f = 0; f <= static_cast<int>(Activation::kDRelu); ++f) {
    const auto activation = static_cast<Activation>(f);
    std::vector<float> expected(x.size()), y(x.size());
    scalar().activate(activation, 0.25f, x.data(), n, expected.data());
    k.activate(activation, 0.25f, x.data(), n, y.data());
    const bool exact = activation != Activation::kSilu && activation != Activation::kGelu;
    CHECK(exact ? y == expected : relative_error(y, expected) < 1e-6, "%s activation %d, n %lld", k.isa, f,
          static_cast<long long>(n));
    std::vector<float> in_place = x;
    k.activate(activation, 0.25f, in_place.data(), n, in_place.data());
    CHECK(in_place == y, "%s activation %d in place", k.isa, f);
    const float hostile[3] = {kNan, kInf, -200.0f};
    float out[3];
    k.activate(activation, 0.25f, hostile, 3, out);
    CHECK(std::isnan(out[0]) && out[1] == kInf && std::fabs(out[2]) < 1e-30f, "%s activation %d: %g %g %g",
          k.isa, f, static_cast<double>(out[0]), static_cast<double>(out[1]), static_cast<double>(out[2]));
  }
}

void check_rope(const KernelTable& k, std::int64_t C, std::int64_t rotary, bool neox) {
  constexpr std::int64_t kHeads = 3;
  const std::vector<float> cos = normal_floats(rotary / 2, 5), sin = normal_floats(rotary / 2, 6);
  std::vector<float> expected = normal_floats(kHeads * C, 7), x = expected;
  scalar().rope(expected.data(), kHeads, C, rotary, neox, cos.data(), sin.data());
  k.rope(x.data(), kHeads, C, rotary, neox, cos.data(), sin.data());
  CHECK(x == expected, "%s rope C %lld rotary %lld neox %d", k.isa, static_cast<long long>(C),
        static_cast<long long>(rotary), neox);
}

void check_attend(const KernelTable& k, std::int64_t n, std::int64_t C, std::int64_t heads) {
  const std::int64_t stride = C + 5;
  const std::vector<float> q = normal_floats(heads * C, 8), kv = normal_floats(2 * n * stride, 9);
  std::vector<std::uint16_t> half(kv.size());
  scalar().to_half(kv.data(), 2 * n * stride, half.data());
  std::vector<float> scores(static_cast<std::size_t>(heads * n)), expected(q.size()), out(q.size());
  const std::uint16_t* v = half.data() + n * stride;
  const auto check = [&](const char* name) {
    CHECK(relative_error(out, expected) < 1e-5, "%s %s n %lld C %lld heads %lld: %g", k.isa, name,
          static_cast<long long>(n), static_cast<long long>(C), static_cast<long long>(heads),
          relative_error(out, expected));
  };
  scalar().attend(q.data(), heads, half.data(), v, n, C, stride, 0.3f, scores.data(), expected.data());
  k.attend(q.data(), heads, half.data(), v, n, C, stride, 0.3f, scores.data(), out.data());
  check("attend");
  // A head gives the same bits alone.
  std::vector<float> one(static_cast<std::size_t>(C));
  const std::int64_t last = (heads - 1) * C;
  k.attend(q.data() + last, 1, half.data(), v, n, C, stride, 0.3f, scores.data(), one.data());
  CHECK(std::equal(one.begin(), one.end(), out.begin() + last), "%s: a head depends on others", k.isa);
  const float* values = kv.data() + n * stride;
  scalar().attend_f32(q.data(), heads, kv.data(), values, n, C, stride, 0.3f, scores.data(), expected.data());
  k.attend_f32(q.data(), heads, kv.data(), values, n, C, stride, 0.3f, scores.data(), out.data());
  check("attend_f32");
}

/// Keys and values of n positions in tiles of 8 bits; what no position was written to is NaN and 0x80.
struct Tiles {
  Tiles(const KernelTable& k, const std::vector<float>& keys_and_values, std::int64_t n, std::int64_t C)
      : bytes((n + kTilePositions - 1) / kTilePositions * cached_tile_bytes(C)),
        memory(static_cast<std::size_t>(2 * bytes), std::byte{0x80}) {
    for (std::int64_t tile = 0; tile < 2 * bytes; tile += cached_tile_bytes(C))
      std::fill_n(memory.begin() + tile + kTilePositions * C, 2 * C, std::byte{0x7e});
    for (std::int64_t p = 0; p < n; ++p) {
      store_key_q8(k, keys_and_values.data() + p * C, C, p, memory.data());
      store_value_q8(k, keys_and_values.data() + (n + p) * C, C, p, memory.data() + bytes);
    }
  }
  const std::byte* keys() const { return memory.data(); }
  const std::byte* values() const { return memory.data() + bytes; }
  std::int64_t bytes;
  std::vector<std::byte> memory;
};

/// The twin against the formula in floats: rounding to 8 bits, of queries, keys, values and shares, is the
/// only difference. Each of them is off by 1/127/sqrt(12) of the largest of 32, that is by 0.6 % of their
/// size.
void check_attend_q8_formula() {
  constexpr std::int64_t kPositions = 257, kWidth = 64, kHeads = 4;
  const std::vector<float> kv = normal_floats(2 * kPositions * kWidth, 13);
  const OwnedInput q(kHeads, kWidth, 14);
  std::vector<float> scores(kHeads * kPositions), expected(q.x.size()), out(q.x.size());
  scalar().attend_f32(q.x.data(), kHeads, kv.data(), kv.data() + kPositions * kWidth, kPositions, kWidth,
                      kWidth, 0.125F, scores.data(), expected.data());
  const Tiles tiles(scalar(), kv, kPositions, kWidth);
  scalar().attend_q8(q.view, kHeads, tiles.keys(), tiles.values(), kPositions, kWidth, 0.125F, scores.data(),
                     out.data());
  CHECK(relative_error(out, expected) < 0.02, "attend_q8: %g", relative_error(out, expected));
}

void check_attend_q8(const KernelTable& k, std::int64_t n, std::int64_t C, std::int64_t heads) {
  const OwnedInput q(heads, C, 8);
  const Tiles tiles(k, normal_floats(2 * n * C, 9), n, C);
  CHECK(tiles.memory == Tiles(scalar(), normal_floats(2 * n * C, 9), n, C).memory, "%s: tiles", k.isa);
  std::vector<float> scores(static_cast<std::size_t>(heads * n)), expected(q.x.size()), out(q.x.size());
  scalar().attend_q8(q.view, heads, tiles.keys(), tiles.values(), n, C, 0.3F, scores.data(), expected.data());
  k.attend_q8(q.view, heads, tiles.keys(), tiles.values(), n, C, 0.3F, scores.data(), out.data());
  // Shares differ by a few eps, so that some of them may be rounded to the next of 127 steps.
  CHECK(relative_error(out, expected) < 2e-3, "%s attend_q8 n %lld C %lld heads %lld: %g", k.isa,
        static_cast<long long>(n), static_cast<long long>(C), static_cast<long long>(heads),
        relative_error(out, expected));
  std::vector<float> one(static_cast<std::size_t>(C));
  const std::int64_t last = (heads - 1) * C;
  const Input alone{nullptr, q.q.data() + last, q.scale.data() + last / kBlock,
                    q.q_sum.data() + last / kBlock};
  k.attend_q8(alone, 1, tiles.keys(), tiles.values(), n, C, 0.3F, scores.data(), one.data());
  CHECK(std::equal(one.begin(), one.end(), out.begin() + last), "%s: a head depends on others", k.isa);
}

/// A NaN in a key, or in a value, must show; in a position that is not asked for it must not.
void check_attend_q8_nan(const KernelTable& k) {
  constexpr std::int64_t kPositions = 40, kWidth = 32;
  const OwnedInput q(1, kWidth, 8);
  for (const std::int64_t broken : {0, 1}) {
    std::vector<float> kv(2 * kPositions * kWidth, 1.0F);
    kv[static_cast<std::size_t>((broken * kPositions + 35) * kWidth)] = kNan;
    const Tiles tiles(k, kv, kPositions, kWidth);
    float scores[kPositions], out[kWidth];
    k.attend_q8(q.view, 1, tiles.keys(), tiles.values(), kPositions, kWidth, 0.3F, scores, out);
    CHECK(std::isnan(out[0]), "%s: NaN must show (%lld)", k.isa, static_cast<long long>(broken));
    k.attend_q8(q.view, 1, tiles.keys(), tiles.values(), 35, kWidth, 0.3F, scores, out);
    CHECK(std::fabs(out[0] - 1.0F) < 0.01F, "%s: %g", k.isa, static_cast<double>(out[0]));
  }
}

void check_signs(const KernelTable& k, std::int64_t n) {
  std::vector<float> x = normal_floats(n, 11);
  const float odd[] = {0.0f, -0.0f, kNan, kInf, -kInf, 1e-45f, -1e-45f};
  for (std::size_t i = 0; i < x.size(); i += 5) x[i] = odd[i / 5 % std::size(odd)];
  const std::int64_t words = sign_words(n);
  std::vector<std::uint64_t> expected(static_cast<std::size_t>(words)), bits(expected.size(), ~0ULL);
  scalar().sign_bits(x.data(), n, expected.data());
  k.sign_bits(x.data(), n, bits.data());
  CHECK(bits == expected, "%s sign_bits %lld", k.isa, static_cast<long long>(n));

  constexpr std::int64_t kRows = 37;
  std::mt19937_64 generator(12);
  std::vector<std::uint64_t> rows(static_cast<std::size_t>(kRows * words));
  for (std::uint64_t& word : rows) word = generator();
  std::copy(bits.begin(), bits.end(), rows.begin());  // no difference in row 0, all of them in row 1
  std::transform(bits.begin(), bits.end(), rows.begin() + words, [](std::uint64_t word) { return ~word; });
  std::vector<std::int32_t> differences(kRows, -1), wanted(kRows, -1);
  scalar().sign_differences(rows.data(), words, bits.data(), 0, kRows - 1, wanted.data());
  k.sign_differences(rows.data(), words, bits.data(), 0, kRows - 1, differences.data());
  CHECK(differences == wanted, "%s sign_differences %lld", k.isa, static_cast<long long>(n));
  CHECK(differences[0] == 0 && differences[1] == 64 * words && differences.back() == -1, "%s: %d %d %d",
        k.isa, differences[0], differences[1], differences.back());
}

/// With equal keys the output is the mean of the values; large scores must not overflow.
void check_attend_properties(const KernelTable& k) {
  constexpr std::int64_t kPositions = 11, kWidth = 16;
  std::vector<std::uint16_t> keys(kPositions * kWidth, 0x3c00), values(keys.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = i / kWidth == 10 ? 0x4980 : 0;  // 11.0 in the last
  const std::vector<float> q(kWidth, 1000.0f);
  float scores[kPositions], out[kWidth];
  k.attend(q.data(), 1, keys.data(), values.data(), kPositions, kWidth, kWidth, 1.0f, scores, out);
  for (const float value : out)
    CHECK(std::fabs(value - 1.0f) < 1e-5f, "%s: %g", k.isa, static_cast<double>(value));
  keys[0] = 0x7e00;  // NaN
  k.attend(q.data(), 1, keys.data(), values.data(), kPositions, kWidth, kWidth, 1.0f, scores, out);
  CHECK(std::isnan(out[0]), "%s: NaN must show", k.isa);
}

void check_table(const KernelTable& k) {
  check_quantize(k, normal_floats(32, 1));
  check_quantize(k, normal_floats(8960, 1));
  check_quantize_cases(k);
  for (const std::int64_t n : {1, 7, 8, 13, 16, 33, 576, 1536}) {
    check_elementwise(k, n);
    check_activations(k, n);
  }
  for (const std::int64_t n : {1, 7, 63, 64, 65, 200, 511, 512, 576, 1536, 4096}) check_signs(k, n);
  for (const bool neox : {false, true}) {
    for (const std::int64_t C : {2, 6, 16, 64, 80, 128}) {
      check_rope(k, C, C, neox);
      check_rope(k, C + 4, C, neox);
    }
  }
  for (const std::int64_t n : {1, 2, 7, 8, 9, 31, 257}) {
    for (const std::int64_t C : {1, 6, 16, 64, 80, 100, 128, 256, 300}) {
      for (const std::int64_t heads : {1, 3, 4}) check_attend(k, n, C, heads);
    }
  }
  check_attend(k, 33, 8, 37);  // more heads than are kept at a time
  for (const std::int64_t n : {1, 7, 16, 31, 32, 33, 64, 257}) {
    for (const std::int64_t C : {32, 64, 96, 128, 256}) {
      for (const std::int64_t heads : {1, 2, 3, 4, 7}) check_attend_q8(k, n, C, heads);
    }
  }
  check_attend_q8_nan(k);
  check_attend_properties(k);
}

void check_choice() {
  const std::vector<std::string> isas = available_isas();
  CHECK(!isas.empty() && isas.back() == "scalar", "the scalar table is always there, last");
  for (const std::string& isa : isas) CHECK(kernel_table(isa).isa == isa, "%s", isa.c_str());
  setenv("TURBOSPARSE_ISA", "scalar", 1);
  CHECK(std::string(kernel_table().isa) == "scalar", "the environment chooses");
  CHECK(kernel_table(isas.front()).isa == isas.front(), "an argument goes before the environment");
  setenv("TURBOSPARSE_ISA", "", 1);
  CHECK(kernel_table().isa == isas.front(), "the best is the default");
  bool thrown = false;
  try {
    kernel_table("sse9");
  } catch (const ConfigError&) {
    thrown = true;
  }
  CHECK(thrown, "unknown names are refused");
}

}  // namespace
}  // namespace turbosparse

int main() {
  turbosparse::check_choice();
  turbosparse::check_attend_q8_formula();
  for (const turbosparse::KernelTable* table : turbosparse::test::tables()) turbosparse::check_table(*table);
  return turbosparse::test::report();
}
