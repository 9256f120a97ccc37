#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

class ThreadPool {
 public:
  void run(int num_threads, const std::function<void(int)>& member) {
    std::lock_guard<std::mutex> turn(turn_);
    const int workers = start_workers(num_threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      member_ = &member;
      wanted_ = pending_ = workers;
      generation_++;
    }
    wake_.notify_all();
    member(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  // Starts threads until there are `count`, or fewer if the system refuses more. Returns how many are there.
  int start_workers(int count) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // only Python's main thread may receive signals
    try {
      for (; started_ < count; started_++) std::thread(&ThreadPool::serve, this, started_ + 1, generation_).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return std::max(0, std::min(count, started_));
  }

  void serve(int self, uint64_t seen) {
    for (;;) {
      const std::function<void(int)>* member;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (self > wanted_) continue;
        member = member_;
      }
      (*member)(self);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller whose job is running
  std::mutex mutex_;  // guards the members below
  std::condition_variable wake_, done_;
  const std::function<void(int)>* member_ = nullptr;
  int wanted_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
  int started_ = 0;  // changed only under turn_
};

std::atomic<ThreadPool*> the_pool{nullptr};

// A forked child has the pool's memory but none of its threads, and perhaps a locked mutex. It forgets the pool and
// makes its own.
void forget_pool() { the_pool.store(nullptr); }

ThreadPool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  ThreadPool* current = the_pool.load();
  if (current) return *current;
  ThreadPool* fresh = new ThreadPool;
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void run_pool(int num_threads, const std::function<void(int)>& member) { pool().run(num_threads, member); }
