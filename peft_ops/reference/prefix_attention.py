"""The prefix's part of attention over [prefix; text], merged with the text's by log-sum-exp, in plain PyTorch.

query, dq [B, H, T, D]; out, dout [B, H, T, Dv]; lse [B, H, T], the log of the sum of a row's exponentiated scores;
prefix_key [Hkv, n, D] and prefix_value [Hkv, n, Dv], shared by the batch, H a multiple of Hkv; bias [H, T, n] or None.
Sums are float32 (float64 for float64 inputs).

dropout_p, dropout_seed: of the weights; the mask is `dropout_keep(seed)` of a [B * H * T, n] tensor.
prefix_p, prefix_seed: of the prefix itself, an own mask for every batch row; keys are rows [0, B * Hkv * n) and values
rows [B * Hkv * n, 2 * B * Hkv * n) of one mask with max(D, Dv) columns. Seeds are 0-dim int64 tensors, None at p = 0.
"""

from collections.abc import Iterator

import torch

from .dropout import dropout
from .rows import CHUNK_ELEMENTS, wide_dtype


def prefix_merge_(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    bias: torch.Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Turns (out, lse) of attention over the text into those over [prefix; text], in place, and returns them."""
    for rows in _batches(query, prefix_p):
        key, value = _seen(prefix_key, prefix_value, rows, query, prefix_p, prefix_seed)
        grouped = _Grouped(query, rows, key.shape[0])
        scores = _scores(grouped, query, key, bias, scaling)
        old = grouped.take(lse.unsqueeze(-1)).to(scores.dtype)
        new = torch.logaddexp(old, scores.logsumexp(-1, keepdim=True))
        weights = grouped.dropout(scores.sub_(new).exp_(), dropout_p, dropout_seed)
        total = torch.baddbmm(grouped.take(out).to(scores.dtype) * old.sub_(new).exp_(), weights, value)
        out[rows] = grouped.give(total).to(out.dtype)
        lse[rows] = grouped.give(new).squeeze(-1)
    return out, lse


def prefix_gradients(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor,
    prefix_value: torch.Tensor, bias: torch.Tensor | None, dq: torch.Tensor | None, need_dprefix: bool, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(dq, dprefix_key, dprefix_value) from merged out and lse: the prefix's part is added to dq in place, where there
    is one; the prefix's own gradients, summed over the batch, are float32 (float64), or None where not needed."""
    wide = wide_dtype(query)
    dprefix_key, dprefix_value = (torch.zeros_like(t, dtype=wide) for t in (prefix_key, prefix_value))
    for rows in _batches(query, prefix_p):
        key, value = _seen(prefix_key, prefix_value, rows, query, prefix_p, prefix_seed)
        grouped = _Grouped(query, rows, key.shape[0])
        weights = _scores(grouped, query, key, bias, scaling).sub_(grouped.take(lse.unsqueeze(-1))).exp_()
        d_out = grouped.take(dout).to(wide)
        delta = (d_out * grouped.take(out)).sum(-1, keepdim=True)
        d_weights = grouped.dropout(d_out @ value.mT, dropout_p, dropout_seed)
        d_scores = (d_weights - delta).mul_(weights).mul_(scaling)
        if dq is not None:
            dq[rows] += grouped.give(d_scores @ key).to(dq.dtype)
        if need_dprefix:
            parts = (
                d_scores.mT @ grouped.take(query).to(wide),
                grouped.dropout(weights, dropout_p, dropout_seed).mT @ d_out,
            )
            dropped = _seen(*parts, rows, query, prefix_p, prefix_seed)
            dprefix_key += dropped[0]
            dprefix_value += dropped[1]
    return dq, *((dprefix_key, dprefix_value) if need_dprefix else (None, None))


def _batches(query: torch.Tensor, prefix_p: float) -> Iterator[slice]:
    """Slices of the batch: as many rows as a core's cache holds, one where each has a prefix of its own."""
    B, H, T, D = query.shape
    step = 1 if prefix_p else max(1, CHUNK_ELEMENTS // max(1, H * T * D))
    return (slice(start, min(start + step, B)) for start in range(0, B, step))


class _Grouped:
    """Rows of the batch by the key head they attend to: [B, H, T, x] and [Hkv, b * H / Hkv * T, x] of a slice."""

    def __init__(self, query: torch.Tensor, rows: slice, heads: int):
        self.rows, self.heads, self.H, self.T = rows, heads, query.shape[1], query.shape[2]
        self.b = rows.stop - rows.start

    def take(self, t: torch.Tensor) -> torch.Tensor:
        return self._group(t[self.rows])

    def _group(self, t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (self.heads, -1)).transpose(0, 1).reshape(self.heads, -1, t.shape[-1])

    def give(self, t: torch.Tensor) -> torch.Tensor:
        """[b, H, T, x] again."""
        return t.view(self.heads, self.b, -1, self.T, t.shape[-1]).transpose(0, 1).flatten(1, 2)

    def every_row(self, bias: torch.Tensor) -> torch.Tensor:
        return self._group(bias.expand(self.b, *bias.shape))

    def dropout(self, weights: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
        if p == 0.0:
            return weights
        whole = self.give(weights)
        dropped = dropout(whole.reshape(-1, whole.shape[-1]), p, seed, self.rows.start * self.H * self.T)
        return self._group(dropped.view(whole.shape))


def _scores(grouped: _Grouped, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scaling: float):
    """[Hkv, rows, n] = scaling · query keyᵀ + bias."""
    scores = (grouped.take(query).to(key.dtype) @ key.mT).mul_(scaling)
    return scores if bias is None else scores.add_(grouped.every_row(bias))


def dropped_prefix(
    key: torch.Tensor, value: torch.Tensor, rows: slice, B: int, p: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [rows, Hkv, n, ...] as these rows of a batch of B see them; without dropout as they are.

    Given gradients of what one row saw, it gives that row's part of the prefix's: the mask is the same.
    """
    if p == 0.0:
        return key, value
    (heads, n, _), b, width = key.shape, rows.stop - rows.start, max(key.shape[-1], value.shape[-1])
    both = []
    for t, row in ((key, rows.start), (value, B + rows.start)):
        every = torch.nn.functional.pad(t, (0, width - t.shape[-1])).expand(b, heads, n, width).reshape(-1, width)
        both.append(dropout(every, p, seed, row * heads * n).view(b, heads, n, width)[..., : t.shape[-1]])
    return both[0], both[1]


def _seen(
    key: torch.Tensor, value: torch.Tensor, rows: slice, query: torch.Tensor, p: float, seed: torch.Tensor | None
):
    """The prefix of a slice of `_batches`, [Hkv, n, ...] in the dtype of sums."""
    wide = wide_dtype(query)
    both = dropped_prefix(key.to(wide), value.to(wide), rows, query.shape[0], p, seed)
    return both if p == 0.0 else (both[0][0], both[1][0])
