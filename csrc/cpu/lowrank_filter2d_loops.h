// Row loops of lowrank_filter2d: the separable filter forwards, the correlations of its gradient backwards.
// Rows are fp32 and counted in whole vectors: `width` is a multiple of kLanes, what lies beyond the image is zero.

// out[r][x] = sum_j taps[r][j] in[x + j]
template <int Rank, int Block>
VQ_INLINE void filter_row_block(const float* in, const float* taps, int64_t k, float* out, int64_t width) {
  Vec sums[Rank][Block] = {};
  for (int64_t j = 0; j < k; ++j) {
    Vec x[Block];
    for (int b = 0; b < Block; ++b) x[b] = load(in + j + b * kLanes);
    for (int r = 0; r < Rank; ++r)
      for (int b = 0; b < Block; ++b) sums[r][b] += broadcast(taps[r * k + j]) * x[b];
  }
  for (int r = 0; r < Rank; ++r)
    for (int b = 0; b < Block; ++b) store(out + r * width + b * kLanes, sums[r][b]);
}

template <int Rank, int Block>
VQ_INLINE void filter_row_ranks(const float* in, const float* taps, int64_t k, float* out, int64_t width) {
  int64_t x = 0;
  for (; x + Block * kLanes <= width; x += Block * kLanes)
    filter_row_block<Rank, Block>(in + x, taps, k, out + x, width);
  for (; x < width; x += kLanes) filter_row_block<Rank, 1>(in + x, taps, k, out + x, width);
}

// One padded row through the horizontal taps of every rank: out [rank][width].
inline void filter_row(const float* in, const float* taps, int64_t rank, int64_t k, float* out, int64_t width) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) filter_row_ranks<4, 2>(in, taps + r * k, k, out + r * width, width);
  for (; r + 2 <= rank; r += 2) filter_row_ranks<2, 4>(in, taps + r * k, k, out + r * width, width);
  for (; r < rank; ++r) filter_row_ranks<1, 4>(in, taps + r * k, k, out + r * width, width);
}

template <int Count, int Block>
VQ_INLINE void filter_columns_block(const float* in, const float* taps, int64_t rank, int64_t k, int64_t width,
                                    Tone tone, const float* const* image, float* const* out, int64_t column) {
  Vec sums[Count][Block] = {};
  const int64_t stride = rank * width;
  for (int64_t r = 0; r < rank; ++r) {
    const float *source = in + r * width + column, *u = taps + r * k;
    for (int b = 0; b < Block; ++b) sums[0][b] += broadcast(u[0]) * load(source + b * kLanes);
    for (int64_t i = 1; i < k; ++i) {
      Vec row[Block];
      for (int b = 0; b < Block; ++b) row[b] = load(source + i * stride + b * kLanes);
      for (int b = 0; b < Block; ++b) sums[0][b] += broadcast(u[i]) * row[b];
      if (Count == 2)
        for (int b = 0; b < Block; ++b) sums[Count - 1][b] += broadcast(u[i - 1]) * row[b];
    }
    if (Count == 2)
      for (int b = 0; b < Block; ++b)
        sums[Count - 1][b] += broadcast(u[k - 1]) * load(source + k * stride + b * kLanes);
  }
  const Vec mix = broadcast(tone.mix), gain = broadcast(tone.gain), bias = broadcast(tone.bias);
  for (int y = 0; y < Count; ++y) {
    const float* x = image[y] + column;
    float* target = out[y] + column;
    for (int b = 0; b < Block; ++b) {
      const Vec pixel = load(x + b * kLanes);
      store(target + b * kLanes, gain * (pixel + mix * (sums[y][b] - pixel)) + bias);
    }
  }
}

template <int Count>
VQ_INLINE void filter_columns_count(const float* in, const float* taps, int64_t rank, int64_t k, int64_t width,
                                    Tone tone, const float* const* image, float* const* out) {
  constexpr int kBlock = 4;
  int64_t column = 0;
  for (; column + kBlock * kLanes <= width; column += kBlock * kLanes)
    filter_columns_block<Count, kBlock>(in, taps, rank, k, width, tone, image, out, column);
  for (; column < width; column += kLanes)
    filter_columns_block<Count, 1>(in, taps, rank, k, width, tone, image, out, column);
}

// out[y] = gain (x[y] + mix (F[y] - x[y])) + bias with F[y] = sum_r sum_i taps[r][i] in[y + i][r], for one row or two:
// two share the rows that they read. in [count + k - 1][rank][width]
inline void filter_columns(const float* in, const float* taps, int64_t rank, int64_t k, int64_t width, Tone tone,
                           int64_t count, const float* const* image, float* const* out) {
  if (count == 2)
    filter_columns_count<2>(in, taps, rank, k, width, tone, image, out);
  else
    filter_columns_count<1>(in, taps, rank, k, width, tone, image, out);
}

// Gradient of rank 1 without the k x k correlation: for one padded row x and the k rows g[i] that meet it,
//   T = sum_j v_j x[. + j],  Q = sum_i u_i g[i],   du_i += <g[i], T>,  dv_j += <Q, x[. + j]>
// sums holds, lanes apart, du [k], dv [k], <g[p], x[. + p]> (p = k / 2) and sum g[p].
template <int K>
VQ_INLINE void rank1_row_fixed(const float* const* g, const float* x, const float* u, const float* v, int64_t width,
                               float* sums) {
  Vec du[K], dv[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) du[i] = load(sums + i * kLanes), dv[i] = load(sums + (K + i) * kLanes);
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec t = {}, q = {};
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) q += broadcast(u[i]) * load(g[i] + c);
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) {
      const Vec pixel = load(x + c + j);
      t += broadcast(v[j]) * pixel;
      dv[j] += q * pixel;
    }
#pragma GCC unroll 16
    for (int i = 0; i < K; ++i) du[i] += load(g[i] + c) * t;
  }
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) store(sums + i * kLanes, du[i]), store(sums + (K + i) * kLanes, dv[i]);
}

template <int Block>
VQ_INLINE void rank1_row_block(const float* const* g, const float* x, const float* u, const float* v, int64_t k,
                               int64_t c, float* sums) {
  Vec t[Block] = {}, q[Block] = {};
  for (int64_t i = 0; i < k; ++i)
    for (int b = 0; b < Block; ++b) {
      t[b] += broadcast(v[i]) * load(x + c + i + b * kLanes);
      q[b] += broadcast(u[i]) * load(g[i] + c + b * kLanes);
    }
  for (int64_t i = 0; i < k; ++i) {
    Vec du = load(sums + i * kLanes), dv = load(sums + (k + i) * kLanes);
    for (int b = 0; b < Block; ++b) {
      du += load(g[i] + c + b * kLanes) * t[b];
      dv += q[b] * load(x + c + i + b * kLanes);
    }
    store(sums + i * kLanes, du), store(sums + (k + i) * kLanes, dv);
  }
}

inline void rank1_row(const float* const* g, const float* x, const float* u, const float* v, int64_t k, int64_t width,
                      float* sums) {
  Vec centre = load(sums + 2 * k * kLanes), total = load(sums + (2 * k + 1) * kLanes);
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec row = load(g[k / 2] + c);
    centre += row * load(x + c + k / 2);
    total += row;
  }
  store(sums + 2 * k * kLanes, centre), store(sums + (2 * k + 1) * kLanes, total);
  if (k == 7) return rank1_row_fixed<7>(g, x, u, v, width, sums);  // the default: every sum stays in a register
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) rank1_row_block<4>(g, x, u, v, k, c, sums);
  for (; c < width; c += kLanes) rank1_row_block<1>(g, x, u, v, k, c, sums);
}

// The k x k correlation. A tile holds I x J sums in registers while it walks over all rows of `in`; row t of it meets
// the rows t - i of g, and only `First` <= i <= `Last` exist at the upper and lower edge.
template <int I, int J, int First, int Last>
VQ_INLINE void correlate_tile_row(const Rows& g, const Rows& in, int64_t t, int64_t width, Vec (&sums)[I][J]) {
  const float* x = in.data + t * in.stride;
  const float* rows[I];
#pragma GCC unroll 8
  for (int i = First; i <= Last; ++i) rows[i] = g.data + (t - i) * g.stride;
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec weight[I];
#pragma GCC unroll 8
    for (int i = First; i <= Last; ++i) weight[i] = load(rows[i] + c);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec pixel = load(x + c + j);
#pragma GCC unroll 8
      for (int i = First; i <= Last; ++i) sums[i][j] += weight[i] * pixel;
    }
  }
}

// sums[i][j] += sum_y sum_x g[y][x] in[y + i][x + j] for I x J lags (lanes apart); needs I <= rows. lag_stride: floats
// between the sums of lag i and i + 1
template <int I, int J>
VQ_INLINE void correlate_tile(const Rows& g, int64_t rows, const Rows& in, int64_t width, float* sums,
                              int64_t lag_stride) {
  Vec tile[I][J];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) tile[i][j] = load(sums + i * lag_stride + j * kLanes);
  if constexpr (I > 1) correlate_tile_row<I, J, 0, 0>(g, in, 0, width, tile);
  if constexpr (I > 2) correlate_tile_row<I, J, 0, 1>(g, in, 1, width, tile);
  if constexpr (I > 3) correlate_tile_row<I, J, 0, 2>(g, in, 2, width, tile);
  for (int64_t t = I - 1; t < rows; ++t) correlate_tile_row<I, J, 0, I - 1>(g, in, t, width, tile);
  if constexpr (I > 3) correlate_tile_row<I, J, I - 3, I - 1>(g, in, rows + I - 4, width, tile);
  if constexpr (I > 2) correlate_tile_row<I, J, I - 2, I - 1>(g, in, rows + I - 3, width, tile);
  if constexpr (I > 1) correlate_tile_row<I, J, I - 1, I - 1>(g, in, rows + I - 2, width, tile);
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store(sums + i * lag_stride + j * kLanes, tile[i][j]);
}

template <int I>
VQ_INLINE void correlate_lags(const Rows& g, int64_t rows, const Rows& in, int64_t k, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + 5 <= k; j += 5)
    correlate_tile<I, 5>(g, rows, {in.data + j, in.stride}, width, sums + j * kLanes, k * kLanes);
  for (; j + 2 <= k; j += 2)
    correlate_tile<I, 2>(g, rows, {in.data + j, in.stride}, width, sums + j * kLanes, k * kLanes);
  for (; j < k; ++j) correlate_tile<I, 1>(g, rows, {in.data + j, in.stride}, width, sums + j * kLanes, k * kLanes);
}

inline void correlate_directly(const Rows& g, int64_t rows, const Rows& in, int64_t lags, int64_t k, int64_t width,
                               float* sums) {
  int64_t i = 0;
  for (; i + 4 <= lags && rows >= 4; i += 4)
    correlate_lags<4>(g, rows, {in.data + i * in.stride, in.stride}, k, width, sums + i * k * kLanes);
  for (; i < lags; ++i)
    correlate_lags<1>(g, rows, {in.data + i * in.stride, in.stride}, k, width, sums + i * k * kLanes);
}

// out[y] = a[y] + sign b[y]
inline void add_rows(const Rows& a, const Rows& b, float sign, int64_t rows, int64_t width, float* out) {
  for (int64_t y = 0; y < rows; ++y, out += width)
    for (int64_t x = 0; x < width; x += kLanes)
      store(out + x, load(a.data + y * a.stride + x) + broadcast(sign) * load(b.data + y * b.stride + x));
}

// sums[lane] += sum_y sum_x g[y][x]
inline void row_sums(const Rows& g, int64_t rows, int64_t width, float* sums) {
  Vec total = load(sums);
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < width; x += kLanes) total += load(g.data + y * g.stride + x);
  store(sums, total);
}
