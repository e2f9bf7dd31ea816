/* A step of the network: OpenELM (arXiv 2404.14619, section 2), as CoreNet's general_gpt.py. */

#include <algorithm>
#include <cmath>
#include <new>

#include "kernels.h"
#include "loops.h"
#include "pool.h"

namespace {

using Values = std::vector<float>;

struct Workspace {
  Values x, h, wide, queries, angles;
};

void norm(const float* x, const float* weight, float* y, std::ptrdiff_t rows, int n, float eps) {
  by_rows(rows, n, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
    loops.rms_norm(x + first * n, weight, y + first * n, end - first, n, eps);
  });
}

/* Cosines, then sines, of position · base^(-2i / dim) for each i up to dim / 2 → y [length, dim]. */
void rope_cos_sin(int position, int length, float* y, int dim, double base) {
  const int half = dim / 2;
  std::vector<double> frequencies(half);
  for (int i = 0; i < half; i++) frequencies[i] = std::pow(base, -2.0 * i / dim);
  by_rows(length, 8 * dim, [&](std::ptrdiff_t first, std::ptrdiff_t end) {
    for (std::ptrdiff_t t = first; t < end; t++)
      for (int i = 0; i < half; i++) {
        const double angle = static_cast<double>(position + t) * frequencies[i];
        y[t * dim + i] = static_cast<float>(std::cos(angle));
        y[t * dim + i + half] = static_cast<float>(std::sin(angle));
      }
  });
}

/* proj_1, the gate, and proj_2, which is added to x. */
void feed_forward(const openelm_layer& layer, bool glu, const float* h, std::ptrdiff_t rows, float* x,
                  Values& space) {
  const std::ptrdiff_t width = layer.proj_2.columns;
  float* wide = room(space, rows * 3 * width);
  multiply(h, static_cast<int>(rows), layer.proj_1, wide, false);
  float* hidden = wide;
  if (glu) {
    hidden = wide + rows * 2 * width;
    by_rows(rows, 2 * width, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
      loops.swiglu(wide + first * 2 * width, hidden + first * width, end - first, static_cast<int>(width));
    });
  } else {
    by_rows(rows, width, [=](std::ptrdiff_t first, std::ptrdiff_t end) {
      loops.silu(wide + first * width, (end - first) * width);
    });
  }
  multiply(hidden, static_cast<int>(rows), layer.proj_2, x, true);
}

/* x [batch, length, n] → token `last` of each sequence [batch, n], in place. */
void select_last(float* x, int batch, int length, int last, std::ptrdiff_t n) {
  for (std::ptrdiff_t b = 0; b < batch; b++)
    std::copy_n(x + (b * length + last) * n, n, x + b * n);
}

void compute(const openelm_network& net, const openelm_step* step) {
  static thread_local Workspace space;
  const int batch = step->batch, dim = net.model_dim, head_dim = net.head_dim;
  int length = step->length;
  std::ptrdiff_t rows = static_cast<std::ptrdiff_t>(batch) * length;

  float* x = room(space.x, rows * dim);
  float* h = room(space.h, rows * dim);
  for (std::ptrdiff_t i = 0; i < rows; i++)
    unpack_rows(net.token_embeddings, step->tokens[i], step->tokens[i] + 1, x + i * dim);

  const int shifts = step->starts == nullptr ? 1 : batch; /* sequences with positions of their own */
  const std::ptrdiff_t angles_size = static_cast<std::ptrdiff_t>(length) * head_dim;
  float* angles = room(space.angles, shifts * angles_size);
  for (int b = 0; b < shifts; b++)
    rope_cos_sin(step->offset - (step->starts == nullptr ? 0 : step->starts[b]), length,
         angles + b * angles_size, head_dim, net.rope_base);

  for (int i = 0; i < net.num_layers; i++) {
    const openelm_layer& layer = net.layers[i];
    Shape shape = {batch, length, layer.query_heads, layer.kv_heads, head_dim};
    const Cache cache = {step->caches[i], step->capacity, step->slot, step->bits, step->group};
    norm(x, layer.attn_norm, h, rows, dim, net.eps);
    float* qkv = room(space.wide, rows * layer.qkv_proj.rows);
    multiply(h, static_cast<int>(rows), layer.qkv_proj, qkv, false);
    float* queries = room(space.queries, rows * layer.query_heads * head_dim);
    split_heads(qkv, layer.q_norm, layer.k_norm, angles,
                step->starts == nullptr ? 0 : angles_size, queries, cache, shape, net.eps);
    Seen seen = {step->starts, step->mask, step->offset};
    if (i == net.num_layers - 1 && step->last >= 0) { /* no other token's logits are needed */
      select_last(queries, batch * layer.query_heads, length, step->last, head_dim);
      select_last(x, batch, length, step->last, dim);
      seen.first += step->last;
      if (seen.mask != nullptr) seen.mask += static_cast<std::ptrdiff_t>(step->last) * step->capacity;
      shape.length = length = 1;
      rows = batch;
    }
    float* attended = qkv; /* in its memory: there are fewer query heads than heads */
    attend(queries, cache, seen, attended, shape);
    multiply(attended, static_cast<int>(rows), layer.out_proj, x, true);
    norm(x, layer.ffn_norm, h, rows, dim, net.eps);
    feed_forward(layer, net.glu, h, rows, x, space.wide);
  }
  norm(x, net.norm, h, rows, dim, net.eps);
  multiply(h, static_cast<int>(rows), net.lm_head, step->logits, false);
}

/* No exception may leave a C function. std::bad_alloc is the only one that the library throws. */
template <class F>
int guarded(const F& run) {
  try {
    run();
    return OPENELM_OK;
  } catch (const std::bad_alloc&) {
    return OPENELM_NO_MEMORY;
  }
}

}  // namespace

int openelm_abi(void) { return OPENELM_ABI; }

void openelm_set_threads(int threads) { pool_set_threads(threads); }

int openelm_multiply(const float* x, int count, const openelm_matrix* w, float* y, int add) {
  return guarded([=] { multiply(x, count, *w, y, add != 0); });
}

int openelm_compute(const openelm_network* network, const openelm_step* step) {
  const std::ptrdiff_t tokens = static_cast<std::ptrdiff_t>(step->batch) * step->length;
  for (std::ptrdiff_t i = 0; i < tokens; i++)
    if (step->tokens[i] < 0 || step->tokens[i] >= network->token_embeddings.rows)
      return OPENELM_BAD_TOKEN;
  return guarded([=] { compute(*network, step); });
}
