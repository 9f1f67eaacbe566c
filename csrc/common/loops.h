// Vectors and loops over fp32 rows. A function marked VQ_MULTIVERSION is compiled once per instruction set, and the
// loader takes the widest that the processor has; what is marked VQ_INLINE is compiled into each of these.
#pragma once
#include <torch/headeronly/util/BFloat16.h>

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

VQ_INLINE Vec load(const torch::headeronly::BFloat16* p) {  // the upper half of a float
  typedef uint16_t Half16 __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  const UintVec u = __builtin_convertvector(h, UintVec) << 16;
  Vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

VQ_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

VQ_INLINE Vec broadcast(float x) { return x - Vec{}; }

VQ_INLINE float horizontal_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// exp(x) for x <= 0 to about 1 ulp, 0 below -87.3; NaN stays NaN. Branch-free, so that loops over it are vectorised.
inline float exp_nonpositive(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float clamped = x < -87.33654f ? -87.33654f : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * kLog2e + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));  // 2^n
  return x < -87.33654f ? 0.f : p * power;
}

template <class T>
inline void load_row(const T* source, float* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(source[i]);
}

template <class T>
inline void store_row(const float* row, T* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(row[i]);
}

}  // namespace vqfast
