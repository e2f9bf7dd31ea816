/* Attention to a cache, plain or quantized. */

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

/* The slots that a token may attend to: none before `first`, none from `end` on. */
struct Span {
  int first, end;
};

/* What a token's mask allows of it; nothing: the empty span at its beginning. */
Span span(const bool* mask, Span of) {
  while (of.end > of.first && !mask[of.end - 1]) of.end--;
  const int beginning = of.first;
  while (of.first < of.end && !mask[of.first]) of.first++;
  return of.first < of.end ? of : Span{beginning, beginning};
}

/* What any of so many tokens may attend to. */
Span hull(const bool* mask, int tokens, int slots) {
  Span all = {slots, 0};
  for (int t = 0; t < tokens; t++, mask += slots) {
    const Span its = span(mask, {0, slots});
    if (its.first < its.end) all = {std::min(all.first, its.first), std::max(all.end, its.end)};
  }
  return all.first < all.end ? all : Span{0, 0};
}

/* Scores of n slots → e^(score - the largest), 0 where the mask says no; returns their sum. */
SIMD float exponentials(float* scores, const bool* mask, int n) {
  float most = -INFINITE;
  for (int j = 0; j < n; j++) {
    if (!mask[j]) scores[j] = -INFINITE;
    most = scores[j] > most ? scores[j] : most;
  }
  vec total = {};
  int j = 0;
  for (; j + LANES <= n; j += LANES) {
    const vec e = exp(load(scores + j) - most);
    store(scores + j, e);
    total += e;
  }
  if (j < n) {
    const vec e = exp(load_part(scores + j, n - j, -INFINITE) - most);
    total += e;
    for (int i = 0; j + i < n; i++) scores[j + i] = e[i];
  }
  return sum(total);
}

/* The products of a query [dim] with n keys [n, dim]. */
SIMD void score(const float* query, const float* keys, float* scores, int n, int dim) {
  int j = 0;
  if (dim % LANES == 0) {
    for (; j + LANES <= n; j += LANES) {
      vec total[LANES] = {};
      const float* key = keys + static_cast<std::ptrdiff_t>(j) * dim;
      for (int i = 0; i < dim; i += LANES) {
        const vec q = load(query + i);
        for (int k = 0; k < LANES; k++) total[k] += q * load(key + k * dim + i);
      }
      store(scores + j, sums(total));
    }
  }
  for (; j < n; j++) scores[j] = dot(query, keys + static_cast<std::ptrdiff_t>(j) * dim, dim);
}

/* The sum of n values [n, dim] with these weights, times `scale`. */
SIMD void average(const float* weights, const float* values, float* y, int n, int dim,
                  float scale) {
  int i = 0;
  for (; i + 4 * LANES <= dim; i += 4 * LANES) {
    vec total[4] = {};
    for (int j = 0; j < n; j++) {
      const float* value = values + static_cast<std::ptrdiff_t>(j) * dim + i;
      for (int k = 0; k < 4; k++) total[k] += weights[j] * load(value + k * LANES);
    }
    for (int k = 0; k < 4; k++) store(y + i + k * LANES, total[k] * scale);
  }
  if (i == dim) return;
  std::fill(y + i, y + dim, 0.0f);
  for (int j = 0; j < n; j++) {
    const float weight = weights[j] * scale;
    const float* value = values + static_cast<std::ptrdiff_t>(j) * dim;
    for (int k = i; k < dim; k++) y[k] += weight * value[k];
  }
}

/* Rows [first, end) of one head, unpacked into `room` if they are quantized. */
const float* rows(const Cache& c, std::ptrdiff_t head, Span s, int dim, std::vector<float>& room) {
  const std::ptrdiff_t start = (head * c.slots + s.first) * dim;
  if (c.plain != nullptr) return c.plain + start;
  const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(s.end - s.first) * dim;
  room.resize(count);
  unpack(c.packed, start, count, room.data());
  return room.data();
}

constexpr int FEW = 8;      /* tokens that attend one by one */
constexpr int BLOCK = 128;  /* of more, those that attend together */

struct Scratch {
  std::vector<float> scores, keys, values;
};

/* One head's `tokens` queries [tokens, dim], each by itself. */
void attend_singly(const float* queries, const float* keys, const float* values, const bool* mask,
                   float* y, std::ptrdiff_t y_stride, int tokens, int slots, Span all, int dim,
                   float* scores) {
  for (int t = 0; t < tokens; t++, queries += dim, mask += slots, y += y_stride) {
    const Span s = span(mask, all);
    const int n = s.end - s.first;
    const std::ptrdiff_t skipped = static_cast<std::ptrdiff_t>(s.first - all.first) * dim;
    score(queries, keys + skipped, scores, n, dim);
    const float total = exponentials(scores, mask + s.first, n);
    average(scores, values + skipped, y, n, dim, n ? 1 / total : 0);
  }
}

/* The same as two products of matrices. */
void attend_together(const float* queries, const float* keys, const float* values, const bool* mask,
                     float* y, std::ptrdiff_t y_stride, int tokens, int slots, Span all, int dim,
                     float* scores) {
  const int n = all.end - all.first;
  cblas_sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, tokens, n, dim, 1, queries, dim, keys, dim, 0, scores,
              n);
  for (int t = 0; t < tokens; t++, mask += slots) {
    const Span s = span(mask, all);
    float* row = scores + static_cast<std::ptrdiff_t>(t) * n;
    float* its = row + (s.first - all.first);
    const int count = s.end - s.first;
    const float total = exponentials(its, mask + s.first, count);
    std::fill(row, its, 0.0f);
    for (int j = 0; j < count; j++) its[j] /= total;
    std::fill(its + count, row + n, 0.0f);
  }
  cblas_sgemm(ROW_MAJOR, PLAIN, PLAIN, tokens, dim, n, 1, scores, n, values, dim, 0, y,
              static_cast<int>(y_stride));
}

}  // namespace

/* Later tokens see more than earlier ones, hence the blocks. */
void attend(const float* queries, const Cache& cache, const bool* mask, std::ptrdiff_t mask_stride,
            float* y, Shape s) {
  static thread_local Scratch scratch;
  const int sharing = s.query_heads / s.kv_heads;
  const std::ptrdiff_t y_stride = static_cast<std::ptrdiff_t>(s.query_heads) * s.dim;
  for (int b = 0; b < s.batch; b++) {
    for (int start = 0; start < s.length; start += BLOCK) {
      const int tokens = std::min(BLOCK, s.length - start);
      const bool* seen = mask + b * mask_stride + static_cast<std::ptrdiff_t>(start) * cache.slots;
      const Span all = hull(seen, tokens, cache.slots);
      const std::size_t n = all.end - all.first;
      scratch.scores.resize(std::max<std::size_t>(n * (tokens > FEW ? tokens : 1), 1));
      for (int h = 0; h < s.kv_heads; h++) {
        const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(b) * 2 * s.kv_heads + h;
        const float* keys = rows(cache, head, all, s.dim, scratch.keys);
        const float* values = rows(cache, head + s.kv_heads, all, s.dim, scratch.values);
        for (int q = h * sharing; q < (h + 1) * sharing; q++) {
          const float* its = queries + ((static_cast<std::ptrdiff_t>(b) * s.query_heads + q) *
                                        s.length + start) * s.dim;
          float* out = y + (static_cast<std::ptrdiff_t>(b) * s.length + start) * y_stride + q * s.dim;
          (tokens > FEW && n > 0 ? attend_together : attend_singly)(
              its, keys, values, seen, out, y_stride, tokens, cache.slots, all, s.dim,
              scratch.scores.data());
        }
      }
    }
  }
}
