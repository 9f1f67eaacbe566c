// Loops of lora_linear and film_adapter over rows (common/each_target.h): a rank of r beside activations that are wide.

// out[row][rank] = <x[row], factors[rank]> for Count rows of x and Ranks factors, at most kLanes sums
template <int Count, int Ranks, class T>
VQ_INLINE void shrink_tile(const T* x, int64_t x_stride, const float* factors, int64_t stride, int64_t width,
                           float* out, int64_t out_stride) {
  Vec sums[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec rows[Count];
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) rows[m] = load(x + m * x_stride + d);
#pragma GCC unroll 16
    for (int r = 0; r < Ranks; ++r) {
      const Vec factor = load(factors + r * stride + d);
#pragma GCC unroll 16
      for (int m = 0; m < Count; ++m) sums[m * Ranks + r] += rows[m] * factor;
    }
  }
  float found[kLanes];
  horizontal_sums(sums, found);
  for (int m = 0; m < Count; ++m)
    for (int r = 0; r < Ranks; ++r) out[m * out_stride + r] = found[m * Ranks + r];
}

// y[row] = base[row] + sum_r weights[row][r] factors[r] for Count rows and Columns vectors
template <int Count, int Columns, class T>
VQ_INLINE void expand_tile(const T* base, T* y, int64_t y_stride, const float* weights, int64_t rank,
                           const float* factors, int64_t stride) {
  Vec sums[Count][Columns] = {};
  for (int64_t r = 0; r < rank; ++r) {
    Vec factor[Columns];
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) factor[c] = load(factors + r * stride + c * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m)
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sums[m][c] += broadcast(weights[m * rank + r]) * factor[c];
  }
#pragma GCC unroll 16
  for (int m = 0; m < Count; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      const int64_t at = m * y_stride + c * kLanes;
      store(y + at, load(base + at) + sums[m][c]);
    }
}

// sums[r] = sum_m weights[m][r] rows[m] for Ranks sums of Columns vectors, over all rows
template <int Ranks, int Columns, class T>
VQ_INLINE void outer_tile(const T* rows, int64_t row_stride, int64_t count, const float* weights, int64_t rank,
                          float* sums, int64_t stride) {
  constexpr int64_t kAhead = 16;     // rows lie a page apart, which no hardware prefetcher follows
  constexpr int64_t kSumRows = 256;  // a sum of sums rounds less than one long sum
  int64_t first = 0;
  do {
    Vec total[Ranks][Columns] = {};
    const int64_t end = std::min(count, first + kSumRows);
    for (int64_t m = first; m < end; ++m) {
      Vec row[Columns];
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) {
        row[c] = load(rows + m * row_stride + c * kLanes);
        __builtin_prefetch(rows + (m + kAhead) * row_stride + c * kLanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < Ranks; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) total[r][c] += broadcast(weights[m * rank + r]) * row[c];
    }
#pragma GCC unroll 16
    for (int r = 0; r < Ranks; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) {
        float* target = sums + r * stride + c * kLanes;
        store(target, first ? load(target) + total[r][c] : total[r][c]);
      }
    first = end;
  } while (first < count);
}

template <class T>
void shrink(const T* x, int64_t x_stride, int64_t rows, const float* factors, int64_t stride, int64_t rank,
            int64_t width, float* out) {
  for (int64_t m = 0; m < rows;) {
    const int64_t count = rows - m >= 4 ? 4 : 1;
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4)
      if (count == 4)
        shrink_tile<4, 4>(x + m * x_stride, x_stride, factors + r * stride, stride, width, out + m * rank + r, rank);
      else
        shrink_tile<1, 4>(x + m * x_stride, x_stride, factors + r * stride, stride, width, out + m * rank + r, rank);
    for (; r < rank; ++r)
      for (int64_t i = 0; i < count; ++i)
        shrink_tile<1, 1>(x + (m + i) * x_stride, x_stride, factors + r * stride, stride, width,
                          out + (m + i) * rank + r, rank);
    m += count;
  }
}

template <class T>
void expand(const T* base, T* y, int64_t y_stride, int64_t rows, const float* weights, int64_t rank,
            const float* factors, int64_t stride, int64_t width) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes)
      expand_tile<4, 4>(base + m * y_stride + d, y + m * y_stride + d, y_stride, weights + m * rank, rank, factors + d,
                        stride);
    for (; d < width; d += kLanes)
      expand_tile<4, 1>(base + m * y_stride + d, y + m * y_stride + d, y_stride, weights + m * rank, rank, factors + d,
                        stride);
  }
  for (; m < rows; ++m)
    for (int64_t d = 0; d < width; d += kLanes)
      expand_tile<1, 1>(base + m * y_stride + d, y + m * y_stride + d, y_stride, weights + m * rank, rank, factors + d,
                        stride);
}

template <class T>
void outer(const T* rows, int64_t row_stride, int64_t count, const float* weights, int64_t rank, float* sums,
           int64_t stride, int64_t width) {
  for (int64_t d = 0; d < width;) {
    const int64_t columns = width - d >= 2 * kLanes ? 2 : 1;
    int64_t r = 0;
    for (; r + 8 <= rank; r += 8)
      if (columns == 2)
        outer_tile<8, 2>(rows + d, row_stride, count, weights + r, rank, sums + r * stride + d, stride);
      else
        outer_tile<8, 1>(rows + d, row_stride, count, weights + r, rank, sums + r * stride + d, stride);
    for (; r < rank; ++r)
      for (int64_t c = 0; c < columns; ++c)
        outer_tile<1, 1>(rows + d + c * kLanes, row_stride, count, weights + r, rank,
                         sums + r * stride + d + c * kLanes, stride);
    d += columns * kLanes;
  }
}
