// The C ABI of the kernels for merges by election: plain structs that safecl/kernels/ties/cpu.py mirrors with ctypes.
// The formulas are in safecl/kernels/ties/calls.py.
#pragma once

#include <cstdint>

// Magnitudes are compared as the bits of non-negative floats, which order as integers do.
struct BracketCall {
  int64_t numel;
  const float *values, *minus;  // the magnitudes |values - minus|, or |values| where minus is null
  int32_t low, high;            // low <= high
  float* between;               // room for `capacity` of the magnitudes strictly between low and high
  int64_t capacity;
  int64_t num_above, num_high, num_between, num_low;  // results; num_low is 0 where low is high
};

struct TaskVector {
  const float* values;  // the task vector, or the tuned model where ElectionCall::subtract is set
  float weight;
  int32_t threshold;  // smaller magnitudes count as 0; 0 keeps all
  int64_t num_equal;  // how many of the first magnitudes equal to the threshold are kept; on return, what is left of it
};

struct ElectionCall {
  int64_t numel;
  float* target;
  TaskVector* vectors;
  int64_t num_vectors, subtract, normalize;
  float half_scale;
};
