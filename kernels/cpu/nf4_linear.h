// Which way y = x deq(W)ᵀ + bias and dx = dy deq(W) are computed, by rows of x and the shape of W.
#pragma once
#include "nf4_few_rows.h"
#include "nf4_pairs.h"
#include "nf4_panels.h"

namespace {

template <class D> void narrow_row(typename D::T* y, const float* x, const typename D::T* bias, int64_t N) {
  for (int64_t n = 0; n < N; n += L) {
    const int64_t some = at_most(L, N - n);
    vf v = widen_some<F32>(x + n, some);
    if (bias) v += widen_some<D>(bias + n, some);
    narrow_some<D>(y + n, v, some);
  }
}

template <class D>
void linear(typename D::T* y, const typename D::T* x, int64_t ldx, const Weight& w, const typename D::T* bias,
            int64_t M, int64_t N, int64_t K, int threads) {
  if (M == 0) return;
#if defined(ISA_AVX512BF16)
  if constexpr (D::PAIRS) {
    if (pairs_fit(w, M, K)) {
      Scratch<uint16_t> laid(M * K);
      Scratch<float> sums(M * N);
      lay_in_fours(laid, x, ldx, M, K);
      paired(sums, laid, w, M, N, K, threads);
      for (int64_t m = 0; m < M; m++) narrow_row<D>(y + m * N, sums + m * N, bias, N);
      return;
    }
  }
#endif
  if (M <= MAX_FEW && K % w.blocksize == 0) {
    Scratch<float> apart(M * K), sums(M * N);
    lay_apart<D>(apart, x, ldx, M, K);
    if (M == 1) few_rows<D, 1>(sums, apart, w, N, K, threads);
    else if (M == 2) few_rows<D, 2>(sums, apart, w, N, K, threads);
    else if (M == 3) few_rows<D, 3>(sums, apart, w, N, K, threads);
    else few_rows<D, 4>(sums, apart, w, N, K, threads);
    for (int64_t m = 0; m < M; m++) narrow_row<D>(y + m * N, sums + m * N, bias, N);
    return;
  }
  const int64_t ld = padded(K, 64);
#if defined(ISA_AVX512BF16)
  if constexpr (D::PAIRS) {
    Scratch<uint16_t> rows(M * ld);
    for (int64_t m = 0; m < M; m++) {
      memcpy(rows + m * ld, x + m * ldx, K * 2);
      memset(rows + m * ld + K, 0, (ld - K) * 2);
    }
    return panels<ProductBF16, D, D>(y, rows, ld, w, bias, M, N, K, threads);
  }
#endif
  Scratch<float> rows(M * ld);
  widen_rows<D>(rows, ld, x, ldx, M, K);
  panels<ProductF32, Rounded<D>, D>(y, rows, ld, w, bias, M, N, K, threads);
}

// For K that blocks end with.
template <class D>
void linear_dx(typename D::T* dx, const typename D::T* dy, int64_t ldy, const Weight& w, int64_t M, int64_t N,
               int64_t K, int threads) {
  if (M == 0) return;
  Scratch<float> rows(M * N), sums(M * K);
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) rows[m * N + n] = D::widen_one(dy[m * ldy + n]);
  const int64_t each = parts_of(M, parts_of(M, MAX_FEW));
  for (int64_t m = 0, some; m < M; m += some) {
    some = at_most(each, M - m);
    if (some == 1) few_rows_dx<D, 1>(sums + m * K, rows + m * N, w, N, K, threads);
    else if (some == 2) few_rows_dx<D, 2>(sums + m * K, rows + m * N, w, N, K, threads);
    else if (some == 3) few_rows_dx<D, 3>(sums + m * K, rows + m * N, w, N, K, threads);
    else few_rows_dx<D, 4>(sums + m * K, rows + m * N, w, N, K, threads);
  }
  for (int64_t m = 0; m < M; m++) narrow_row<D>(dx + m * K, sums + m * K, nullptr, K);
}

}  // namespace
