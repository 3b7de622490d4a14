// Neurons on disk: the numbers of an engine with everything in memory, whatever comes first; and a disk that
// fails while a token is computed, after which everybody can go on.
#include <algorithm>
#include <cerrno>
#include <deque>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "engine/session.h"
#include "tiny_gguf.h"
#include "util/error.h"

namespace turbosparse {
namespace {

using test::TinyGguf;
const std::vector<std::int32_t> kIds{3, 41, 7, 7, 19, 0, 33, 12, 25, 49};

/// A model as a file of its own.
class TempModel {
 public:
  explicit TempModel(const TinyGguf& model = TinyGguf::bundled_model()) {
    std::string folder = (std::filesystem::temp_directory_path() / "turbosparse-XXXXXX").string();
    if (::mkdtemp(folder.data()) == nullptr) std::abort();
    folder_ = folder;
    const std::vector<std::byte> bytes = model.bytes();
    std::ofstream(path(), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  ~TempModel() { std::filesystem::remove_all(folder_); }
  TempModel(const TempModel&) = delete;
  TempModel& operator=(const TempModel&) = delete;
  std::string path() const { return folder_ / "model.gguf"; }

 private:
  std::filesystem::path folder_;
};

/// Lets reads through until it is told to fail.
class FaultyReader final : public DiskReader {
 public:
  FaultyReader(std::unique_ptr<DiskReader> reader, std::shared_ptr<int> reads_left, int error)
      : reader_(std::move(reader)), reads_left_(std::move(reads_left)), error_(error) {}
  const char* name() const override { return "faulty"; }
  std::size_t depth() const override { return reader_->depth(); }
  void start(std::span<const DiskRead> reads) override { reader_->start(reads); }
  std::size_t wait(std::span<DiskDone> done) override {
    const std::size_t count = reader_->wait(done);
    for (std::size_t i = 0; i < count; ++i) {
      if ((*reads_left_)-- <= 0) done[i].error = error_;
    }
    return count;
  }

 private:
  std::unique_ptr<DiskReader> reader_;
  std::shared_ptr<int> reads_left_;
  int error_;
};

/// The model with as few neurons in memory as it can have, and some more if asked for: the hottest then.
std::shared_ptr<Model> load_small(const TempModel& file, int threads, const std::shared_ptr<int>& reads_left,
                                  int error, std::size_t more = 0) {
  auto model = std::make_shared<Model>(file.path(), threads, "", WeightType::kQ8_0);
  const Bundles& bundles = *model->weights->bundles;
  const std::int64_t token = model->config.token_neurons();
  const auto disk = std::make_shared<const DiskFile>(file.path(), true);
  auto reader = std::make_unique<FaultyReader>(make_pread_reader(disk), reads_left, error);
  std::vector<FfnBundles> ffns = bundles.ffns;
  for (FfnBundles& ffn : ffns) {
    for (std::int64_t n = 0; more > 0 && n < ffn.neurons; ++n)
      ffn.hotness.push_back(1.0F / static_cast<float>(1 + n));
  }
  const StoreRoom room{NeuronStore::minimum_bytes(bundles.layout, bundles.ffns, token) + more, 0};
  model->store = std::make_unique<NeuronStore>(bundles.layout, std::move(ffns), model->pool, token, room,
                                               disk, std::move(reader));
  return model;
}

std::vector<float> run(Session& session, Mode mode, bool stepwise) {
  const auto vocab = static_cast<std::size_t>(session.model().config.vocab_size);
  std::vector<float> logits(kIds.size() * vocab);
  session.truncate(0);
  const ForwardOptions options{.mode = mode, .logits = WantedLogits::kAll};
  if (!stepwise) session.forward(kIds, options, logits.data());
  for (std::size_t i = 0; stepwise && i < kIds.size(); ++i) {
    session.forward(std::span(kIds).subspan(i, 1), options, logits.data() + i * vocab);
  }
  return logits;
}

void test_same_numbers(const TinyGguf& tiny) {
  const TempModel file(tiny);
  for (const int threads : {1, 3}) {
    Session memory(std::make_shared<const Model>(file.path(), threads, "", WeightType::kQ8_0), 16);
    Session disk(load_small(file, threads, std::make_shared<int>(1 << 30), EIO), 16);
    CHECK(disk.model().on_disk() && !memory.model().on_disk(), "%d threads", threads);
    for (const Mode mode : {Mode::kDense, Mode::kExact, Mode::kThreshold, Mode::kPredicted}) {
      for (const bool stepwise : {true, false}) {
        CHECK(run(disk, mode, stepwise) == run(memory, mode, stepwise), "mode %s stepwise %d",
              mode_name(mode), stepwise);
      }
    }
    std::int64_t cached = 0, missed = 0, foreseen = 0;
    for (const LayerCounts& layer : disk.counters().layers) {
      cached += layer.cached;
      missed += layer.missed;
      foreseen += layer.foreseen;
    }
    CHECK(foreseen > 0 && foreseen < missed, "%ld foreseen", static_cast<long>(foreseen));
    CHECK(cached > 0 && missed > 0, "%ld cached, %ld missed", static_cast<long>(cached),
          static_cast<long>(missed));
  }
}

/// Memory begins with the hottest neurons, pinned or not, which changes no number.
void test_filled(const TinyGguf& tiny) {
  const TempModel file(tiny);
  Session memory(std::make_shared<const Model>(file.path(), 1, "", WeightType::kQ8_0), 16);
  std::int64_t before = 0;
  for (const std::size_t more : {std::size_t{0}, std::size_t{20} << 10}) {
    Session disk(load_small(file, 3, std::make_shared<int>(1 << 30), EIO, more), 16);
    std::vector<float> logits(static_cast<std::size_t>(disk.model().config.vocab_size));
    disk.forward(std::span(kIds).first(1), {.mode = Mode::kExact}, logits.data());
    std::int64_t cached = 0;
    for (const LayerCounts& layer : disk.counters().layers) cached += layer.cached;
    CHECK(more == 0 ? cached == 0 : cached > 0, "%ld cached of the first token", static_cast<long>(cached));
    for (const bool stepwise : {true, false}) {
      CHECK(run(disk, Mode::kExact, stepwise) == run(memory, Mode::kExact, stepwise), "stepwise %d",
            stepwise);
    }
    before = cached;
  }
  CHECK(before > 0, "nothing was filled");
}

void test_faults(const TinyGguf& tiny) {
  const TempModel file(tiny);
  for (const int error : {EIO, kEndOfFile}) {
    const auto reads_left = std::make_shared<int>(1 << 30);
    const std::shared_ptr<Model> model = load_small(file, 2, reads_left, error);
    Session session(model, 16), other(model, 16);
    for (const bool stepwise : {true, false}) {
      const std::vector<float> before = run(session, Mode::kPredicted, stepwise);
      const std::vector<float> others = run(other, Mode::kExact, stepwise);
      for (const int reads : {0, 1}) {
        *reads_left = reads;
        std::string message;
        try {
          (void)run(session, Mode::kExact, stepwise);
        } catch (const EngineError& e) {
          message = e.what();
        }
        CHECK(message.find(disk_error_text(error)) != std::string::npos, "%d reads: %s", reads,
              message.c_str());
        *reads_left = 1 << 30;
        CHECK(run(other, Mode::kExact, stepwise) == others, "another session after %d reads", reads);
        CHECK(run(session, Mode::kPredicted, stepwise) == before, "after %d reads", reads);
      }
    }
  }
}

/// Reads nothing; says how many reads were on their way at once.
class CountingReader final : public DiskReader {
 public:
  explicit CountingReader(std::shared_ptr<std::size_t> most) : most_(std::move(most)) {}
  const char* name() const override { return "counting"; }
  std::size_t depth() const override { return 64; }
  void start(std::span<const DiskRead> reads) override {
    for (const DiskRead& read : reads) {
      waiting_.push_back(read);
      CHECK(read.offset % 4096 == 0 && read.bytes % 4096 == 0, "offset %zu", std::size_t{read.offset});
    }
    *most_ = std::max(*most_, waiting_.size());
  }
  std::size_t wait(std::span<DiskDone> done) override {
    std::size_t count = 0;
    for (; count < done.size() && !waiting_.empty(); ++count, waiting_.pop_front()) {
      done[count] = {waiting_.front().tag, 0};
    }
    return count;
  }

 private:
  std::shared_ptr<std::size_t> most_;
  std::deque<DiskRead> waiting_;
};

/// Of a file whose neurons are numbered, one byte of a bundle says which neuron it is.
constexpr std::int64_t kNumbered = 512;

/// Fills what it reads with the number of the neuron, 4096 bytes each; the newest read ends first. Those of
/// the neurons it was told of fail.
class NumberingReader final : public DiskReader {
 public:
  NumberingReader(std::shared_ptr<std::vector<DiskRead>> asked, std::int64_t broken)
      : asked_(std::move(asked)), broken_(broken) {}
  const char* name() const override { return "numbering"; }
  std::size_t depth() const override { return 64; }
  void start(std::span<const DiskRead> reads) override {
    for (const DiskRead& read : reads) {
      waiting_.push_back(read);
      asked_->push_back(read);
    }
  }
  std::size_t wait(std::span<DiskDone> done) override {
    if (waiting_.empty()) return 0;
    const DiskRead read = waiting_.back();
    waiting_.pop_back();
    const auto first = static_cast<std::int64_t>(read.offset / kDiskBlock);
    const auto end = first + static_cast<std::int64_t>(read.bytes / kDiskBlock);
    for (std::int64_t n = first; n < end; ++n)
      std::fill_n(read.to + static_cast<std::size_t>(n - first) * kDiskBlock, kDiskBlock,
                  static_cast<std::byte>(n % 251));
    done[0] = {read.tag, first <= broken_ && broken_ < end ? EIO : 0};
    return 1;
  }

 private:
  std::shared_ptr<std::vector<DiskRead>> asked_;
  std::int64_t broken_;
  std::deque<DiskRead> waiting_;
};

/// What is guessed is read before it is asked for, neighbours together; wrong and failed guesses cost
/// nothing.
void test_guesses() {
  ThreadPool pool(1);
  BundleLayout layout{.parts = {}, .cols = 16, .bytes = 64, .file_bytes = kDiskBlock, .cluster = 1};
  layout.parts[1] = {.there = true, .type = WeightType::kF32, .offset = 0};
  const std::vector<FfnBundles> ffns{
      {.offset = 0, .data = {}, .file = nullptr, .neurons = kNumbered, .hotness = {}}};
  const auto asked = std::make_shared<std::vector<DiskRead>>();
  const StoreRoom room{NeuronStore::minimum_bytes(layout, ffns, 64), 0};
  NeuronStore store(layout, ffns, pool, 64, room, nullptr, std::make_unique<NumberingReader>(asked, 300));
  const auto list = [](const std::vector<std::int32_t>& neurons) {
    return NeuronList{0, neurons.data(), static_cast<std::int64_t>(neurons.size())};
  };
  const std::vector<std::int32_t> guessed{100, 101, 102, 103, 200, 300, 400};
  const std::vector<std::int32_t> wanted{101, 102, 201, 400, 401};
  const NeuronList guess = list(guessed), want = list(wanted);
  CHECK(store.foresee({&guess, 1}) == 7 * 4096, "bytes of guesses");
  CHECK(asked->size() == 4 && asked->front().bytes == 4 * kDiskBlock, "%zu reads", asked->size());
  std::vector<std::int32_t> rows(64), ready(64);
  const FetchCounts counts = store.fetch({&want, 1}, rows.data(), ready.data());
  CHECK(counts.cached == 0 && counts.missed == 5 && counts.foreseen == 3 && counts.bytes == 2 * 4096,
        "%ld foreseen", static_cast<long>(counts.foreseen));
  std::array<ListRange, 2> parts;
  std::int64_t came = 0;
  for (std::int64_t n; (n = store.arrived(parts)) > 0; came += n) {
    for (const ListRange& part : std::span(parts).first(static_cast<std::size_t>(n))) {
      const Matrix all = store.rows(Projection::kUp);
      const std::int32_t row = rows[static_cast<std::size_t>(part.begin)];
      CHECK(all.data[static_cast<std::size_t>(row) * all.row_bytes] ==
                static_cast<std::byte>(wanted[static_cast<std::size_t>(part.begin)] % 251),
            "neuron %d", wanted[static_cast<std::size_t>(part.begin)]);
    }
  }
  CHECK(came == 5 && store.take_error().empty(), "%ld came", static_cast<long>(came));
  // Guesses that are on their way end before the same memory is used for stripes.
  const std::vector<std::int32_t> failing{299, 300, 301};
  const NeuronList fails = list(failing);
  CHECK(store.foresee({&fails, 1}) == 3 * 4096, "neurons that are not there yet");
  store.stream(0);
  CHECK(store.stripe(0) == kNumbered * 4096 &&
            store.stripe_matrix(0, 0, Projection::kUp).data[5 * 4096] == static_cast<std::byte>(5),
        "a stripe after a guess");
  CHECK(!store.take_error().empty(), "the stripe's own error");
  const std::size_t before = asked->size();
  const FetchCounts again = store.fetch({&fails, 1}, rows.data(), ready.data());
  CHECK(asked->size() == before + 1, "%zu reads instead of one", asked->size() - before);
  CHECK(again.foreseen == 0 && again.missed == 3, "guesses are forgotten");
  while (store.arrived(parts) > 0) {
  }
  CHECK(!store.take_error().empty(), "a neuron that can't be read");
}

/// However large its neurons are, an FFN that is streamed does not ask for more than a reader takes.
void test_reads_on_their_way() {
  ThreadPool pool(1);
  for (const std::int64_t cols : {512, 1000, 4096}) {  // F32: 6 to 48 KiB per neuron
    BundleLayout layout{.parts = {}, .cols = cols, .cluster = 1};
    for (BundleLayout::Part& part : layout.parts) {
      part = {.there = true, .type = WeightType::kF32, .offset = layout.bytes};
      layout.bytes += static_cast<std::size_t>(cols) * sizeof(float);
    }
    layout.file_bytes = (layout.bytes + 4095) / 4096 * 4096;
    const std::int64_t neurons = 3 * NeuronStore::kStripe + 32;
    const std::vector<FfnBundles> ffns{
        {.offset = 8192, .data = {}, .file = nullptr, .neurons = neurons, .hotness = {}}};
    const auto most = std::make_shared<std::size_t>(0);
    const StoreRoom room{NeuronStore::minimum_bytes(layout, ffns, 32), 0};
    NeuronStore store(layout, ffns, pool, 32, room, nullptr, std::make_unique<CountingReader>(most));
    store.stream(0);
    std::int64_t bytes = 0;
    for (std::int64_t index = 0; index < 4; ++index) bytes += store.stripe(index);
    CHECK(bytes == neurons * static_cast<std::int64_t>(layout.file_bytes), "%ld bytes",
          static_cast<long>(bytes));
    CHECK(*most > 0 && *most <= 64, "%ld columns: %zu reads at once", static_cast<long>(cols), *most);
  }
}

void test_budget() {
  const TempModel file;
  const auto load = [&](std::size_t budget) {
    return std::make_shared<const Model>(file.path(), 1, "", WeightType::kQ8_0,
                                         MemoryOptions{budget, 16, "pread", ""});
  };
  std::string message;
  try {
    (void)load(1);
  } catch (const ConfigError& e) {
    message = e.what();
  }
  CHECK(message.find("expected at least") != std::string::npos, "%s", message.c_str());
  const std::shared_ptr<const Model> roomy = load(std::size_t{1} << 24);
  CHECK(!roomy->on_disk(), "everything fits");
  const Session first(roomy, 16);
  bool refused = false;
  try {
    std::vector<std::unique_ptr<Session>> sessions;
    for (int i = 0; i < 1000; ++i) sessions.push_back(std::make_unique<Session>(roomy, 128));
  } catch (const ConfigError&) {
    refused = true;
  }
  CHECK(refused, "a thousand sessions");
  const Session again(roomy, 128);
}

}  // namespace
}  // namespace turbosparse

int main() {
  using turbosparse::test::TinyGguf;
  for (const TinyGguf& tiny : {TinyGguf::bundled_model(), TinyGguf::bundled_expert_model()}) {
    turbosparse::test_same_numbers(tiny);
    turbosparse::test_filled(tiny);
    turbosparse::test_faults(tiny);
  }
  turbosparse::test_guesses();
  turbosparse::test_reads_on_their_way();
  turbosparse::test_budget();
  return turbosparse::test::report();
}
