// turbosparse._native.GgufFile and GgufTensor: checked views of a mapped model file.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <filesystem>
#include <memory>

#include "bindings/bindings.h"
#include "io/ggml_types.h"
#include "io/gguf_file.h"

namespace nb = nanobind;

namespace turbosparse {
namespace {

using FilePtr = std::shared_ptr<const GgufFile>;

/// What Python holds. Tensors and arrays handed out share the file, so that the mapping outlives them.
struct FileView {
  FilePtr file;
};

struct TensorView {
  FilePtr file;
  const GgufTensor* tensor;
};

nb::object to_python(const GgufValue& value) {
  if (const auto* array = std::get_if<std::shared_ptr<const GgufArray>>(&value)) {
    nb::list list;
    for (std::size_t i = 0; i < (*array)->size; ++i) list.append(to_python((*array)->at(i)));
    return std::move(list);
  }
  if (const auto* text = std::get_if<std::string_view>(&value)) return nb::str(text->data(), text->size());
  if (const auto* u = std::get_if<std::uint64_t>(&value)) return nb::int_(*u);
  if (const auto* i = std::get_if<std::int64_t>(&value)) return nb::int_(*i);
  if (const auto* d = std::get_if<double>(&value)) return nb::float_(*d);
  return nb::bool_(std::get<bool>(value));
}

nb::dict metadata(const FileView& self) {
  nb::dict out;
  for (const auto& [key, value] : self.file->metadata())
    out[nb::str(key.data(), key.size())] = to_python(value);
  return out;
}

nb::dict metadata_kinds(const FileView& self) {
  const auto& file = self.file;
  nb::dict out;
  for (std::size_t i = 0; i < file->kinds().size(); ++i) {
    const auto& [key, value] = file->metadata()[i];
    std::string kind = gguf_kind_name(file->kinds()[i]);
    if (const auto* array = std::get_if<std::shared_ptr<const GgufArray>>(&value)) {
      kind = std::string(gguf_kind_name((*array)->kind)) + "[]";
    }
    out[nb::str(key.data(), key.size())] = nb::str(kind.data(), kind.size());
  }
  return out;
}

const GgufTensor& find_tensor(const FileView& self, std::string_view name) {
  const auto* tensor = self.file->tensor(name);
  if (tensor == nullptr) throw nb::key_error(std::string(name).c_str());
  return *tensor;
}

nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>> tensor_bytes(const FileView& self,
                                                                     std::string_view name) {
  const auto data = find_tensor(self, name).data;
  const nb::capsule owner(new FilePtr(self.file),
                          [](void* held) noexcept { delete static_cast<FilePtr*>(held); });
  return {reinterpret_cast<const std::uint8_t*>(data.data()), {data.size()}, owner};
}

}  // namespace

void bind_gguf(nb::module_& m) {
  nb::class_<TensorView>(m, "GgufTensor")
      .def_prop_ro("name", [](const TensorView& self) { return self.tensor->name; })
      .def_prop_ro("type", [](const TensorView& self) { return self.tensor->type; })
      .def_prop_ro("type_name",
                   [](const TensorView& self) { return find_ggml_type(self.tensor->type)->name; })
      .def_prop_ro("shape",
                   [](const TensorView& self) {
                     nb::list shape;
                     for (const auto dim : self.tensor->shape) shape.append(dim);
                     return nb::tuple(shape);
                   })
      .def_prop_ro("offset", [](const TensorView& self) { return self.tensor->offset; })
      .def_prop_ro("nbytes", [](const TensorView& self) { return self.tensor->data.size(); })
      .def("__repr__", [](const TensorView& self) {
        return "<GgufTensor " + self.tensor->name + " " + find_ggml_type(self.tensor->type)->name + ">";
      });

  nb::class_<FileView>(m, "GgufFile")
      .def(
          "__init__",
          [](FileView* self, const std::filesystem::path& path) {
            new (self) FileView{GgufFile::open(path.string())};
          },
          nb::arg("path"))
      .def_prop_ro("path",
                   [](const FileView& self) {
                     const auto& path = self.file->path();
                     return nb::steal<nb::str>(
                         PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
                   })
      .def_prop_ro("version", [](const FileView& self) { return self.file->version(); })
      .def_prop_ro("file_bytes", [](const FileView& self) { return self.file->file_bytes(); })
      .def_prop_ro("metadata", &metadata)
      .def_prop_ro("metadata_kinds", &metadata_kinds)
      .def_prop_ro("tensors",
                   [](const FileView& self) {
                     nb::list tensors;
                     for (const auto& tensor : self.file->tensors())
                       tensors.append(TensorView{self.file, &tensor});
                     return tensors;
                   })
      .def(
          "tensor",
          [](const FileView& self, std::string_view name) {
            return TensorView{self.file, &find_tensor(self, name)};
          },
          nb::arg("name"))
      .def("tensor_bytes", &tensor_bytes, nb::arg("name"));
}

}  // namespace turbosparse
