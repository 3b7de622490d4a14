// The tables this build contains. Null where the build's target has no such instruction set.
#pragma once

#include "kernels/kernels.h"

namespace turbosparse {

const KernelTable* scalar_table() noexcept;
const KernelTable* avx2_table() noexcept;
const KernelTable* avx512_table() noexcept;

}  // namespace turbosparse
