// What module.cpp puts together.
#pragma once

#include <nanobind/nanobind.h>

namespace turbosparse {

/// Maps C++ errors to the classes of the same name in turbosparse.errors.
void bind_errors();
void bind_gguf(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);

}  // namespace turbosparse
