// The two products that everything here is made of, on tiles that a core's first cache holds.
#pragma once
#include "vectors.h"

namespace {

// out[r][k] = t[k][r] in float32 for t [K, ldt] of which R columns count, zeros from K to ldo, a multiple of L.
template <class D>
inline void widen_transposed(float* out, int64_t ldo, const typename D::T* t, int64_t ldt, int64_t R, int64_t K) {
  for (int64_t k = 0; k < ldo; k += L)
    for (int64_t r = 0; r < R; r += L) {
      const typename D::T* from = t + k * ldt + r;
      const int64_t ranks = at_most(L, R - r);
      vf block[L];
      if (k + L <= K && (k + L - 1) * ldt + r + L <= (K - 1) * ldt + R) {  // whole vectors, all in memory of t
        for (int i = 0; i < L; i++) block[i] = D::widen(from + i * ldt);
      } else {
        for (int i = 0; i < L; i++) block[i] = k + i < K ? widen_some<D>(from + i * ldt, ranks) : vf{};
      }
      transpose(block);
      float* to = out + r * ldo + k;
      for (int i = 0; i < L; i++)
        if (i < ranks) store(to + i * ldo, block[i]);
    }
}

// How a vector of x and one of w are multiplied and summed.
struct ProductF32 {
  typedef float T;
  static constexpr int STEP = L;
  static vf add(vf sum, const T* x, vf w) { return fma(load<vf>(x), w, sum); }
  static vf operand(const T* w) { return load<vf>(w); }
};
#if defined(ISA_AVX512BF16)
struct ProductBF16 {  // pairs: exact products, float32 sums
  typedef uint16_t T;
  static constexpr int STEP = 2 * L;
  static vf add(vf sum, const T* x, __m512i w) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<__m512i>(x), (__m512bh)w);
  }
  static __m512i operand(const T* w) { return load<__m512i>(w); }
};
#endif

template <class P, int I, int J>
inline void dot_block(float* sums, int64_t ld_sums, const typename P::T* x, int64_t ldx, const typename P::T* w,
                      int64_t ldw, int64_t n) {
  vf acc[I][J];
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) acc[i][j] = load<vf>(sums + i * ld_sums + j * L);
  for (int64_t k = 0; k < n; k += P::STEP) {
    decltype(P::operand(w)) wk[J];
    for (int j = 0; j < J; j++) wk[j] = P::operand(w + j * ldw + k);
    for (int i = 0; i < I; i++)
      for (int j = 0; j < J; j++) acc[i][j] = P::add(acc[i][j], x + i * ldx + k, wk[j]);
  }
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) store(sums + i * ld_sums + j * L, acc[i][j]);
}

template <class P, int J>
inline void dot_rows(float* sums, int64_t ld_sums, const typename P::T* x, int64_t ldx, int64_t rows,
                     const typename P::T* w, int64_t ldw, int64_t n) {
  constexpr int I = L == 8 ? 3 : 4;
  int64_t i = 0;
  for (; i + I <= rows; i += I) dot_block<P, I, J>(sums + i * ld_sums, ld_sums, x + i * ldx, ldx, w, ldw, n);
  for (; i < rows; i++) dot_block<P, 1, J>(sums + i * ld_sums, ld_sums, x + i * ldx, ldx, w, ldw, n);
}

// sums[i][j] += x[i] · w[j], each sum a vector of L partial ones; n, the length of the rows, is a multiple of P::STEP.
template <class P>
inline void dot_tile(float* sums, int64_t ld_sums, const typename P::T* x, int64_t ldx, int64_t rows_x,
                     const typename P::T* w, int64_t ldw, int64_t rows_w, int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= rows_w; j += 4) dot_rows<P, 4>(sums + j * L, ld_sums, x, ldx, rows_x, w + j * ldw, ldw, n);
  for (; j < rows_w; j++) dot_rows<P, 1>(sums + j * L, ld_sums, x, ldx, rows_x, w + j * ldw, ldw, n);
}

// Words of 32 bits that are multiplied and summed: a float, or a pair of bfloat16 whose products are exact.
struct Singles {
  typedef float Word;
  static constexpr int PER = 1;
  static vf add(vf sum, Word a, vf b) { return fma(splat(a), b, sum); }
};
#if defined(ISA_AVX512BF16)
struct Pairs {
  typedef uint32_t Word;
  static constexpr int PER = 2;
  static vf add(vf sum, Word a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
  }
};
#endif

constexpr int BLOCK_COLUMNS = (L == 8 ? 2 : 4) * L;  // of axpy_tile; divides 64

template <class W, int I, int J, bool FRESH>
inline void axpy_block(float* c, int64_t ldc, const typename W::Word* a, int64_t row_a, int64_t step_a,
                       const typename W::Word* b, int64_t ldb, int64_t n) {
  vf acc[I][J];
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) acc[i][j] = vf{};
  for (int64_t r = 0; r < n; r++) {
    vf br[J];
    for (int j = 0; j < J; j++) br[j] = load<vf>(b + r * ldb + j * L);
    for (int i = 0; i < I; i++) {
      const typename W::Word s = a[i * row_a + r * step_a];
      for (int j = 0; j < J; j++) acc[i][j] = W::add(acc[i][j], s, br[j]);
    }
  }
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) {
      float* to = c + i * ldc + j * L;
      store(to, FRESH ? acc[i][j] : load<vf>(to) + acc[i][j]);
    }
}

template <class W, int I, bool FRESH>
inline void axpy_rows(float* c, int64_t ldc, const typename W::Word* a, int64_t row_a, int64_t step_a,
                      const typename W::Word* b, int64_t ldb, int64_t columns, int64_t n) {
  constexpr int J = BLOCK_COLUMNS / L;
  int64_t k = 0;
  for (; k + J * L <= columns; k += J * L) axpy_block<W, I, J, FRESH>(c + k, ldc, a, row_a, step_a, b + k, ldb, n);
  if (J > 2 && k + 2 * L <= columns) axpy_block<W, I, 2, FRESH>(c + k, ldc, a, row_a, step_a, b + k, ldb, n), k += 2 * L;
  if (k < columns) axpy_block<W, I, 1, FRESH>(c + k, ldc, a, row_a, step_a, b + k, ldb, n);
}

// c[i][:] += Σ_r a[i · row_a + r · step_a] b[r][:], over n rows of b; FRESH: c[i][:] = that. columns is a multiple of L.
template <bool FRESH, class W = Singles>
inline void axpy_tile(float* c, int64_t ldc, int64_t rows, const typename W::Word* a, int64_t row_a, int64_t step_a,
                      const typename W::Word* b, int64_t ldb, int64_t columns, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    axpy_rows<W, 4, FRESH>(c + i * ldc, ldc, a + i * row_a, row_a, step_a, b, ldb, columns, n);
  for (; i < rows; i++) axpy_rows<W, 1, FRESH>(c + i * ldc, ldc, a + i * row_a, row_a, step_a, b, ldb, columns, n);
}

}  // namespace
