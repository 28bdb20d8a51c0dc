// The only place that starts or takes threads. The number of threads comes from the caller (torch.get_num_threads()).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pbe {

// Calls `then` in every child that is forked off from now on: it has none of its parent's threads.
inline void after_fork([[maybe_unused]] void (*then)()) {
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, then);
#endif
}

// The threads of the OpenMP library that the process has loaded, which is PyTorch's: they spin for milliseconds after
// each of its operations, and threads of our own would have to share the processors with them.
class OpenMP {
 public:
  // As Pool::run. The team has `threads` members, as PyTorch's has: with another number, threads end and start anew.
  static bool run(int parts, int threads, const std::function<void(int)>& task) {
    static const OpenMP library;
    if (library.parallel_ == nullptr || forked_.load(std::memory_order_relaxed)) return false;
    Work work{&library, parts, &task};
    library.parallel_(&OpenMP::member, &work, static_cast<unsigned>(threads), 0);
    return true;
  }

 private:
  struct Work {
    const OpenMP* library;
    int parts;
    const std::function<void(int)>* task;
  };

  OpenMP() {
#ifndef _WIN32
    // GCC's interface, which LLVM's and Intel's libraries have as well. Nothing is linked: there must be no second one.
    find("omp_get_thread_num", number_);
    find("omp_get_num_threads", count_);
    if (number_ != nullptr && count_ != nullptr) find("GOMP_parallel", parallel_);
#endif
  }

  template <class Function>
  static void find(const char* name, Function& function) {
#ifndef _WIN32
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
#endif
  }

  static void member(void* data) {
    const Work& work = *static_cast<const Work*>(data);
    const int members = work.library->count_();
    for (int part = work.library->number_(); part < work.parts; part += members) (*work.task)(part);
  }

  int (*number_)() = nullptr;
  int (*count_)() = nullptr;
  void (*parallel_)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

  // In a child the library waits for threads that are not there. They may be PyTorch's: it is not only from the first
  // call here on that forks count.
  static inline std::atomic<bool> forked_{false};
  static inline const bool watched_ = [] {
    after_fork([] { forked_.store(true, std::memory_order_relaxed); });
    return true;
  }();
};

// Where there is no OpenMP: workers that sleep between calls, as starting threads anew would cost more than a small
// batch takes.
class Pool {
 public:
  // Runs task(0) ... task(parts - 1), part 0 here and the others on the workers; returns when all are done. False,
  // with nothing run, while another call has the pool or the system gives no more threads.
  bool run(int parts, const std::function<void(int)>& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const bool enough = start_workers(parts - 1);
    if (enough) {
      bool asleep;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        task_ = &task;
        parts_ = parts;
        pending_.store(parts - 1, std::memory_order_relaxed);
        call_.fetch_add(1, std::memory_order_release);
        asleep = sleeping_ > 0;
      }
      if (asleep) wake_.notify_all();
      task(0);
      const auto is_done = [this] { return pending_.load(std::memory_order_acquire) == 0; };
      if (!spin_until(is_done)) {
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, is_done);
      }
    }
    busy_.store(false, std::memory_order_release);
    return enough;
  }

  // Never destroyed: workers may outlive static destructors. A forked child (DataLoader) starts with a new pool.
  static Pool& instance() {
    static Pool* pool = nullptr;
    static const bool ready = [] {
      pool = new Pool;
      after_fork([] { pool = new Pool; });
      return true;
    }();
    static_cast<void>(ready);
    return *pool;
  }

 private:
  bool start_workers(int count) {
    try {
      for (; workers_ < count; ++workers_) {
        // No call is running, so call_ stands still: the worker starts from it and takes the next one.
        std::thread([this, part = workers_ + 1, seen = call_.load()] { work(part, seen); }).detach();
      }
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }

  void work(int part, std::uint64_t seen) {
    const auto is_called = [&] { return call_.load(std::memory_order_acquire) != seen; };
    for (;;) {
      spin_until(is_called);
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, is_called);
      --sleeping_;
      seen = call_.load(std::memory_order_relaxed);
      if (part >= parts_) continue;
      const std::function<void(int)>* task = task_;
      lock.unlock();
      (*task)(part);
      lock.lock();
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  // To sleep and be woken takes tens of microseconds, as long as a small batch: a moment of waiting awake comes first.
  template <class Condition>
  static bool spin_until(const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    do {
      for (int i = 0; i < 64; ++i) {
        if (condition()) return true;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  int workers_ = 0;
  int parts_ = 0;
  int sleeping_ = 0;
  std::atomic<int> pending_{0};
  std::atomic<std::uint64_t> call_{0};
};

// body(begin, end) over [0, n), cut into at most `threads` ranges of at least `grain` elements. The ranges depend on
// n, grain and threads alone. The body must not throw.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  const std::int64_t most = (n + std::max<std::int64_t>(grain, 1) - 1) / std::max<std::int64_t>(grain, 1);
  const int parts = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), most));
  const std::int64_t each = n / parts;
  const std::int64_t extra = n % parts;
  const auto begin_of = [&](int part) { return part * each + std::min<std::int64_t>(part, extra); };
  const std::function<void(int)> task = [&](int part) { body(begin_of(part), begin_of(part + 1)); };
  if (parts > 1 && (OpenMP::run(parts, threads, task) || Pool::instance().run(parts, task))) return;
  // One part, or a nested call, or calls from several Python threads at once: the work is done where it is.
  for (int part = 0; part < parts; ++part) task(part);
}

}  // namespace pbe
