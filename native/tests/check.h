// The tests' one macro: a failed check says where and what, the process goes on and exits with 1.
#pragma once

#include <cstdio>

namespace turbosparse::test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int report() {
  if (failures() != 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace turbosparse::test

/// CHECK(condition, printf format and arguments that name the case)
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++turbosparse::test::failures();                                     \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
    }                                                                      \
  } while (false)
