#include <Python.h>

#include <exception>
#include <string_view>

#include "bindings/bindings.h"
#include "util/error.h"

namespace nb = nanobind;

namespace turbosparse {
namespace {

/// Sets the Python error. The class is looked up when it is needed: errors are rare, and importing the
/// package from inside its own native module would be circular.
void raise(const char* name, const char* message) {
  nb::object type = nb::module_::import_("turbosparse.errors").attr(name);
  // A path may hold any bytes; the message must still reach the user.
  const auto size = static_cast<Py_ssize_t>(std::string_view(message).size());
  const nb::object text = nb::steal(PyUnicode_DecodeUTF8(message, size, "replace"));
  PyErr_SetObject(type.ptr(), text.ptr());
}

}  // namespace

void bind_errors() {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const ModelFileError& e) {
      raise("ModelFileError", e.what());
    } catch (const ConfigError& e) {
      raise("ConfigError", e.what());
    } catch (const ContextLengthError& e) {
      raise("ContextLengthError", e.what());
    } catch (const Error& e) {
      raise("EngineError", e.what());
    }
  });
}

}  // namespace turbosparse
