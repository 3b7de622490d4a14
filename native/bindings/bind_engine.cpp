// turbosparse._native.Model, ModelInfo and Session: the engine as Python sees it. No arithmetic here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>

#include "bindings/bindings.h"
#include "engine/bandwidth.h"
#include "engine/session.h"
#include "io/read_bursts.h"
#include "util/error.h"
#include "util/thread_pool.h"

namespace nb = nanobind;

namespace turbosparse {
namespace {

using ModelPtr = std::shared_ptr<const Model>;
using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Integers = nb::ndarray<nb::numpy, std::int32_t, nb::ndim<2>>;

/// What Python holds of a model, and its info. Sessions share the model as well.
struct ModelView {
  ModelPtr model;
};
struct InfoView {
  ModelPtr model;
};

/// A copy: what Python does to its array while the engine computes must not meet ids that were checked.
std::vector<std::int32_t> own(const Ids& ids) { return {ids.data(), ids.data() + ids.shape(0)}; }

/// An uninitialised array that Python owns.
template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> make_array(std::int64_t rows, std::int64_t cols) {
  auto data = std::make_unique<T[]>(static_cast<std::size_t>(rows * cols));
  T* values = data.get();
  const nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return {values, {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)}, owner};
}

/// Raises the error of a pending signal (KeyboardInterrupt), at most once in 20 ms: taking the GIL from a
/// busy Python thread may cost several.
std::function<void()> signal_check() {
  constexpr std::chrono::milliseconds kPeriod{20};
  return [next = std::chrono::steady_clock::now() + kPeriod, kPeriod]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now < next) return;
    next = now + kPeriod;
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  };
}

std::function<void()> stop_check(const nb::object& should_stop) {
  if (should_stop.is_none()) return {};
  return [&should_stop] {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (nb::cast<bool>(nb::bool_(should_stop()))) throw Interrupted();
  };
}

WeightType parse_transcode(const std::string& name) {
  for (int i = 0; i < kWeightTypes; ++i) {
    if (name == weight_type_name(static_cast<WeightType>(i))) return static_cast<WeightType>(i);
  }
  throw ConfigError("[transcode] expected F32, F16, BF16, Q8_0 or Q4_0, got " + name);
}

ModelPtr load(const std::filesystem::path& path, int threads, const std::string& isa,
              const std::string& transcode, const MemoryOptions& memory) {
  const WeightType type = parse_transcode(transcode);
  const nb::gil_scoped_release release;
  return std::make_shared<const Model>(path.string(), threads, isa, type, memory);
}

const bool* checked_mask(const std::optional<Mask>& mask, const ModelConfig& config, std::size_t tokens) {
  if (!mask) return nullptr;
  const auto layers = static_cast<std::size_t>(config.num_hidden_layers);
  const auto neurons = static_cast<std::size_t>(config.layer_neurons());
  if (mask->shape(0) != layers || mask->shape(1) != tokens || mask->shape(2) != neurons) {
    const auto text = [](std::size_t a, std::size_t b, std::size_t c) {
      return "(" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + ")";
    };
    throw ConfigError("[candidates] expected shape " + text(layers, tokens, neurons) + ", got " +
                      text(mask->shape(0), mask->shape(1), mask->shape(2)));
  }
  return mask->data();
}

/// Asks Python which neurons to compute.
Choose python_choice(const nb::object& choose, const ModelConfig& config) {
  if (choose.is_none()) return {};
  const auto neurons = static_cast<std::size_t>(config.layer_neurons());
  return [&choose, neurons](std::int64_t layer, std::int64_t tokens, const float* gate, const float* up,
                            bool* kept) {
    using View = nb::ndarray<nb::numpy, const float, nb::ndim<2>>;
    using Chosen = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    const nb::gil_scoped_acquire gil;
    const auto T = static_cast<std::size_t>(tokens);
    // Copies, one by one: what a signal's handler raises in the first must not meet the second.
    const nb::object gates = nb::cast(View(gate, {T, neurons}));
    const nb::object ups = nb::cast(View(up, {T, neurons}));
    const nb::object found = choose(layer, gates, ups);
    Chosen mask;
    if (!nb::try_cast(found, mask) || mask.shape(0) != T || mask.shape(1) != neurons) {
      throw ConfigError("[choose] expected a bool array of shape (" + std::to_string(T) + ", " +
                        std::to_string(neurons) + "), got something else");
    }
    std::copy_n(mask.data(), T * neurons, kept);
  };
}

Floats forward(Session& self, const Ids& ids, const std::string& mode, const std::string& logits,
               const nb::object& should_stop, const std::optional<Mask>& candidates,
               const nb::object& choose) {
  const WantedLogits wanted = parse_wanted_logits(logits);
  if (candidates && !choose.is_none()) throw ConfigError("[forward] expected candidates or choose, got both");
  const ForwardOptions options{.mode = parse_mode(mode),
                               .logits = wanted,
                               .candidates = checked_mask(candidates, self.model().config, ids.shape(0)),
                               .choose = python_choice(choose, self.model().config),
                               .between_layers = signal_check(),
                               .between_chunks = stop_check(should_stop)};
  const std::int64_t rows = Session::logit_rows(wanted, static_cast<std::int64_t>(ids.shape(0)));
  Floats out = make_array<float>(rows, self.model().config.vocab_size);
  const std::vector<std::int32_t> tokens = own(ids);
  const nb::gil_scoped_release release;
  self.forward(tokens, options, out.data());
  return out;
}

nb::list capture(Session& self, const Ids& ids, const std::vector<std::int64_t>& layers) {
  const ModelConfig& config = self.model().config;
  const std::vector<std::int32_t> own_ids = own(ids);
  const auto tokens = static_cast<std::int64_t>(own_ids.size());
  nb::list arrays;
  std::vector<CapturedLayer> wanted;
  for (const std::int64_t layer : layers) {
    if (layer < 0 || layer >= config.num_hidden_layers) {
      throw ConfigError("[layers] expected 0 to " + std::to_string(config.num_hidden_layers - 1) + ", got " +
                        std::to_string(layer));
    }
    if (std::ranges::find(wanted, layer, &CapturedLayer::layer) != wanted.end())
      throw ConfigError("[layers] expected each layer once, got " + std::to_string(layer) + " twice");
    Floats gate = make_array<float>(tokens, config.layer_neurons());
    Floats up = make_array<float>(tokens, config.layer_neurons());
    Floats out = make_array<float>(tokens, config.hidden_size);
    Floats residual = make_array<float>(tokens, config.hidden_size);
    Integers experts = make_array<std::int32_t>(tokens, config.router.used);
    wanted.push_back({layer, gate.data(), up.data(), out.data(), residual.data(), experts.data()});
    arrays.append(nb::make_tuple(std::move(gate), std::move(up), std::move(out), std::move(residual),
                                 std::move(experts)));
  }
  const nb::gil_scoped_release release;
  self.capture(own_ids, wanted, signal_check());
  return arrays;
}

nb::dict counters(Session& self) {
  const Counters counters = self.counters();
  const auto per_layer = [&](std::int64_t LayerCounts::* count) {
    nb::list values;
    for (const LayerCounts& layer : counters.layers) values.append(layer.*count);
    return values;
  };
  nb::dict out;
  out["tokens"] = counters.tokens;
  out["candidates"] = per_layer(&LayerCounts::candidates);
  out["gate_passed"] = per_layer(&LayerCounts::gate_passed);
  out["active"] = per_layer(&LayerCounts::active);
  out["refined"] = per_layer(&LayerCounts::refined);
  out["wanted"] = per_layer(&LayerCounts::wanted);
  out["found"] = per_layer(&LayerCounts::found);
  out["bytes_read"] = counters.bytes_read;
  out["decode_tokens"] = counters.decode_tokens;
  out["cached"] = per_layer(&LayerCounts::cached);
  out["missed"] = per_layer(&LayerCounts::missed);
  out["disk_bytes"] = per_layer(&LayerCounts::disk_bytes);
  out["foreseen"] = per_layer(&LayerCounts::foreseen);
  out["disk_wait_ns"] = per_layer(&LayerCounts::disk_wait_ns);
  const auto times = [](const PartTimes& parts) {
    nb::dict named;
    for (std::size_t part = 0; part < parts.size(); ++part) named[kPartNames[part]] = parts[part];
    return named;
  };
  out["decode_ns"] = times(counters.decode_times);
  out["batch_ns"] = times(counters.batch_times);
  return out;
}

std::vector<std::string> mode_names(const InfoView& self) {
  std::vector<std::string> names;
  for (const Mode mode : self.model->modes()) names.emplace_back(mode_name(mode));
  return names;
}

nb::object memory(const InfoView& self) {
  const Model& model = *self.model;
  if (!model.on_disk()) return nb::none();
  nb::dict out;
  out["pinned_neurons"] = model.store->pinned_neurons();
  out["cached_neurons"] = model.store->cached_neurons();
  out["neuron_bytes"] = model.store->layout().bytes;
  out["read_bytes"] = model.store->layout().read_bytes();
  out["io"] = model.store->reader_name();
  out["io_note"] = model.io_note;
  return std::move(out);
}

nb::dict plan_memory(const std::filesystem::path& path, int threads, const std::string& transcode,
                     std::size_t memory_budget, std::int64_t context, const std::string& kv_cache) {
  const MemoryPlan plan =
      Model::plan(path.string(), threads, parse_transcode(transcode), {memory_budget, context, "", kv_cache});
  nb::dict out;
  out["dense"] = plan.dense;
  out["gates"] = plan.gates;
  out["predictors"] = plan.predictors;
  out["per_neuron"] = plan.per_neuron;
  out["cache"] = plan.cache;
  out["scratch"] = plan.scratch;
  out["all_neurons"] = plan.all_neurons;
  out["buffers"] = plan.buffers;
  out["fewest_neurons"] = plan.fewest_neurons;
  out["kept_clusters"] = plan.clusters.kept;
  out["pinned_clusters"] = plan.clusters.pinned;
  out["least"] = plan.least();
  out["everything"] = plan.everything();
  return out;
}

nb::tuple read_bursts(const std::filesystem::path& path, const std::string& io, std::size_t read_bytes,
                      std::uint64_t begin, std::uint64_t end, std::size_t reads, double seconds) {
  BurstTime found;
  {
    const nb::gil_scoped_release release;
    found = time_read_bursts(path.string(), io, {begin, end, read_bytes, reads}, seconds);
  }
  return nb::make_tuple(found.seconds, found.reader);
}

void bind_info(nb::module_& m) {
  const auto size = [](std::int64_t ModelConfig::* field) {
    return [field](const InfoView& self) { return self.model->config.*field; };
  };
  nb::class_<InfoView>(m, "ModelInfo")
      .def_prop_ro("architecture", [](const InfoView& self) { return self.model->config.architecture; })
      .def_prop_ro("hidden_size", size(&ModelConfig::hidden_size))
      .def_prop_ro("intermediate_size", size(&ModelConfig::intermediate_size))
      .def_prop_ro("shared_intermediate_size", size(&ModelConfig::shared_intermediate_size))
      .def_prop_ro("num_experts", [](const InfoView& self) { return self.model->config.router.experts; })
      .def_prop_ro("num_experts_per_tok", [](const InfoView& self) { return self.model->config.router.used; })
      .def_prop_ro("layer_neurons", [](const InfoView& self) { return self.model->config.layer_neurons(); })
      .def_prop_ro("token_neurons", [](const InfoView& self) { return self.model->config.token_neurons(); })
      .def_prop_ro("num_hidden_layers", size(&ModelConfig::num_hidden_layers))
      .def_prop_ro("num_attention_heads", size(&ModelConfig::num_attention_heads))
      .def_prop_ro("num_key_value_heads", size(&ModelConfig::num_key_value_heads))
      .def_prop_ro("head_dim", size(&ModelConfig::head_dim))
      .def_prop_ro("vocab_size", size(&ModelConfig::vocab_size))
      .def_prop_ro("context_length", size(&ModelConfig::context_length))
      .def_prop_ro("activation",
                   [](const InfoView& self) { return activation_name(self.model->config.activation); })
      .def_prop_ro("modes", mode_names)
      .def_prop_ro("neuron_major_down",
                   [](const InfoView& self) { return self.model->weights->neuron_major; })
      .def_prop_ro("weight_bytes", [](const InfoView& self) { return self.model->weights->bytes; })
      .def_prop_ro("memory", memory)
      .def_prop_ro("transcoded", [](const InfoView& self) { return self.model->weights->transcoded; })
      .def_prop_ro("ffn_types", [](const InfoView& self) { return self.model->weights->ffn_types; });
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind_info(m);
  nb::class_<Session>(m, "Session")
      .def_prop_ro("context", &Session::context)
      .def_prop_ro("position", &Session::position)
      .def("truncate", &Session::truncate, nb::arg("position"))
      .def("forward", &forward, nb::arg("ids").noconvert(), nb::kw_only(), nb::arg("mode") = "dense",
           nb::arg("logits") = "last", nb::arg("should_stop") = nb::none(),
           nb::arg("candidates") = nb::none(), nb::arg("choose") = nb::none())
      .def("capture", &capture, nb::arg("ids").noconvert(), nb::arg("layers"))
      .def_prop_rw("profiling", &Session::profiling, &Session::set_profiling)
      .def_prop_rw("skipping", &Session::skipping, &Session::set_skipping)
      .def_prop_ro("counters", &counters)
      .def("reset_counters", &Session::reset_counters);
  nb::class_<ModelView>(m, "Model")
      .def(
          "__init__",
          [](ModelView* self, const std::filesystem::path& path, int threads, const std::string& isa,
             const std::string& transcode, std::size_t memory_budget, std::int64_t context,
             const std::string& io, const std::string& kv_cache) {
            new (self) ModelView{load(path, threads, isa, transcode, {memory_budget, context, io, kv_cache})};
          },
          nb::arg("path"), nb::kw_only(), nb::arg("threads") = 0, nb::arg("isa") = "",
          nb::arg("transcode") = "Q8_0", nb::arg("memory_budget") = 0, nb::arg("context") = 0,
          nb::arg("io") = "", nb::arg("kv_cache") = "")
      .def_prop_ro("info", [](const ModelView& self) { return InfoView{self.model}; })
      .def_prop_ro("threads", [](const ModelView& self) { return self.model->pool.size(); })
      .def("pin_threads", [](const ModelView& self) { self.model->pool.pin(); })
      .def_prop_ro("isa", [](const ModelView& self) { return self.model->kernels.isa; })
      .def_prop_ro("kv_cache", [](const ModelView& self) { return kv_type_name(self.model->kv_type); })
      .def(
          "session",
          [](const ModelView& self, std::int64_t context) { return new Session(self.model, context); },
          nb::arg("context"), nb::rv_policy::take_ownership);
  m.def("plan_memory", &plan_memory, nb::arg("path"), nb::kw_only(), nb::arg("threads") = 0,
        nb::arg("transcode") = "Q8_0", nb::arg("memory_budget"), nb::arg("context"),
        nb::arg("kv_cache") = "");
  m.def("time_read_bursts", &read_bursts, nb::arg("path"), nb::kw_only(), nb::arg("io") = "",
        nb::arg("read_bytes"), nb::arg("begin"), nb::arg("end"), nb::arg("reads"), nb::arg("seconds") = 0.5);
  m.def("available_isas", &available_isas);
  m.def("thread_count", &thread_count, nb::arg("requested"));
  m.def(
      "read_bandwidth",
      [](int threads, std::size_t buffer_bytes, std::size_t row_bytes, std::size_t one_in, double seconds) {
        return read_bandwidth(threads, {buffer_bytes, row_bytes, one_in}, seconds);
      },
      nb::arg("threads"), nb::arg("buffer_bytes"), nb::kw_only(), nb::arg("row_bytes") = 0,
      nb::arg("one_in") = 1, nb::arg("seconds") = 0.5, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace turbosparse
