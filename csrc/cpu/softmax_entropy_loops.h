// Loops of softmax_entropy over a chunk of one row (common/each_target.h).

constexpr float kNoClass = -std::numeric_limits<float>::infinity();  // behind the last one

VQ_INLINE void add_terms(Vec z, Vec shift, Vec& weight, Vec& moment) {
  const Vec d = z - shift, e = exp_nonpositive(d);
  weight += e, moment += e * clamp_exponent(d);
}

template <class T>
SoftmaxSums chunk_sums(const T* z, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  const Vec last = load_last(z + whole, n - whole, kNoClass);
  Vec max = last;
  for (int64_t i = 0; i < whole; i += kLanes) max = maximum(load(z + i), max);
  SoftmaxSums sums;
  sums.max = horizontal_max(max), sums.centre = sums.shift();
  const Vec shift = broadcast(sums.shift());
  Vec weight = {}, moment = {};
  for (int64_t i = 0; i < whole; i += kLanes) add_terms(load(z + i), shift, weight, moment);
  add_terms(last, shift, weight, moment);
  sums.weight = horizontal_sum(weight), sums.moment = horizontal_sum(moment);
  return sums;
}

VQ_INLINE Vec gradient_of(Vec z, Row row) {
  const Vec log_p = (z - broadcast(row.max)) - broadcast(row.log_sum);  // never z - lse: it rounds at |lse|
  const Vec dz = broadcast(-row.grad) * exp_nonpositive(log_p) * (log_p + broadcast(row.entropy));
  return zero_where_below(dz, log_p, kExpMin);
}

template <class T>
void chunk_gradient(const T* z, T* dz, int64_t n, Row row) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(dz + i, gradient_of(load(z + i), row));
  T last[kLanes];
  store(last, gradient_of(load_last(z + whole, n - whole, kNoClass), row));
  std::copy_n(last, n - whole, dz + whole);
}
