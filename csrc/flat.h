// The C ABI of the flat kernels: raw pointers and plain structs, without torch and Python headers, so that one build
// serves every torch and Python. safecl/kernels/native.py mirrors these structs with ctypes. The formulas of the
// kernels are in safecl/kernels/flat/calls.py.
#pragma once

#include <cstdint>

struct Buffer {  // contiguous fp32 or bf16; data is null if an optional buffer is absent
  void* data;
  int64_t is_bf16;
};

// Element i in [offsets[s], offsets[s + 1]) uses entry s. count is 0 without a table; a null column means the scalar.
struct Segments {
  int64_t count;
  const int64_t* offsets;
  const float* strength;
  const float* weight_decay;
};

struct PenaltyCall {
  int64_t numel;
  Buffer grad, param, anchor, fisher;
  Segments segments;
  float strength, grad_mult;
};

struct AdamWCall {
  int64_t numel;
  Buffer grad, anchor, fisher;
  float *param, *exp_avg, *exp_avg_sq, *ema;
  uint16_t* param_out;
  Segments segments;
  int64_t proximal, ema_by_fisher;
  float grad_mult, lr, step_size, inv_sqrt_correction2, weight_decay, strength;
  float ema_rate, ema_threshold, ema_rate_above;  // ema_rate_above applies where fisher is above the threshold
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
};

struct EmaCall {
  int64_t numel;
  Buffer ema, param;
  float rate;
  uint32_t seed[2];  // for the stochastic rounding of a bf16 ema
};

struct FisherCall {
  int64_t numel;
  Buffer fisher, grad;
  float weight;
};

struct Sums {  // sums of a kernel over its elements
  double penalty;     // sum strength F d^2, twice the penalty loss
  double square;      // sum (grad_mult grad + strength F d)^2
  int64_t nonfinite;  // elements whose new weight, second moment or average is NaN or infinite
};

// The kernels compiled for one instruction set, each over elements [begin, end). None fuses multiply-adds, so the
// instruction sets agree bitwise.
struct KernelTable {
  Sums (*adamw)(const AdamWCall&, int64_t begin, int64_t end);
  Sums (*fisher_penalty)(const PenaltyCall&, int64_t begin, int64_t end);
  Sums (*penalized_grad_norm)(const PenaltyCall&, int64_t begin, int64_t end);
  Sums (*ema)(const EmaCall&, int64_t begin, int64_t end);
  Sums (*fisher_accumulate)(const FisherCall&, int64_t begin, int64_t end);
};
