/* See pool.h. Workers and the caller take chunks from a common counter, so a thread that wakes late
   delays the others by no more than one chunk. */

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace {

constexpr int MAX_THREADS = 64;
constexpr std::int64_t SPIN = 50000; /* nanoseconds that an idle worker polls before it sleeps */

struct Pool {
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for starting workers and going to sleep */
  pthread_cond_t work = PTHREAD_COND_INITIALIZER;
  std::atomic<int> threads{1}, workers{0}, sleeping{0};
  std::atomic_flag taken = ATOMIC_FLAG_INIT; /* by a caller */
  std::atomic<std::ptrdiff_t> left{0}, done{0};
  std::atomic<bool> out_of_memory{false};
  Chunk* compute = nullptr;
  const void* context = nullptr;
};

Pool* pool = new Pool; /* never destroyed: workers outlive exit() */
thread_local bool inside = false;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

std::int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Computes a chunk if one is left. The job can't change meanwhile: its caller waits for `done`. */
bool take() {
  std::ptrdiff_t left = pool->left.load();
  do {
    if (left <= 0) return false;
  } while (!pool->left.compare_exchange_weak(left, left - 1));
  inside = true;
  try {
    pool->compute(pool->context, left - 1);
  } catch (const std::bad_alloc&) { /* thrown by pool_run when all chunks are done */
    pool->out_of_memory.store(true);
  }
  inside = false;
  pool->done.fetch_add(1);
  return true;
}

bool wanted(std::intptr_t worker) {
  return pool->left.load() > 0 && worker < pool->threads.load();
}

void* work(void* number) {
  const auto worker = reinterpret_cast<std::intptr_t>(number);
  for (;;) {
    if (!wanted(worker)) {
      for (const std::int64_t end = now() + SPIN; !wanted(worker) && now() < end;) sched_yield();
    }
    if (!wanted(worker)) {
      pthread_mutex_lock(&pool->lock);
      pool->sleeping.fetch_add(1);
      while (!wanted(worker)) pthread_cond_wait(&pool->work, &pool->lock);
      pool->sleeping.fetch_sub(1);
      pthread_mutex_unlock(&pool->lock);
    }
    take();
  }
  return nullptr;
}

/* A forked child has none of the threads, and a lock may be held by one of them. */
void forked() {
  const int threads = pool->threads.load();
  pool = new Pool;
  pool->threads.store(threads);
}

void start_workers(int count) {
  static const int registered = pthread_atfork(nullptr, nullptr, forked);
  (void)registered;
  pthread_mutex_lock(&pool->lock);
  for (int n = pool->workers.load() + 1; n <= count; n++) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void*>(static_cast<std::intptr_t>(n)))) break;
    pthread_detach(thread);
    pool->workers.store(n);
  }
  pthread_mutex_unlock(&pool->lock);
}

void wake() {
  if (!pool->sleeping.load()) return;
  pthread_mutex_lock(&pool->lock);
  pthread_cond_broadcast(&pool->work);
  pthread_mutex_unlock(&pool->lock);
}

}  // namespace

void pool_set_threads(int threads) { pool->threads.store(std::clamp(threads, 1, MAX_THREADS)); }

int pool_threads() { return inside ? 1 : pool->threads.load(); }

void pool_run(Chunk* compute, const void* context, std::ptrdiff_t count) {
  const int threads = pool_threads();
  if (count < 2 || threads < 2 || pool->taken.test_and_set()) {
    for (std::ptrdiff_t i = 0; i < count; i++) compute(context, i);
    return;
  }
  if (pool->workers.load() < threads - 1) start_workers(threads - 1);
  pool->compute = compute;
  pool->context = context;
  pool->done.store(0);
  pool->out_of_memory.store(false);
  pool->left.store(count);
  wake();
  while (take()) {
  }
  for (int i = 0; pool->done.load() < count; i++) {
    if (i < 1000)
      pause_briefly();
    else
      sched_yield();
  }
  const bool out_of_memory = pool->out_of_memory.load();
  pool->taken.clear();
  if (out_of_memory) throw std::bad_alloc();
}
