/* The loops for any processor: NEON on ARM, SSE2 on x86-64. */

#define LOOPS loops_any
#define VECTOR float __attribute__((vector_size(16), may_alias))
#define ROWS 6
#if defined(__aarch64__)
#define VECS 4
#else
#define VECS 2
#endif
#include "loops.inc"

extern const Loops loops_v3, loops_v4;

namespace {

const Loops& find() {
#if defined(__x86_64__) && !defined(PORTABLE)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return loops_v4;
  if (v3) return loops_v3;
#endif
  return loops_any;
}

}  // namespace

const Loops& loops = find();
