// The Python module turbosparse._native: nothing but the list of what is bound.
#include "bindings/bindings.h"

NB_MODULE(_native, m) {
  m.doc() = "Native core of turbosparse: model files, kernels and the engine.";
  turbosparse::bind_errors();
  turbosparse::bind_gguf(m);
  turbosparse::bind_engine(m);
  turbosparse::bind_kernels(m);
}
