#include <Python.h>

#include <exception>

#include "bindings/bindings.h"
#include "util/error.h"

namespace nb = nanobind;

namespace turbosparse {
namespace {

/// Sets the Python error. The class is looked up when it is needed: errors are rare, and importing the
/// package from inside its own native module would be circular.
void raise(const char* name, const char* message) {
  nb::object type = nb::module_::import_("turbosparse.errors").attr(name);
  PyErr_SetString(type.ptr(), message);
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
