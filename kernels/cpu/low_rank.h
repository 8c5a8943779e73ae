// LoRA's skinny products: s = drop(x) aᵀ, da = dsᵀ drop(x), and y += scaling · drop(s bᵀ), in tiles of the first cache.
//
// Rows of a (columns of s) form `groups` equal groups, each with a mask of its own. Sums are float32, in an order that
// the shape alone decides.
#pragma once
#include "philox.h"
#include "tiles.h"

namespace {

constexpr int64_t TILE_ROWS = 8, TILE_COLUMNS = 512;

inline void prefetch(const void* p, int64_t bytes) {  // addresses outside any memory do no harm
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// tile[m][k] = x[row + m][first + k], masked, in float32; zeros from `columns` to a multiple of 64. What comes `ahead`
// elements later in x is fetched meanwhile.
template <class D>
void load_tile(float* tile, int64_t ld, const typename D::T* x, int64_t ldx, int64_t row, int64_t rows, int64_t first,
               int64_t columns, int64_t ahead, const Dropout& dropout, int64_t group) {
  alignas(64) uint16_t mask[mask_words(TILE_COLUMNS)];
  for (int64_t m = 0; m < rows; m++) {
    const typename D::T* from = x + (row + m) * ldx + first;
    float* to = tile + m * ld;
    int64_t k = 0;
    prefetch(from + ahead, columns * sizeof *x);
    if (dropout.on()) {
      dropout.keep(mask, group, row + m, first, columns);
      for (; k + L <= columns; k += L) store(to + k, masked(D::widen(from + k), mask, k));
      if (k < columns) store(to + k, masked(widen_some<D>(from + k, columns - k), mask, k)), k += L;
    } else {
      for (; k + L <= columns; k += L) store(to + k, D::widen(from + k));
      if (k < columns) store(to + k, widen_some<D>(from + k, columns - k)), k += L;
    }
    for (; k % 64; k += L) store(to + k, vf{});
  }
}

// s[M][R] = scale · drop(x) aᵀ for a [R, lda] in float32, whose columns from K on are zero up to a multiple of 64.
template <class D>
void down_project(float* s, const typename D::T* x, int64_t ldx, const float* a, int64_t lda, int64_t M, int64_t K,
                  int64_t R, int64_t groups, const Dropout& dropout, float scale, int threads) {
  const int64_t each = R / groups, step = at_most(each, 32);
  parallel(threads, parts_of(M, TILE_ROWS), [&](int64_t part) {
    const int64_t row = part * TILE_ROWS, rows = at_most(TILE_ROWS, M - row);
    alignas(64) float tile[TILE_ROWS * TILE_COLUMNS];
    alignas(64) float parts[TILE_ROWS * 32 * L];
    for (int64_t r = 0, ranks; r < R; r += ranks) {
      ranks = at_most(step, each - r % each);
      memset(parts, 0, rows * step * L * sizeof(float));
      for (int64_t k = 0; k < K; k += TILE_COLUMNS) {
        const int64_t columns = at_most(TILE_COLUMNS, K - k);
        load_tile<D>(tile, TILE_COLUMNS, x, ldx, row, rows, k, columns, TILE_COLUMNS, dropout, r / each);
        dot_tile<ProductF32>(parts, step * L, tile, TILE_COLUMNS, rows, a + r * lda + k, lda, ranks,
                             parts_of(columns, 64) * 64);
      }
      float total[TILE_ROWS * 32];
      sums(total, parts, rows * step);
      for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < ranks; i++) s[(row + m) * R + r + i] = scale * total[m * step + i];
    }
  });
}

constexpr int64_t DA_TILE = 4096;  // elements

inline int64_t panel_width(int64_t K) { return K >= 2048 ? 256 : K >= 512 ? 128 : 64; }

// da[R][K] = scale · dsᵀ drop(x) for ds [M, R] in float32.
template <class D>
void down_project_da(float* da, const float* ds, const typename D::T* x, int64_t ldx, int64_t M, int64_t K, int64_t R,
                     int64_t groups, const Dropout& dropout, float scale, int threads) {
  const int64_t each = R / groups, width = panel_width(K), depth = DA_TILE / width;
  parallel(threads, parts_of(K, width), [&](int64_t part) {
    const int64_t first = part * width, columns = at_most(width, K - first), whole = parts_of(columns, 64) * 64;
    alignas(64) float tile[DA_TILE];
    Scratch<float> sums(R * width);
    memset(sums, 0, R * width * sizeof(float));
    for (int64_t row = 0; row < M; row += depth) {
      const int64_t rows = at_most(depth, M - row);
      for (int64_t group = 0; group < groups; group++) {
        if (group == 0 || dropout.on())
          load_tile<D>(tile, width, x, ldx, row, rows, first, columns, depth * ldx, dropout, group);
        const int64_t r = group * each;
        axpy_tile<false>(sums + r * width, width, each, ds + row * R + r, 1, R, tile, width, whole, rows);
      }
    }
    for (int64_t r = 0; r < R; r++)
      for (int64_t k = 0; k < columns; k++) da[r * K + first + k] = scale * sums[r * width + k];
  });
}

constexpr int64_t GRADIENT_ROWS = 16, GRADIENT_COLUMNS = 256, GRADIENT_RANKS = 16;

// ds[M][R] = scale · dy b and, of each of `chunks` equal parts of the rows, db[chunk][R][N] = scale · dyᵀ s, in one pass
// over dy, for R <= GRADIENT_RANKS, bt [R, ldb] and s [M, R] in float32; bt is zero from N on to a multiple of 64.
template <class D>
void low_rank_gradients(float* ds, float* db, const typename D::T* dy, int64_t ldy, const float* bt, int64_t ldb,
                        const float* s, int64_t M, int64_t N, int64_t R, int64_t chunks, float scale, int threads) {
  const int64_t size = parts_of(M, chunks), wide = padded(N, 64);
  const Dropout none{-1, nullptr, 0};
  parallel(threads, chunks, [&](int64_t chunk) {
    alignas(64) float tile[GRADIENT_ROWS * GRADIENT_COLUMNS], parts[GRADIENT_ROWS * GRADIENT_RANKS * L];
    Scratch<float> of_b(R * wide);
    memset(of_b, 0, R * wide * sizeof(float));
    const int64_t last = at_most((chunk + 1) * size, M);
    for (int64_t row = chunk * size; row < last; row += GRADIENT_ROWS) {
      const int64_t rows = at_most(GRADIENT_ROWS, last - row);
      memset(parts, 0, rows * R * L * sizeof(float));
      for (int64_t k = 0; k < N; k += GRADIENT_COLUMNS) {
        const int64_t columns = at_most(GRADIENT_COLUMNS, N - k), whole = padded(columns, 64);
        load_tile<D>(tile, GRADIENT_COLUMNS, dy, ldy, row, rows, k, columns, GRADIENT_COLUMNS, none, 0);
        dot_tile<ProductF32>(parts, R * L, tile, GRADIENT_COLUMNS, rows, bt + k, ldb, R, whole);
        axpy_tile<false>(of_b + k, wide, R, s + row * R, 1, R, tile, GRADIENT_COLUMNS, whole, rows);
      }
      float total[GRADIENT_ROWS * GRADIENT_RANKS];
      sums(total, parts, rows * R);
      for (int64_t i = 0; i < rows * R; i++) ds[row * R + i] = scale * total[i];
    }
    for (int64_t r = 0; r < R; r++)
      for (int64_t n = 0; n < N; n++) db[(chunk * R + r) * N + n] = scale * of_b[r * wide + n];
  });
}

constexpr int64_t UPDATE_COLUMNS = 256;

// sums[i][j] = Σ_r s[i][r] bt[r][j] over ranks [r, last), for I rows and J vectors of columns.
template <int I, int J>
inline void ranks_sum(vf (&sums)[I][J], const float* s, int64_t R, const float* bt, int64_t ldb, int64_t r, int64_t last) {
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) sums[i][j] = vf{};
  for (; r < last; r++) {
    vf b[J];
    for (int j = 0; j < J; j++) b[j] = load<vf>(bt + r * ldb + j * L);
    for (int i = 0; i < I; i++) {
      const vf si = splat(s[i * R + r]);
      for (int j = 0; j < J; j++) sums[i][j] = fma(si, b[j], sums[i][j]);
    }
  }
}

// y[i][k] += scale · Σ over groups of drop(Σ_r s[i][r] bt[r][k]) for I rows and the `columns` <= BLOCK_COLUMNS from
// column k of a tile on; mask[group][row of the tile].
template <class D, int I>
inline void update_block(typename D::T* y, int64_t ldy, const float* s, const float* bt, int64_t ldb, int64_t columns,
                         int64_t R, int64_t groups, const uint16_t* mask, int64_t k, float scale) {
  constexpr int J = BLOCK_COLUMNS / L;
  constexpr int64_t WORDS = mask_words(UPDATE_COLUMNS);
  const int64_t each = R / groups;
  vf total[I][J];
  ranks_sum<I, J>(total, s, R, bt, ldb, 0, each);
  for (int i = 0; mask && i < I; i++)
    for (int j = 0; j < J; j++) total[i][j] = masked(total[i][j], mask + i * WORDS, k + j * L);
  for (int64_t group = 1; group < groups; group++) {
    vf terms[I][J];
    ranks_sum<I, J>(terms, s, R, bt, ldb, group * each, (group + 1) * each);
    for (int i = 0; i < I; i++)
      for (int j = 0; j < J; j++)
        total[i][j] += mask ? masked(terms[i][j], mask + (group * TILE_ROWS + i) * WORDS, k + j * L) : terms[i][j];
  }
  for (int i = 0; i < I; i++) {
    typename D::T* to = y + i * ldy;
    if (columns == BLOCK_COLUMNS) {
      for (int j = 0; j < J; j += 2) {
        const vf a = fma(splat(scale), total[i][j], D::widen(to + j * L));
        D::narrow_pair(to + j * L, a, fma(splat(scale), total[i][j + 1], D::widen(to + (j + 1) * L)));
      }
    } else {
      for (int j = 0; j < J && j * L < columns; j++) {
        const int64_t some = at_most(L, columns - j * L);
        narrow_some<D>(to + j * L, fma(splat(scale), total[i][j], widen_some<D>(to + j * L, some)), some);
      }
    }
  }
}

// y[M][N] += scale · Σ over groups of drop(s bt), for bt [R, ldb] in float32, zero from N on to a multiple of 64.
template <class D>
void low_rank_update(typename D::T* y, int64_t ldy, const float* s, const float* bt, int64_t ldb, int64_t M, int64_t N,
                     int64_t R, int64_t groups, const Dropout& dropout, float scale, int threads) {
  constexpr int I = L == 8 ? 3 : 4;
  parallel(threads, parts_of(M, TILE_ROWS), [&](int64_t part) {
    const int64_t row = part * TILE_ROWS, rows = at_most(TILE_ROWS, M - row);
    Scratch<uint16_t> masks(dropout.on() ? groups * TILE_ROWS * mask_words(UPDATE_COLUMNS) : 0);
    for (int64_t first = 0; first < N; first += UPDATE_COLUMNS) {
      const int64_t columns = at_most(UPDATE_COLUMNS, N - first);
      for (int64_t m = 0; m < rows; m++) {
        prefetch(y + (row + m) * ldy + first + UPDATE_COLUMNS, UPDATE_COLUMNS * sizeof(typename D::T));
        for (int64_t group = 0; dropout.on() && group < groups; group++)
          dropout.keep(masks + (group * TILE_ROWS + m) * mask_words(UPDATE_COLUMNS), group, row + m, first, columns);
      }
      for (int64_t k = 0; k < columns; k += BLOCK_COLUMNS) {
        const int64_t some = at_most(BLOCK_COLUMNS, columns - k);
        for (int64_t m = 0, taken; m < rows; m += taken) {
          taken = m + I <= rows ? I : 1;
          typename D::T* to = y + (row + m) * ldy + first + k;
          const uint16_t* mask = dropout.on() ? masks + m * mask_words(UPDATE_COLUMNS) : nullptr;
          const float *si = s + (row + m) * R, *b = bt + first + k;
          if (taken == I) update_block<D, I>(to, ldy, si, b, ldb, some, R, groups, mask, k, scale);
          else update_block<D, 1>(to, ldy, si, b, ldb, some, R, groups, mask, k, scale);
        }
      }
    }
  });
}

}  // namespace
