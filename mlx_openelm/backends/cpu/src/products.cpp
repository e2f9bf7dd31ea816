/* Products with weight matrices. Few rows stream the matrix once, as it is stored; many rows work
   on blocks of it in float32 (K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix
   Multiplication, 2008). */

#include <algorithm>

#include "kernels.h"
#include "loops.h"
#include "pool.h"

namespace {

constexpr int FEW = 8;         /* rows; more are worth blocks in float32 */
constexpr int FEW_AT_ONCE = 4; /* packed values are multiplied with so many rows at a time */
constexpr int DEPTH = 256;     /* of a block: its part of the panel stays in the first cache */
constexpr int STRIPS = 8;      /* of loops.rows rows of a matrix that are one chunk */

struct Scratch {
  std::vector<float> panels, rows, values, sums;
};
thread_local Scratch scratch;

bool is_packed(const openelm_matrix& w) { return w.kind == AFFINE4 || w.kind == AFFINE8; }

/* A panel [k, width] is `tile` wide. out [n, width] (rows out_stride apart) = a [n, k] · panel. */
void multiply_panel(const float* a, int n, int k, const float* panel, std::ptrdiff_t panel_stride,
                    int tile, float* out, std::ptrdiff_t out_stride) {
  const int rows = loops.rows, width = loops.width[tile];
  alignas(64) float spare[MAX_ROWS * DEPTH], last[MAX_ROWS * MAX_WIDTH];
  for (int start = 0; start < k; start += DEPTH) {
    const int depth = std::min(DEPTH, k - start);
    const float* b = panel + start * panel_stride;
    int r = 0;
    for (; r + rows <= n; r += rows)
      loops.tile[tile](a + static_cast<std::ptrdiff_t>(r) * k + start, k, b, panel_stride, depth,
                       out + r * out_stride, out_stride, start > 0);
    if (r == n) continue;
    for (int i = 0; i < rows; i++) { /* the last row stands in for those beyond it */
      const float* row = a + static_cast<std::ptrdiff_t>(std::min(r + i, n - 1)) * k + start;
      std::copy_n(row, depth, spare + i * depth);
      if (start > 0 && r + i < n) std::copy_n(out + (r + i) * out_stride, width, last + i * width);
    }
    loops.tile[tile](spare, depth, b, panel_stride, depth, last, width, start > 0);
    for (int i = 0; r + i < n; i++) std::copy_n(last + i * width, width, out + (r + i) * out_stride);
  }
}

void multiply_many(const float* x, int count, const openelm_matrix& w, float* y, bool add) {
  const int tile = count > loops.width[0], width = loops.width[tile], k = w.columns;
  const int panels = (count + width - 1) / width, block = STRIPS * loops.rows;
  const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(k) * width;
  float* packed = room(scratch.panels, panels * size);
  by_rows(panels, size, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
    for (std::ptrdiff_t p = first; p < end; p++)
      loops.pack(x + p * width * k, std::min<int>(count - p * width, width), k, packed + p * size, width);
  });
  const auto compute = [=](std::ptrdiff_t chunk) {
    alignas(64) float out[STRIPS * MAX_ROWS * MAX_WIDTH];
    const std::ptrdiff_t first = chunk * block, end = std::min<std::ptrdiff_t>(first + block, w.rows);
    const int n = static_cast<int>(end - first);
    const float* rows = static_cast<const float*>(w.weight) + first * k;
    if (w.kind != F32) {
      float* unpacked = room(scratch.rows, static_cast<std::ptrdiff_t>(block) * k);
      unpack_rows(w, first, end, unpacked);
      rows = unpacked;
    }
    for (int p = 0; p < panels; p++) {
      multiply_panel(rows, n, k, packed + p * size, width, tile, out, width);
      loops.transpose(out, width, n, std::min(count - p * width, width),
                      y + static_cast<std::ptrdiff_t>(p) * width * w.rows + first, w.rows, add);
    }
  };
  const std::ptrdiff_t chunks = (w.rows + block - 1) / block;
  if (static_cast<std::ptrdiff_t>(w.rows) * k * count > 16 * CHUNK)
    in_chunks(chunks, compute);
  else
    for (std::ptrdiff_t i = 0; i < chunks; i++) compute(i);
}

/* Calls run(first, end) for the rows of W, in chunks of a multiple of 4. */
template <class F>
void by_weight_rows(const openelm_matrix& w, const F& run) {
  const int size = static_cast<int>(CHUNK / w.columns + 4) / 4 * 4;
  in_chunks((w.rows + size - 1) / size, [&](std::ptrdiff_t i) {
    const int first = static_cast<int>(i) * size;
    run(first, std::min(first + size, w.rows));
  });
}

void multiply_few_packed(const float* x, int count, const openelm_matrix& w, float* y, bool add) {
  const int kind = w.kind - AFFINE4, bits = 4 << kind;
  const std::ptrdiff_t words = static_cast<std::ptrdiff_t>(w.columns) * bits / 32;
  float* values = room(scratch.values, static_cast<std::ptrdiff_t>(count) * w.columns);
  float* sums = room(scratch.sums, count * words);
  for (std::ptrdiff_t row = 0; row < count; row += FEW_AT_ONCE)
    loops.reorder[kind](x + row * w.columns, std::min<int>(count - row, FEW_AT_ONCE), w.columns,
                        values + row * w.columns, sums + row * words);
  by_weight_rows(w, [&](int first, int end) {
    for (std::ptrdiff_t row = 0; row < count; row += FEW_AT_ONCE)
      loops.few_packed[kind](values + row * w.columns, sums + row * words,
                             std::min<int>(count - row, FEW_AT_ONCE), w, first, end, y + row * w.rows,
                             add);
  });
}

}  // namespace

void multiply(const float* x, int count, const openelm_matrix& w, float* y, bool add) {
  if (count > FEW)
    multiply_many(x, count, w, y, add);
  else if (is_packed(w))
    multiply_few_packed(x, count, w, y, add);
  else
    by_weight_rows(w, [&](int first, int end) { loops.few[w.kind](x, count, w, first, end, y, add); });
}

void unpack_rows(const openelm_matrix& w, std::ptrdiff_t first, std::ptrdiff_t end, float* y) {
  const std::ptrdiff_t start = first * w.columns, n = (end - first) * w.columns;
  if (w.kind == F32)
    std::copy_n(static_cast<const float*>(w.weight) + start, n, y);
  else if (!is_packed(w))
    loops.convert[w.kind - F16](static_cast<const std::uint16_t*>(w.weight) + start, n, y);
  else
    loops.dequantize[w.kind - AFFINE4](
        static_cast<const std::uint32_t*>(w.weight) + start / (w.kind == AFFINE4 ? 8 : 4),
        w.scales + start / w.group, w.biases + start / w.group, y, n / w.group, w.group);
}

void multiply_dense(const float* a, int rows, const float* b, std::ptrdiff_t b_stride, int columns,
                    int k, float* out, std::ptrdiff_t out_stride) {
  for (int j = 0; j < columns;) {
    const int left = columns - j, tile = left >= loops.width[1];
    const int width = loops.width[tile];
    if (left >= width) {
      multiply_panel(a, rows, k, b + j, b_stride, tile, out + j, out_stride);
    } else { /* columns that don't fill a tile */
      float* panel = room(scratch.panels, static_cast<std::ptrdiff_t>(k) * width);
      float* part = room(scratch.values, static_cast<std::ptrdiff_t>(rows) * width);
      for (std::ptrdiff_t i = 0; i < k; i++)
        for (int c = 0; c < width; c++) panel[i * width + c] = c < left ? b[i * b_stride + j + c] : 0;
      multiply_panel(a, rows, k, panel, width, tile, part, width);
      for (std::ptrdiff_t r = 0; r < rows; r++)
        std::copy_n(part + r * width, left, out + r * out_stride + j);
    }
    j += width;
  }
}
