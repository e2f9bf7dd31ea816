/* Work on all threads. */

#ifndef CHUNKS_H
#define CHUNKS_H

#include <algorithm>
#include <cstddef>

#include "pool.h"

/* The library of sgemm.c has it, if that is loaded. */
#pragma weak openelm_pool_run

/* Calls f(0) to f(count - 1), on several threads if there is a pool. */
template <class F>
void in_chunks(std::ptrdiff_t count, const F& f) {
  if (count > 1 && openelm_pool_run != nullptr) {
    openelm_pool_run([](const void* f, std::ptrdiff_t i) { (*static_cast<const F*>(f))(i); }, &f,
                     count);
  } else {
    for (std::ptrdiff_t i = 0; i < count; i++) f(i);
  }
}

constexpr std::ptrdiff_t CHUNK = 32768; /* values: fewer aren't worth waking a thread for */

/* Calls f(first, end) for all of `rows` rows, in chunks; each row computes so many values. */
template <class F>
void by_rows(std::ptrdiff_t rows, std::ptrdiff_t values, const F& f) {
  const std::ptrdiff_t size = std::max<std::ptrdiff_t>(CHUNK / std::max<std::ptrdiff_t>(values, 1), 1);
  in_chunks((rows + size - 1) / size,
            [&](std::ptrdiff_t i) { f(i * size, std::min((i + 1) * size, rows)); });
}

#endif
