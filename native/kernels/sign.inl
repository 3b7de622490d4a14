// Signs of values as bits, and how many of them differ between rows and a vector.
#pragma once

#include "kernels/kernels.h"

namespace turbosparse {
namespace {

template <class Isa>
void sign_bits(const float* x, std::int64_t n, std::uint64_t* bits) noexcept {
  using Float = typename Isa::Float;
  for (std::int64_t word = 0; word < sign_words(n); ++word) {
    std::uint64_t signs = 0;
    const std::int64_t last = std::min<std::int64_t>(64, n - 64 * word);
    for (std::int64_t i = 0; i < last; i += Float::kLanes) {
      const float* at = x + 64 * word + i;
      const auto v = last - i >= Float::kLanes ? Float::load(at) : Float::load_n(at, last - i);
      signs |= static_cast<std::uint64_t>(Float::positive(v)) << i;
    }
    bits[word] = signs;
  }
}

template <class Isa>
void sign_differences(const std::uint64_t* rows, std::int64_t words, const std::uint64_t* x,
                      std::int64_t row_begin, std::int64_t row_end, std::int32_t* out) noexcept {
  using Bits = typename Isa::Bits;
  const std::int64_t whole = words / Bits::kWords * Bits::kWords;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const std::uint64_t* row = rows + r * words;
    auto counts = Bits::zero();
    for (std::int64_t i = 0; i < whole; i += Bits::kWords) {
      counts = Bits::add_differences(Bits::load(row + i), Bits::load(x + i), counts);
    }
    if (whole < words) {
      const std::int64_t left = words - whole;
      counts = Bits::add_differences(Bits::load_n(row + whole, left), Bits::load_n(x + whole, left), counts);
    }
    out[r] = Bits::sum(counts);
  }
}

}  // namespace
}  // namespace turbosparse
