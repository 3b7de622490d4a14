// The Python module turbosparse._native: nothing but the list of what is bound.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) { m.doc() = "Native core of turbosparse: model files, kernels and the engine."; }
