// y = x deq(W)ᵀ for any W and as many rows of x as a core's second cache holds: W is decoded a panel at a time into the
// first cache and multiplied there. Weights are rounded to the dtype of x, sums are float32.
#pragma once
#include "nf4_decode.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL_ROWS = 8, PANEL_BYTES = 2048;  // of W

// out[m][k] = x[m][k] in float32, zeros from K to ldo.
template <class D> void widen_rows(float* out, int64_t ldo, const typename D::T* x, int64_t ldx, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M; m++) {
    int64_t k = 0;
    for (; k + L <= K; k += L) store(out + m * ldo + k, D::widen(x + m * ldx + k));
    for (; k < ldo; k += L) store(out + m * ldo + k, widen_some<D>(x + m * ldx + k, K > k ? K - k : 0));
  }
}

// y[m][n] = bias[n] + sums over x [M, ldx], whose columns from K on are zero; W is decoded as P's operand.
template <class P, class W, class D>
void panels(typename D::T* y, const typename P::T* x, int64_t ldx, const Weight& w, const typename D::T* bias,
            int64_t M, int64_t N, int64_t K, int threads) {
  typedef typename P::T T;
  constexpr int64_t DEPTH = PANEL_BYTES / sizeof(T);
  parallel(threads, parts_of(N, PANEL_ROWS), [&](int64_t part) {
    const int64_t n = part * PANEL_ROWS, rows = at_most(PANEL_ROWS, N - n);
    Scratch<float> parts(M * PANEL_ROWS * L);
    memset(parts, 0, M * PANEL_ROWS * L * sizeof(float));
    alignas(64) T panel[PANEL_ROWS * DEPTH];
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = at_most(DEPTH, K - k), whole = padded(depth, P::STEP);
      for (int64_t r = 0; r < rows; r++) {
        decode<W>(panel + r * DEPTH, w, (n + r) * K + k, (n + r) * K + k + depth);
        memset(panel + r * DEPTH + depth, 0, (whole - depth) * sizeof(T));
      }
      dot_tile<P>(parts, PANEL_ROWS * L, x + k, ldx, M, panel, DEPTH, rows, whole);
    }
    float shift[PANEL_ROWS] = {};
    for (int64_t r = 0; bias && r < rows; r++) shift[r] = D::widen_one(bias[n + r]);
    for (int64_t m = 0; m < M; m++) {
      float total[PANEL_ROWS];
      sums(total, parts + m * PANEL_ROWS * L, rows);
      for (int64_t r = 0; r < rows; r++) narrow_some<D>(y + m * N + n + r, splat(total[r] + shift[r]), 1);
    }
  });
}

}  // namespace
