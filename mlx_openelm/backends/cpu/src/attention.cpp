/* Attention to a cache, plain or quantized. */

#include <algorithm>

#include "kernels.h"
#include "loops.h"
#include "pool.h"

namespace {

constexpr int FEW = 8;     /* tokens that attend one by one */
constexpr int BLOCK = 128; /* of more, those that attend together: later tokens see more */
constexpr std::ptrdiff_t WORTH = 500000; /* products that are worth a second thread */

struct Scratch {
  std::vector<float> scores, keys, values, panels;
  std::vector<Span> spans;
};

/* Tokens `start` to start + tokens - 1 of one sequence. */
struct Part {
  int start, tokens;
  std::ptrdiff_t sequence;
};

const std::uint8_t* mask_of(const Seen& seen, int token, int capacity) {
  return seen.mask == nullptr ? nullptr : seen.mask + static_cast<std::ptrdiff_t>(token) * capacity;
}

Span span_of(const Seen& seen, std::ptrdiff_t sequence, int token, int capacity) {
  const std::uint8_t* mask = mask_of(seen, token, capacity);
  if (mask == nullptr)
    return {seen.starts == nullptr ? 0 : seen.starts[sequence], seen.first + token + 1};
  Span s = {0, capacity};
  while (s.end > 0 && !mask[s.end - 1]) s.end--;
  while (s.first < s.end && !mask[s.first]) s.first++;
  return s;
}

/* The spans of all tokens, and what covers them. A token that sees nothing has an empty span there. */
Span find_spans(const Seen& seen, Part part, int capacity, std::vector<Span>& spans) {
  spans.resize(part.tokens);
  Span all = {capacity, 0};
  for (int t = 0; t < part.tokens; t++) {
    const Span s = spans[t] = span_of(seen, part.sequence, part.start + t, capacity);
    if (s.first < s.end) all = {std::min(all.first, s.first), std::max(all.end, s.end)};
  }
  if (all.first >= all.end) all = {0, 0};
  for (Span& s : spans)
    if (s.first >= s.end) s = {all.first, all.first};
  return all;
}

/* Slots of one head, [end - first, dim], unpacked into `v` if they are quantized. */
const float* slots(const Cache& c, std::ptrdiff_t head, Span s, int dim, std::vector<float>& v) {
  const std::ptrdiff_t start = (head * c.capacity + s.first) * dim;
  if (c.bits == 32) return static_cast<const float*>(c.arrays.values) + start;
  const std::ptrdiff_t n = static_cast<std::ptrdiff_t>(s.end - s.first) * dim;
  float* y = room(v, n);
  loops.dequantize[c.bits == 8](static_cast<const std::uint32_t*>(c.arrays.values) + start / (32 / c.bits),
                                c.arrays.scales + start / c.group, c.arrays.biases + start / c.group, y,
                                n / c.group, c.group);
  return y;
}

/* Softmax of the scores [tokens, stride] of slots `all`; 0 for what a token doesn't attend to. */
void softmax(float* scores, std::ptrdiff_t stride, const Span* spans, const Seen& seen, Part part,
             int capacity, Span all) {
  for (int t = 0; t < part.tokens; t++, scores += stride) {
    const Span s = spans[t];
    const std::uint8_t* mask = mask_of(seen, part.start + t, capacity);
    float *row = scores + (s.first - all.first), *end = scores + (s.end - all.first);
    const float total = loops.exponentials(row, mask == nullptr ? nullptr : mask + s.first, s.end - s.first);
    const float scale = 1 / total;
    std::fill(scores, row, 0.0f);
    for (float* p = row; p < end; p++) *p *= scale;
    std::fill(end, scores + stride, 0.0f);
  }
}

}  // namespace

/* A chunk is a key head with its query heads, and a block of tokens. */
void attend(const float* queries, const Cache& cache, Seen seen, float* y, Shape s) {
  const int sharing = s.query_heads / s.kv_heads, blocks = (s.length + BLOCK - 1) / BLOCK;
  const std::ptrdiff_t dim = s.dim, y_stride = s.query_heads * dim;
  const auto compute = [=](std::ptrdiff_t i) {
    static thread_local Scratch scratch;
    const std::ptrdiff_t h = i % s.kv_heads, b = i / s.kv_heads / blocks;
    const int start = static_cast<int>(i / s.kv_heads % blocks) * BLOCK;
    const Part part = {start, std::min(BLOCK, s.length - start), b};
    const Span all = find_spans(seen, part, cache.capacity, scratch.spans);
    const int n = all.end - all.first, width = loops.width[1], panels = (n + width - 1) / width;
    const float* keys = slots(cache, b * 2 * s.kv_heads + h, all, s.dim, scratch.keys);
    const float* values = slots(cache, (b * 2 + 1) * s.kv_heads + h, all, s.dim, scratch.values);
    const bool together = part.tokens > FEW && n > 0;
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(panels) * width;
    float* scores = room(scratch.scores, (together ? part.tokens : 1) * stride + 1);
    float* panel = nullptr;
    if (together) {
      panel = room(scratch.panels, stride * dim);
      for (int p = 0; p < panels; p++)
        loops.pack(keys + p * width * dim, std::min(n - p * width, width), s.dim, panel + p * width * dim, width);
    }
    for (std::ptrdiff_t q = h * sharing; q < (h + 1) * sharing; q++) {
      const float* x = queries + ((b * s.query_heads + q) * s.length + start) * dim;
      float* out = y + (b * s.length + start) * y_stride + q * dim;
      if (together) {
        for (int p = 0; p < panels; p++)
          multiply_dense(x, part.tokens, panel + p * width * dim, width, width, s.dim, scores + p * width, stride);
        softmax(scores, stride, scratch.spans.data(), seen, part, cache.capacity, all);
        for (int t = 0; t < part.tokens && stride > n; t++) /* as rows of n */
          std::copy_n(scores + t * stride, n, scores + static_cast<std::ptrdiff_t>(t) * n);
        multiply_dense(scores, part.tokens, values, dim, s.dim, n, out, y_stride);
        continue;
      }
      for (int t = 0; t < part.tokens; t++, x += dim, out += y_stride) {
        const Span span = scratch.spans[t];
        const std::uint8_t* mask = mask_of(seen, start + t, cache.capacity);
        const std::ptrdiff_t skipped = (span.first - all.first) * dim;
        const int count = span.end - span.first;
        loops.score(x, keys + skipped, scores, count, s.dim);
        const float total = loops.exponentials(scores, mask == nullptr ? nullptr : mask + span.first, count);
        loops.average(scores, values + skipped, out, count, s.dim, count ? 1 / total : 0);
      }
    }
  };
  const std::ptrdiff_t chunks = static_cast<std::ptrdiff_t>(s.batch) * blocks * s.kv_heads;
  const std::ptrdiff_t scores = static_cast<std::ptrdiff_t>(seen.mask == nullptr ? seen.first + s.length : cache.capacity) *
                                s.length * s.query_heads * s.batch;
  if (scores * dim > WORTH)
    in_chunks(chunks, compute);
  else
    for (std::ptrdiff_t i = 0; i < chunks; i++) compute(i);
}
