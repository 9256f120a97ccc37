#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "thread_pool.h"

namespace {

// The blocks, divided among the members of a team. A member that has finished its own share takes from the next.
class Shares {
 public:
  Shares(int64_t num_blocks, int count) : count_(count), shares_(new Share[count]) {
    for (int i = 0; i < count; i++) {
      shares_[i].next.store(num_blocks * i / count, std::memory_order_relaxed);
      shares_[i].end = num_blocks * (i + 1) / count;
    }
  }

  void work(int self, const std::function<void(int64_t)>& task) {
    for (int i = 0; i < count_; i++) {
      Share& share = shares_[(self + i) % count_];
      for (int64_t block; (block = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(block);
    }
  }

 private:
  struct alignas(64) Share {  // a cache line of its own, because the owner changes `next` all the time
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  int count_;
  std::unique_ptr<Share[]> shares_;
};

// The OpenMP runtime that torch has loaded. It is found by name, because linking one could load a second runtime into
// the process. Its threads spin for up to 20 ms after each operation of torch, and threads of our own would have to
// share the cores with them.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
};

OpenMP find_openmp() {
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return found;
}

std::atomic<bool> openmp_wanted{true}, forked{false};

// A forked child has no threads of OpenMP's team: entering the team again would wait for ever.
void mark_forked() { forked.store(true); }

const OpenMP* openmp() {
  static const int registered = pthread_atfork(nullptr, nullptr, mark_forked);
  static const OpenMP found = find_openmp();
  (void)registered;
  return openmp_wanted && !forked && found.parallel && found.thread_num ? &found : nullptr;
}

struct Team {
  const OpenMP* runtime;
  const std::function<void(int)>* member;
};

void enter_team(void* data) {
  const Team* team = static_cast<const Team*>(data);
  (*team->member)(team->runtime->thread_num());
}

void run_team(int num_threads, const std::function<void(int)>& member) {
  if (const OpenMP* runtime = openmp()) {
    Team team = {runtime, &member};
    runtime->parallel(enter_team, &team, static_cast<unsigned>(num_threads), 0);
  } else {
    run_pool(num_threads, member);
  }
}

}  // namespace

void run_blocks(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task) {
  const int team = static_cast<int>(std::min<int64_t>(num_threads, num_blocks));
  if (team <= 1) {
    for (int64_t block = 0; block < num_blocks; block++) task(block);
    return;
  }
  Shares shares(num_blocks, team);
  run_team(team, [&](int self) { shares.work(self, task); });
}

bool use_openmp(bool wanted) {
  openmp_wanted.store(wanted);
  return openmp() != nullptr;
}
