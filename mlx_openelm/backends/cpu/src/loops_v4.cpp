/* The loops for x86-64 with AVX-512. */

#if defined(__x86_64__) && !defined(PORTABLE)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512vl,avx512bw,avx512dq")
#define HAS_F16C
#define LOOPS loops_v4
#define VECTOR float __attribute__((vector_size(64), may_alias))
#define ROWS 8
#define VECS 2
#include "loops.inc"
#endif
