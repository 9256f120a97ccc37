// Loops over the blocks of a buffer, on torch's OpenMP threads if there are any.
#pragma once

#include <cstdint>
#include <functional>

// Calls task(block) once for each block in [0, num_blocks), on up to num_threads threads including this one, and
// returns when all are done. Each thread first does its own contiguous share of the blocks in order, so that memory
// stays on its NUMA node from call to call, then helps the others.
void run_blocks(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task);

// Allows or forbids torch's OpenMP threads (allowed by default). Returns whether they are used.
bool use_openmp(bool wanted);
