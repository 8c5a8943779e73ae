// y = x deq(W)ᵀ and dx = dy deq(W) for at most MAX_FEW rows of x and blocks that end with the rows of W: products are
// taken as codes are looked up. Weights are rounded to the dtype of x, sums are float32.
//
// Looking up high and low nibbles apart gives even and odd elements, so x is laid out so too, 2 L elements at a time.
#pragma once
#include "nf4_decode.h"

namespace {

constexpr int MAX_FEW = 4;  // whose sums fit into registers
constexpr int FEW_ROWS = L == 16 ? 4 : 2;  // of W at once

// apart[m][k]: groups of 2 L elements of x, the even ones first.
template <class D> void lay_apart(float* apart, const typename D::T* x, int64_t ldx, int64_t M, int64_t K) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < K; k += 2 * L) {
      float both[2 * L];
      for (int h = 0; h < 2; h++) store(both + h * L, D::widen(x + m * ldx + k + h * L));
      for (int i = 0; i < L; i++) apart[m * K + k + i] = both[2 * i], apart[m * K + k + L + i] = both[2 * i + 1];
    }
}

template <class D, int M, int R>
inline void few_dots(float* y, int64_t N, const float* x, const Weight& w, int64_t row, int64_t K) {
  const int64_t blocks = K / w.blocksize;
  vf sums[R][M] = {};
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* p = w.packed + (row * K + b * w.blocksize) / 2;
    Entries<4> entries[R];
    for (int r = 0; r < R; r++) entries[r] = Entries<4>(D{}, w.scale((row + r) * blocks + b));
    for (int64_t k = 0; k < w.blocksize; k += 2 * L)
      for (int r = 0; r < R; r++) {
        vf high, low;
        entries[r].both(p + (r * K + k) / 2, high, low);
        for (int m = 0; m < M; m++) {
          const float* xk = x + m * K + b * w.blocksize + k;
          sums[r][m] = fma(load<vf>(xk), high, sums[r][m]);
          sums[r][m] = fma(load<vf>(xk + L), low, sums[r][m]);
        }
      }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) y[m * N + r] = sum(sums[r][m]);
}

// y[M][N] in float32.
template <class D, int M>
void few_rows(float* y, const float* x, const Weight& w, int64_t N, int64_t K, int threads) {
  const int64_t rows = parts_of(1 << 16, K * FEW_ROWS + 1) * FEW_ROWS;
  parallel(threads, parts_of(N, rows), [&](int64_t part) {
    int64_t n = part * rows, stop = at_most(n + rows, N);
    for (; n + FEW_ROWS <= stop; n += FEW_ROWS) few_dots<D, M, FEW_ROWS>(y + n, N, x, w, n, K);
    for (; n < stop; n++) few_dots<D, M, 1>(y + n, N, x, w, n, K);
  });
}

template <class D, int M, int R>
inline void few_sums(float* dx, const float* dy, int64_t N, const Weight& w, int64_t row, int64_t K) {
  const int64_t blocks = K / w.blocksize;
  vf d[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) d[r][m] = splat(dy[m * N + row + r]);
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* p = w.packed + (row * K + b * w.blocksize) / 2;
    Entries<4> entries[R];
    for (int r = 0; r < R; r++) entries[r] = Entries<4>(D{}, w.scale((row + r) * blocks + b));
    for (int64_t k = 0; k < w.blocksize; k += 2 * L) {
      vf sums[2][M];
      float* out = dx + b * w.blocksize + k;
      for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) sums[h][m] = load<vf>(out + m * K + h * L);
      for (int r = 0; r < R; r++) {
        vf high, low;
        entries[r].both(p + (r * K + k) / 2, high, low);
        for (int m = 0; m < M; m++) {
          sums[0][m] = fma(d[r][m], high, sums[0][m]);
          sums[1][m] = fma(d[r][m], low, sums[1][m]);
        }
      }
      for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) store(out + m * K + h * L, sums[h][m]);
    }
  }
}

// dx[M][K] in float32. Rows of W are cut into parts by their number alone; their sums are added in order.
template <class D, int M>
void few_rows_dx(float* dx, const float* dy, const Weight& w, int64_t N, int64_t K, int threads) {
  const int64_t rows = at_most(N / 16 + FEW_ROWS, 512), parts = parts_of(N, rows);
  Scratch<float> sums(parts * M * K);
  parallel(threads, parts, [&](int64_t part) {
    float* own = sums + part * M * K;
    memset(own, 0, M * K * sizeof *own);
    int64_t n = part * rows, stop = at_most(n + rows, N);
    for (; n + FEW_ROWS <= stop; n += FEW_ROWS) few_sums<D, M, FEW_ROWS>(own, dy, N, w, n, K);
    for (; n < stop; n++) few_sums<D, M, 1>(own, dy, N, w, n, K);
  });
  parallel(M * K * parts < 1 << 17 ? 1 : threads, parts_of(K, 1024), [&](int64_t part) {
    for (int64_t k = part * 1024; k < at_most((part + 1) * 1024, K); k += 2 * L)
      for (int m = 0; m < M; m++) {
        vf both[2] = {};
        for (int64_t q = 0; q < parts; q++)
          for (int h = 0; h < 2; h++) both[h] += load<vf>(sums + (q * M + m) * K + k + h * L);
        for (int i = 0; i < L; i++) dx[m * K + k + 2 * i] = both[0][i], dx[m * K + k + 2 * i + 1] = both[1][i];
      }
  });
}

}  // namespace
