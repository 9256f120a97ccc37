// The entry points of the flat kernels: they choose the instruction set, divide blocks among threads, and add sums in
// a fixed order.
#include "flat.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "common.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kGroup = 64;            // elements read from one stream before the next: 4 cache lines of fp32
constexpr int kWideGroup = 128;       // the same for kernels of two streams
constexpr int kLanes = 16;            // fp64 accumulators of a sum
constexpr int64_t kBlock = 1 << 15;   // elements per block: the unit of work and of the fixed-order sum
constexpr int64_t kInlineBlocks = 4;  // up to this many blocks, waking threads costs more time than it saves
// Bytes of software prefetch. The hardware's prefetch stops at the end of each page, and there are many streams.
constexpr int64_t kAhead = 1024;
// From this many elements on, the bf16 copy bypasses the cache, where it would only displace other streams.
constexpr int64_t kStream = 1 << 19;

using Group = float[kGroup];

struct Ones {
  alignas(64) Group values = {};
  constexpr Ones() {
    for (float& value : values) value = 1.0f;
  }
};

constexpr Ones kOneEach;
constexpr const float* kOnes = kOneEach.values;  // the Fisher of a penalty without one (L2-SP)

struct Bf16 {  // consecutive bf16 values, read as fp32
  const uint16_t* bits;
  Bf16(const Buffer& source, int64_t at) : bits(static_cast<const uint16_t*>(source.data) + at) {}
  float operator[](int j) const { return from_bits(uint32_t{bits[j]} << 16); }
};

inline bool is_finite(float value) { return (to_bits(value) & 0x7f800000u) != 0x7f800000u; }

inline uint16_t to_bf16(float value) {  // rounds to nearest, ties to even
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline uint16_t to_bf16_stochastic(float value, uint32_t word) {
  const uint32_t bits = to_bits(value);
  const uint32_t special = value != value ? 0x7fc0u : bits >> 16;
  return static_cast<uint16_t>(is_finite(value) ? (bits + (word >> 16)) >> 16 : special);
}

inline uint32_t mix(uint32_t x) {  // "lowbias32", C. Wellons
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

inline uint32_t random_word(int64_t index, const uint32_t (&seed)[2]) {
  const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
  return mix(mix(low ^ seed[0]) + seed[1] + high * 0x9e3779b9u);
}

inline void prefetch(const void* data, int64_t bytes) {
  const char* from = static_cast<const char*>(data) + kAhead;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
}

template <int kSize>
inline void prefetch_all(std::initializer_list<Buffer> buffers, int64_t at) {
  for (const Buffer& buffer : buffers) {
    const int64_t size = buffer.is_bf16 ? 2 : 4;
    if (buffer.data) prefetch(static_cast<const char*>(buffer.data) + at * size, kSize * size);
  }
}

inline void prefetch_penalty(const PenaltyCall& c, int64_t at) {
  prefetch_all<kGroup>({c.grad, c.param, c.anchor, c.fisher}, at);
}

inline void prefetch_step(const AdamWCall& c, int64_t at) {
  prefetch_all<kGroup>({c.grad, {c.param, 0}, {c.exp_avg, 0}, {c.exp_avg_sq, 0}, c.anchor, c.fisher, {c.ema, 0}}, at);
}

// Writes bf16(values) to a buffer that is never read.
template <bool kFull>
inline void store_copy(uint16_t* target, const float* values, int n, bool bypass) {
  alignas(64) uint16_t bits[kGroup];
  for (int j = 0; j < (kFull ? kGroup : n); j++) bits[j] = to_bf16(values[j]);
#if defined(__x86_64__)
  if (kFull && bypass && reinterpret_cast<uintptr_t>(target) % sizeof(__m128i) == 0) {
    const __m128i* from = reinterpret_cast<const __m128i*>(bits);
    for (int j = 0; j < kGroup / 8; j++) _mm_stream_si128(reinterpret_cast<__m128i*>(target) + j, from[j]);
    return;
  }
#endif
  (void)bypass;
  std::memcpy(target, bits, (kFull ? kGroup : n) * sizeof(uint16_t));
}

inline void finish_streams() {  // nothing else orders the stores that bypass the cache
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls piece(first, last, segment) for each part of [begin, end) in one segment; segment is -1 without a table.
template <class Piece>
inline void for_each_piece(const Segments& table, int64_t begin, int64_t end, const Piece& piece) {
  if (table.count == 0) return piece(begin, end, int64_t{-1});
  const int64_t* stops = table.offsets + 1;
  int64_t s = std::upper_bound(stops, stops + table.count - 1, begin) - stops;
  for (int64_t first = begin; first < end; s++) {
    const int64_t last = s + 1 < table.count ? std::min(end, stops[s]) : end;
    if (last > first) piece(first, last, s);
    first = std::max(first, last);
  }
}

}  // namespace

namespace baseline {
#include "flat_kernels.inc"
}

#if defined(SAFECL_X86_SETS)
#pragma GCC push_options
#pragma GCC target("avx2,prefer-vector-width=256")
namespace avx2 {
#include "flat_kernels.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "flat_kernels.inc"
}
#pragma GCC pop_options
#endif

namespace {

std::atomic<int> num_threads{1};

const KernelTable& kernels() {
#if defined(SAFECL_X86_SETS)
  if (instruction_set() == kAvx512) return avx512::kernels;
  if (instruction_set() == kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

// Runs a kernel block by block. The blocks do not depend on the number of threads, so the order of the sums does not.
template <class Call>
Sums run(Sums (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  const int64_t num_blocks = (call.numel + kBlock - 1) / kBlock;
  std::vector<Sums> partial(num_blocks);
  const int threads = num_blocks > kInlineBlocks ? num_threads.load() : 1;
  run_blocks(num_blocks, threads, [&](int64_t block) {
    partial[block] = kernel(call, block * kBlock, std::min(call.numel, (block + 1) * kBlock));
  });
  Sums sums = {0, 0, 0};
  for (const Sums& part : partial) {
    sums.penalty += part.penalty;
    sums.square += part.square;
    sums.nonfinite += part.nonfinite;
  }
  return sums;
}

}  // namespace

EXPORT const char* safecl_source_hash() { return SAFECL_SOURCE_HASH; }

EXPORT void safecl_use_threads(int count) { num_threads.store(std::max(1, count)); }

// Allows torch's OpenMP threads, or forbids them: then our own pool is used. Returns whether they are used.
EXPORT int safecl_use_openmp(int wanted) { return use_openmp(wanted != 0); }

EXPORT void safecl_adamw(const AdamWCall* call, Sums* sums) { *sums = run(kernels().adamw, *call); }

EXPORT double safecl_fisher_penalty(const PenaltyCall* call) {
  return run(kernels().fisher_penalty, *call).penalty;
}

EXPORT void safecl_penalized_grad_norm(const PenaltyCall* call, Sums* sums) {
  *sums = run(kernels().penalized_grad_norm, *call);
}

EXPORT void safecl_ema(const EmaCall* call) { run(kernels().ema, *call); }

EXPORT void safecl_fisher_accumulate(const FisherCall* call) { run(kernels().fisher_accumulate, *call); }
