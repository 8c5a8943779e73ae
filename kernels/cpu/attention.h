// Attention softmax(scaling · q kᵀ + bias) v with its log-sum-exp, in tiles that a core's caches hold.
//
// A thread takes a batch row and a head of keys, lays keys and values out once, and goes through the queries of all heads
// that share them. Sums are float32; weights are rounded to bfloat16 where pairs are multiplied. Dao et al.,
// "FlashAttention", 2022, algorithm 1.
#pragma once
#include "attention_tiles.h"
#include <math.h>

namespace {

inline float largest(vf v) {
#if defined(ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float m = v[0];
  for (int i = 1; i < L; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// Adds a head's keys to rows [t, t + rows) of a head of queries: total [rows, columns_v], the sum of weights · v with the
// weights' largest exponent `most` taken out, and their `sums`.
template <class Words>
void attend(float* total, float* most, float* sums, const typename Words::W::Word* q, const Laid<Words>& laid,
            const Scores& scores, const Sizes& n, int64_t batch, int64_t h, int64_t t, int64_t rows) {
  typedef typename Words::W W;
  constexpr int PER = W::PER;
  alignas(64) float z[ROWS_AT_ONCE * KEYS];
  alignas(64) typename W::Word weights[QUERIES * KEYS / PER];
  alignas(64) uint16_t mask[mask_words(KEYS)];
  const int64_t last = keys_seen(n, scores, t + rows - 1), columns = laid.columns_v;
  for (int64_t first = 0; first < last; first += KEYS) {
    const int64_t some = padded(at_most(KEYS, last - first), L);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = r % ROWS_AT_ONCE, seen = keys_seen(n, scores, t + r);
      if (!i)
        axpy_tile<true, W>(z, KEYS, at_most(ROWS_AT_ONCE, rows - r), q + r * laid.words, laid.words, 1,
                           laid.kt + first, laid.wide, some, laid.words);
      const float* bias = scores.bias.p ? scores.bias.row(batch, h, t + r) : nullptr;
      vf top = splat(most[r]);
      for (int64_t c = 0; c < some; c += L) {
        const vf s = score(load<vf>(z + i * KEYS + c), scores, bias, first + c, seen);
        store(z + i * KEYS + c, s);
        top = top < s ? s : top;
      }
      if (scores.dropout.on()) scores.dropout.keep(mask, 0, (batch * n.H + h) * n.T + t + r, first, some);
      const float now = largest(top), against = now == -INFINITY ? 0 : now;
      vf sum = {};
      for (int64_t c = 0; c < some; c += L) {
        vf w = exp(load<vf>(z + i * KEYS + c) - against);
        sum += w;
        if (scores.dropout.on()) w = masked(w, mask, c) * scores.kept;
        Words::along(weights + r * (KEYS / PER) + c / PER, w);
      }
      const float scale = most[r] == now || most[r] == -INFINITY ? 1 : expf(most[r] - now);  // the latter: of zeros
      sums[r] = sums[r] * scale + ::sum(sum);
      for (int64_t d = 0; scale != 1 && d < columns; d += L)
        store(total + r * columns + d, load<vf>(total + r * columns + d) * scale);
      most[r] = now;
    }
    axpy_tile<false, W>(total, columns, rows, weights, KEYS / PER, 1, laid.vs + first / PER * columns, columns, columns,
                        some / PER);
  }
}

// lse [B, H, T].
template <class D>
void attention(Heads<typename D::T> out, float* lse, Heads<const typename D::T> q, Heads<const typename D::T> k,
               Heads<const typename D::T> v, const Scores& scores, const Sizes& n, int threads) {
  typedef WordsOf<D> Words;
  parallel(threads, n.B * n.heads, [&](int64_t part) {
    const int64_t batch = part / n.heads, head = part % n.heads;
    Laid<Words> laid(n, false);
    laid.template lay<D>(n, k.row(batch, head, 0), k.strides[2], v.row(batch, head, 0), v.strides[2]);
    Scratch<typename Words::W::Word> rows_q(QUERIES * laid.words);
    Scratch<float> total(QUERIES * laid.columns_v);
    each_tile(n, head, [&](int64_t h, int64_t t, int64_t rows) {
      float most[QUERIES], sums[QUERIES];
      for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY, sums[r] = 0;
      memset(total, 0, rows * laid.columns_v * sizeof(float));
      rows_of_words<D, Words>(rows_q, laid.words, q.row(batch, h, t), q.strides[2], rows, n.D);
      attend<Words>(total, most, sums, rows_q, laid, scores, n, batch, h, t, rows);
      for (int64_t r = 0; r < rows; r++) {
        typename D::T* to = out.row(batch, h, t + r);
        for (int64_t d = 0; d < n.Dv; d += L)
          write<D>(to + d, load<vf>(total + r * laid.columns_v + d) / splat(sums[r]), at_most(L, n.Dv - d));
        lse[(batch * n.H + h) * n.T + t + r] = most[r] + logf(sums[r]);
      }
    });
  });
}

}  // namespace
