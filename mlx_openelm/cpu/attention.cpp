/* Attention to a cache, plain or quantized. */

#include <algorithm>
#include <vector>

#include "chunks.h"
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

constexpr int FEW = 8;     /* tokens that attend one by one */
constexpr int BLOCK = 128; /* of more, those that attend together */
constexpr std::ptrdiff_t WORTH = 500000; /* products that are worth a second thread */

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

/* Later tokens see more than earlier ones, hence the blocks. A chunk is a key head of one block. */
void attend(const float* queries, const Cache& cache, const bool* mask, std::ptrdiff_t mask_stride,
            float* y, Shape s) {
  const int sharing = s.query_heads / s.kv_heads, blocks = (s.length + BLOCK - 1) / BLOCK;
  const std::ptrdiff_t length = s.length, y_stride = static_cast<std::ptrdiff_t>(s.query_heads) * s.dim;
  const auto compute = [=](std::ptrdiff_t i) {
    static thread_local Scratch scratch;
    const std::ptrdiff_t h = i % s.kv_heads, b = i / s.kv_heads / blocks;
    const std::ptrdiff_t start = i / s.kv_heads % blocks * BLOCK;
    const int tokens = static_cast<int>(std::min<std::ptrdiff_t>(BLOCK, length - start));
    const bool* seen = mask + b * mask_stride + start * cache.slots;
    const Span all = hull(seen, tokens, cache.slots);
    const std::size_t n = all.end - all.first;
    scratch.scores.resize(std::max<std::size_t>(n * (tokens > FEW ? tokens : 1), 1));
    const std::ptrdiff_t head = b * 2 * s.kv_heads + h;
    const float* keys = rows(cache, head, all, s.dim, scratch.keys);
    const float* values = rows(cache, head + s.kv_heads, all, s.dim, scratch.values);
    const auto run = tokens > FEW && n > 0 ? attend_together : attend_singly;
    for (std::ptrdiff_t q = h * sharing; q < (h + 1) * sharing; q++)
      run(queries + ((b * s.query_heads + q) * length + start) * s.dim, keys, values, seen,
          y + (b * length + start) * y_stride + q * s.dim, y_stride, tokens, cache.slots, all, s.dim,
          scratch.scores.data());
  };
  const std::ptrdiff_t chunks = static_cast<std::ptrdiff_t>(s.batch) * blocks * s.kv_heads;
  const std::ptrdiff_t products = static_cast<std::ptrdiff_t>(cache.slots) * s.length * s.query_heads;
  if (products * s.dim * s.batch > WORTH)
    in_chunks(chunks, compute);
  else
    for (std::ptrdiff_t i = 0; i < chunks; i++) compute(i);
}
