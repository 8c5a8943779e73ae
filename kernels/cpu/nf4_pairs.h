// y = x deq(W)ᵀ for a few rows of bfloat16 and blocks of 64 or more that end with the rows of W: codes are looked up and
// multiplied in registers, two products to an instruction. Weights are rounded to bfloat16, products are exact, sums
// float32; subnormal weights are zeros, as they are to the instruction.
//
// A register of 256 bits holds the codes of 64 elements of a row, a group; its 16-bit words hold elements 4 j + 1, 4 j,
// 4 j + 3 and 4 j + 2 from their lowest bits up, so a group of x is laid out so too.
#pragma once
#include "nf4_decode.h"

#if defined(ISA_AVX512BF16)
namespace {

constexpr int64_t MAX_PAIRED = 16;       // rows of x
constexpr int64_t GROUP = 64;
constexpr int64_t AHEAD = 8;             // rows of W, from which codes are fetched meanwhile
constexpr int64_t LAID_BYTES = 1 << 14;  // of x at a time: half a first cache
constexpr int64_t PART_LEAST = 1 << 16, PART_MOST = 1 << 19;  // elements of W that a thread takes at once
constexpr int WORDS = 8;                 // float32 in 256 bits

inline bool pairs_fit(const Weight& w, int64_t M, int64_t K) {
  return M <= MAX_PAIRED && K > 0 && K % w.blocksize == 0 && w.blocksize % GROUP == 0;
}

// laid[g][m]: group g of row m of x.
inline void lay_in_fours(uint16_t* laid, const uint16_t* x, int64_t ldx, int64_t M, int64_t K) {
  constexpr int64_t ORDER[4] = {1, 0, 3, 2};
  for (int64_t first = 0; first < K; first += GROUP)
    for (int64_t m = 0; m < M; m++, laid += GROUP)
      for (int64_t i = 0; i < GROUP; i++) laid[i] = x[m * ldx + first + i % 16 * 4 + ORDER[i / 16]];
}

// The scales of the groups of one row.
inline void group_scales(float* scales, const Weight& w, int64_t row, int64_t K) {
  const int64_t blocks = K / w.blocksize, groups = w.blocksize / GROUP;
  if (groups == 1) return w.scales(scales, row * blocks, blocks);
  for (int64_t b = 0; b < blocks; b++) {
    const float scale = w.scale(row * blocks + b);
    for (int64_t g = b * groups; g < (b + 1) * groups; g++) scales[g] = scale;
  }
}

// sums[r][m] += the products of groups [first, last) of `ROWS` rows of W with x, as 8 partial sums.
template <int M, int ROWS>
inline void paired_dots(float* sums, const uint16_t* laid, const uint8_t* codes, const float* scales, int64_t groups,
                        int64_t first, int64_t last) {
  constexpr int64_t BYTES = GROUP / 2;
  constexpr int CHAINS = M * ROWS < 16 ? 2 : 1;  // of sums, that one may begin before another ends
  __m256 acc[CHAINS][ROWS][M] = {};
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < M; m++) acc[0][r][m] = _mm256_loadu_ps(sums + (r * M + m) * WORDS);
  const __m512 levels = _mm512_load_ps(LEVELS);
  for (int64_t g = first; g < last; g++, laid += M * GROUP) {
    __m256i words[ROWS], table[ROWS];
    for (int r = 0; r < ROWS; r++) {
      __builtin_prefetch(codes + ((r + AHEAD) * groups + g) * BYTES);
      words[r] = load<__m256i>(codes + (r * groups + g) * BYTES);
      const __m512 scale = _mm512_set1_ps(scales[r * groups + g]);
      table[r] = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(levels, scale));
    }
    for (int i = 0; i < 4; i++) {
      __m256bh values[ROWS];
      for (int r = 0; r < ROWS; r++)
        values[r] = (__m256bh)_mm256_permutexvar_epi16(_mm256_srli_epi16(words[r], 4 * i), table[r]);
      for (int m = 0; m < M; m++) {
        const __m256bh xs = (__m256bh)load<__m256i>(laid + m * GROUP + i * (GROUP / 4));
        for (int r = 0; r < ROWS; r++) acc[i % CHAINS][r][m] = _mm256_dpbf16_ps(acc[i % CHAINS][r][m], xs, values[r]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < M; m++) {
      if (CHAINS == 2) acc[0][r][m] = _mm256_add_ps(acc[0][r][m], acc[CHAINS - 1][r][m]);
      _mm256_storeu_ps(sums + (r * M + m) * WORDS, acc[0][r][m]);
    }
}

inline float sum_of_words(const float* p) {
  __m128 t = _mm_add_ps(_mm_loadu_ps(p), _mm_loadu_ps(p + 4));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

// y[M][N] in float32. Parts are large against what is fetched ahead, and still four to a thread where W allows it; a row's
// sums do not depend on the part that it is in.
template <int M>
void paired_rows(float* y, const uint16_t* laid, const Weight& w, int64_t N, int64_t K, int threads) {
  constexpr int ROWS = M <= 2 ? 4 : M <= 8 ? 2 : 1;
  const int64_t groups = K / GROUP, each = at_most(groups, parts_of(LAID_BYTES, M * GROUP * 2));
  const int64_t share = at_most(parts_of(N * K, 4 * threads), PART_MOST);
  const int64_t rows = padded(parts_of(share < PART_LEAST ? PART_LEAST : share, K), ROWS);
  parallel(threads, parts_of(N, rows), [&](int64_t part) {
    const int64_t start = part * rows, some = at_most(rows, N - start);
    Scratch<float> sums(some * M * WORDS), scales(some * groups);
    memset(sums, 0, some * M * WORDS * sizeof(float));
    for (int64_t n = 0; n < some; n++) group_scales(scales + n * groups, w, start + n, K);
    for (int64_t g = 0; g < groups; g += each) {
      const int64_t last = at_most(g + each, groups);
      const uint16_t* xs = laid + g * M * GROUP;
      const uint8_t* codes = w.packed + start * K / 2;
      int64_t n = 0;
      for (; n + ROWS <= some; n += ROWS)
        paired_dots<M, ROWS>(sums + n * M * WORDS, xs, codes + n * K / 2, scales + n * groups, groups, g, last);
      for (; n < some; n++)
        paired_dots<M, 1>(sums + n * M * WORDS, xs, codes + n * K / 2, scales + n * groups, groups, g, last);
    }
    for (int64_t n = 0; n < some; n++)
      for (int m = 0; m < M; m++) y[m * N + start + n] = sum_of_words(sums + (n * M + m) * WORDS);
  });
}

template <int M = 1>
void paired(float* y, const uint16_t* laid, const Weight& w, int64_t rows, int64_t N, int64_t K, int threads) {
  if (rows == M) paired_rows<M>(y, laid, w, N, K, threads);
  else if constexpr (M < MAX_PAIRED) paired<M + 1>(y, laid, w, rows, N, K, threads);
}

}  // namespace
#endif
