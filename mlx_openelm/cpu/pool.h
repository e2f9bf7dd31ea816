/* Threads that help whoever computes something in chunks. */

#ifndef POOL_H
#define POOL_H

#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef void pool_chunk(const void *context, ptrdiff_t index);

/* Sets how many threads compute at the same time, callers included, unless that is 0; returns how
   many do: one at first, and one within a chunk. */
EXPORT int openelm_pool_threads(int threads);

/* Computes chunks 0 to `chunks` - 1, in any order, on the calling thread and on those that are
   free; returns when all are done. Within a chunk, on the calling thread only. */
EXPORT void openelm_pool_run(pool_chunk *compute, const void *context, ptrdiff_t chunks);

#ifdef __cplusplus
}
#endif

#endif
