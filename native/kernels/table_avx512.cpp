#include "kernels/tables.h"
namespace turbosparse {
const KernelTable* avx512_table() noexcept { return nullptr; }
}  // namespace turbosparse
