/* cblas_sgemm for few rows.

   A decoded token multiplies one row (a few, when drafts are verified or sequences batched) with
   every weight matrix: each weight is used once or a few times, so the time is that of reading it.
   General libraries pack the whole matrix first, which costs several times as much. Here the
   matrix is streamed once, whatever the number of rows, by as many threads as there are.

   blas.py loads this library before MLX, globally, so that MLX calls this `cblas_sgemm`, and gives
   it the `cblas_sgemm` of a fast BLAS to pass everything else on to. Without one the kernel takes
   matrices of any height: it is no match for OpenBLAS there, and far ahead of reference BLAS.

   No Python and no BLAS is needed to compile this: C11, POSIX threads, GCC's vector extensions. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pool.h"

/* ---- Vectors ------------------------------------------------------------------------------ */

#if defined(__x86_64__) && !defined(PORTABLE)
#define LANES 8
#define SIMD __attribute__((target("avx2,fma")))
#else
#define LANES 4 /* NEON, SSE */
#define SIMD
#endif
#define INLINE SIMD static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16)));
typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t mask __attribute__((vector_size(LANES * 4)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif

INLINE vec load(const float *p) { return *(const loose *)p; }

/* The first n values, then zeros. */
INLINE vec load_part(const float *p, int n) {
  float values[LANES] = {0};
  for (int i = 0; i < n; i++) values[i] = p[i];
  return load(values);
}

/* The sum of each of four vectors. */
INLINE four sums(vec a, vec b, vec c, vec d) {
#if LANES == 8
  vec ab = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  vec cd = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  vec all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  four halves[2];
  memcpy(halves, &all, sizeof all);
  return halves[0] + halves[1];
#else
  vec ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
  vec cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
}

/* ---- One product -------------------------------------------------------------------------- */

enum { ROW_MAJOR = 101, COLUMN_MAJOR = 102, NO_TRANS = 111 };

/* C = alpha A B + beta C, all row-major: A [M, K], B [K, N], either as its transpose, C [M, N]. */
typedef struct {
  ptrdiff_t M, N, K, lda, ldb, ldc;
  float alpha, beta;
  const float *A, *B;
  float *C;
  int trans_a, trans_b;
  int passed_on;           /* to the BLAS that follows */
  ptrdiff_t rows, columns; /* of C in one chunk */
} product;

/* What `beta` says to do with what was in C, which is not read for 0. */
static inline void put(float *c, float sum, float alpha, float beta) {
  *c = beta == 0 ? alpha * sum : alpha * sum + beta * *c;
}

INLINE void put_four(float *c, four sum, float alpha, float beta, int n) {
  if (n >= 4) {
    four value = sum * alpha;
    if (beta != 0) value += beta * *(loose_four *)c;
    *(loose_four *)c = value;
  } else {
    for (int i = 0; i < n; i++) put(c + i, sum[i], alpha, beta);
  }
}

/* Sums of BLOCK products are added up apart, so that the rounding error of a long sum stays small. */
#define BLOCK 128

/* `rows` rows of A with four rows of a transposed B; with fewer left, the last stands in for them.
   Of several passes over four rows only the first waits for memory: so each of the first two
   fetches half of the four rows that come after the next four, and a single one all of them. */
INLINE void dots(const product *p, const int rows, ptrdiff_t m, ptrdiff_t n, int pass) {
  const int left = p->N - n < 4 ? (int)(p->N - n) : 4;
  const int single = p->M <= 3;
  const ptrdiff_t next = n + 12 <= p->N ? n + 8 + (single ? 0 : 2 * (pass & 1)) : n;
  const ptrdiff_t step = left == 4 ? p->ldb : 0; /* not beyond the last row */
  const float *soon = p->B + next * p->ldb;
  const float *a[3], *b[4];
  vec total[3][4] = {{{0}}}, x[3];
  for (int i = 0; i < rows; i++) a[i] = p->A + (m + i) * p->lda;
  for (int j = 0; j < 4; j++) b[j] = p->B + (n + (j < left ? j : left - 1)) * p->ldb;
  const ptrdiff_t whole = p->K / LANES * LANES;
  for (ptrdiff_t k = 0; k < whole;) {
    vec acc[3][4] = {{{0}}};
    const ptrdiff_t end = whole - k < BLOCK * LANES ? whole : k + BLOCK * LANES;
    for (; k < end; k += LANES) {
      __builtin_prefetch(soon + k);
      __builtin_prefetch(soon + step + k);
      if (single) {
        __builtin_prefetch(soon + 2 * step + k);
        __builtin_prefetch(soon + 3 * step + k);
      }
#pragma GCC unroll 3
      for (int i = 0; i < rows; i++) x[i] = load(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        vec y = load(b[j] + k);
#pragma GCC unroll 3
        for (int i = 0; i < rows; i++) acc[i][j] += x[i] * y;
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) total[i][j] += acc[i][j];
    }
  }
  if (whole < p->K) {
    const int rest = (int)(p->K - whole);
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++) x[i] = load_part(a[i] + whole, rest);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      vec y = load_part(b[j] + whole, rest);
#pragma GCC unroll 3
      for (int i = 0; i < rows; i++) total[i][j] += x[i] * y;
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < rows; i++) {
    four sum = sums(total[i][0], total[i][1], total[i][2], total[i][3]);
    put_four(p->C + (m + i) * p->ldc + n, sum, p->alpha, p->beta, left);
  }
}

/* `rows` rows of A with `width` vectors of columns of B, which is not transposed. */
INLINE void columns(const product *p, const int rows, const int width, ptrdiff_t m, ptrdiff_t n) {
  const float *a[3], *b = p->B + n;
  vec total[3][12] = {{{0}}};
  for (int i = 0; i < rows; i++) a[i] = p->A + (m + i) * p->lda;
  for (ptrdiff_t k = 0; k < p->K;) {
    vec acc[3][12] = {{{0}}};
    const ptrdiff_t end = k + BLOCK < p->K ? k + BLOCK : p->K;
    for (; k < end; k++, b += p->ldb) {
      vec x[3];
#pragma GCC unroll 3
      for (int i = 0; i < rows; i++) x[i] = a[i][k] - (vec){0};
#pragma GCC unroll 12
      for (int j = 0; j < width; j++) {
        vec y = load(b + j * LANES);
#pragma GCC unroll 3
        for (int i = 0; i < rows; i++) acc[i][j] += x[i] * y;
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 12
      for (int j = 0; j < width; j++) total[i][j] += acc[i][j];
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < width; j++) {
      float *c = p->C + (m + i) * p->ldc + n + j * LANES;
      vec value = total[i][j] * p->alpha;
      if (p->beta != 0) value += p->beta * load(c);
      *(loose *)c = value;
    }
  }
}

/* The columns that don't fill a vector. */
INLINE void last_columns(const product *p, ptrdiff_t m, ptrdiff_t n, ptrdiff_t end) {
  const int rest = (int)(end - n);
  vec total = {0};
  for (ptrdiff_t k = 0; k < p->K;) {
    vec acc = {0};
    const ptrdiff_t stop = k + BLOCK < p->K ? k + BLOCK : p->K;
    for (; k < stop; k++) acc += p->A[m * p->lda + k] * load_part(p->B + k * p->ldb + n, rest);
    total += acc;
  }
  for (int i = 0; i < rest; i++) put(p->C + m * p->ldc + n + i, total[i], p->alpha, p->beta);
}

/* Rows are taken in threes: with four columns, twelve sums fill AVX2's registers. */
SIMD static void chunk_transposed(const product *p, ptrdiff_t start, ptrdiff_t end) {
  for (ptrdiff_t n = start; n < end; n += 4) {
    ptrdiff_t m = 0;
    int pass = 0;
    for (; p->M - m == 3 || p->M - m > 4; m += 3) dots(p, 3, m, n, pass++);
    for (; p->M - m >= 2; m += 2) dots(p, 2, m, n, pass++);
    if (m < p->M) dots(p, 1, m, n, pass);
  }
}

INLINE void strip(const product *p, const int rows, const int width, ptrdiff_t m, ptrdiff_t start,
                  ptrdiff_t end) {
  ptrdiff_t n = start;
  for (; n + width * LANES <= end; n += width * LANES) columns(p, rows, width, m, n);
  for (; n + LANES <= end; n += LANES) columns(p, rows, 1, m, n);
  for (int i = 0; n < end && i < rows; i++) last_columns(p, m + i, n, end);
}

SIMD static void chunk_plain(const product *p, ptrdiff_t start, ptrdiff_t end) {
  ptrdiff_t m = 0;
  for (; p->M - m == 3 || p->M - m > 4; m += 3) strip(p, 3, 4, m, start, end);
  for (; p->M - m >= 2; m += 2) strip(p, 2, 4, m, start, end);
  if (m < p->M) strip(p, 1, 8, m, start, end);
}

static void pass_on(const product *p, ptrdiff_t m, ptrdiff_t n);

/* Chunks are numbered by rows, then by columns. */
static void chunk(const void *context, ptrdiff_t index) {
  const product *p = context;
  const ptrdiff_t across = (p->N + p->columns - 1) / p->columns;
  const ptrdiff_t start = index % across * p->columns;
  const ptrdiff_t end = start + p->columns < p->N ? start + p->columns : p->N;
  if (p->passed_on)
    pass_on(p, index / across * p->rows, start);
  else
    (p->trans_b == NO_TRANS ? chunk_plain : chunk_transposed)(p, start, end);
}

#define SMALL 50000 /* a matrix of so many values isn't worth a second thread */
#define CHUNK 32768 /* values of B in a chunk, about */
#define SHARED 2000000 /* products of values that are worth passing on in parts */
#define PARTS 2 /* for each thread */
#define PART 64 /* rows or columns of a part, a multiple of that */

static void run(const product *p) {
  const ptrdiff_t across = (p->N + p->columns - 1) / p->columns;
  openelm_pool_run(chunk, p, (p->M + p->rows - 1) / p->rows * across);
}

/* ---- The function of CBLAS ---------------------------------------------------------------- */

typedef void sgemm(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                   const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc);

/* Any product, slowly, for whoever calls before there is a next. `order` is by rows. */
static void plain(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                  const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc) {
  (void)order;
  for (ptrdiff_t m = 0; m < M; m++)
    for (ptrdiff_t n = 0; n < N; n++) {
      float sum = 0;
      for (ptrdiff_t k = 0; k < K; k++)
        sum += (trans_a == NO_TRANS ? A[m * lda + k] : A[k * lda + m]) *
               (trans_b == NO_TRANS ? B[k * ldb + n] : B[n * ldb + k]);
      put(C + m * ldc + n, sum, alpha, beta);
    }
}

static sgemm *next = plain; /* who takes what is not for this kernel */
static int shares; /* whether `next` uses one thread, so that workers can help */
/* Else it may have threads of its own, or not be made for several callers. */
static pthread_mutex_t next_lock = PTHREAD_MUTEX_INITIALIZER;

/* A child that is forked during a product has nobody who would unlock it. */
static void forked(void) { pthread_mutex_init(&next_lock, NULL); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forked); }

static void (*set_threads)(int); /* how many `next` uses when this thread calls; if need be */

static void pass_on(const product *p, ptrdiff_t m, ptrdiff_t n) {
  const ptrdiff_t M = p->M - m < p->rows ? p->M - m : p->rows;
  const ptrdiff_t N = p->N - n < p->columns ? p->N - n : p->columns;
  const float *A = p->A + m * (p->trans_a == NO_TRANS ? p->lda : 1);
  const float *B = p->B + n * (p->trans_b == NO_TRANS ? 1 : p->ldb);
  if (set_threads) set_threads(1);
  next(ROW_MAJOR, p->trans_a, p->trans_b, (int)M, (int)N, (int)p->K, p->alpha, A, (int)p->lda, B,
       (int)p->ldb, p->beta, p->C + m * p->ldc + n, (int)p->ldc);
}

/* The largest products that are: in rows of A, and in columns of a B that isn't transposed, as that
   is read in strips, which is slow in memory. Measured: docs/performance.md. */
static int most_rows = 32, most_columns = 128;

/* Whether the kernel runs on this processor. */
static int supported(void) {
#if defined(__x86_64__) && !defined(PORTABLE)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

/* Sets what isn't 0; 0 where the kernel doesn't run on this processor, and passes everything on. */
EXPORT int sgemm_set(sgemm *following, int rows, int columns, int threads) {
  if (following) next = following;
  if (rows) most_rows = rows;
  if (columns) most_columns = columns;
  if (threads) openelm_pool_threads(threads);
  return supported();
}

/* From now on the BLAS that follows computes every call with one thread, and workers share what is
   passed on to it. `setting`, if not NULL, is what tells it so, on every thread that calls. */
EXPORT void sgemm_share(void (*setting)(int)) {
  shares = 1;
  set_threads = setting;
}

static void by_rows(int trans_a, int trans_b, int M, int N, int K, float alpha, const float *A,
                    int lda, const float *B, int ldb, float beta, float *C, int ldc) {
  if (M == 1 && lda == 1) trans_a = NO_TRANS; /* a row is a row */
  if (M <= 0 || N <= 0) return;
  product p = {M, N, K, lda, ldb, ldc, alpha, beta, A, B, C, trans_a, trans_b, 0, M, N};
  if (trans_a != NO_TRANS || M > most_rows ||
      (trans_b == NO_TRANS && M > 1 && N > most_columns) || !supported()) {
    if (!shares) {
      pthread_mutex_lock(&next_lock);
      next(ROW_MAJOR, trans_a, trans_b, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
      pthread_mutex_unlock(&next_lock);
      return;
    }
    p.passed_on = 1;
    if (p.M * p.N * p.K > SHARED && openelm_pool_threads(0) > 1) {
      ptrdiff_t *side = M > N ? &p.rows : &p.columns;
      const int parts = PARTS * openelm_pool_threads(0);
      *side = ((*side + parts - 1) / parts + PART - 1) / PART * PART;
    }
  } else {
    if (alpha == 0 || K <= 0) p.alpha = 0, p.K = 0; /* A and B are not looked at */
    if (p.N * p.K * (1 + p.M / 4) > SMALL) {
      const ptrdiff_t multiple = trans_b != NO_TRANS ? 4 : M == 1 ? 8 * LANES : 4 * LANES;
      p.columns = (CHUNK / p.K / multiple + 1) * multiple;
    }
  }
  run(&p);
}

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                        const float *A, int lda, const float *B, int ldb, float beta, float *C,
                        int ldc) {
  if (order == COLUMN_MAJOR) /* the same memory, read by rows, holds the transposes */
    by_rows(trans_b, trans_a, N, M, K, alpha, B, ldb, A, lda, beta, C, ldc);
  else
    by_rows(trans_a, trans_b, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
