/* Threads that help the caller of `in_chunks`. */

#ifndef POOL_H
#define POOL_H

#include <algorithm>
#include <cstddef>

using Chunk = void(const void* context, std::ptrdiff_t index);

void pool_set_threads(int threads);
int pool_threads();

/* Computes chunks 0 to count - 1 in any order, on this thread and on idle workers; returns when
   all are done. Nested calls, and calls while another thread has the workers, compute on the
   calling thread alone.

   Chunks throw nothing but std::bad_alloc. Then pool_run throws it, too, when no other thread is
   computing a chunk any more. */
void pool_run(Chunk* compute, const void* context, std::ptrdiff_t count);

template <class F>
void in_chunks(std::ptrdiff_t count, const F& f) {
  pool_run([](const void* f, std::ptrdiff_t i) { (*static_cast<const F*>(f))(i); }, &f, count);
}

constexpr std::ptrdiff_t CHUNK = 32768; /* values: fewer aren't worth waking a thread for */

/* Calls f(first, end) for all of `rows` rows, in chunks of about CHUNK values. */
template <class F>
void by_rows(std::ptrdiff_t rows, std::ptrdiff_t values, const F& f) {
  const std::ptrdiff_t size = std::max<std::ptrdiff_t>(CHUNK / std::max<std::ptrdiff_t>(values, 1), 1);
  in_chunks((rows + size - 1) / size,
            [&](std::ptrdiff_t i) { f(i * size, std::min((i + 1) * size, rows)); });
}

#endif
