// The entry points of the kernels for merges by election. They work in the caller's thread: a merge reads, computes and
// writes in a thread each, and reading takes longest.
#include "ties.h"

#include "common.h"

namespace {

constexpr int kGroup = 64;  // elements that are worked on together

using Group = float[kGroup];

struct KernelTable {
  void (*bracket)(BracketCall&);
  void (*elect)(const ElectionCall&);
};

inline int32_t magnitude(float value) { return static_cast<int32_t>(to_bits(value) & 0x7fffffffu); }

}  // namespace

namespace baseline {
#include "ties_kernels.inc"
}

#if defined(SAFECL_X86_SETS)
#pragma GCC push_options
#pragma GCC target("avx2,fma,prefer-vector-width=256")
namespace avx2 {
#include "ties_kernels.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "ties_kernels.inc"
}
#pragma GCC pop_options
#endif

namespace {

const KernelTable& kernels() {
#if defined(SAFECL_X86_SETS)
  if (instruction_set() == kAvx512) return avx512::kernels;
  if (instruction_set() == kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

EXPORT void safecl_bracket(BracketCall* call) { kernels().bracket(*call); }

EXPORT void safecl_elect(const ElectionCall* call) { kernels().elect(*call); }
