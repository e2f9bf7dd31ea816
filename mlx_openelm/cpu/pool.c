/* See pool.h. No more than C11 and POSIX threads. */

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* Workers take a job's chunks from a common counter, and so does the caller: one that wakes
   late, or loses its core to somebody else, holds up nobody for longer than one chunk. MLX calls
   from as many threads as it has streams: each has a core then, and workers have the others. */

#define MOST_THREADS 64
#define MOST_CALLERS 4 /* who get help */
#define SPIN 50000 /* nanoseconds that an idle worker looks for the next job before it sleeps */

static atomic_int most_threads = 1; /* workers may exist already when it is set */

typedef struct {
  atomic_flag taken;           /* by a caller */
  atomic_ptrdiff_t left, done; /* chunks not yet begun; chunks finished */
  pool_chunk *compute;
  const void *context;
} job;

static struct {
  pthread_mutex_t lock; /* for starting threads, and for going to sleep */
  pthread_cond_t work;
  atomic_int workers, sleeping, callers;
  job jobs[MOST_CALLERS];
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};

/* Whether this thread computes a chunk: what that computes in chunks isn't shared once more. */
static _Thread_local int inside;

/* Computes a chunk if one is left. The job can't change under it: its caller waits for `done`. */
static int take(job *j) {
  ptrdiff_t left = atomic_load(&j->left);
  do {
    if (left <= 0) return 0;
  } while (!atomic_compare_exchange_weak(&j->left, &left, left - 1));
  inside = 1;
  j->compute(j->context, left - 1);
  inside = 0;
  atomic_fetch_add(&j->done, 1);
  return 1;
}

/* Tells the processor that this is a loop that waits. */
static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* The job that the worker of this number, from 1 on, can help with, if there is a core for it. */
static job *wanting(intptr_t worker) {
  if (worker + atomic_load(&pool.callers) > most_threads) return NULL;
  for (job *j = pool.jobs; j < pool.jobs + MOST_CALLERS; j++)
    if (atomic_load(&j->left) > 0) return j;
  return NULL;
}

static void *work(void *number) {
  const intptr_t worker = (intptr_t)number;
  for (;;) {
    job *j = wanting(worker);
    for (int64_t end = now() + SPIN; !j && now() < end; j = wanting(worker)) sched_yield();
    if (!j) {
      pthread_mutex_lock(&pool.lock);
      atomic_fetch_add(&pool.sleeping, 1);
      while (!(j = wanting(worker))) pthread_cond_wait(&pool.work, &pool.lock);
      atomic_fetch_sub(&pool.sleeping, 1);
      pthread_mutex_unlock(&pool.lock);
    }
    take(j);
  }
  return NULL;
}

static void wake(void) {
  if (!atomic_load(&pool.sleeping)) return;
  pthread_mutex_lock(&pool.lock);
  pthread_cond_broadcast(&pool.work);
  pthread_mutex_unlock(&pool.lock);
}

/* A forked child has none of its parent's threads, and what they held is not free. */
static void forked(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.work, NULL);
  atomic_store(&pool.workers, 0);
  atomic_store(&pool.sleeping, 0);
  atomic_store(&pool.callers, 0);
  for (job *j = pool.jobs; j < pool.jobs + MOST_CALLERS; j++) {
    atomic_flag_clear(&j->taken);
    atomic_store(&j->left, 0);
  }
}

static void start_workers(int count) {
  static int registered = 0;
  pthread_mutex_lock(&pool.lock);
  if (!registered) registered = !pthread_atfork(NULL, NULL, forked);
  for (intptr_t n = atomic_load(&pool.workers) + 1; n <= count; n++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)n)) break;
    pthread_detach(thread);
    atomic_store(&pool.workers, (int)n);
  }
  pthread_mutex_unlock(&pool.lock);
}

static job *free_job(void) {
  for (job *j = pool.jobs; j < pool.jobs + MOST_CALLERS; j++)
    if (!atomic_flag_test_and_set(&j->taken)) return j;
  return NULL;
}

int openelm_pool_threads(int threads) {
  if (threads) most_threads = threads;
  if (inside) return 1;
  return most_threads < MOST_THREADS ? most_threads : MOST_THREADS;
}

void openelm_pool_run(pool_chunk *compute, const void *context, ptrdiff_t chunks) {
  if (inside) {
    for (ptrdiff_t i = 0; i < chunks; i++) compute(context, i);
    return;
  }
  const int threads = openelm_pool_threads(0);
  const int callers = atomic_fetch_add(&pool.callers, 1) + 1;
  job *j = chunks > 1 && threads > 1 ? free_job() : NULL;
  if (!j) {
    for (ptrdiff_t i = 0; i < chunks; i++) compute(context, i);
  } else {
    if (atomic_load(&pool.workers) < threads - 1) start_workers(threads - 1);
    j->compute = compute;
    j->context = context;
    atomic_store(&j->done, 0);
    atomic_store(&j->left, chunks);
    if (callers < threads) wake();
    while (take(j)) {
    }
    for (int i = 0; atomic_load(&j->done) < chunks; i++) {
      if (i < 1000)
        pause_briefly();
      else
        sched_yield();
    }
    atomic_flag_clear(&j->taken);
  }
  /* There is a core now for the jobs of the others */
  if (atomic_fetch_sub(&pool.callers, 1) > 1) wake();
}
