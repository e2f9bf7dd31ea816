/* The loops for x86-64 with AVX2. */

#if defined(__x86_64__) && !defined(PORTABLE)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define HAS_F16C /* g++ defines __F16C__ by its command line only */
#define LOOPS loops_v3
#define VECTOR float __attribute__((vector_size(32), may_alias))
#define ROWS 6
#define VECS 2
#include "loops.inc"
#endif
