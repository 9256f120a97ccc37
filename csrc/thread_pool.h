// A small pool of persistent threads for loops over blocks of a buffer.
//
// Not OpenMP: a second OpenMP runtime beside torch's would spin against it, and its workers do not survive fork(). Here idle workers sleep,
// a forked child starts a fresh pool on first use, and nothing is joined at exit.
#pragma once

#include <cstdint>
#include <functional>

// Calls task(block) once for each block in [0, num_blocks), on up to num_threads threads, this one included, and returns when all are done.
// Each thread takes a contiguous share of the blocks in order (memory stays on its NUMA node from call to call), then helps the others.
// Concurrent callers take turns; task must not throw and must not call run_blocks.
void run_blocks(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task);
