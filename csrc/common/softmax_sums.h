// Sums of a softmax over a part of the classes, and how parts are joined.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace vqfast {

struct SoftmaxSums {
  float max = -std::numeric_limits<float>::infinity();
  float centre = 0.f;  // what moments are taken about: any number near the mean logit, so that they do not cancel later
  float weight = 0.f;  // sum_i exp(z_i - max)
  float moment = 0.f;  // sum_i exp(z_i - max) (z_i - centre)
  // What is taken off z: max, but 0 where every z is -inf, so that -inf - max is no NaN.
  float shift() const { return max == -std::numeric_limits<float>::infinity() ? 0.f : max; }
};

// A part relative to another maximum, no smaller than its own, and another centre.
struct Rescaled {
  double factor, step, weight, moment;
  Rescaled(const SoftmaxSums& part, float max, float centre)
      : factor(part.weight == 0.f ? 0.0
               : part.max == max  ? 1.0
                                  : std::exp(double(part.max) - max)),
        step(double(part.centre) - centre),
        weight(factor * part.weight),
        moment(factor == 0.0 ? 0.0 : factor * (part.moment + part.weight * step)) {}
};

// The part with the largest maximum.
inline const SoftmaxSums& largest(const SoftmaxSums* parts, int64_t count, int64_t stride = 1) {
  const SoftmaxSums* found = parts;
  for (int64_t i = 1; i < count; ++i)
    if (parts[i * stride].max > found->max) found = parts + i * stride;
  return *found;
}

}  // namespace vqfast
