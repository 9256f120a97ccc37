// Loops over the blocks of a buffer, on torch's own OpenMP threads where there are any.
#pragma once

#include <cstdint>
#include <functional>

// Calls task(block) once for each block in [0, num_blocks), on up to num_threads threads, this one included, and returns when all are done.
// Each thread takes a contiguous share of the blocks in order (memory stays on its NUMA node from call to call), then helps the others.
void run_blocks(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task);

// Whether torch's OpenMP threads may be used (default: yes). Returns whether they are.
bool use_openmp(bool wanted);
