// Target regions: functions between TURBOSPARSE_BEGIN_TARGET("...") and TURBOSPARSE_END_TARGET are compiled
// for the named instruction sets whatever the compiler's flags. Headers that code outside a region uses too
// must come before it, or that code would need these instructions as well: this one brings them all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/cached_tile.h"
#include "kernels/gemm_sizes.h"
#include "kernels/packed.h"
#include "kernels/tables.h"

// A #pragma takes no macro for its text, so that a region's features cannot be a constant.
#define TURBOSPARSE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TURBOSPARSE_BEGIN_TARGET(features) \
  TURBOSPARSE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TURBOSPARSE_END_TARGET TURBOSPARSE_PRAGMA(clang attribute pop)
#else
#define TURBOSPARSE_BEGIN_TARGET(features) \
  TURBOSPARSE_PRAGMA(GCC push_options) TURBOSPARSE_PRAGMA(GCC target(features))
#define TURBOSPARSE_END_TARGET TURBOSPARSE_PRAGMA(GCC pop_options)
#endif
