/* The network's operations for MLX's CPU backend, one graph primitive each.

   On a CPU `mx.fast` falls apart into primitives, and dispatching one costs more than most of them
   compute in a small model. These do in one what takes MLX four to twelve, in vector arithmetic.
   `native.py` builds the network's step of them. All arrays are float32 and row-contiguous.

   An MLX extension as MLX documents them, without CMake: nanobind's own half is compiled at the
   end of this file. It fits the MLX and the nanobind that it is compiled with; `kernels.py` looks
   whether they are there when it is loaded. */

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>
#include <mlx/version.h>

namespace nb = nanobind;
namespace mx = mlx::core;
using mx::array;

/* MLX links a BLAS; blas.py may have put a faster one before it. */
extern "C" void cblas_sgemm(int, int, int, int, int, int, float, const float*, int, const float*,
                            int, float, float*, int);

namespace {

/* ---- Vectors -------------------------------------------------------------------------------- */

#if defined(__x86_64__) && defined(__gnu_linux__)
#define SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SIMD
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef std::int32_t ints __attribute__((vector_size(LANES * 4)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

INLINE float sum(vec a) {
  return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

/* The sum of each of eight vectors. */
INLINE vec sums(const vec* a) {
  vec pairs[4], fours[2];
  for (int i = 0; i < 4; i++) {
    const vec x = a[2 * i], y = a[2 * i + 1];
    pairs[i] = SHUFFLE(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; i++) {
    const vec x = pairs[2 * i], y = pairs[2 * i + 1];
    fours[i] = SHUFFLE(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE float dot(const float* a, const float* b, int n) {
  vec even = {}, odd = {};
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + LANES) * load(b + i + LANES);
  }
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return sum(even + odd) + rest;
}

constexpr float INFINITE = std::numeric_limits<float>::infinity();

/* e^x with a relative error of 3e-7; 0 below -87, infinite from 88 on.

   x = n ln 2 + f; e^x = 2^n e^f, and 2^n is n + 127 in the bits of an exponent (W. Cody and
   W. Waite, Software Manual for the Elementary Functions, 1980). The polynomial has the least
   relative error in e^f for |f| up to ln 2 / 2. */
INLINE vec exp(vec x) {
  const float round = 1.5f * (1 << 23) + 127; /* leaves the nearest integer in the low bits */
  const vec zero = {};
  const vec rounded = x * 1.44269504f + round;
  const vec n = rounded - round;
  const vec f = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
  const vec square = f * f;
  const vec power = (vec)((ints)rounded << 23);
  const vec y = ((1.0f + f) + square * ((0.49999231f + f * 0.16667114f) +
                                        square * (0.041890159f + f * 0.0083125215f))) * power;
  return x < zero - 87 ? zero : x > zero + 88 ? zero + INFINITE : y;
}

/* The first n values, then `beyond`. */
INLINE vec load_part(const float* p, int n, float beyond) {
  vec x;
  for (int i = 0; i < LANES; i++) x[i] = i < n ? p[i] : beyond;
  return x;
}

/* ---- Norm, gate, heads ---------------------------------------------------------------------- */

/* RMSNorm (arXiv 1910.07467, equation 4) of rows of n values. */
SIMD void norm_rows(const float* x, const float* weight, float* y, int rows, int n, float eps) {
  for (int row = 0; row < rows; row++, x += n, y += n) {
    const float scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
  }
}

INLINE vec gated(vec gate, vec up) { return gate * up / (1 + exp(-gate)); }

/* Rows of n gates and n values → gate · sigmoid(gate) · value. */
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

struct Shape {
  int batch, length, query_heads, kv_heads, dim;
};

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

/* x [batch, length, heads, dim] → queries and keys_values, each [batch, heads, length, dim].
   `turns` [batch or 1, length, dim]: cosines, then sines. */
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

/* ---- Attention ------------------------------------------------------------------------------ */

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

/* A layer's keys and values, [batch, 2 · kv_heads, slots, dim], perhaps as mx.quantize stores them:
   `group` values with a scale and a bias, each `bits` wide, from the low bits up. */
struct Cache {
  const float* plain;
  const std::uint32_t* packed;
  const float *scales, *biases;
  int slots, bits, group;
};

template <int bits>
INLINE void unpack(const std::uint32_t* packed, const float* scales, const float* biases, float* y,
                   std::ptrdiff_t groups, int group) {
  constexpr int count = 32 / bits;
  for (std::ptrdiff_t g = 0; g < groups; g++) {
    for (int word = 0; word < group / count; word++, packed++, y += count)
      for (int i = 0; i < count; i++)
        y[i] = static_cast<float>(*packed >> (bits * i) & ((1 << bits) - 1)) * scales[g] + biases[g];
  }
}

SIMD void unpack_rows(const Cache& c, std::ptrdiff_t first, float* y, std::ptrdiff_t count) {
  const std::uint32_t* packed = c.packed + first / (32 / c.bits);
  const float *scales = c.scales + first / c.group, *biases = c.biases + first / c.group;
  if (c.bits == 8)
    unpack<8>(packed, scales, biases, y, count / c.group, c.group);
  else
    unpack<4>(packed, scales, biases, y, count / c.group, c.group);
}

/* Rows [first, end) of one head, unpacked into `room` if they are quantized. */
const float* rows(const Cache& c, std::ptrdiff_t head, Span s, int dim, std::vector<float>& room) {
  const std::ptrdiff_t start = (head * c.slots + s.first) * dim;
  if (c.plain != nullptr) return c.plain + start;
  const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(s.end - s.first) * dim;
  room.resize(count);
  unpack_rows(c, start, room.data(), count);
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
  enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
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

/* queries [batch, query_heads, length, dim], mask [batch or 1, length, slots] → y [batch, length,
   query_heads, dim]. Later tokens see more than earlier ones, hence the blocks. */
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

/* cos and sin of positions [n] times base^(-2i / dim), for each i up to dim / 2. */
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

/* ---- Primitives ----------------------------------------------------------------------------- */

using Arrays = std::vector<array>;
using Task = std::function<void()>;

/* What a primitive computes: given its inputs, and its outputs with memory, a task for the stream's
   thread. The arrays may be gone when it runs; their memory is not. */
using Plan = std::function<Task(const Arrays&, Arrays&)>;

class Kernel : public mx::Primitive {
 public:
  Kernel(mx::Stream stream, const char* name, Plan plan)
      : mx::Primitive(stream), name_(name), plan_(std::move(plan)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    for (const array& x : inputs)
      if (!x.flags().row_contiguous)
        throw std::invalid_argument(std::string(name_) + ": an input is not row-contiguous");
    for (array& y : outputs) y.set_data(mx::allocator::malloc(y.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(plan_(inputs, outputs));
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name_) + " is for CPUs");
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  Plan plan_;
};

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

bool is_float(const array& x) { return x.dtype() == mx::float32; }

Arrays kernel(const char* name, std::vector<mx::Shape> shapes, Arrays inputs, Plan plan) {
  const mx::Stream stream = mx::to_stream({});
  expect(stream.device == mx::Device::cpu, "the kernels are for CPUs");
  return array::make_arrays(
      std::move(shapes), std::vector<mx::Dtype>(shapes.size(), mx::float32),
      std::make_shared<Kernel>(stream, name, std::move(plan)), std::move(inputs));
}

array rms_norm(const array& x, const array& weight, float eps) {
  const int n = x.ndim() ? x.shape(-1) : 0;
  expect(n > 0 && weight.shape() == mx::Shape{n} && is_float(x) && is_float(weight),
         "rms_norm: x [..., n] and weight [n] must be float32");
  return kernel("RMSNorm", {x.shape()}, {x, weight}, [n, eps](const Arrays& in, Arrays& out) {
    return [=, x = in[0].data<float>(), weight = in[1].data<float>(), y = out[0].data<float>(),
            rows = static_cast<int>(in[0].size() / n)] { norm_rows(x, weight, y, rows, n, eps); };
  })[0];
}

array swiglu(const array& x) {
  expect(x.ndim() && x.shape(-1) > 0 && x.shape(-1) % 2 == 0 && is_float(x),
         "swiglu: x [..., 2n] must be float32");
  mx::Shape shape = x.shape();
  const int n = shape.back() /= 2;
  return kernel("SwiGLU", {shape}, {x}, [n](const Arrays& in, Arrays& out) {
    return [=, x = in[0].data<float>(), y = out[0].data<float>(),
            rows = static_cast<int>(out[0].size() / n)] { gate_rows(x, y, rows, n); };
  })[0];
}

array rope_turns(const array& positions, int dim, double base) {
  expect(positions.ndim() == 2 && positions.dtype() == mx::int32 && dim > 0 && dim % 2 == 0,
         "rope_turns: positions [B, L] must be int32, and dim even");
  const mx::Shape shape = {positions.shape(0), positions.shape(1), dim};
  return kernel("RoPETurns", {shape}, {positions}, [=](const Arrays& in, Arrays& out) {
    return [=, positions = in[0].data<std::int32_t>(), y = out[0].data<float>(), n = in[0].size()] {
      turn_table(positions, y, n, dim, base);
    };
  })[0];
}

std::pair<array, array> heads(const array& x, const std::optional<array>& q_norm,
                              const std::optional<array>& k_norm, const array& turns, int batch,
                              int query_heads, int kv_heads, float eps) {
  const bool normed = q_norm && k_norm;
  expect(turns.ndim() == 3 && (turns.shape(0) == 1 || turns.shape(0) == batch) && is_float(turns),
         "heads: turns must be float32 [B or 1, L, dim]");
  const Shape s = {batch, turns.shape(1), query_heads, kv_heads, turns.shape(2)};
  expect(x.shape() == mx::Shape{batch * s.length, (query_heads + 2 * kv_heads) * s.dim} &&
             is_float(x),
         "heads: x must be float32 [B · L, (query_heads + 2 · kv_heads) · dim]");
  Arrays inputs = {x, turns};
  if (normed) {
    expect(q_norm->shape() == mx::Shape{s.dim} && k_norm->shape() == mx::Shape{s.dim} &&
               is_float(*q_norm) && is_float(*k_norm),
           "heads: q_norm and k_norm must be float32 [dim]");
    inputs.insert(inputs.end(), {*q_norm, *k_norm});
  }
  Arrays out = kernel(
      "Heads",
      {{batch, query_heads, s.length, s.dim}, {batch, 2 * kv_heads, s.length, s.dim}},
      std::move(inputs), [=](const Arrays& in, Arrays& out) {
        return [=, x = in[0].data<float>(), turns = in[1].data<float>(),
                stride = in[1].shape(0) == 1 ? 0 : static_cast<std::ptrdiff_t>(s.length) * s.dim,
                q_norm = normed ? in[2].data<float>() : nullptr,
                k_norm = normed ? in[3].data<float>() : nullptr, queries = out[0].data<float>(),
                keys_values = out[1].data<float>()] {
          split_heads(x, q_norm, k_norm, turns, stride, queries, keys_values, s, eps);
        };
      });
  return {out[0], out[1]};
}

array attention(const array& queries, const Arrays& buffer, const array& mask, int bits) {
  expect(queries.ndim() == 4 && is_float(queries) && (buffer.size() == 1 || buffer.size() == 3),
         "attention: queries must be float32 [B, query_heads, L, dim]");
  const array& kept = buffer[0];
  const Shape s = {queries.shape(0), queries.shape(2), queries.shape(1),
                   kept.ndim() == 4 ? kept.shape(1) / 2 : 0, queries.shape(3)};
  const bool plain = buffer.size() == 1;
  const int slots = s.kv_heads ? kept.shape(2) : 0;
  const int width = plain ? s.dim : s.dim * bits / 32;
  expect(s.kv_heads && s.query_heads % s.kv_heads == 0 &&
             kept.shape() == mx::Shape{s.batch, 2 * s.kv_heads, slots, width} &&
             (plain ? is_float(kept) : kept.dtype() == mx::uint32 && (bits == 4 || bits == 8)),
         "attention: the buffer must be [B, 2 · kv_heads, slots, dim], float32 or of 4 or 8 bits");
  for (std::size_t i = 1; i < buffer.size(); i++)
    expect(buffer[i].ndim() == 4 && is_float(buffer[i]) && s.dim % buffer[i].shape(3) == 0,
           "attention: the buffer's scales and biases must be float32 [..., dim / group]");
  expect(mask.ndim() == 3 && (mask.shape(0) == 1 || mask.shape(0) == s.batch) &&
             mask.shape(1) == s.length && mask.shape(2) == slots && mask.dtype() == mx::bool_,
         "attention: mask must be bool [B or 1, L, slots]");
  Arrays inputs = {queries, mask};
  inputs.insert(inputs.end(), buffer.begin(), buffer.end());
  return kernel(
      "Attention", {{s.batch * s.length, s.query_heads * s.dim}}, std::move(inputs),
      [=](const Arrays& in, Arrays& out) {
        Cache cache = {nullptr, nullptr, nullptr, nullptr, slots, bits, 0};
        if (plain) {
          cache.plain = in[2].data<float>();
        } else {
          cache.packed = in[2].data<std::uint32_t>();
          cache.scales = in[3].data<float>();
          cache.biases = in[4].data<float>();
          cache.group = s.dim / in[3].shape(3);
        }
        return [=, queries = in[0].data<float>(), mask = in[1].data<bool>(),
                stride = in[1].shape(0) == 1 ? 0 : static_cast<std::ptrdiff_t>(s.length) * slots,
                y = out[0].data<float>()] { attend(queries, cache, mask, stride, y, s); };
      })[0];
}

}  // namespace

NB_MODULE(_kernels, m) {
  const std::string version = std::to_string(MLX_VERSION_MAJOR) + "." +
                              std::to_string(MLX_VERSION_MINOR) + "." +
                              std::to_string(MLX_VERSION_PATCH);
  m.attr("MLX_VERSION") = version.c_str();
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
  m.def("swiglu", &swiglu, nb::arg("x"));
  m.def("rope_turns", &rope_turns, nb::arg("positions"), nb::arg("dim"), nb::arg("base"));
  m.def("heads", &heads, nb::arg("x"), nb::arg("q_norm").none(), nb::arg("k_norm").none(),
        nb::arg("turns"), nb::arg("batch"), nb::arg("query_heads"), nb::arg("kv_heads"),
        nb::arg("eps"));
  m.def("attention", &attention, nb::arg("queries"), nb::arg("buffer"), nb::arg("mask"),
        nb::arg("bits") = 32);
}

#include <nb_combined.cpp>
