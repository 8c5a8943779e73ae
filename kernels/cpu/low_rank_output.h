// How DoRA's and the adapter's low-rank terms leave: y = g ∘ (u + scaling · s bᵀ) + bias, written once.
#pragma once
#include "low_rank.h"

namespace {

// For s [M, R] and bt [R, ldb] in float32, bt, g and bias zero from N on to a multiple of 64; u, of any float type, g and
// bias may be null. y may take the memory of u.
template <class D, class U>
void low_rank_output(typename D::T* y, int64_t ldy, const typename U::T* u, int64_t ldu, const float* s,
                     const float* bt, int64_t ldb, const float* g, const float* bias, int64_t M, int64_t N, int64_t R,
                     float scale, int threads) {
  constexpr int64_t WIDTH = 256;
  parallel(threads, parts_of(M, TILE_ROWS), [&](int64_t part) {
    const int64_t row = part * TILE_ROWS, rows = at_most(TILE_ROWS, M - row);
    alignas(64) float total[TILE_ROWS * WIDTH];
    for (int64_t first = 0; first < N; first += WIDTH) {
      const int64_t columns = at_most(WIDTH, N - first), whole = parts_of(columns, 64) * 64;
      for (int64_t m = 0; u && m < rows; m++)
        prefetch(u + (row + m) * ldu + first + WIDTH, WIDTH * sizeof(typename U::T));
      axpy_tile<true>(total, WIDTH, rows, s + row * R, R, 1, bt + first, ldb, whole, R);
      for (int64_t m = 0; m < rows; m++) {
        typename D::T* to = y + (row + m) * ldy + first;
        const typename U::T* from = u ? u + (row + m) * ldu + first : nullptr;
        const auto at = [&](int64_t k, vf base) {
          vf v = fma(splat(scale), load<vf>(total + m * WIDTH + k), base);
          if (g) v *= load<vf>(g + first + k);
          return bias ? v + load<vf>(bias + first + k) : v;
        };
        int64_t k = 0;
        for (; k + L <= columns; k += L) D::narrow(to + k, at(k, u ? U::widen(from + k) : vf{}));
        const int64_t some = columns - k;
        if (some) narrow_some<D>(to + k, at(k, u ? widen_some<U>(from + k, some) : vf{}), some);
      }
    }
  });
}

}  // namespace
