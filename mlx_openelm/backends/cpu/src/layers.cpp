/* Heads with RoPE, and the cache's quantization. */

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "loops.h"
#include "pool.h"

namespace {

/* Writes one head of keys or values [dim] to its slot. */
void write_slot(const Cache& c, std::ptrdiff_t head, int slot, const float* x, int dim) {
  const std::ptrdiff_t at = (head * c.capacity + slot) * dim;
  if (c.bits == 32)
    std::copy_n(x, dim, static_cast<float*>(c.arrays.values) + at);
  else
    quantize(x, dim / c.group, c.group, c.bits,
             static_cast<std::uint32_t*>(c.arrays.values) + at / (32 / c.bits),
             c.arrays.scales + at / c.group, c.arrays.biases + at / c.group);
}

}  // namespace

/* As MLX's affine_quantize: the end of the range that is farther from zero is met exactly. */
void quantize(const float* x, std::ptrdiff_t groups, int group, int bits, std::uint32_t* packed,
              float* scales, float* biases) {
  const float bins = static_cast<float>((1 << bits) - 1);
  const int in_word = 32 / bits;
  for (std::ptrdiff_t g = 0; g < groups; g++, x += group, packed += group / in_word) {
    const float low = *std::min_element(x, x + group), high = *std::max_element(x, x + group);
    const bool negative = std::abs(low) > std::abs(high);
    float scale = std::max((high - low) / bins, 1e-7f);
    if (!negative) scale = -scale;
    const float edge = negative ? low : high;
    const float q0 = std::rint(edge / scale);
    float bias = 0;
    if (q0 != 0) scale = edge / q0, bias = edge;
    for (int i = 0; i < group; i += in_word) {
      std::uint32_t word = 0;
      for (int n = 0; n < in_word; n++) {
        /* In this order of arguments, NaN becomes 0: converting it would be undefined. */
        const float q = std::min(bins, std::max(0.0f, std::rint((x[i + n] - bias) / scale)));
        word |= static_cast<std::uint32_t>(q) << (bits * n);
      }
      packed[i / in_word] = word;
    }
    scales[g] = scale;
    biases[g] = bias;
  }
}

void split_heads(const float* x, const float* q_norm, const float* k_norm, const float* angles,
                 std::ptrdiff_t angles_stride, float* queries, const Cache& cache, Shape s, float eps) {
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const std::ptrdiff_t dim = s.dim, values = (s.query_heads + 2 * s.kv_heads) * dim;
  by_rows(static_cast<std::ptrdiff_t>(s.batch) * s.length, values,
          [=](std::ptrdiff_t first, std::ptrdiff_t end) {
            static thread_local std::vector<float> rotated;
            for (std::ptrdiff_t token = first; token < end; token++) {
              const std::ptrdiff_t b = token / s.length, t = token % s.length;
              const float *head = x + token * values, *cos_sin = angles + b * angles_stride + t * dim;
              float* q = queries + (b * s.query_heads * s.length + t) * dim;
              for (int h = 0; h < s.query_heads; h++, head += dim)
                loops.rotate(head, q_norm, cos_sin, q + h * s.length * dim, s.dim, scale, eps);
              const int slot = cache.slot + static_cast<int>(t);
              for (int h = 0; h < 2 * s.kv_heads; h++, head += dim) {
                const float* vector = head;
                if (h < s.kv_heads) {
                  float* y = room(rotated, dim);
                  loops.rotate(head, k_norm, cos_sin, y, s.dim, 1, eps);
                  vector = y;
                }
                write_slot(cache, b * 2 * s.kv_heads + h, slot, vector, s.dim);
              }
            }
          });
}
