// Loops over fp32 rows, compiled once per instruction set; the loader takes the widest that the processor has.
#pragma once
#include <bit>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VQ_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VQ_MULTIVERSION
#endif

namespace vqfast {

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
