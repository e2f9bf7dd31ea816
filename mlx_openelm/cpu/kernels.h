/* What the primitives compute. All matrices are dense and row-major. */

#ifndef KERNELS_H
#define KERNELS_H

#include <cstddef>
#include <cstdint>

extern "C" {
/* MLX links a BLAS; blas.py may have put a faster one before it. */
void cblas_sgemm(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                 const float* A, int lda, const float* B, int ldb, float beta, float* C, int ldc);
}
enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };

/* Values as mx.quantize stores them in affine mode: 4 or 8 bits each, from the low bits up, and a
   scale and a bias for every `group` of them. */
struct Packed {
  const std::uint32_t* words;
  const float *scales, *biases;
  int bits, group;
};

/* `count` values from number `first` on; both are multiples of the group. */
void unpack(const Packed& p, std::ptrdiff_t first, std::ptrdiff_t count, float* y);

/* Adds x [count, columns] · Wᵀ to y [count, rows]; W [rows, columns] is packed, and `columns` a
   multiple of 256 / bits, which is what eight words hold: a group is half of that, or a multiple. */
void add_product(const float* x, int count, const Packed& w, int rows, int columns, float* y);

/* RMSNorm (arXiv 1910.07467, equation 4) of rows of n values. */
void norm_rows(const float* x, const float* weight, float* y, std::ptrdiff_t rows, int n,
               float eps);

/* Rows of n gates and n values → gate · sigmoid(gate) · value. */
void gate_rows(const float* x, float* y, std::ptrdiff_t rows, int n);

/* cos and sin of positions [n] times base^(-2i / dim), for each i up to dim / 2 → y [n, dim]. */
void turn_table(const std::int32_t* positions, float* y, std::size_t n, int dim, double base);

struct Shape {
  int batch, length, query_heads, kv_heads, dim;
};

/* x [batch, length, heads, dim] → queries and keys_values, each [batch, heads, length, dim].
   `turns` [batch or 1, length, dim]: cosines, then sines. Norms null: none. */
void split_heads(const float* x, const float* q_norm, const float* k_norm, const float* turns,
                 std::ptrdiff_t turns_stride, float* queries, float* keys_values, Shape s,
                 float eps);

/* A layer's keys and values, [batch, 2 · kv_heads, slots, dim]; `plain` null: quantized. */
struct Cache {
  const float* plain;
  Packed packed;
  int slots;
};

/* queries [batch, query_heads, length, dim], mask [batch or 1, length, slots] → y [batch, length,
   query_heads, dim]; zeros where the mask allows nothing. */
void attend(const float* queries, const Cache& cache, const bool* mask, std::ptrdiff_t mask_stride,
            float* y, Shape s);

#endif
