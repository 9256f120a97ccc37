// A small pool of persistent threads, for processes without torch's OpenMP threads and for forked children, which have
// lost them. Idle workers sleep, a forked child starts a fresh pool on first use, and nothing is joined at exit.
#pragma once

#include <functional>

// Calls member(self) with self = 0 on this thread and self = 1, 2, ... on up to num_threads - 1 others; returns when
// all are done. Concurrent callers take turns. member must not throw and must not call run_pool.
void run_pool(int num_threads, const std::function<void(int)>& member);
