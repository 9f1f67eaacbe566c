// Loops of linear_softmax_entropy over kBlock rows of W (common/each_target.h).

// z[p][r] = <h[p], w[r]> for kBlock rows w, kRows of them at a time, so that Positions * kRows = kLanes sums are in
// registers. 16-bit rows are also left in `copy` as fp32 [kBlock][width], unless it is null.
template <int Positions, class T>
VQ_INLINE void logits_of(const T* w, int64_t stride, const float* h, int64_t width, float* copy, float (*z)[kBlock]) {
  constexpr int kRows = kLanes / Positions;
  for (int64_t r = 0; r < kBlock; r += kRows) {
    Vec sums[kLanes] = {};  // [Positions][kRows]
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec row[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        row[i] = load(w + (r + i) * stride + d);
        __builtin_prefetch(w + (r + i + kRows) * stride + d);
        if (!std::is_same_v<T, float> && copy) store(copy + (r + i) * width + d, row[i]);
      }
#pragma GCC unroll 16
      for (int p = 0; p < Positions; ++p) {
        const Vec x = load(h + p * width + d);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) sums[p * kRows + i] += x * row[i];
      }
    }
    float found[kLanes];
    horizontal_sums(sums, found);
    for (int p = 0; p < Positions; ++p) std::copy_n(found + p * kRows, kRows, z[p] + r);
  }
}

// sums[m][d] += sum_r weights[m][r] w[r][d] for Count rows m of weights, Columns vectors at a time. The rows from
// `next` are fetched meanwhile, unless it is null.
template <int Count, int Columns, class Row, class T>
VQ_INLINE void add_rows_of(const Row* w, int64_t stride, const T* next, int64_t next_stride, const float* weights,
                           float* sums, int64_t width, int64_t d) {
  Vec total[Count][Columns];
#pragma GCC unroll 16
  for (int m = 0; m < Count; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) total[m][c] = load(sums + m * width + d + c * kLanes);
  for (int64_t r = 0; r < kBlock; ++r) {
    Vec row[Columns];
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      row[c] = load(w + r * stride + d + c * kLanes);
      if (next) __builtin_prefetch(next + r * next_stride + d + c * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m)
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) total[m][c] += broadcast(weights[m * kBlock + r]) * row[c];
  }
#pragma GCC unroll 16
  for (int m = 0; m < Count; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) store(sums + m * width + d + c * kLanes, total[m][c]);
}

template <int Positions, class Row, class T>
VQ_INLINE void add_block_rows(const Row* w, int64_t stride, const T* next, int64_t next_stride,
                              const float (*weights)[kBlock], float* sums, int64_t width) {
  constexpr int kCount = 2 * Positions < 8 ? 2 * Positions : 8, kColumns = 16 / kCount;
  for (int m = 0; m < 2 * Positions; m += kCount) {
    const T* fetched = m == 0 ? next : nullptr;
    int64_t d = 0;
    for (; d + kColumns * kLanes <= width; d += kColumns * kLanes)
      add_rows_of<kCount, kColumns>(w, stride, fetched, next_stride, weights[m], sums + m * width, width, d);
    for (; d < width; d += kLanes)
      add_rows_of<kCount, 1>(w, stride, fetched, next_stride, weights[m], sums + m * width, width, d);
  }
}

// Brings the sums to a new maximum, that of `logits`, which come next, and to the mean logit known by then.
VQ_INLINE void raise_max(SoftmaxSums& s, Vec logits, float max, float* rows, int64_t width, bool gradient) {
  const Vec exponent = logits - broadcast(max), e = exp_nonpositive(exponent);
  const float factor = s.weight == 0.f ? 0.f : std::exp(s.max - max), weight = factor * s.weight;
  const float moment = weight * (s.centre - max) + factor * s.moment + horizontal_sum(e * clamp_exponent(exponent));
  const float centre = max + moment / (weight + horizontal_sum(e)), step = s.centre - centre;
  if (gradient && s.weight != 0.f)
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec first = load(rows + d), second = load(rows + width + d);
      store(rows + d, broadcast(factor) * first);
      store(rows + width + d, broadcast(factor) * (second + broadcast(step) * first));
    }
  s = {max, centre, weight, factor * s.moment + weight * step};
}

template <int Positions, class T>
VQ_INLINE void block_of(const T* w, int64_t stride, const float* h, const float* bias, int64_t width, bool gradient,
                        float* copy, Sums sums) {
  float z[Positions][kBlock], weights[2 * Positions][kBlock];
  constexpr bool kCopies = !std::is_same_v<T, float> && Positions >= 4;  // pays where the rows are used often
  logits_of<Positions>(w, stride, h, width, kCopies && gradient ? copy : nullptr, z);
  for (int p = 0; p < Positions; ++p) {
    SoftmaxSums& s = sums.softmax[p];
    const Vec logits = load(z[p]) + load(bias);
    if (const float max = horizontal_max(logits); max > s.max)
      raise_max(s, logits, max, sums.rows + 2 * p * width, width, gradient);
    const Vec exponent = logits - broadcast(s.shift()), e = exp_nonpositive(exponent);
    const Vec ec = e * (clamp_exponent(exponent) + broadcast(s.shift() - s.centre));
    s.weight += horizontal_sum(e), s.moment += horizontal_sum(ec);
    store(weights[2 * p], e), store(weights[2 * p + 1], ec);
  }
  if (!gradient) return;
  const T* next = w + kBlock * stride;
  if constexpr (kCopies)
    add_block_rows<Positions>(copy, width, next, stride, weights, sums.rows, width);
  else
    add_block_rows<Positions>(w, stride, next, stride, weights, sums.rows, width);
}

template <class T>
void add_block(int64_t positions, const T* w, int64_t stride, const float* h, const float* bias, int64_t width,
               bool gradient, float* copy, Sums sums) {
  for (int64_t p = 0; p < positions;) {
    const float* rows = h + p * width;
    const Sums s{sums.softmax + p, sums.rows + 2 * p * width};
    const int64_t left = positions - p;
    if (left >= 8)
      block_of<8>(w, stride, rows, bias, width, gradient, copy, s), p += 8;
    else if (left >= 4)
      block_of<4>(w, stride, rows, bias, width, gradient, copy, s), p += 4;
    else if (left >= 2)
      block_of<2>(w, stride, rows, bias, width, gradient, copy, s), p += 2;
    else
      block_of<1>(w, stride, rows, bias, width, gradient, copy, s), p += 1;
  }
}
