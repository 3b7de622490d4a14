// Speed of the kernels: per ISA, weight type and shape, weights and bytes per second in the median
// and in the best twentieth of short runs. Matrices are larger than the caches where the model's are, so
// decode kernels show memory bandwidth.
//   bench_kernels [kernel [isa [type]]]    e.g. bench_kernels gemv avx2 Q4_0; "" is any
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "../tests/kernel_cases.h"
#include "timing.h"

namespace turbosparse {
namespace {

using namespace test;  // NOLINT: one program

struct Shape {
  const char* name;
  std::int64_t rows, cols;
};

constexpr Shape kShapes[] = {{"SmolLM2 ffn", 1536, 576},
                             {"Qwen2.5-1.5B ffn", 8960, 1536},
                             {"Qwen2.5-1.5B down", 1536, 8960},
                             {"7B ffn", 11008, 4096}};
constexpr std::int64_t kTokens = 256;
constexpr std::size_t kCopiesBytes = std::size_t{192} << 20;  // matrices of one shape, used in turn

constexpr double kSeconds = 0.3;  // per line

/// Copies of one matrix, enough of them to fall out of the caches.
struct Weights {
  Weights(WeightType type, const Shape& shape) : first(type, 64, shape.cols, 1) {
    const std::size_t bytes = static_cast<std::size_t>(shape.rows) * first.view.row_bytes;
    const std::size_t count = std::max<std::size_t>(1, kCopiesBytes / bytes);
    constexpr std::size_t kHugePage = std::size_t{2} << 20;  // as the engine keeps its weights
    const std::size_t total = (count * bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kHugePage, total)));
#if defined(MADV_HUGEPAGE)
    madvise(memory.get(), total, MADV_HUGEPAGE);
#endif
    for (std::size_t at = 0; at < count * bytes; at += first.view.row_bytes) {
      std::memcpy(memory.get() + at, first.bytes.data() + at % first.bytes.size(), first.view.row_bytes);
    }
    for (std::size_t i = 0; i < count; ++i) {
      copies.push_back({memory.get() + i * bytes, shape.rows, shape.cols, first.view.row_bytes, type});
    }
  }
  OwnedMatrix first;
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory;
  std::vector<Matrix> copies;
};

/// Ten lists of rows in order, each with `some` random rows of every ten neighbours, and each row in as many.
std::vector<std::vector<std::int32_t>> tenths_of_rows(std::int64_t rows, std::size_t some) {
  std::mt19937 generator(3);
  std::vector<std::vector<std::int32_t>> lists(10);
  for (std::int32_t first = 0; first + 10 <= rows; first += 10) {
    std::vector<std::int32_t> group(10);
    std::iota(group.begin(), group.end(), first);
    std::shuffle(group.begin(), group.end(), generator);
    for (std::size_t i = 0; i < lists.size(); ++i) {
      for (std::size_t j = 0; j < some; ++j) lists[i].push_back(group[(i + j) % group.size()]);
      std::sort(lists[i].end() - static_cast<std::ptrdiff_t>(some), lists[i].end());
    }
  }
  return lists;
}

/// Of a run: products that it computed and bytes that it read.
struct Work {
  double products, bytes;
};

void report(const char* kernel, const KernelTable& k, const char* type, const char* shape, int threads,
            Work work, bench::Times times) {
  std::printf("%-10s %-7s %-5s %-18s %d thread%s %8.1f G weights/s %7.1f GB/s, best %8.1f %7.1f\n", kernel,
              k.isa, type, shape, threads, threads == 1 ? " " : "s", work.products / times.median * 1e-9,
              work.bytes / times.median * 1e-9, work.products / times.best * 1e-9,
              work.bytes / times.best * 1e-9);
  std::fflush(stdout);
}

void report(const char* kernel, const KernelTable& k, const Matrix& w, const Shape& shape, int threads,
            double weights, bench::Times times) {
  const double bytes = weights / static_cast<double>(w.cols) * static_cast<double>(w.row_bytes);
  report(kernel, k, weight_type_name(w.type), shape.name, threads, {weights, bytes}, times);
}

struct Filter {
  std::string kernel, isa, type;
  static bool matches(const std::string& wanted, const char* name) {
    return wanted.empty() || wanted == name;
  }
};

void bench_decode(const KernelTable& k, const Weights& weights, const Shape& shape, int threads,
                  const Filter& filter) {
  const OwnedInput x(1, shape.cols, 4);
  const std::vector<float> coef = normal_floats(shape.rows, 5);
  std::vector<float> y(static_cast<std::size_t>(std::max(shape.rows, shape.cols)));
  const std::vector<std::vector<std::int32_t>> every{all_rows(shape.rows)},
      tenths = tenths_of_rows(shape.rows, 1), most = tenths_of_rows(shape.rows, 8);
  const auto rows_of = [&](const std::vector<std::int32_t>& list, int t) {
    const std::size_t begin = list.size() * static_cast<std::size_t>(t) / static_cast<std::size_t>(threads);
    const std::size_t end = list.size() * static_cast<std::size_t>(t + 1) / static_cast<std::size_t>(threads);
    return std::pair(list.data() + begin, static_cast<std::int64_t>(end - begin));
  };
  const auto columns = [&](int t) { return shape.cols / kBlock * t / threads * kBlock; };
  // Every list on every copy before any comes again: what is read must have left the caches.
  const auto run = [&](const char* kernel, const std::vector<std::vector<std::int32_t>>& lists, auto call) {
    if (!Filter::matches(filter.kernel, kernel)) return;
    const std::size_t copies = weights.copies.size();
    const bench::Times times = bench::measure(threads, kSeconds, [&](int t, std::size_t i) {
      call(weights.copies[i % copies], lists[i / copies % lists.size()], t);
    });
    report(kernel, k, weights.copies[0], shape, threads,
           static_cast<double>(lists[0].size()) * static_cast<double>(shape.cols), times);
  };
  run("gemv", every, [&](const Matrix& w, const auto& list, int t) {
    const auto [rows, n] = rows_of(list, t);
    k.gemv(w, x.view, rows[0], rows[0] + n, y.data());
  });
  const auto gemv_rows = [&](const Matrix& w, const auto& list, int t) {
    const auto [rows, n] = rows_of(list, t);
    k.gemv_rows(w, x.view, rows, n, y.data());
  };
  run("gemv_rows", tenths, gemv_rows);
  run("gemv_most", most, gemv_rows);
  const auto axpy = [&](const Matrix& w, const auto& list, int t) {
    k.axpy_rows(w, list.data(), static_cast<std::int64_t>(list.size()), coef.data(), columns(t),
                columns(t + 1), y.data());
  };
  run("axpy", every, axpy);
  run("axpy_rows", tenths, axpy);
}

/// 256 rows of the shape: enough to be limited by arithmetic, as prefill is, and short enough to repeat.
void bench_prefill(const KernelTable& k, const Weights& weights, const Shape& full, int threads,
                   const Filter& filter) {
  const Shape shape{full.name, 256, full.cols};
  const OwnedInput x(kTokens, shape.cols, 4);
  const std::vector<float> a = normal_floats(kTokens * shape.rows, 5);
  const std::int64_t stride = std::max(shape.rows, shape.cols);
  std::vector<float> y(static_cast<std::size_t>(kTokens * stride));
  const Scratch scratch[2] = {Scratch(shape.cols), Scratch(shape.cols)};
  Matrix w = weights.copies[0];
  w.rows = shape.rows;
  const double all =
      static_cast<double>(kTokens) * static_cast<double>(shape.rows) * static_cast<double>(shape.cols);
  if (Filter::matches(filter.kernel, "gemm")) {
    report("gemm", k, w, shape, threads, all, bench::measure(threads, kSeconds, [&](int t, std::size_t) {
             k.gemm(w, x.view, kTokens, shape.rows * t / threads, shape.rows * (t + 1) / threads, y.data(),
                    stride, scratch[t].memory);
           }));
  }
  if (Filter::matches(filter.kernel, "gemm_t")) {
    report("gemm_t", k, w, shape, threads, all, bench::measure(threads, kSeconds, [&](int t, std::size_t) {
             k.gemm_t(w, a.data(), shape.rows, kTokens, shape.cols / kBlock * t / threads * kBlock,
                      shape.cols / kBlock * (t + 1) / threads * kBlock, y.data(), stride, scratch[t].memory);
           }));
  }
}

/// Signs of a shape's rows against those of a vector; a bit is a weight.
void bench_signs(const KernelTable& k, const Shape& shape, int threads) {
  const std::int64_t words = sign_words(shape.cols);
  const auto size = static_cast<std::size_t>(shape.rows * words);
  const std::size_t copies = std::max<std::size_t>(1, kCopiesBytes / (size * sizeof(std::uint64_t)));
  std::vector<std::uint64_t> rows(size * copies, 0x0123456789abcdef);
  const std::vector<std::uint64_t> x(static_cast<std::size_t>(words), 0xfedcba9876543210);
  std::vector<std::int32_t> out(static_cast<std::size_t>(shape.rows));
  const bench::Times times = bench::measure(threads, kSeconds, [&](int t, std::size_t i) {
    k.sign_differences(rows.data() + i % copies * size, words, x.data(), shape.rows * t / threads,
                       shape.rows * (t + 1) / threads, out.data());
  });
  const double weights = static_cast<double>(shape.rows) * static_cast<double>(shape.cols);
  const double bytes = static_cast<double>(size * sizeof(std::uint64_t));
  report("signs", k, "bits", shape.name, threads, {weights, bytes}, times);
}

/// One token's attention over 4,000 positions with the heads of a 7B model, 32 on 8, of width 128: keys and
/// values as halves, or in tiles of 8 bits.
void bench_attention(const KernelTable& k, bool halves, int threads) {
  constexpr std::int64_t kPositions = 4000, kWidth = 128, kGroup = 4, kKvHeads = 8;
  constexpr std::int64_t kHead = kPositions * kWidth;  // values of keys, and as many of values
  constexpr std::int64_t kTiled = kPositions / kBlock * cached_tile_bytes(kWidth);
  const std::int64_t head_bytes = halves ? 2 * kHead : kTiled;
  const auto copies =
      static_cast<std::size_t>(kCopiesBytes) / static_cast<std::size_t>(kKvHeads * 2 * head_bytes);
  std::vector<std::byte> one(static_cast<std::size_t>(head_bytes)), cache;
  const std::vector<float> some = normal_floats(kHead, 6);
  const OwnedInput q(kGroup, kWidth, 7);
  if (halves) k.to_half(some.data(), kHead, reinterpret_cast<std::uint16_t*>(one.data()));
  for (std::int64_t p = 0; p < kPositions && !halves; ++p)
    store_key_q8(k, some.data() + p * kWidth, kWidth, p, one.data());
  cache.reserve(copies * kKvHeads * 2 * one.size());
  for (std::size_t i = 0; i < copies * kKvHeads * 2; ++i) cache.insert(cache.end(), one.begin(), one.end());
  std::vector<float> scores[2], out[2];
  for (int t = 0; t < threads; ++t) {
    scores[t].resize(kGroup * kPositions);
    out[t].resize(q.x.size());
  }
  const bench::Times times = bench::measure(threads, kSeconds, [&](int t, std::size_t i) {
    for (std::int64_t head = kKvHeads * t / threads; head < kKvHeads * (t + 1) / threads; ++head) {
      const std::byte* keys =
          cache.data() + (i % copies * kKvHeads + static_cast<std::size_t>(head)) * 2 * one.size();
      const std::byte* values = keys + one.size();
      if (halves) {
        k.attend(q.x.data(), kGroup, reinterpret_cast<const std::uint16_t*>(keys),
                 reinterpret_cast<const std::uint16_t*>(values), kPositions, kWidth, kWidth, 0.1F,
                 scores[t].data(), out[t].data());
      } else {
        k.attend_q8(q.view, kGroup, keys, values, kPositions, kWidth, 0.1F, scores[t].data(), out[t].data());
      }
    }
  });
  constexpr double kValues = 2.0 * kKvHeads * kHead;
  const double bytes = 2.0 * kKvHeads * static_cast<double>(head_bytes);
  report("attend", k, halves ? "F16" : "Q8_0", "7B, 4000 positions", threads, {kValues * kGroup, bytes},
         times);
}

/// What is cheap next to the matrices: the vectors of one token of a 7B model, in the cache, on one thread.
/// A "weight" is a value here.
void bench_vectors(const KernelTable& k, const Filter& filter) {
  constexpr std::int64_t kHidden = 4096, kNeurons = 11008, kWidth = 128;
  constexpr int kRepeats = 256;  // a run has to be longer than the clock's steps
  const auto size = static_cast<std::size_t>(kNeurons);
  const std::vector<float> x = normal_floats(kNeurons, 8), weight = normal_floats(kNeurons, 9);
  std::vector<float> y = normal_floats(kNeurons, 10), scales(size);
  std::vector<std::int8_t> q(size);
  std::vector<std::int32_t> sums(size);
  std::vector<std::uint64_t> bits(size);
  std::vector<std::uint16_t> halves(size);
  const OwnedMatrix row(WeightType::kQ8_0, 1, kHidden, 11);
  const auto run = [&](const char* kernel, std::int64_t values, auto call) {
    if (!Filter::matches(filter.kernel, kernel)) return;
    const bench::Times times = bench::measure(1, kSeconds, [&](int, std::size_t) {
      for (int i = 0; i < kRepeats; ++i) call();
    });
    const double all = static_cast<double>(values) * kRepeats;
    report(kernel, k, "F32", values == kHidden ? "7B state" : "7B neurons", 1, {all, all * sizeof(float)},
           times);
  };
  run("quantize", kHidden, [&] { k.quantize_q8(x.data(), kHidden, q.data(), scales.data(), sums.data()); });
  run("dequantize", kHidden, [&] { k.dequantize_row(row.view, 0, y.data()); });
  run("sign_bits", kHidden, [&] { k.sign_bits(x.data(), kHidden, bits.data()); });
  run("rms_norm", kHidden, [&] { k.rms_norm(x.data(), weight.data(), kHidden, 1e-5F, y.data()); });
  run("add", kHidden, [&] { k.add(x.data(), kHidden, y.data()); });
  // cos and sin of 0: values stay what they are, however often they are rotated.
  const std::vector<float> cosines(kWidth / 2, 1.0F), sines(kWidth / 2, 0.0F);
  run("rope", kHidden,
      [&] { k.rope(y.data(), kHidden / kWidth, kWidth, kWidth, true, cosines.data(), sines.data()); });
  run("to_half", kHidden, [&] { k.to_half(x.data(), kHidden, halves.data()); });
  run("silu", kNeurons, [&] { k.activate(Activation::kSilu, 0, x.data(), kNeurons, y.data()); });
  run("gelu", kNeurons, [&] { k.activate(Activation::kGelu, 0, x.data(), kNeurons, y.data()); });
  run("relu", kNeurons, [&] { k.activate(Activation::kDRelu, 0, x.data(), kNeurons, y.data()); });
}

}  // namespace
}  // namespace turbosparse

int main(int argc, char** argv) {
  using namespace turbosparse;  // NOLINT: one program
  Filter filter;
  if (argc > 1) filter.kernel = argv[1];
  if (argc > 2) filter.isa = argv[2];
  if (argc > 3) filter.type = argv[3];
  for (const KernelTable* k : test::tables()) {
    if (!Filter::matches(filter.kernel, "attend") || !Filter::matches(filter.isa, k->isa)) continue;
    for (const bool halves : {true, false}) {
      if (!Filter::matches(filter.type, halves ? "F16" : "Q8_0")) continue;
      for (const int threads : {1, 2}) bench_attention(*k, halves, threads);
    }
  }
  for (const KernelTable* k : test::tables()) {
    if (Filter::matches(filter.isa, k->isa) && Filter::matches(filter.type, "F32")) bench_vectors(*k, filter);
  }
  for (const Shape& shape : kShapes) {
    for (const KernelTable* k : test::tables()) {
      const bool wanted = Filter::matches(filter.kernel, "signs") && Filter::matches(filter.type, "bits");
      if (!wanted || !Filter::matches(filter.isa, k->isa)) continue;
      for (const int threads : {1, 2}) bench_signs(*k, shape, threads);
    }
    for (const WeightType type : {WeightType::kQ4_0, WeightType::kQ8_0, WeightType::kF16}) {
      if (!Filter::matches(filter.type, weight_type_name(type))) continue;
      const Weights weights(type, shape);
      for (const KernelTable* k : test::tables()) {
        if (filter.isa.empty() ? std::strcmp(k->isa, "scalar") == 0 : filter.isa != k->isa) continue;
        for (const int threads : {1, 2}) {
          bench_decode(*k, weights, shape, threads, filter);
          bench_prefill(*k, weights, shape, threads, filter);
        }
      }
    }
  }
  return 0;
}
