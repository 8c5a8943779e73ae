// A prefix, which all of the batch shares, merged into attention over the text by its log-sum-exp, and its gradients; in
// float32, as a prefix beside a 16-bit text may be.
#pragma once
#include "attention.h"
#include "attention_gradients.h"

namespace {

// Keys [heads, n, D] and values [heads, n, Dv], each element dropped by a mask of its own in every batch row: keys are
// rows [0, B · heads · n), values the rows behind them, of one mask.
struct Prefix {
  const float *key, *value;
  Dropout dropout;
  float kept;

  // to[i][k] = from[i][k] or, with `add`, that more, as batch row and head see it; rows of `columns`, ld apart.
  void seen(float* to, const float* from, int64_t ld, const Sizes& n, int64_t batch, int64_t head, bool values,
            bool add) const {
    const int64_t columns = values ? n.Dv : n.D;
    alignas(64) uint16_t mask[mask_words(64)];
    for (int64_t i = 0; i < n.S; i++)
      for (int64_t k = 0; k < columns; k += 64) {
        const int64_t row = (values * n.B + batch) * n.heads + head, some = at_most(64, columns - k);
        if (dropout.on()) dropout.keep(mask, 0, row * n.S + i, k, some);
        for (int64_t c = 0; c < some; c += L) {
          float* at = to + i * columns + k + c;
          vf v = read<F32>(from + i * ld + k + c, at_most(L, some - c));
          if (dropout.on()) v = masked(v, mask, c) * kept;
          if (add) v += read<F32>(at, at_most(L, some - c));
          write<F32>(at, v, at_most(L, some - c));
        }
      }
  }
};

// out and lse of the text become those of [prefix; text].
template <class D>
void prefix_merge(Heads<typename D::T> out, Heads<float> lse, Heads<const typename D::T> q, const Prefix& prefix,
                  const Scores& scores, const Sizes& n, int threads) {
  typedef Floats<D> Words;
  parallel(threads, n.B * n.heads, [&](int64_t part) {
    const int64_t batch = part / n.heads, head = part % n.heads;
    Laid<Words> laid(n, false);
    Scratch<float> key(n.S * n.D), value(n.S * n.Dv), rows_q(QUERIES * laid.words), total(QUERIES * laid.columns_v);
    prefix.seen(key, prefix.key + head * n.S * n.D, n.D, n, batch, head, false, false);
    prefix.seen(value, prefix.value + head * n.S * n.Dv, n.Dv, n, batch, head, true, false);
    columns_of_rows<F32, Floats<F32>>(laid.kt, key, n.D, n.S, n.D, laid.wide);
    pairs_of_rows<F32, Floats<F32>>(laid.vs, value, n.Dv, n.S, n.Dv, laid.columns_v);
    each_tile(n, head, [&](int64_t h, int64_t t, int64_t rows) {
      float most[QUERIES], sums[QUERIES];
      memset(total, 0, rows * laid.columns_v * sizeof(float));
      for (int64_t r = 0; r < rows; r++) {
        most[r] = *lse.row(batch, h, t + r), sums[r] = most[r] == -INFINITY ? 0 : 1;
        for (int64_t d = 0; d < n.Dv; d += L) {
          const int64_t some = at_most(L, n.Dv - d);
          write<F32>(total + r * laid.columns_v + d, read<D>(out.row(batch, h, t + r) + d, some), some);
        }
      }
      rows_of_words<D, Words>(rows_q, laid.words, q.row(batch, h, t), q.strides[2], rows, n.D);
      attend<Words>(total, most, sums, rows_q, laid, scores, n, batch, h, t, rows);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t d = 0; d < n.Dv; d += L)
          write<D>(out.row(batch, h, t + r) + d, load<vf>(total + r * laid.columns_v + d) / splat(sums[r]),
                   at_most(L, n.Dv - d));
        *lse.row(batch, h, t + r) = most[r] + logf(sums[r]);
      }
    });
  });
}

// From merged out and lse: the prefix's part is added to dq, unless it is null; dkey and dvalue [chunks, heads, n, D or
// Dv], of as many equal parts of the batch.
template <class D>
void prefix_gradients(Heads<typename D::T> dq, float* dkey, float* dvalue, int64_t chunks,
                      Heads<const typename D::T> dout, Heads<const typename D::T> q, Heads<const typename D::T> out,
                      Heads<const float> lse, const Prefix& prefix, const Scores& scores, const Sizes& n, int threads) {
  parallel(threads, chunks * n.heads, [&](int64_t part) {
    const int64_t head = part % n.heads, size = parts_of(n.B, chunks), first = part / n.heads * size;
    Gradients<D, Floats<D>> g(n, scores, q, dout, out, lse);
    Scratch<float> key(n.S * n.D), value(n.S * n.Dv);
    float *to_key = dkey + part * n.S * n.D, *to_value = dvalue + part * n.S * n.Dv;
    memset(to_key, 0, n.S * n.D * sizeof(float));
    memset(to_value, 0, n.S * n.Dv * sizeof(float));
    for (int64_t batch = first; batch < at_most(first + size, n.B); batch++) {
      if (batch == first || prefix.dropout.on()) {
        prefix.seen(key, prefix.key + head * n.S * n.D, n.D, n, batch, head, false, false);
        prefix.seen(value, prefix.value + head * n.S * n.Dv, n.Dv, n, batch, head, true, false);
        columns_of_rows<F32, Floats<F32>>(g.laid.kt, key, n.D, n.S, n.D, g.laid.wide);
        columns_of_rows<F32, Floats<F32>>(g.laid.vt, value, n.Dv, n.S, n.Dv, g.laid.wide);
        pairs_of_rows<F32, Floats<F32>>(g.laid.ks, key, n.D, n.S, n.D, g.laid.columns);
      }
      g.clear();
      each_tile(n, head, [&](int64_t h, int64_t t, int64_t rows) {
        g.add(batch, h, t, rows);
        for (int64_t r = 0; dq.p && r < rows; r++)
          for (int64_t d = 0; d < n.D; d += L) {
            typename D::T* to = dq.row(batch, h, t + r) + d;
            const int64_t some = at_most(L, n.D - d);
            write<D>(to, load<vf>(g.dq + r * g.laid.columns + d) + read<D>(to, some), some);
          }
      });
      prefix.seen(to_key, g.dk, g.laid.columns, n, batch, head, false, true);
      prefix.seen(to_value, g.dv, g.laid.columns_v, n, batch, head, true, true);
    }
  });
}

}  // namespace
