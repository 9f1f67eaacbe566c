// Vectors and loops over fp32 rows. A function marked VQ_MULTIVERSION is compiled once per instruction set, and the
// loader takes the widest that the processor has; what is marked VQ_INLINE is compiled into each of these.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VQ_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VQ_MULTIVERSION
#endif

#if defined(__GNUC__)
#define VQ_INLINE inline __attribute__((always_inline))
#else
#error "csrc/cpu needs the vector extensions of GCC or Clang"
#endif

namespace vqfast {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));  // one register of AVX-512, two of AVX2, four of SSE
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

VQ_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class To, class From>
VQ_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &v, sizeof v);
  return result;
}

VQ_INLINE IntVec load_16_bits(const void* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, IntVec);
}

VQ_INLINE Vec load(const torch::headeronly::BFloat16* p) { return bits<Vec>(load_16_bits(p) << 16); }

VQ_INLINE Vec load(const torch::headeronly::Half* p) {
  const IntVec h = load_16_bits(p), exponent = h & 0x7c00;
  const Vec magnitude = bits<Vec>((h & 0x7fff) << 13) * 0x1p112f;  // right for subnormal numbers too
  const IntVec special = exponent == 0x7c00;                       // infinity, NaN
  return bits<Vec>(bits<IntVec>(magnitude) | (special & 0x7f800000) | ((h & 0x8000) << 16));
}

VQ_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
VQ_INLINE void store(torch::headeronly::BFloat16* p, Vec v) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  const IntVec u = bits<IntVec>(v), rounded = u + 0x7fff + ((u >> 16) & 1);
  const Halves h = __builtin_convertvector((v == v ? rounded : (u | 0x400000)) >> 16, Halves);
  std::memcpy(p, &h, sizeof h);
}

VQ_INLINE void store(torch::headeronly::Half* p, Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<torch::headeronly::Half>(lanes[i]);
}

VQ_INLINE Vec broadcast(float x) { return x - Vec{}; }

VQ_INLINE float horizontal_max(Vec v) {  // NaN is ignored
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  return lanes[0];
}

VQ_INLINE float horizontal_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// Lane i of the result is the sum of v[i].
VQ_INLINE Vec horizontal_sums(Vec (&v)[kLanes]) {
  const IntVec low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const IntVec low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const IntVec low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const IntVec low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + 8], low8) + __builtin_shuffle(v[i], v[i + 8], low8 + 8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + 4], low4) + __builtin_shuffle(v[i], v[i + 4], low4 + 4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + 2], low2) + __builtin_shuffle(v[i], v[i + 2], low2 + 2);
  return __builtin_shuffle(v[0], v[1], low1) + __builtin_shuffle(v[0], v[1], low1 + 1);
}

constexpr float kExpMin = -87.33654f;  // exp of it is the smallest normal number

// x, or kExpMin where it is smaller, so that 0 exp(-inf) is no NaN.
VQ_INLINE Vec clamp_exponent(Vec x) { return x < kExpMin ? broadcast(kExpMin) : x; }

// exp(x) for x <= 0 to about 1 ulp, 0 below kExpMin; NaN stays NaN.
VQ_INLINE Vec exp_nonpositive(Vec exponent) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec x = clamp_exponent(exponent), shifted = x * kLog2e + kMagic, n = shifted - kMagic;
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Vec power = bits<Vec>((bits<IntVec>(shifted) << 23) + (127 << 23));  // 2^n
  return exponent < kExpMin ? Vec{} : p * power;
}

inline void load_row(const float* source, float* row, int64_t n) { std::memcpy(row, source, n * sizeof(float)); }
inline void store_row(const float* row, float* target, int64_t n) { std::memcpy(target, row, n * sizeof(float)); }

template <class T>
inline void load_row(const T* source, float* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(source[i]);
}

template <class T>
inline void store_row(const float* row, T* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(row[i]);
}

}  // namespace vqfast
