// Which instruction sets there are, and the choice of one.
#include <cstdlib>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels/gemm_sizes.h"
#include "kernels/tables.h"
#include "util/error.h"

namespace turbosparse {
namespace {

#if defined(__x86_64__)

bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

#elif defined(__aarch64__)

bool cpu_has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t bytes = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &bytes, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

#endif

/// Best first.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  if (cpu_has_avx512()) tables.push_back(&kAvx512Table);
  if (cpu_has_avx2()) tables.push_back(&kAvx2Table);
#elif defined(__aarch64__)
  if (cpu_has_dotprod()) tables.push_back(&kNeonDotprodTable);
  tables.push_back(&kNeonTable);
#endif
  tables.push_back(&kScalarTable);
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
