#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

struct alignas(64) Share {  // one thread's blocks; a cache line of its own, since its owner advances `next` all the time
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

class ThreadPool {
 public:
  void run(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> turn(turn_);
    const int workers = start_workers(static_cast<int>(std::min<int64_t>(num_threads, num_blocks)) - 1);
    divide(num_blocks, workers + 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      wanted_ = pending_ = workers;
      generation_++;
    }
    wake_.notify_all();
    work(0, task);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  // Starts threads until there are `count`; fewer where the system gives no more.
  int start_workers(int count) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals belong to Python's main thread
    try {
      for (; started_ < count; started_++) std::thread(&ThreadPool::serve, this, started_ + 1, generation_).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return std::max(0, std::min(count, started_));
  }

  void divide(int64_t num_blocks, int num_shares) {
    if (num_shares > capacity_) {
      shares_.reset(new Share[num_shares]);
      capacity_ = num_shares;
    }
    num_shares_ = num_shares;
    for (int i = 0; i < num_shares; i++) {
      shares_[i].next.store(num_blocks * i / num_shares, std::memory_order_relaxed);
      shares_[i].end = num_blocks * (i + 1) / num_shares;
    }
  }

  void work(int self, const std::function<void(int64_t)>& task) {
    for (int i = 0; i < num_shares_; i++) {
      Share& share = shares_[(self + i) % num_shares_];
      for (int64_t block; (block = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(block);
    }
  }

  void serve(int self, uint64_t seen) {
    for (;;) {
      const std::function<void(int64_t)>* task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (self > wanted_) continue;
        task = task_;
      }
      work(self, *task);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // held by the caller whose job is running
  std::mutex mutex_;  // guards what follows, up to generation_
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int wanted_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
  int started_ = 0, num_shares_ = 0, capacity_ = 0;  // changed only under turn_, while every worker waits
  std::unique_ptr<Share[]> shares_;
};

std::atomic<ThreadPool*> the_pool{nullptr};

// A forked child has the pool's memory but none of its threads, and perhaps a locked mutex: it forgets the pool and makes its own.
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

void run_blocks(int64_t num_blocks, int num_threads, const std::function<void(int64_t)>& task) {
  if (num_threads <= 1 || num_blocks <= 1) {
    for (int64_t block = 0; block < num_blocks; block++) task(block);
    return;
  }
  pool().run(num_blocks, num_threads, task);
}
