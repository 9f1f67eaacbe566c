// Orthonormal DCT-II of 16 lines at once, and its inverse, for every length.
//   X_k = s_k sum_n x_n cos(pi (2n + 1) k / 2N),  s_0 = sqrt(1 / N), s_k = sqrt(2 / N)
// In the order v = x_0 x_2 x_4 ... x_5 x_3 x_1 the cosine transform is the Fourier transform V, turned:
//   X_k = s_k Re(exp(-i pi k / 2N) V_k)  (Makhoul 1980)
// Two real lines travel as one complex line, and each of 8 lanes carries one: no step mixes lanes. Cost is O(N log N)
// where N has small factors, O(N p) for its largest prime factor p in general.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <utility>
#include <vector>

#include "common/rows.h"

#define VQ_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VQ_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VQ_MULTIVERSION
#endif

namespace vqfast {

constexpr int64_t kLines = 16;                              // real lines of one block
typedef float HalfVec __attribute__((vector_size(4 * 8)));  // GCC would keep whole ones of AVX2 in memory

// One point of 8 complex lines, or of 16 real ones: lines 0 to 7 in re, the others in im. Aligned in every clone alike.
struct alignas(4 * kLines) Point {
  HalfVec re, im;
};

namespace {

VQ_INLINE HalfVec spread(float x) {  // GCC builds x * v by element where there is no register for it
  float lanes[8];
  for (float& lane : lanes) lane = x;
  HalfVec v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

VQ_INLINE Point operator+(const Point& a, const Point& b) { return {a.re + b.re, a.im + b.im}; }
VQ_INLINE Point operator-(const Point& a, const Point& b) { return {a.re - b.re, a.im - b.im}; }
VQ_INLINE Point operator*(HalfVec a, const Point& b) { return {a * b.re, a * b.im}; }
VQ_INLINE Point operator*(float a, const Point& b) { return spread(a) * b; }
VQ_INLINE Point operator*(const Point& a, const Point& b) { return {a.re * b.re, a.im * b.im}; }  // by line
VQ_INLINE Point turned(const Point& a, HalfVec re, HalfVec im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}
VQ_INLINE Point turned(const Point& a, const float* w) { return turned(a, spread(w[0]), spread(w[1])); }

// What depends on the length of the lines only.
struct Dct {
  struct Stage {
    int64_t radix, columns, stride;
    std::vector<float> roots;     // exp(-2 pi i t / radix), t < radix
    std::vector<float> twiddles;  // exp(-2 pi i j t / (radix columns)), 1 <= t < radix, for each j < columns
  };

  int64_t n;
  std::vector<int32_t> order, identity;  // where x_i goes in v; where it goes unpermuted
  std::vector<float> turns;              // sqrt(1 / 2N) exp(i pi k / 2N), k <= N / 2
  std::vector<Stage> stages;

  explicit Dct(int64_t length) : n(length), order(n), identity(n) {
    // All angles are multiples of pi / 2N. The product of 4N factors keeps 12 digits, fp32 needs 7.
    std::vector<double> circle(8 * n);
    const double angle = std::numbers::pi / (2.0 * double(n)), step_re = std::cos(angle), step_im = std::sin(angle);
    circle[0] = 1.0;
    for (int64_t k = 2; k < 8 * n; k += 2) {
      circle[k] = circle[k - 2] * step_re - circle[k - 1] * step_im;
      circle[k + 1] = circle[k - 2] * step_im + circle[k - 1] * step_re;
    }
    const auto append_conjugate = [&](std::vector<float>& values, int64_t k) {
      values.push_back(float(circle[2 * k]));
      values.push_back(float(-circle[2 * k + 1]));
    };
    for (int64_t i = 0; i < n; ++i) order[i] = int32_t(i % 2 ? n - 1 - i / 2 : i / 2), identity[i] = int32_t(i);
    for (int64_t i = 0; i < 2 * (n / 2 + 1); ++i) turns.push_back(float(std::sqrt(0.5 / double(n)) * circle[i]));
    for (int64_t rest = n, stride = 1, radix = 8; rest > 1;) {
      while (rest % radix) radix += radix > 8 ? 2 : radix > 2 ? -1 : 9;  // 8 to 2, then 11 and further odd ones
      Stage stage{radix, rest / radix, stride, {}, {}};
      for (int64_t t = 0; t < radix; ++t) append_conjugate(stage.roots, 4 * n / radix * t);
      for (int64_t j = 0; j < stage.columns; ++j)
        for (int64_t t = 1; t < radix; ++t) append_conjugate(stage.twiddles, 4 * n / rest * j * t);
      stages.push_back(std::move(stage));
      rest /= radix, stride *= radix;
    }
  }
};

// x <- its discrete Fourier transform of length P, with exp(-2 pi i / P) = roots[step].
template <int P, int step = 1>
VQ_INLINE void butterfly(Point (&x)[P], const float* roots) {
  constexpr int kHalf = P / 2;
  if constexpr (P == 1) return;
  if constexpr (P == 4) {
    const Point a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
    x[0] = a + c, x[2] = a - c;
    x[1] = {b.re + d.im, b.im - d.re}, x[3] = {b.re - d.im, b.im + d.re};
  } else if constexpr (P % 2 == 0) {
    Point even[kHalf], odd[kHalf];
#pragma GCC unroll 8
    for (int t = 0; t < kHalf; ++t) even[t] = x[2 * t], odd[t] = x[2 * t + 1];
    butterfly<kHalf, 2 * step>(even, roots), butterfly<kHalf, 2 * step>(odd, roots);
#pragma GCC unroll 8
    for (int t = 0; t < kHalf; ++t) {
      const Point moved = t == 0 ? odd[0] : turned(odd[t], roots + 2 * step * t);
      x[t] = even[t] + moved, x[t + kHalf] = even[t] - moved;
    }
  } else {
    const Point first = x[0];
    Point sum[kHalf + 1], difference[kHalf + 1];
#pragma GCC unroll 8
    for (int u = 1; u <= kHalf; ++u) {
      sum[u] = x[u] + x[P - u], difference[u] = x[u] - x[P - u];
      x[0] = x[0] + sum[u];
    }
#pragma GCC unroll 8
    for (int t = 1; t <= kHalf; ++t) {
      Point even = first, odd = {};
#pragma GCC unroll 8
      for (int u = 1; u <= kHalf; ++u) {
        const float* root = roots + 2 * step * (t * u % P);
        even = even + root[0] * sum[u];
        odd = odd + root[1] * difference[u];
      }
      x[t] = {even.re - odd.im, even.im + odd.re}, x[P - t] = {even.re + odd.im, even.im - odd.re};
    }
  }
}

// One stage of the Stockham transform: it leaves the points in order, and may not run in place.
template <int P>
VQ_INLINE void stage(const Dct::Stage& s, const Point* in, Point* out) {
  const float* twiddle = s.twiddles.data();
  for (int64_t j = 0; j < s.columns; ++j, twiddle += 2 * (P - 1))
    for (int64_t q = 0; q < s.stride; ++q) {
      Point x[P];
#pragma GCC unroll 8
      for (int t = 0; t < P; ++t) x[t] = in[q + s.stride * (j + s.columns * t)];
      butterfly(x, s.roots.data());
      Point* target = out + q + s.stride * P * j;
      target[0] = x[0];
#pragma GCC unroll 8
      for (int t = 1; t < P; ++t) target[s.stride * t] = j == 0 ? x[t] : turned(x[t], twiddle + 2 * (t - 1));
    }
}

// The same for any odd radix p, in O(p^2); scratch holds p points.
VQ_INLINE void odd_stage(const Dct::Stage& s, const Point* in, Point* out, Point* scratch) {
  constexpr int64_t kTogether = 3;  // pairs of results that share a pass over sum and difference, within 16 registers
  const int64_t p = s.radix, half = p / 2;
  Point *sum = scratch, *difference = scratch + half;
  for (int64_t j = 0; j < s.columns; ++j)
    for (int64_t q = 0; q < s.stride; ++q) {
      const Point* source = in + q + s.stride * j;
      Point* target = out + q + s.stride * p * j;
      const Point first = source[0];
      Point total = first;
      for (int64_t u = 1; u <= half; ++u) {
        const Point a = source[s.stride * s.columns * u], b = source[s.stride * s.columns * (p - u)];
        sum[u - 1] = a + b, difference[u - 1] = a - b;
        total = total + sum[u - 1];
      }
      target[0] = total;
      for (int64_t t = 1; t <= half; t += kTogether) {
        Point even[kTogether], odd[kTogether] = {};
        int64_t k[kTogether];
        for (int64_t i = 0; i < kTogether; ++i) even[i] = first, k[i] = t + i;
        for (int64_t u = 0; u < half; ++u)
#pragma GCC unroll 8
          for (int64_t i = 0; i < kTogether; ++i) {
            even[i] = even[i] + s.roots[2 * k[i]] * sum[u];
            odd[i] = odd[i] + s.roots[2 * k[i] + 1] * difference[u];
            k[i] += k[i] + t + i < p ? t + i : t + i - p;
          }
        for (int64_t i = 0; i < kTogether && t + i <= half; ++i) {
          const float* low = s.twiddles.data() + 2 * (j * (p - 1) + t + i - 1);
          const float* high = low + 2 * (p - 2 * (t + i));
          target[s.stride * (t + i)] = turned({even[i].re - odd[i].im, even[i].im + odd[i].re}, low);
          target[s.stride * (p - t - i)] = turned({even[i].re + odd[i].im, even[i].im - odd[i].re}, high);
        }
      }
    }
}

// Fourier transform of the 8 complex lines in z. Returns where it lies, z or other; both are overwritten.
VQ_MULTIVERSION Point* fourier(const Dct& dct, Point* z, Point* other, Point* scratch) {
  for (const Dct::Stage& s : dct.stages) {
    switch (s.radix) {
      case 2: stage<2>(s, z, other); break;
      case 3: stage<3>(s, z, other); break;
      case 4: stage<4>(s, z, other); break;
      case 5: stage<5>(s, z, other); break;
      case 6: stage<6>(s, z, other); break;
      case 7: stage<7>(s, z, other); break;
      case 8: stage<8>(s, z, other); break;
      default: odd_stage(s, z, other, scratch);
    }
    std::swap(z, other);
  }
  return z;
}

// DCT coefficients of 16 real lines from the Fourier transform z of their complex pairs in the order v.
VQ_MULTIVERSION void untangle(const Dct& dct, const Point* z, Point* spectrum) {
  spectrum[0] = float(std::sqrt(1.0 / double(dct.n))) * z[0];
  for (int64_t k = 1; k <= dct.n / 2; ++k) {
    const HalfVec c = spread(dct.turns[2 * k]), s = spread(dct.turns[2 * k + 1]);
    const Point sum = z[k] + z[dct.n - k], difference = z[k] - z[dct.n - k];
    spectrum[k] = {c * sum.re + s * difference.im, c * sum.im - s * difference.re};
    spectrum[dct.n - k] = {s * sum.re - c * difference.im, s * sum.im + c * difference.re};
  }
}

// The inverse of untangle followed by the change of k to -k, which turns the next Fourier transform into the inverse.
VQ_MULTIVERSION void tangle(const Dct& dct, const Point* spectrum, Point* z) {
  z[0] = float(std::sqrt(1.0 / double(dct.n))) * spectrum[0];
  for (int64_t k = 1; k <= dct.n / 2; ++k) {
    const HalfVec c = spread(dct.turns[2 * k]), s = spread(dct.turns[2 * k + 1]);
    const Point a = spectrum[k], b = spectrum[dct.n - k];
    z[dct.n - k] = turned({a.re + b.im, a.im - b.re}, c, s);
    z[k] = turned({b.re + a.im, b.im - a.re}, s, c);
  }
}

// DCT-II of the 16 real lines that were loaded to z in Dct::order. Returns where the coefficients lie, z or other.
VQ_INLINE Point* forward_lines(const Dct& dct, Point* z, Point* other, Point* scratch) {
  Point* v = fourier(dct, z, other, scratch);
  Point* spectrum = v == z ? other : z;
  untangle(dct, v, spectrum);
  return spectrum;
}

// Its inverse. Returns where the values lie, in Dct::order.
VQ_INLINE Point* inverse_lines(const Dct& dct, Point* spectrum, Point* z, Point* scratch) {
  tangle(dct, spectrum, z);
  return fourier(dct, z, spectrum, scratch);
}

typedef float Quad __attribute__((vector_size(16)));

VQ_INLINE void transpose(Quad (&q)[4]) {
  const Quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5), b = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
  const Quad c = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5), d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
  q[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), q[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  q[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), q[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

VQ_INLINE float* lines(Point* p) { return reinterpret_cast<float*>(p); }
VQ_INLINE const float* lines(const Point* p) { return reinterpret_cast<const float*>(p); }

// z[order[i]] <- the i-th values of 16 rows.
VQ_MULTIVERSION void load_rows(const float* const* rows, int64_t n, const int32_t* order, Point* z) {
  for (int64_t start = 0; start < n; start += kLines) {  // a cache line of each row
    const int64_t stop = start + kLines < n ? start + kLines : n;
    for (int64_t line = 0; line < kLines; line += 4) {
      const float* const four[4] = {rows[line], rows[line + 1], rows[line + 2], rows[line + 3]};
      int64_t i = start;
      for (; i + 4 <= stop; i += 4) {
        Quad q[4];
        for (int64_t t = 0; t < 4; ++t) std::memcpy(&q[t], four[t] + i, sizeof(Quad));
        transpose(q);
        for (int64_t t = 0; t < 4; ++t) std::memcpy(lines(z + order[i + t]) + line, &q[t], sizeof(Quad));
      }
      for (; i < stop; ++i)
        for (int64_t t = 0; t < 4; ++t) lines(z + order[i])[line + t] = four[t][i];
    }
  }
}

// The i-th values of 16 rows <- z[order[i]].
VQ_MULTIVERSION void store_rows(const Point* z, int64_t n, const int32_t* order, float* const* rows) {
  for (int64_t start = 0; start < n; start += kLines) {
    const int64_t stop = start + kLines < n ? start + kLines : n;
    for (int64_t line = 0; line < kLines; line += 4) {
      float* const four[4] = {rows[line], rows[line + 1], rows[line + 2], rows[line + 3]};
      int64_t i = start;
      for (; i + 4 <= stop; i += 4) {
        Quad q[4];
        for (int64_t t = 0; t < 4; ++t) std::memcpy(&q[t], lines(z + order[i + t]) + line, sizeof(Quad));
        transpose(q);
        for (int64_t t = 0; t < 4; ++t) std::memcpy(four[t] + i, &q[t], sizeof(Quad));
      }
      for (; i < stop; ++i)
        for (int64_t t = 0; t < 4; ++t) four[t][i] = lines(z + order[i])[line + t];
    }
  }
}

// Up to 16 adjacent values as a point; the lines beyond count are 0.
VQ_INLINE Point load_point(const float* values, int64_t count) {
  Point p = {};
  if (count >= kLines)
    std::memcpy(&p, values, sizeof p);
  else
    std::memcpy(&p, values, sizeof(float) * count);
  return p;
}

VQ_INLINE void store_point(const Point& p, float* values, int64_t count) {
  if (count >= kLines)
    std::memcpy(values, &p, sizeof p);
  else
    std::memcpy(values, &p, sizeof(float) * count);
}

// z[order[i]] <- row i of `count` adjacent columns.
VQ_MULTIVERSION void load_columns(const float* corner, int64_t stride, int64_t count, int64_t n, const int32_t* order,
                                  Point* z) {
  for (int64_t i = 0; i < n; ++i) z[order[i]] = load_point(corner + i * stride, count);
}

VQ_MULTIVERSION void store_columns(const Point* z, int64_t n, const int32_t* order, float* corner, int64_t stride,
                                   int64_t count) {
  for (int64_t i = 0; i < n; ++i) store_point(z[order[i]], corner + i * stride, count);
}

}  // namespace
}  // namespace vqfast
