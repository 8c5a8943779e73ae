// What attention and its gradients share: heads in memory, their tiles as words of 32 bits, scores and weights.
#pragma once
#include "activations.h"
#include "philox.h"
#include "tiles.h"

namespace {

template <class T> struct Heads {  // [B, heads, rows, D] of any strides but the last, which is 1
  T* p;
  const int64_t* strides;
  T* row(int64_t batch, int64_t head, int64_t t) const {
    return p + batch * strides[0] + head * strides[1] + t * strides[2];
  }
};

struct Sizes {
  int64_t B, H, heads, T, S, D, Dv;  // heads: of key and value; H is a multiple
};

// Scores are scaling · q kᵀ + bias, for bias [B, H, T, S] or null; of their weights, some are dropped by the mask of a
// [B · H · T, S] tensor and the rest multiplied by `kept`.
struct Scores {
  Heads<const float> bias;
  bool causal;
  float scaling;
  Dropout dropout;
  float kept;
};

constexpr int64_t QUERIES = 32, KEYS = 128;  // of a tile
constexpr int64_t ROWS_AT_ONCE = 4;

template <class D> struct Floats {
  typedef Singles W;
  static void along(float* to, vf v) { store(to, v); }
  static void across(float* to, const vf* v) { store(to, v[0]); }
  static void row(float* to, const typename D::T* from, int64_t columns) {
    for (int64_t k = 0; k < columns; k++) to[k] = D::widen_one(from[k]);
  }
  static vf of_rows(const typename D::T* const* rows, int64_t k, int64_t some) { return read<D>(rows[0] + k, some); }
};
template <class D> struct WordsOf : Floats<D> {};
#if defined(ISA_AVX512BF16)
template <> struct WordsOf<BF16> {
  typedef Pairs W;
  static void along(uint32_t* to, vf v) { store(to, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }  // neighbours in a row
  static void across(uint32_t* to, const vf* v) {  // neighbours in a column: of v[0] and v[1]
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(to, _mm512_permutexvar_epi16(turns, both));
  }
  static void row(uint32_t* to, const uint16_t* from, int64_t columns) {
    to[(columns - 1) / 2] = 0;
    memcpy(to, from, columns * sizeof *from);
  }
  static vf of_rows(const uint16_t* const* rows, int64_t k, int64_t some) {
    const vu even = (vu)read<BF16>(rows[0] + k, some), odd = rows[1] ? (vu)read<BF16>(rows[1] + k, some) : vu{};
    return (vf)(even >> 16 | odd);
  }
};
#endif

// Rows [rows, columns] of t in words, for products on the left: to[row][·], neighbours in a row.
template <class D, class Words>
void rows_of_words(typename Words::W::Word* to, int64_t ld, const typename D::T* from, int64_t stride, int64_t rows,
                   int64_t columns) {
  for (int64_t r = 0; r < rows; r++) Words::row(to + r * ld, from + r * stride, columns);
}

// The same on the right of a product that sums over rows: to[row / PER][column], zeros up to `wide` columns.
template <class D, class Words>
void pairs_of_rows(typename Words::W::Word* to, const typename D::T* from, int64_t stride, int64_t rows,
                   int64_t columns, int64_t wide) {
  constexpr int PER = Words::W::PER;
  for (int64_t r = 0; r < rows; r += PER, to += wide) {
    const typename D::T* const both[2] = {from + r * stride, r + 1 < rows ? from + (r + 1) * stride : nullptr};
    for (int64_t k = 0; k < wide; k += L)
      store(to + k, k < columns ? Words::of_rows(both, k, at_most(L, columns - k)) : vf{});
  }
}

// The same on the right of a product that sums over columns: to[column / PER][row], zeros up to `wide` rows.
template <class D, class Words>
void columns_of_rows(typename Words::W::Word* to, const typename D::T* from, int64_t stride, int64_t rows,
                     int64_t columns, int64_t wide) {
  const int64_t words = parts_of(columns, Words::W::PER), ld = padded(words, L);
  Scratch<typename Words::W::Word> some(L * ld);
  memset(some, 0, L * ld * sizeof *some);
  for (int64_t r = 0; r < wide; r += L) {
    const int64_t here = r < rows ? at_most(L, rows - r) : 0;
    rows_of_words<D, Words>(some, ld, from + r * stride, stride, here, columns);
    if (here < L) memset(some + here * ld, 0, (L - here) * ld * sizeof *some);
    for (int64_t k = 0; k < words; k += L) {
      vf block[L];
      for (int i = 0; i < L; i++) block[i] = load<vf>(some + i * ld + k);
      transpose(block);
      for (int64_t i = 0; i < at_most(L, words - k); i++) store(to + (k + i) * wide + r, block[i]);
    }
  }
}

// A head's keys and values as the products want them, zeros behind the last key.
template <class Words> struct Laid {
  typedef typename Words::W::Word Word;
  static constexpr int PER = Words::W::PER;
  int64_t wide, words, columns, words_v, columns_v;  // keys, D in words, D and Dv in whole vectors
  Scratch<Word> kt, vs, vt, ks;                      // [words][wide], [wide / PER][columns_v]; for gradients the others
  Laid(const Sizes& n, bool gradients)
      : wide(padded(n.S, L)), words(parts_of(n.D, PER)), columns(padded(n.D, L)), words_v(parts_of(n.Dv, PER)),
        columns_v(padded(n.Dv, L)), kt(words * wide), vs(gradients ? 0 : wide / PER * columns_v),
        vt(gradients ? words_v * wide : 0), ks(gradients ? wide / PER * columns : 0) {
    memset(vs, 0, gradients ? 0 : wide / PER * columns_v * sizeof(Word));
    memset(ks, 0, gradients ? wide / PER * columns * sizeof(Word) : 0);
  }
  template <class D> void lay(const Sizes& n, const typename D::T* k, int64_t ldk, const typename D::T* v, int64_t ldv) {
    columns_of_rows<D, Words>(kt, k, ldk, n.S, n.D, wide);
    pairs_of_rows<D, Words>(vs, v, ldv, n.S, n.Dv, columns_v);
  }
  template <class D>
  void lay_for_gradients(const Sizes& n, const typename D::T* k, int64_t ldk, const typename D::T* v, int64_t ldv) {
    columns_of_rows<D, Words>(kt, k, ldk, n.S, n.D, wide);
    columns_of_rows<D, Words>(vt, v, ldv, n.S, n.Dv, wide);
    pairs_of_rows<D, Words>(ks, k, ldk, n.S, n.D, columns);
  }
};

inline int64_t keys_seen(const Sizes& n, const Scores& scores, int64_t t) {  // by row t
  return scores.causal ? at_most(t + 1, n.S) : n.S;
}

// The vector of scores at column `key` of row t, from products; columns from `seen` on are -inf.
inline vf score(vf product, const Scores& s, const float* bias, int64_t key, int64_t seen) {
  vf z = splat(s.scaling) * product;
  if (bias) z += read<F32>(bias + key, at_most(L, seen - key));
  if (key + L <= seen) return z;
  vi place;
  for (int i = 0; i < L; i++) place[i] = i;
  return place < (int32_t)(seen - key) ? z : splat(-__builtin_inff());
}

// f(head, t, rows) for every tile of queries of the heads that share a head of keys.
template <class F> inline void each_tile(const Sizes& n, int64_t head, F f) {
  const int64_t group = n.H / n.heads;
  for (int64_t h = head * group; h < (head + 1) * group; h++)
    for (int64_t t = 0; t < n.T; t += QUERIES) f(h, t, at_most(QUERIES, n.T - t));
}

}  // namespace
