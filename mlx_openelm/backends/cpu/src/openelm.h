/* The C interface of the library: one call computes a step of the network on a CPU.

   All arrays are dense and row-major, and belong to the caller. Everything is computed in float32.
   The structures are mirrored in library.py; OPENELM_ABI changes with them. */

#ifndef OPENELM_H
#define OPENELM_H

#include <stdint.h>

#define OPENELM_ABI 2
#define EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { F32, F16, BF16, AFFINE4, AFFINE8 };

/* [rows, columns]. AFFINE: as mx.quantize stores it, 4 or 8 bits a value from the low bits of
   uint32 words up; columns a multiple of 256 / bits, group of 128 / bits or a multiple of
   256 / bits; scales and biases [rows, columns / group] in float32, else null. */
typedef struct {
  const void *weight;
  const float *scales, *biases;
  int32_t kind, group, rows, columns;
} openelm_matrix;

typedef struct {
  const float *attn_norm, *ffn_norm; /* [model_dim] */
  const float *q_norm, *k_norm;      /* [head_dim], or null */
  openelm_matrix qkv_proj, out_proj, proj_1, proj_2;
  int32_t query_heads, kv_heads;
} openelm_layer;

typedef struct {
  openelm_matrix token_embeddings, lm_head;
  const float *norm; /* [model_dim] */
  const openelm_layer *layers;
  int32_t num_layers, model_dim, head_dim, glu;
  float eps;
  double rope_base;
} openelm_network;

/* The keys and values of one layer, [batch, 2 * kv_heads, capacity, head_dim], the keys first.
   bits 32: float32. Else 8 or 4, as mx.quantize stores them in groups of `group`. */
typedef struct {
  void *values;
  float *scales, *biases;
} openelm_cache;

typedef struct {
  const int32_t *tokens;  /* [batch, length] */
  const int32_t *starts;  /* [batch]: where sequences begin that are padded in front; or null */
  const uint8_t *mask;    /* [length, capacity]: which slots a token attends to; null: all from
                             its sequence's start to its own */
  openelm_cache *caches;  /* one a layer, written from `slot` on */
  float *logits;          /* [batch, length or 1, vocab_size] */
  int32_t batch, length;
  int32_t offset;         /* position of the first token */
  int32_t slot, capacity; /* where its keys and values go; slots of the buffers */
  int32_t bits, group;    /* of the caches */
  int32_t last;           /* only this token's logits; -1: those of all */
} openelm_step;

EXPORT int openelm_abi(void);

/* Threads that compute at the same time, the caller's included. */
EXPORT void openelm_set_threads(int threads);

enum { OPENELM_OK, OPENELM_BAD_TOKEN, OPENELM_NO_MEMORY };

/* Returns OPENELM_OK; OPENELM_BAD_TOKEN if a token id is negative or not below vocab_size, with
   nothing computed; OPENELM_NO_MEMORY if memory for intermediate results ran out. */
EXPORT int openelm_compute(const openelm_network *network, const openelm_step *step);

/* y [count, rows] = x [count, columns] · Wᵀ, added to y if `add`. Returns OPENELM_OK or
   OPENELM_NO_MEMORY. */
EXPORT int openelm_multiply(const float *x, int count, const openelm_matrix *w, float *y, int add);

#ifdef __cplusplus
}
#endif

#endif
