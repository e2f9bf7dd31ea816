/* Vectors of eight floats in GCC's vector extensions, which compile for any processor: a vector
   takes several registers where they are narrower. */

#ifndef VECTORS_H
#define VECTORS_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(HAS_F16C)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

/* Everything is in a namespace of its own for each processor: see loops.h. */
namespace {

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef std::int32_t ints __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t words __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t loose_words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef std::uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef std::uint16_t loose_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
INLINE words load_words(const std::uint32_t* p) { return *reinterpret_cast<const loose_words*>(p); }

/* Eight values of 16 bits, each in the low half of a word. */
INLINE words load_halves(const std::uint16_t* p) {
  return __builtin_convertvector((halves)*reinterpret_cast<const loose_halves*>(p), words);
}

INLINE vec load_bfloat16(const std::uint16_t* p) { return (vec)(load_halves(p) << 16); }

INLINE vec load_float16(const std::uint16_t* p) {
#if defined(HAS_F16C)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  typedef __fp16 floats __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector((floats)*reinterpret_cast<const loose_halves*>(p), vec);
#else
  /* The exponent and fraction, put where those of a float32 are, are 2^112 too small; the
     multiplication makes subnormal numbers right, too. Infinities and NaN keep their exponent. */
  const words x = load_halves(p);
  const vec magnitude = (vec)((x & 0x7fff) << 13) * 0x1p112f;
  const words special = (words)((x & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (vec)((words)magnitude | special | (x & 0x8000) << 16);
#endif
}

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

/* Rows of eight become columns. */
INLINE void transpose(vec* a) {
  vec b[8], c[8];
  for (int i = 0; i < 4; i++) {
    b[2 * i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[2 * i + 1] = SHUFFLE(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      c[i + j] = SHUFFLE(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      c[i + j + 2] = SHUFFLE(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    a[i] = SHUFFLE(c[i], c[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    a[i + 4] = SHUFFLE(c[i], c[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
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

constexpr float INFINITE = __builtin_inff();

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

}  // namespace

#endif
