// The tables that a build for this processor family contains; which of them the CPU can run is found out in
// dispatch.cpp.
#pragma once

#include "kernels/kernels.h"

namespace turbosparse {

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table, kAvx512Table;
#elif defined(__aarch64__)
extern const KernelTable kNeonTable, kNeonDotprodTable;
#endif

}  // namespace turbosparse
