// The instruction sets that this machine has, and running with less than the best of them.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "native.h"

namespace support {

// TARFLOW_ISA for as long as this lives.
class Lowered {
 public:
  explicit Lowered(const char* isa) { setenv("TARFLOW_ISA", isa, 1); }
  ~Lowered() { unsetenv("TARFLOW_ISA"); }
};

// The best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const char* name : {"avx512_vnni", "avx512", "avx2", "neon", "baseline"}) {
    const Lowered isa(name);
    if (tarflow_native_isa() != nullptr) found.emplace_back(name);
  }
  return found;
}

}  // namespace support
