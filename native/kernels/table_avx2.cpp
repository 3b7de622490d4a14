#include "kernels/tables.h"
namespace turbosparse {
const KernelTable* avx2_table() noexcept { return nullptr; }
}  // namespace turbosparse
