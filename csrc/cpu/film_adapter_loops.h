// Loops of film_adapter (common/each_target.h): the activation between two products of low rank.
#include "cpu/low_rank_loops.h"

// 1 - Phi(|z|) = t P(t) exp(-z^2 / 2), t = 1 / (1 + 0.27 |z|), where P was fitted to erfcx for |z| <= 14: relative
// error 3e-8.
VQ_INLINE Vec normal_tail(Vec magnitude, Vec density) {
  const Vec t = broadcast(1.f) / (broadcast(1.f) + broadcast(0.27f) * magnitude);
  Vec p = broadcast(0.0289165984f) * t + broadcast(-0.1262612198f);
  p = p * t + broadcast(0.1693025792f);
  p = p * t + broadcast(-0.0686323011f);
  p = p * t + broadcast(0.1074061271f);
  p = p * t + broadcast(0.0722379682f);
  p = p * t + broadcast(0.1017596119f);
  p = p * t + broadcast(0.1075504658f);
  p = p * t + broadcast(0.1077201821f);
  return p * t * density;
}

// act(z) and act'(z)
VQ_INLINE void activate(Activation kind, Vec z, Vec& value, Vec& slope) {
  const Vec one = broadcast(1.f), minus = broadcast(-1.f) * z, magnitude = maximum(z, minus);
  if (kind == Activation::kRelu) {
    value = maximum(Vec{}, z);
    slope = zero_where_below(one, z, std::numeric_limits<float>::min());
  } else if (kind == Activation::kSilu) {
    const Vec e = exp_nonpositive(broadcast(-1.f) * magnitude), p = one / (one + e), q = e * p;
    const Vec sigmoid = zero_where_below(p - q, z, 0.f) + q;
    value = z * sigmoid;
    slope = sigmoid * (one + z * (one - sigmoid));
  } else {
    const Vec e = exp_nonpositive(broadcast(-0.5f) * magnitude * magnitude), q = normal_tail(magnitude, e);
    const Vec phi = zero_where_below(one - q - q, z, 0.f) + q;
    value = z * phi;
    slope = phi + z * e * broadcast(0.3989422804f);
  }
}

// a = act(z), z = (1 + scale) h + shift, for n values, a multiple of kLanes
inline void film(Activation kind, const float* h, const float* scale, const float* shift, float* a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec value, slope;
    activate(kind, load(h + i) + load(h + i) * load(scale + i) + load(shift + i), value, slope);
    store(a + i, value);
  }
}

// The same, and from da: dz = act'(z) da, dh = (1 + scale) dz
inline void film_gradient(Activation kind, const float* h, const float* scale, const float* shift, const float* da,
                          float* a, float* dz, float* dh, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec gain = load(scale + i) + broadcast(1.f);
    Vec value, slope;
    activate(kind, load(h + i) + load(h + i) * load(scale + i) + load(shift + i), value, slope);
    const Vec d = slope * load(da + i);
    store(a + i, value);
    store(dz + i, d);
    store(dh + i, gain * d);
  }
}
