/* Packed values: unpacking them, and multiplying with a matrix of them. */

#include <algorithm>
#include <vector>

#include "chunks.h"
#include "kernels.h"
#include "vectors.h"

namespace {

typedef std::uint32_t words __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t loose_words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE words load_words(const std::uint32_t* p) { return *reinterpret_cast<const loose_words*>(p); }

/* Eight values of a word each are taken at once. */
INLINE void unpack_nibbles(const std::uint32_t* packed, const float* scales, const float* biases,
                           float* y, std::ptrdiff_t groups, int group) {
  const words places = {0, 4, 8, 12, 16, 20, 24, 28};
  for (std::ptrdiff_t g = 0; g < groups; g++) {
    for (int i = 0; i < group; i += LANES, packed++, y += LANES) {
      const vec q = __builtin_convertvector((ints)(((words{} + *packed) >> places) & 15), vec);
      store(y, q * scales[g] + biases[g]);
    }
  }
}

/* Bytes of a little-endian machine, as all are that MLX runs on; the compiler finds the vectors. */
INLINE void unpack_bytes(const std::uint32_t* packed, const float* scales, const float* biases,
                         float* __restrict y, std::ptrdiff_t groups, int group) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(packed);
  for (std::ptrdiff_t g = 0; g < groups; g++, bytes += group, y += group) {
    const float scale = scales[g], bias = biases[g];
    for (int i = 0; i < group; i++) y[i] = bytes[i] * scale + bias;
  }
}

SIMD void unpack_4(const std::uint32_t* packed, const float* scales, const float* biases, float* y,
                   std::ptrdiff_t groups, int group) {
  unpack_nibbles(packed, scales, biases, y, groups, group);
}

SIMD void unpack_8(const std::uint32_t* packed, const float* scales, const float* biases, float* y,
                   std::ptrdiff_t groups, int group) {
  unpack_bytes(packed, scales, biases, y, groups, group);
}

/* ---- Few rows ------------------------------------------------------------------------------- */

constexpr int AHEAD = 256; /* words that are fetched before they are needed */
constexpr int MOST = 4;    /* rows that are multiplied together: so many sums fit in registers */

/* Up to MOST rows, in the order in which they are used. Eight words of the matrix are taken at once,
   and of each word the same value: values that are a word apart. A value that is masked but not
   shifted is 2^(bits · n) times as large, and what it is multiplied with as much smaller. The
   values of a word are added up, too, for the biases. */
struct Rows {
  const float* values; /* [columns / (LANES · values in a word), values in a word, rows, LANES] */
  const float* sums;   /* [columns / (LANES · values in a word), rows, LANES] */
};

template <int bits>
INLINE void reorder(const float* x, int count, int columns, float* values, float* sums) {
  constexpr int in_word = 32 / bits, block = LANES * in_word;
  for (int row = 0; row < count; row++) {
    float *value = values + row * LANES, *total = sums + row * LANES;
    for (int start = 0; start < columns; start += block, x += block, total += count * LANES) {
      vec sum = {};
      for (int n = 0; n < in_word; n++, value += count * LANES) {
        vec its;
        for (int word = 0; word < LANES; word++) its[word] = x[word * in_word + n];
        store(value, n < in_word - 1 ? its / static_cast<float>(1u << (bits * n)) : its);
        sum += its;
      }
      store(total, sum);
    }
  }
}

SIMD void reorder_4(const float* x, int count, int columns, float* values, float* sums) {
  reorder<4>(x, count, columns, values, sums);
}

SIMD void reorder_8(const float* x, int count, int columns, float* values, float* sums) {
  reorder<8>(x, count, columns, values, sums);
}

/* The value number n of each word, times 2^(bits · n) but for the last. */
template <int bits>
INLINE vec nth(words w, int n) {
  const std::uint32_t mask = (1u << bits) - 1;
  return __builtin_convertvector(
      (ints)(n < 32 / bits - 1 ? w & (mask << (bits * n)) : w >> (32 - bits)), vec);
}

/* The products of `count` rows with rows [first, end) of the matrix: in each group
   Σ (scale · q + bias) · x = scale · Σ q · x + bias · Σ x. */
template <int bits, int count>
INLINE void products(const Rows& x, const Packed& w, int columns, int rows, int first, int end,
                     float* y) {
  constexpr int in_word = 32 / bits;
  const int words_in_row = columns / in_word, words_in_group = w.group / in_word;
  const std::uint32_t* packed = w.words + static_cast<std::ptrdiff_t>(first) * words_in_row;
  const float* scale = w.scales + static_cast<std::ptrdiff_t>(first) * (columns / w.group);
  const float* bias = w.biases + (scale - w.scales);
  for (int row = first; row < end; row++) {
    vec total[count] = {};
    const float *values = x.values, *sums = x.sums;
    for (int word = 0; word < words_in_row;) {
      vec scales = vec{} + *scale++, biases = vec{} + *bias++;
      int stop = word + words_in_group;
      if (words_in_group < LANES) { /* two groups in eight words */
        scales = SHUFFLE(scales, vec{} + *scale++, 0, 0, 0, 0, 8, 8, 8, 8);
        biases = SHUFFLE(biases, vec{} + *bias++, 0, 0, 0, 0, 8, 8, 8, 8);
        stop = word + LANES;
      }
      vec even[count] = {}, odd[count] = {};
      for (; word < stop; word += LANES) {
        const words its = load_words(packed);
        __builtin_prefetch(packed + AHEAD);
#pragma GCC unroll 8
        for (int n = 0; n < in_word; n += 2) {
          const vec q = nth<bits>(its, n), r = nth<bits>(its, n + 1);
#pragma GCC unroll 4
          for (int i = 0; i < count; i++) even[i] += q * load(values + (n * count + i) * LANES);
#pragma GCC unroll 4
          for (int i = 0; i < count; i++)
            (count < 3 ? odd : even)[i] += r * load(values + ((n + 1) * count + i) * LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) total[i] += load(sums + i * LANES) * biases;
        packed += LANES, values += in_word * count * LANES, sums += count * LANES;
      }
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) total[i] += (count < 3 ? even[i] + odd[i] : even[i]) * scales;
    }
    for (int i = 0; i < count; i++) y[i * static_cast<std::ptrdiff_t>(rows) + row] += sum(total[i]);
  }
}

template <int bits>
INLINE void few(const Rows& x, int count, const Packed& w, int columns, int rows, int first,
                int end, float* y) {
  if (count == 4) products<bits, 4>(x, w, columns, rows, first, end, y);
  if (count == 3) products<bits, 3>(x, w, columns, rows, first, end, y);
  if (count == 2) products<bits, 2>(x, w, columns, rows, first, end, y);
  if (count == 1) products<bits, 1>(x, w, columns, rows, first, end, y);
}

SIMD void few_4(const Rows& x, int count, const Packed& w, int columns, int rows, int first,
                int end, float* y) {
  few<4>(x, count, w, columns, rows, first, end, y);
}

SIMD void few_8(const Rows& x, int count, const Packed& w, int columns, int rows, int first,
                int end, float* y) {
  few<8>(x, count, w, columns, rows, first, end, y);
}

/* ---- In chunks ------------------------------------------------------------------------------ */

constexpr int FEW = 8;           /* rows that aren't worth unpacking the matrix for */
constexpr int UNPACKED = 131072; /* values of an unpacked chunk: half of a cache of a megabyte */

struct Product {
  const float* x;
  const float* sums;
  int count, rows, columns;
  Packed w;
  float* y;
};

/* `x` and `sums` are reordered, MOST rows at a time. */
void multiply_few(const Product& p, int first, int end) {
  for (std::ptrdiff_t row = 0; row < p.count; row += MOST) {
    const Rows x = {p.x + row * p.columns, p.sums + row * p.columns * p.w.bits / 32};
    const int count = std::min<int>(p.count - row, MOST);
    (p.w.bits == 4 ? few_4 : few_8)(x, count, p.w, p.columns, p.rows, first, end, p.y + row * p.rows);
  }
}

void multiply_unpacked(const Product& p, int first, int end) {
  static thread_local std::vector<float> values;
  const std::ptrdiff_t n = static_cast<std::ptrdiff_t>(end - first) * p.columns;
  values.resize(n);
  unpack(p.w, static_cast<std::ptrdiff_t>(first) * p.columns, n, values.data());
  cblas_sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, p.count, end - first, p.columns, 1, p.x, p.columns,
              values.data(), p.columns, 1, p.y + first, p.rows);
}

}  // namespace

void unpack(const Packed& p, std::ptrdiff_t first, std::ptrdiff_t count, float* y) {
  (p.bits == 4 ? unpack_4 : unpack_8)(p.words + first / (32 / p.bits), p.scales + first / p.group,
                                      p.biases + first / p.group, y, count / p.group, p.group);
}

void add_product(const float* x, int count, const Packed& w, int rows, int columns, float* y) {
  static thread_local std::vector<float> values, sums;
  Product p = {x, nullptr, count, rows, columns, w, y};
  const bool is_few = count <= FEW;
  if (is_few) {
    const std::ptrdiff_t words = static_cast<std::ptrdiff_t>(columns) * w.bits / 32;
    values.resize(static_cast<std::size_t>(count) * columns);
    sums.resize(count * words);
    for (std::ptrdiff_t row = 0; row < count; row += MOST)
      (w.bits == 4 ? reorder_4 : reorder_8)(x + row * columns, std::min<int>(count - row, MOST),
                                            columns, values.data() + row * columns,
                                            sums.data() + row * words);
    p.x = values.data(), p.sums = sums.data();
  }
  const int size = static_cast<int>((is_few ? CHUNK : UNPACKED) / columns) + 1;
  in_chunks((rows + size - 1) / size, [&](std::ptrdiff_t i) {
    const int first = static_cast<int>(i) * size, end = std::min(first + size, rows);
    (is_few ? multiply_few : multiply_unpacked)(p, first, end);
  });
}
