// Bundles in a model file: the rows of gate, up and down_t of one neuron behind each other, packed as kernels
// read them, so that a neuron is one read. docs/format.md has the layout.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "io/gguf_file.h"
#include "kernels/kernels.h"

namespace turbosparse {

enum class Projection : std::uint8_t { kGate = 0, kUp, kDown };

/// How the rows of one neuron lie behind each other.
struct BundleLayout {
  struct Part {
    bool there = false;
    WeightType type = WeightType::kF32;
    std::size_t offset = 0;  // in the bundle
  };
  std::array<Part, 3> parts;   // by Projection
  std::int64_t cols = 0;       // D
  std::size_t bytes = 0;       // of the rows, and so from one bundle to the next in memory
  std::size_t file_bytes = 0;  // the same in the file
  std::int64_t cluster = 0;    // neurons that are read at a time
  std::size_t read_bytes() const { return file_bytes * static_cast<std::size_t>(cluster); }
  const Part& part(Projection p) const { return parts[static_cast<std::size_t>(p)]; }
};

/// The bundles of one FFN in the file.
struct FfnBundles {
  std::uint64_t offset = 0;
  std::span<const std::byte> data;
  const GgufFile* file = nullptr;  // that data is a part of
  std::int64_t neurons = 0;
  std::vector<float> hotness;  // [neurons] share of tokens that need it, descending; or empty
};

/// All bundles of a file, in the order of layers and their FFNs.
struct Bundles {
  BundleLayout layout;
  std::vector<FfnBundles> ffns;
};

/// Whether the file has bundles.
bool has_bundles(const GgufFile& file);
/// What the keys say of them. Throws ModelFileError.
BundleLayout read_bundle_layout(const GgufFile& file, std::int64_t hidden_size, bool gated);
/// The bundles of `ffns` FFNs of `neurons` neurons each, one after the other. Throws ModelFileError where the
/// tensor does not match the model.
std::vector<FfnBundles> split_bundles(const GgufFile& file, const GgufTensor& tensor,
                                      const BundleLayout& layout, std::int64_t ffns, std::int64_t neurons);

}  // namespace turbosparse
