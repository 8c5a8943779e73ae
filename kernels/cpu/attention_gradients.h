// dq, dk and dv of attention from any (out, log-sum-exp): weights are exp(score - lse), whatever keys else went into them.
// Dao et al., "FlashAttention", 2022, algorithm 4.
#pragma once
#include "attention_tiles.h"

namespace {

template <class D, class Words> struct Gradients {
  typedef typename D::T T;
  typedef typename Words::W W;
  typedef typename W::Word Word;
  static constexpr int PER = W::PER;

  const Sizes& n;
  const Scores& scores;
  Heads<const T> q, dout, out;
  Heads<const float> lse;
  Laid<Words> laid;
  Scratch<Word> rows_q, rows_d, pairs_q, pairs_d;
  Scratch<float> dq, dk, dv;  // [QUERIES, columns], [wide, columns], [wide, columns_v]

  Gradients(const Sizes& n, const Scores& scores, Heads<const T> q, Heads<const T> dout, Heads<const T> out,
            Heads<const float> lse)
      : n(n), scores(scores), q(q), dout(dout), out(out), lse(lse), laid(n, true), rows_q(QUERIES * laid.words),
        rows_d(QUERIES * laid.words_v), pairs_q(QUERIES / PER * laid.columns), pairs_d(QUERIES / PER * laid.columns_v),
        dq(QUERIES * laid.columns), dk(laid.wide * laid.columns), dv(laid.wide * laid.columns_v) {}

  void clear() {
    memset(dk, 0, laid.wide * laid.columns * sizeof(float));
    memset(dv, 0, laid.wide * laid.columns_v * sizeof(float));
  }

  // Σ dout · out of rows [t, t + rows).
  void deltas(float* delta, int64_t batch, int64_t h, int64_t t, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      const T *d = dout.row(batch, h, t + r), *o = out.row(batch, h, t + r);
      vf total = {};
      for (int64_t c = 0; c < n.Dv; c += L) {
        const int64_t some = at_most(L, n.Dv - c);
        total = fma(read<D>(d + c, some), read<D>(o + c, some), total);
      }
      delta[r] = sum(total);
    }
  }

  // Of rows [t, t + rows) of a head of queries: dq, and what they add to dk and dv.
  void add(int64_t batch, int64_t h, int64_t t, int64_t rows) {
    const int64_t words = laid.words, words_v = laid.words_v, columns = laid.columns, columns_v = laid.columns_v;
    alignas(64) float z[ROWS_AT_ONCE * KEYS], dz[ROWS_AT_ONCE * KEYS];
    alignas(64) Word weights[QUERIES / PER * KEYS], slopes[QUERIES / PER * KEYS], slope_rows[QUERIES * KEYS / PER];
    float delta[QUERIES];
    deltas(delta, batch, h, t, rows);
    const T *from_q = q.row(batch, h, t), *from_d = dout.row(batch, h, t);
    rows_of_words<D, Words>(rows_q, words, from_q, q.strides[2], rows, n.D);
    rows_of_words<D, Words>(rows_d, words_v, from_d, dout.strides[2], rows, n.Dv);
    pairs_of_rows<D, Words>(pairs_q, from_q, q.strides[2], rows, n.D, columns);
    pairs_of_rows<D, Words>(pairs_d, from_d, dout.strides[2], rows, n.Dv, columns_v);
    memset(dq, 0, rows * columns * sizeof(float));
    const int64_t last = keys_seen(n, scores, t + rows - 1), each = parts_of(rows, PER);
    for (int64_t first = 0; first < last; first += KEYS) {
      const int64_t some = padded(at_most(KEYS, last - first), L);
      for (int64_t r = 0; r < rows; r += PER) {
        const int64_t i = r % ROWS_AT_ONCE;
        if (!i) {
          const int64_t together = at_most(ROWS_AT_ONCE, rows - r);
          axpy_tile<true, W>(z, KEYS, together, rows_q + r * words, words, 1, laid.kt + first, laid.wide, some, words);
          axpy_tile<true, W>(dz, KEYS, together, rows_d + r * words_v, words_v, 1, laid.vt + first, laid.wide, some,
                             words_v);
        }
        slope_tile(weights + r / PER * KEYS, slopes + r / PER * KEYS, slope_rows + r * (KEYS / PER), z + i * KEYS,
                   dz + i * KEYS, delta + r, batch, h, t + r, at_most(PER, rows - r), first, some);
      }
      axpy_tile<false, W>(dq, columns, rows, slope_rows, KEYS / PER, 1, laid.ks + first / PER * columns, columns,
                          columns, some / PER);
      axpy_tile<false, W>(dk + first * columns, columns, some, slopes, 1, KEYS, pairs_q, columns, columns, each);
      axpy_tile<false, W>(dv + first * columns_v, columns_v, some, weights, 1, KEYS, pairs_d, columns_v, columns_v,
                          each);
    }
  }

  // Weights and the gradients of scores of PER rows from t on, keys [first, first + some), out of their products.
  void slope_tile(Word* weights, Word* slopes, Word* slope_rows, const float* z, const float* dz, const float* delta,
                  int64_t batch, int64_t h, int64_t t, int64_t rows, int64_t first, int64_t some) const {
    int64_t seen[PER];
    vf lses[PER], dots[PER];
    const float* bias[PER];
    alignas(64) uint16_t mask[PER][mask_words(KEYS)];
    const bool drops = scores.dropout.on();
    for (int64_t m = 0; m < rows; m++) {
      seen[m] = keys_seen(n, scores, t + m);
      bias[m] = scores.bias.p ? scores.bias.row(batch, h, t + m) : nullptr;
      lses[m] = splat(*lse.row(batch, h, t + m)), dots[m] = splat(delta[m]);
      if (drops) scores.dropout.keep(mask[m], 0, (batch * n.H + h) * n.T + t + m, first, some);
    }
    for (int64_t c = 0; c < some; c += L) {
      vf w[PER] = {}, slope[PER] = {};
      for (int64_t m = 0; m < rows; m++) {
        vf d = load<vf>(dz + m * KEYS + c);
        w[m] = exp(score(load<vf>(z + m * KEYS + c), scores, bias[m], first + c, seen[m]) - lses[m]);
        if (drops) d = masked(d, mask[m], c) * scores.kept;
        slope[m] = w[m] * (d - dots[m]) * scores.scaling;
        if (drops) w[m] = masked(w[m], mask[m], c) * scores.kept;
        Words::along(slope_rows + m * (KEYS / PER) + c / PER, slope[m]);
      }
      Words::across(weights + c, w);
      Words::across(slopes + c, slope);
    }
  }
};

template <class D>
void attention_gradients(Heads<typename D::T> dq, Heads<typename D::T> dk, Heads<typename D::T> dv,
                         Heads<const typename D::T> dout, Heads<const typename D::T> q, Heads<const typename D::T> k,
                         Heads<const typename D::T> v, Heads<const typename D::T> out, Heads<const float> lse,
                         const Scores& scores, const Sizes& n, int threads) {
  const auto give = [](Heads<typename D::T> to, int64_t batch, int64_t h, int64_t t, int64_t rows, const float* from,
                       int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < columns; d += L)
        write<D>(to.row(batch, h, t + r) + d, load<vf>(from + r * padded(columns, L) + d), at_most(L, columns - d));
  };
  parallel(threads, n.B * n.heads, [&](int64_t part) {
    const int64_t batch = part / n.heads, head = part % n.heads;
    Gradients<D, WordsOf<D>> g(n, scores, q, dout, out, lse);
    g.laid.template lay_for_gradients<D>(n, k.row(batch, head, 0), k.strides[2], v.row(batch, head, 0), v.strides[2]);
    g.clear();
    each_tile(n, head, [&](int64_t h, int64_t t, int64_t rows) {
      g.add(batch, h, t, rows);
      give(dq, batch, h, t, rows, g.dq, n.D);
    });
    give(dk, batch, head, 0, n.S, g.dk, n.D);
    give(dv, batch, head, 0, n.S, g.dv, n.Dv);
  });
}

}  // namespace
