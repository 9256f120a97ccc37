// The choice of the instruction set for the whole process.
#include <atomic>
#include <vector>

#include "common.h"

namespace {

struct Set {
  const char* name;
  InstructionSet set;
  bool supported;
};

#if defined(SAFECL_X86_SETS)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<Set>& sets() {  // best first
  static const std::vector<Set> found = {
#if defined(SAFECL_X86_SETS)
      {"avx512", kAvx512, has_avx512()},
      {"avx2", kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", kBaseline, true},
  };
  return found;
}

const Set* best_set() {
  for (const Set& set : sets())
    if (set.supported) return &set;
  return nullptr;
}

std::atomic<const Set*> chosen{nullptr};

const Set& current_set() {
  if (!chosen.load()) chosen.store(best_set());
  return *chosen.load();
}

}  // namespace

InstructionSet instruction_set() { return current_set().set; }

EXPORT const char* safecl_instruction_set() { return current_set().name; }

// Switches the whole process to an instruction set, for tests and comparisons of speed. Returns 0 if the CPU lacks the
// set or the name is unknown.
EXPORT int safecl_use_instruction_set(const char* name) {
  for (const Set& set : sets()) {
    if (set.supported && std::strcmp(set.name, name) == 0) {
      chosen.store(&set);
      return 1;
    }
  }
  return 0;
}
