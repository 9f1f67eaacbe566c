// Loops of cosine_alignment over one row (common/each_target.h).

VQ_INLINE void add_terms(Vec p, Vec t, Vec& pp, Vec& tt, Vec& pt) { pp += p * p, tt += t * t, pt += p * t; }

template <class T>
Products row_products(const T* p, const T* t, int64_t n) {
  Products sums;
  for (; n > 0; p += kBlock, t += kBlock, n -= kBlock) {
    const int64_t count = std::min(n, kBlock), whole = count / kLanes * kLanes;
    Vec pp = {}, tt = {}, pt = {};
    for (int64_t i = 0; i < whole; i += kLanes) add_terms(load(p + i), load(t + i), pp, tt, pt);
    if (whole < count)
      add_terms(load_last(p + whole, count - whole, 0.f), load_last(t + whole, count - whole, 0.f), pp, tt, pt);
    sums.pp += horizontal_sum(pp), sums.tt += horizontal_sum(tt), sums.pt += horizontal_sum(pt);
  }
  return sums;
}

VQ_INLINE Vec gradient_of(Vec p, Vec t, Vec slope, Vec inverse_t, Vec along) {
  return slope * (t * inverse_t - p * along);
}

template <class T>
void row_gradient(const T* p, const T* t, T* dp, int64_t n, Row row) {
  const Vec slope = broadcast(row.grad * row.inverse_p), inverse_t = broadcast(row.inverse_t);
  const Vec along = broadcast(row.cosine * row.inverse_p);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    store(dp + i, gradient_of(load(p + i), load(t + i), slope, inverse_t, along));
  if (whole == n) return;
  T last[kLanes];
  store(last, gradient_of(load_last(p + whole, n - whole, 0.f), load_last(t + whole, n - whole, 0.f), slope, inverse_t,
                          along));
  std::copy_n(last, n - whole, dp + whole);
}
