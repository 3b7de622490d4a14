// Which instruction sets there are, and the choice of one.
#include <cstdlib>

#include "kernels/gemm_sizes.h"
#include "kernels/tables.h"
#include "util/error.h"

namespace turbosparse {
namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
  if (avx512_table() != nullptr && cpu_has_avx512()) tables.push_back(avx512_table());
  if (avx2_table() != nullptr && cpu_has_avx2()) tables.push_back(avx2_table());
  tables.push_back(scalar_table());
  return tables;
}

}  // namespace

std::size_t gemm_scratch_bytes(std::int64_t) { return kPanelBytes + kTokenBytes; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_tables()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernel_table(const std::string& isa) {
  std::string name = isa;
  if (name.empty()) {
    const char* from_environment = std::getenv("TURBOSPARSE_ISA");
    if (from_environment != nullptr) name = from_environment;
  }
  const std::vector<const KernelTable*> tables = usable_tables();
  if (name.empty()) return *tables.front();
  std::string known;
  for (const KernelTable* table : tables) {
    if (name == table->isa) return *table;
    known += known.empty() ? "" : ", ";
    known += table->isa;
  }
  throw ConfigError("[isa] expected one of " + known + ", got '" + name + "'");
}

}  // namespace turbosparse
