// What DoRA reads once: W for the norms of W + scaling · b a, dy for dz = g ∘ dy and the sums of dy ∘ u. Sums are
// float32, in an order that the shape alone decides.
#pragma once
#include "low_rank.h"
#include "nf4_decode.h"

namespace {

constexpr int64_t NORM_ROWS = 32, NORM_COLUMNS = 128;
constexpr float NORM_FLOOR = 1e-18f;

inline float norm_of(float squares) {  // NaN stays
  const float norm = __builtin_sqrtf(squares);
  return norm < NORM_FLOOR ? NORM_FLOOR : norm;
}

// norm[n] = ‖W[n] + b[n] a‖ for a [R, lda] in float32, zero from K on to a multiple of 64, and b [N, R].
// fill(tile, n, rows, k, columns) writes rows of NORM_COLUMNS from W[n][k] on.
template <class Fill>
void norms_of_rows(float* norm, const float* a, int64_t lda, const float* b, int64_t N, int64_t K, int64_t R, Fill fill,
                   int threads) {
  parallel(threads, parts_of(N, NORM_ROWS), [&](int64_t part) {
    const int64_t n = part * NORM_ROWS, rows = at_most(NORM_ROWS, N - n);
    alignas(64) float tile[NORM_ROWS * NORM_COLUMNS];
    alignas(64) float squares[NORM_ROWS * L] = {};
    for (int64_t k = 0; k < K; k += NORM_COLUMNS) {
      const int64_t columns = at_most(NORM_COLUMNS, K - k), whole = parts_of(columns, 64) * 64;
      fill(tile, n, rows, k, columns);
      axpy_tile<false>(tile, NORM_COLUMNS, rows, b + n * R, R, 1, a + k, lda, whole, R);
      for (int64_t r = 0; r < rows; r++) {
        float* row = tile + r * NORM_COLUMNS;
        memset(row + columns, 0, (whole - columns) * sizeof(float));
        vf sum = load<vf>(squares + r * L);
        for (int64_t i = 0; i < whole; i += L) sum = fma(load<vf>(row + i), load<vf>(row + i), sum);
        store(squares + r * L, sum);
      }
    }
    float total[NORM_ROWS];
    sums(total, squares, rows);
    for (int64_t r = 0; r < rows; r++) norm[n + r] = norm_of(total[r]);
  });
}

// The same of W whose neighbours in memory are those of a column: wt [K, N] of rows ldw apart, at [K, R] and bt [R, ldb],
// zero from N on to a multiple of 64.
template <class D>
void norms_of_columns(float* norm, const typename D::T* wt, int64_t ldw, const float* at, const float* bt, int64_t ldb,
                      int64_t N, int64_t K, int64_t R, int threads) {
  parallel(threads, parts_of(N, NORM_COLUMNS), [&](int64_t part) {
    const int64_t n = part * NORM_COLUMNS, columns = at_most(NORM_COLUMNS, N - n), whole = parts_of(columns, 64) * 64;
    alignas(64) float tile[NORM_ROWS * NORM_COLUMNS];
    alignas(64) float squares[NORM_COLUMNS] = {};
    for (int64_t k = 0; k < K; k += NORM_ROWS) {
      const int64_t rows = at_most(NORM_ROWS, K - k);
      load_tile<D>(tile, NORM_COLUMNS, wt, ldw, k, rows, n, columns, NORM_ROWS * ldw, Dropout{-1, nullptr, 0}, 0);
      axpy_tile<false>(tile, NORM_COLUMNS, rows, at + k * R, R, 1, bt + n, ldb, whole, R);
      for (int64_t i = 0; i < whole; i += L) {
        vf sum = {};
        for (int64_t r = 0; r < rows; r++) {
          const vf v = load<vf>(tile + r * NORM_COLUMNS + i);
          sum = fma(v, v, sum);
        }
        store(squares + i, load<vf>(squares + i) + sum);
      }
    }
    for (int64_t i = 0; i < columns; i++) norm[n + i] = norm_of(squares[i]);
  });
}

constexpr int64_t SUM_ROWS = 64;

// dz[m][n] = g[n] dy[m][n] where there is dz [M, N], and dg[n] = Σ_m dy[m][n] u[m][n] where there is dg, without u the
// sum of dy. g is read up to a multiple of 64.
template <class D>
void scaled_and_summed(typename D::T* dz, float* dg, const typename D::T* dy, int64_t ldy, const typename D::T* u,
                       int64_t ldu, const float* g, int64_t M, int64_t N, int threads) {
  const int64_t blocks = parts_of(M, SUM_ROWS), ld = parts_of(N, 64) * 64;
  Scratch<float> parts(dg ? blocks * ld : 0);
  parallel(threads, blocks, [&](int64_t part) {
    float* sums = parts + part * ld;
    if (dg) memset(sums, 0, ld * sizeof(float));
    for (int64_t m = part * SUM_ROWS; m < at_most((part + 1) * SUM_ROWS, M); m++) {
      const auto at = [&](int64_t n, vf d, vf other, auto narrow) {
        if (dg) store(sums + n, u ? fma(d, other, load<vf>(sums + n)) : load<vf>(sums + n) + d);
        if (dz) narrow(dz + m * N + n, d * load<vf>(g + n));
      };
      const typename D::T *row = dy + m * ldy, *other = u ? u + m * ldu : nullptr;
      int64_t n = 0;
      for (; n + L <= N; n += L) at(n, D::widen(row + n), u ? D::widen(other + n) : vf{}, D::narrow);
      const int64_t some = N - n;
      if (some)
        at(n, widen_some<D>(row + n, some), u ? widen_some<D>(other + n, some) : vf{},
           [&](typename D::T* to, vf v) { narrow_some<D>(to, v, some); });
    }
  });
  for (int64_t n = 0; dg && n < N; n++) {
    float total = 0;
    for (int64_t part = 0; part < blocks; part++) total += parts[part * ld + n];
    dg[n] = total;
  }
}

}  // namespace
