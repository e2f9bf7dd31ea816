/* Norm, gate, heads. */

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "vectors.h"

SIMD void norm_rows(const float* x, const float* weight, float* y, int rows, int n, float eps) {
  for (int row = 0; row < rows; row++, x += n, y += n) {
    const float scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
  }
}

INLINE vec gated(vec gate, vec up) { return gate * up / (1 + exp(-gate)); }

SIMD void gate_rows(const float* x, float* y, int rows, int n) {
  for (int row = 0; row < rows; row++, x += 2 * n, y += n) {
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

SIMD void split_heads(const float* x, const float* q_norm, const float* k_norm, const float* turns,
                      std::ptrdiff_t turns_stride, float* queries, float* keys_values, Shape s,
                      float eps) {
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const int normed = s.query_heads + s.kv_heads, heads = normed + s.kv_heads;
  const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(s.length) * s.dim;
  for (int b = 0; b < s.batch; b++) {
    for (int t = 0; t < s.length; t++) {
      const float* cos = turns + b * turns_stride + static_cast<std::ptrdiff_t>(t) * s.dim;
      float* q = queries + b * s.query_heads * head + static_cast<std::ptrdiff_t>(t) * s.dim;
      float* kv = keys_values + b * 2 * s.kv_heads * head + static_cast<std::ptrdiff_t>(t) * s.dim;
      for (int h = 0; h < heads; h++, x += s.dim) {
        if (h < s.query_heads)
          turn(x, q_norm, cos, q + h * head, s.dim, scale, eps);
        else if (h < normed)
          turn(x, k_norm, cos, kv + (h - s.query_heads) * head, s.dim, 1, eps);
        else
          std::copy_n(x, s.dim, kv + (h - s.query_heads) * head);
      }
    }
  }
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
