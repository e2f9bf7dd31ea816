/* The inner loops, compiled once for each kind of processor (loops_*.cpp include loops.inc), and
   the set that fits this one. A loop runs on the calling thread. */

#ifndef LOOPS_H
#define LOOPS_H

#include <cstddef>
#include <cstdint>

#include "openelm.h"

struct Span {
  int first, end; /* slots of a cache: from `first` to before `end` */
};

constexpr int MAX_ROWS = 8, MAX_WIDTH = 32; /* of a tile */

struct Loops {
  /* out [rows, width] = or += a [rows, k] · b [k, width]; rows are `stride`s apart. */
  using Tile = void(const float* a, std::ptrdiff_t a_stride, const float* b, std::ptrdiff_t b_stride,
                    int k, float* out, std::ptrdiff_t out_stride, bool add);
  Tile* tile[2]; /* the narrow and the wide one: both have `rows` rows */
  int rows, width[2];

  /* Rows [first, end) of W: y [count, W's rows] = or += x [count, columns] · Wᵀ. */
  void (*few[3])(const float* x, int count, const openelm_matrix& w, int first, int end, float* y,
                 bool add); /* by kind: F32, F16, BF16 */

  /* The same with a packed W, and x as `reorder` makes it: at most 4 rows. */
  void (*few_packed[2])(const float* values, const float* sums, int count, const openelm_matrix& w,
                        int first, int end, float* y, bool add); /* AFFINE4, AFFINE8 */
  void (*reorder[2])(const float* x, int count, int columns, float* values, float* sums);

  /* 16-bit values in float32: F16, BF16 */
  void (*convert[2])(const std::uint16_t* x, std::ptrdiff_t n, float* y);
  /* AFFINE4, AFFINE8 */
  void (*dequantize[2])(const std::uint32_t* packed, const float* scales, const float* biases,
                        float* y, std::ptrdiff_t groups, int group);

  /* x [count, k] → y [k, width], zeros beyond the last row. */
  void (*pack)(const float* x, int count, int k, float* y, int width);
  /* x [n, width] (rows x_stride apart) → y [count, n] (rows y_stride apart), = or +=. */
  void (*transpose)(const float* x, std::ptrdiff_t x_stride, int n, int count, float* y,
                    std::ptrdiff_t y_stride, bool add);

  void (*rms_norm)(const float* x, const float* weight, float* y, std::ptrdiff_t rows, int n,
                   float eps);
  void (*swiglu)(const float* x, float* y, std::ptrdiff_t rows, int n);
  void (*silu)(float* x, std::ptrdiff_t n);
  /* One head: normalized with `weight` (null: not), times scale, rotated (RoPE). `angles`: cos, sin. */
  void (*rotate)(const float* x, const float* weight, const float* angles, float* y, int dim,
                 float scale, float eps);

  void (*score)(const float* query, const float* keys, float* scores, int n, int dim);
  float (*exponentials)(float* scores, const std::uint8_t* mask, int n);
  void (*average)(const float* weights, const float* values, float* y, int n, int dim, float scale);
};

extern const Loops& loops;

#endif
