/* Norm, gate, heads. */

#include <algorithm>
#include <cmath>
#include <vector>

#include "chunks.h"
#include "kernels.h"
#include "vectors.h"

namespace {

SIMD void norms(const float* x, const float* weight, float* y, std::ptrdiff_t rows, int n,
                float eps) {
  for (std::ptrdiff_t row = 0; row < rows; row++, x += n, y += n) {
    const float scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
  }
}

INLINE vec gated(vec gate, vec up) { return gate * up / (1 + exp(-gate)); }

SIMD void gates(const float* x, float* y, std::ptrdiff_t rows, int n) {
  for (std::ptrdiff_t row = 0; row < rows; row++, x += 2 * n, y += n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, gated(load(x + i), load(x + n + i)));
    if (i < n) {
      const vec last = gated(load_part(x + i, n - i, 0), load_part(x + n + i, n - i, 0));
      for (int j = 0; i + j < n; j++) y[i + j] = last[j];
    }
  }
}

/* One head of one token: normed, scaled, and turned by RoPE (arXiv 2104.09864, equation 34; the
   halves of a head are its pairs, as in CoreNet). `weight` null: no norm. */
INLINE void turn(const float* x, const float* weight, const float* cos, float* y, int dim,
                 float scale, float eps) {
  const int half = dim / 2;
  const float* sin = cos + half;
  if (weight == nullptr) {
    for (int i = 0; i < half; i++) {
      const float a = x[i] * scale, b = x[i + half] * scale;
      y[i] = a * cos[i] - b * sin[i];
      y[i + half] = b * cos[i] + a * sin[i];
    }
    return;
  }
  const float all = scale / std::sqrt(dot(x, x, dim) / dim + eps);
  for (int i = 0; i < half; i++) {
    const float a = x[i] * all * weight[i], b = x[i + half] * all * weight[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i] + a * sin[i];
  }
}

struct Heads {
  const float *x, *q_norm, *k_norm, *turns;
  std::ptrdiff_t turns_stride;
  float *queries, *keys_values;
  Shape shape;
  float eps;
};

/* Tokens [first, end) of all sequences. */
SIMD void split(const Heads& p, std::ptrdiff_t first, std::ptrdiff_t end) {
  const Shape& s = p.shape;
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const int normed = s.query_heads + s.kv_heads, heads = normed + s.kv_heads;
  const std::ptrdiff_t dim = s.dim, head = s.length * dim;
  const float* x = p.x + first * heads * dim;
  for (std::ptrdiff_t token = first; token < end; token++) {
    const std::ptrdiff_t b = token / s.length, t = token % s.length;
    const float* cos = p.turns + b * p.turns_stride + t * dim;
    float* queries = p.queries + b * s.query_heads * head + t * dim;
    float* keys_values = p.keys_values + b * 2 * s.kv_heads * head + t * dim;
    for (int h = 0; h < heads; h++, x += dim) {
      float* y = h < s.query_heads ? queries + h * head : keys_values + (h - s.query_heads) * head;
      if (h < s.query_heads)
        turn(x, p.q_norm, cos, y, s.dim, scale, p.eps);
      else if (h < normed)
        turn(x, p.k_norm, cos, y, s.dim, 1, p.eps);
      else
        std::copy_n(x, dim, y);
    }
  }
}

}  // namespace

void norm_rows(const float* x, const float* weight, float* y, std::ptrdiff_t rows, int n,
               float eps) {
  by_rows(rows, n, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
    norms(x + first * n, weight, y + first * n, end - first, n, eps);
  });
}

void gate_rows(const float* x, float* y, std::ptrdiff_t rows, int n) {
  by_rows(rows, 2 * n, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
    gates(x + first * 2 * n, y + first * n, end - first, n);
  });
}

void split_heads(const float* x, const float* q_norm, const float* k_norm, const float* turns,
                 std::ptrdiff_t turns_stride, float* queries, float* keys_values, Shape s,
                 float eps) {
  const Heads p = {x, q_norm, k_norm, turns, turns_stride, queries, keys_values, s, eps};
  const std::ptrdiff_t values = (s.query_heads + 2 * s.kv_heads) * s.dim;
  by_rows(static_cast<std::ptrdiff_t>(s.batch) * s.length, values,
          [&](std::ptrdiff_t first, std::ptrdiff_t end) { split(p, first, end); });
}

void turn_table(const std::int32_t* positions, float* y, std::size_t n, int dim, double base) {
  const int half = dim / 2;
  std::vector<double> frequencies(half);
  for (int i = 0; i < half; i++) frequencies[i] = std::pow(base, -2.0 * i / dim);
  for (std::size_t t = 0; t < n; t++, y += dim) {
    for (int i = 0; i < half; i++) {
      const double angle = positions[t] * frequencies[i];
      y[i] = static_cast<float>(std::cos(angle));
      y[i + half] = static_cast<float>(std::sin(angle));
    }
  }
}
