// The k x k correlation of lowrank_filter2d's gradient with fewer products than its definition. Included after the
// loops.
#pragma once
#include <algorithm>

namespace vqfast {
namespace {

// Lags above this are halved as below; a whole number of halvings, so that no lag is computed in vain.
constexpr int64_t kDirectLags = 8;

int64_t halvings(int64_t lags) {
  int64_t n = 0;
  for (; lags > kDirectLags; lags = (lags + 1) / 2) ++n;
  return n;
}

// Floats that correlate() needs for its rows and sums, over all levels.
int64_t correlate_scratch(int64_t rows, int64_t lags, int64_t k, int64_t width, int64_t in_width) {
  return 2 * (rows + lags) * in_width + rows * width + 4 * lags * k * kLanes;
}

// sums[i][j] += sum_y sum_x g[y][x] in[y + i][x + j] for y < rows, i < lags, j < k, lanes apart. Two rows by two lags
// take three products where the definition takes four (the fast FIR algorithm F(2, 2), applied to rows):
//   G_0 = g_0 x_0 + g_1 x_1 = m_1 + m_2,   G_1 = g_0 x_1 + g_1 x_2 = m_2 - m_3
//   m_1 = g_0 (x_0 - x_1),   m_2 = (g_0 + g_1) x_1,   m_3 = g_1 (x_1 - x_2)
// `in` has rows + lags - 1 rows of in_width values.
void correlate(const Rows& g, int64_t rows, const Rows& in, int64_t lags, int64_t k, int64_t width, int64_t in_width,
               float* sums, float* scratch) {
  if (lags <= kDirectLags || lags % 2 || rows % 2)
    return VQ_CALL(correlate_directly, g, rows, in, lags, k, width, sums);
  const int64_t half_rows = rows / 2, half_lags = lags / 2, in_rows = half_rows + half_lags - 1;
  const int64_t part = half_lags * k * kLanes;
  float *even = scratch, *odd = even + in_rows * in_width, *both = odd + in_rows * in_width;
  float *parts = both + half_rows * width, *rest = parts + 3 * part;
  const auto step = [&](const Rows& r, int64_t first) { return Rows{r.data + first * r.stride, 2 * r.stride}; };
  VQ_CALL(add_rows, step(in, 0), step(in, 1), -1.f, in_rows, in_width, even);
  VQ_CALL(add_rows, step(in, 1), step(in, 2), -1.f, in_rows, in_width, odd);
  VQ_CALL(add_rows, step(g, 0), step(g, 1), 1.f, half_rows, width, both);
  std::fill_n(parts, 3 * part, 0.f);
  correlate(step(g, 0), half_rows, {even, in_width}, half_lags, k, width, in_width, parts, rest);
  correlate({both, width}, half_rows, step(in, 1), half_lags, k, width, in_width, parts + part, rest);
  correlate(step(g, 1), half_rows, {odd, in_width}, half_lags, k, width, in_width, parts + 2 * part, rest);
  for (int64_t i = 0; i < half_lags; ++i)
    for (int64_t n = 0; n < k * kLanes; ++n) {
      const float m1 = parts[i * k * kLanes + n], m2 = parts[part + i * k * kLanes + n],
                  m3 = parts[2 * part + i * k * kLanes + n];
      sums[2 * i * k * kLanes + n] += m1 + m2;
      sums[(2 * i + 1) * k * kLanes + n] += m2 - m3;
    }
}

}  // namespace
}  // namespace vqfast
