// What all kernels share: how they are compiled for several instruction sets, and floats as bits.
//
// A kernel is compiled once for each instruction set, in a namespace of its own, and its entry point asks for the one
// in use. Without fused multiply-adds, apart from those that a kernel asks for by name, all sets give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(SAFECL_BASELINE_ONLY)  // SAFECL_BASELINE_ONLY makes quick builds
#define SAFECL_X86_SETS
#endif

#define IVDEP _Pragma("GCC ivdep")
#define EXPORT extern "C" __attribute__((visibility("default")))

enum InstructionSet { kBaseline, kAvx2, kAvx512 };

// The set in use: the best one that the CPU has, until safecl_use_instruction_set chooses another.
InstructionSet instruction_set();

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
