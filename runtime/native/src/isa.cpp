#include "isa.hpp"

#include <cstdlib>
#include <string>
#include <vector>

#include "safetensors.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tarflow::native {
namespace {

// Those of this machine, the best first.
std::vector<const Kernels*> present() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512_vnni::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#elif defined(__aarch64__) && defined(__linux__)
  if ((getauxval(AT_HWCAP) & (1ul << 20)) != 0) found.push_back(&neon::kernels);  // HWCAP_ASIMDDP
#elif defined(__aarch64__)
  found.push_back(&neon::kernels);  // Apple's all have the products of bytes
#endif
  found.push_back(&baseline::kernels);
  return found;
}

}  // namespace

const Kernels& best_kernels() {
  const std::vector<const Kernels*> found = present();
  const char* asked = std::getenv("TARFLOW_ISA");
  if (asked == nullptr || *asked == '\0') return *found.front();
  std::string names;
  for (const Kernels* kernels : found) {
    if (kernels->name == std::string(asked)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw Wrong("TARFLOW_ISA is '" + std::string(asked) + "'; this machine has " + names);
}

}  // namespace tarflow::native
