/* What a step consists of, on all threads. Matrices are dense, row-major, and float32 unless packed. */

#ifndef KERNELS_H
#define KERNELS_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "openelm.h"

constexpr std::size_t KEPT = 4 << 20; /* values: a larger buffer is freed when little of it is used */

/* Makes v hold at least n values; its old values are lost. A long prompt's buffers, which are kept
   for the thread's next step, shrink in the steps of one token that follow it. */
inline float* room(std::vector<float>& v, std::ptrdiff_t n) {
  const std::size_t size = static_cast<std::size_t>(n);
  if (v.size() < size || (v.size() > KEPT && size < v.size() / 64)) {
    std::vector<float>().swap(v); /* first, so that both are never allocated */
    v.resize(size);
  }
  return v.data();
}

/* y [count, rows] = x [count, columns] · Wᵀ, or += if `add`. */
void multiply(const float* x, int count, const openelm_matrix& w, float* y, bool add);

/* Rows [first, end) of W in float32 → y [end - first, columns]. */
void unpack_rows(const openelm_matrix& w, std::ptrdiff_t first, std::ptrdiff_t end, float* y);

/* On this thread: out [rows, columns] (rows out_stride apart) = a [rows, k] · b [k, columns]
   (rows b_stride apart). */
void multiply_dense(const float* a, int rows, const float* b, std::ptrdiff_t b_stride, int columns,
                    int k, float* out, std::ptrdiff_t out_stride);

struct Shape {
  int batch, length, query_heads, kv_heads, dim;
};

/* One layer's keys and values; see openelm_cache. */
struct Cache {
  openelm_cache arrays;
  int capacity, slot, bits, group;
};

/* x [batch, length, heads, dim] → queries [batch, query_heads, length, dim], normalized, rotated
   (RoPE) and scaled; keys and values go into the cache. `angles` [batch or 1, length, dim]:
   cosines, then sines. A norm that is null isn't applied. */
void split_heads(const float* x, const float* q_norm, const float* k_norm, const float* angles,
                 std::ptrdiff_t angles_stride, float* queries, const Cache& cache, Shape s, float eps);

/* Which slots token t of sequence b attends to: from starts[b] (0 if null) to slot first + t, or
   what `mask` [length, capacity] allows. */
struct Seen {
  const std::int32_t* starts;
  const std::uint8_t* mask;
  int first;
};

/* queries [batch, query_heads, length, dim] → y [batch, length, query_heads, dim]; zeros for a
   token that attends to nothing. */
void attend(const float* queries, const Cache& cache, Seen seen, float* y, Shape s);

/* Affine quantization of 4 or 8 bits, as mx.quantize does it. */
void quantize(const float* x, std::ptrdiff_t groups, int group, int bits, std::uint32_t* packed,
              float* scales, float* biases);

#endif
