// Sums of a softmax over a part of the classes, and how parts are joined.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace vqfast {

struct SoftmaxSums {
  float max = -std::numeric_limits<float>::infinity();
  float weight = 0.f;  // sum_i exp(z_i - max)
  float moment = 0.f;  // sum_i exp(z_i - max) (z_i - max)
  // What is taken off z: max, but 0 where every z is -inf, so that -inf - max is no NaN.
  float shift() const { return max == -std::numeric_limits<float>::infinity() ? 0.f : max; }
};

inline float common_max(const SoftmaxSums* parts, int64_t count) {
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) max = parts[i].max > max ? parts[i].max : max;
  return max;
}

// A part relative to the maximum of all parts: exp(z - max) = factor exp(z - part.max), z - max = z - part.max + step.
struct Rescaled {
  double step, factor, weight, moment;
  Rescaled(const SoftmaxSums& part, float max)
      : step(part.max == max ? 0.0 : double(part.shift()) - max), factor(std::exp(step)) {
    weight = factor * part.weight;
    moment = factor == 0.0 ? part.moment * 0.0 : factor * (part.moment + part.weight * step);
  }
};

}  // namespace vqfast
