"""log softmax of chosen logits of a linear head, its entropy and gradients, in plain PyTorch.

x [M, K]; weight W [V, K], dense with any strides or an NF4Weight; bias [V]; s = the down-projected x [M, R], b = lora_B
[V, R]; targets [M]. A logit is z = outer · tanh(inner · u), or outer · u where inner is None, of u = x Wᵀ + bias +
scaling · s bᵀ. Logits exist for a slab of the vocabulary and some of the rows at a time. They and all sums are float32
(float64 for float64 inputs). Rows whose target is ignore_index are left out.
"""

from collections.abc import Iterator

import torch

from .nf4_linear import decoded_rows
from .rows import wide_dtype

_TILE = 1 << 19  # logits at a time: 2 MiB of float32
_COLUMNS = 1024  # of the vocabulary at a time, for a dense head


def linear_logprob(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor | None, b: torch.Tensor | None, scaling: float,
    targets: torch.Tensor, ignore_index: int, inner: float | None, outer: float, need_entropy: bool, slope_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(logp [M] = log softmax(z) at the target; norm [2, M]: the largest z of each row and log Σ e^(z - largest), which
    together are logsumexp(z) and apart keep the digits of confident rows; entropy [M] of softmax(z) where needed; slope
    [slope_rows, K] = ∂logp/∂x of the first rows through W, where there are any); 0 where ignored.

    The slope is carried along as attention carries its output, with the rows of W as keys and values: Σ softmax(z) W is
    scaled down whenever a larger logit comes. So forward and backward together take two products with W.
    """
    kept = _kept(targets, ignore_index)
    head = _Head(_take(x, kept), weight, bias, None if s is None else _take(s, kept), b, scaling, inner, outer)
    y, M = _take(targets, kept), head.x.shape[0]
    first = slope_rows if kept is None else int((kept < slope_rows).sum())
    top = head.x.new_full((M,), torch.finfo(head.wide).min)
    total, moment, chosen = (head.x.new_zeros(M) for _ in range(3))
    expected, own = (head.x.new_zeros(first, x.shape[1]) for _ in range(2))
    for columns, w, rows, z, cap in head.tiles():
        at, column = _inside(y[rows], columns)
        chosen[rows.start + at] = z[at, column]
        new = torch.maximum(top[rows], z.amax(1))
        decay = torch.exp(top[rows] - new)
        z.sub_(new[:, None])
        p = torch.exp(z) if need_entropy else z.exp_()
        if need_entropy:
            before = moment[rows] + (top[rows] - new) * total[rows]
            moment[rows] = before * decay + z.mul_(p).masked_fill_(p == 0, 0.0).sum(1)
        total[rows] = total[rows] * decay + p.sum(1)
        top[rows] = new
        if rows.start < first:
            n = min(rows.stop, first) - rows.start
            part = expected[rows.start : rows.start + n].mul_(decay[:n, None])
            part.addmm_(p[:n] if cap is None else p[:n] * cap[:n], w)
            at, column = at[at < n], column[at < n]
            own[rows.start + at] = w[column] if cap is None else w[column] * cap[at, column, None]
    log_total, slope = total.log(), None
    if slope_rows:
        slope = own.sub_(expected.div_(total[:first, None])).mul_(head.rate)
        slope = _spread(slope, None if kept is None else kept[:first], slope_rows).to(x.dtype)
    n = targets.shape[0]
    entropy = _spread(log_total - moment / total, kept, n) if need_entropy else None
    norm = _spread(torch.stack((top, log_total), 1), kept, n).t()
    return _spread((chosen - top) - log_total, kept, n), norm, entropy, slope


def linear_logprob_gradients(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor | None, b: torch.Tensor | None, scaling: float,
    targets: torch.Tensor, ignore_index: int, inner: float | None, outer: float, norm: torch.Tensor,
    entropy: torch.Tensor | None, dlogp: torch.Tensor, dentropy: torch.Tensor | None,
    need_dx: bool, need_dw: bool, need_dbias: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """(dx [M, K] through W in the dtype of x, dw [V, K] in that of W, dbias [V], ds [M, R], db [V, R]): the first
    three where needed, the last two where there is an s. Tiles of logits are computed again.

    dz = dlogp · (onehot - p) - dentropy · p · (log p + entropy), and du = dz · ∂z/∂u.
    """
    kept = _kept(targets, ignore_index)
    head = _Head(_take(x, kept), weight, bias, None if s is None else _take(s, kept), b, scaling, inner, outer)
    y, dlogp, (top, log_total) = _take(targets, kept), _take(dlogp, kept), _take(norm.t(), kept).t()
    h, dh = (None if t is None or dentropy is None else _take(t, kept)[:, None] for t in (entropy, dentropy))
    make = head.x.new_zeros
    dx = make(head.x.shape) if need_dx else None
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_dw else None
    dbias = make(weight.shape[0]) if need_dbias else None
    ds, db = (None, None) if head.s is None else (make(head.s.shape), make(weight.shape[0], head.s.shape[1]))
    dw_slab = None
    for columns, w, rows, z, cap in head.tiles():
        at, column = _inside(y[rows], columns)
        z.sub_(top[rows, None]).sub_(log_total[rows, None])
        p = z.exp()
        if h is None or dh is None:
            dz = p.mul_(-dlogp[rows, None])
        else:
            dz = z.add_(h[rows]).mul_(dh[rows]).add_(dlogp[rows, None]).mul_(p).masked_fill_(p == 0, 0.0).neg_()
        dz[at, column] += dlogp[rows][at]
        if cap is not None:
            dz.mul_(cap)
        if dx is not None:
            dx[rows].addmm_(dz, w, alpha=head.rate)
        if dw is not None:
            dw_slab = torch.zeros_like(w) if rows.start == 0 or dw_slab is None else dw_slab
            dw_slab.addmm_(dz.t(), head.x[rows], alpha=head.rate)
            if rows.stop == head.x.shape[0]:
                dw[columns] = dw_slab
        if dbias is not None:
            dbias[columns] += dz.sum(0).mul_(head.rate)
        if ds is not None and db is not None and head.s is not None and b is not None:
            ds[rows].addmm_(dz, b[columns].to(head.wide), alpha=head.rate * scaling)
            db[columns].addmm_(dz.t(), head.s[rows], alpha=head.rate)
    n = targets.shape[0]
    dx, ds = (None if t is None else _spread(t, kept, n) for t in (dx, ds))
    return None if dx is None else dx.to(x.dtype), dw, dbias, ds, db


class _Head:
    """Everything that makes logits, and the walk over their tiles.

    x, s: of the rows that count, in the wide dtype, s with its scaling. rate: ∂z/∂u where tanh' is 1.
    """

    def __init__(self, x, weight, bias, s, b, scaling, inner, outer):
        self.wide, self.dtype = wide_dtype(x), x.dtype
        self.x, self.s = x.to(self.wide), None if s is None else s.to(self.wide) * scaling
        self.weight, self.bias, self.b, self.inner, self.outer = weight, bias, b, inner, outer
        self.rate = outer if inner is None else outer * inner

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor, torch.Tensor | None]]:
        """(columns, W[columns] [C, K], rows, z [rows, C], tanh'(inner · u) or None), rows within columns; z is the
        caller's until the next."""
        M, store = self.x.shape[0], None
        for columns, w in self._slabs():
            shift = None if self.bias is None else self.bias[columns].to(self.wide)
            bt = None if self.b is None else self.b[columns].to(self.wide).t()
            step = max(64, _TILE // w.shape[0])
            for start in range(0, M, step):
                rows = slice(start, min(start + step, M))
                size = (rows.stop - start) * w.shape[0]
                if store is None or store.numel() < size:  # slabs of a 4-bit head differ in width
                    store = self.x.new_empty(size)
                z = store[:size].view(-1, w.shape[0])
                if shift is None:
                    torch.mm(self.x[rows], w.t(), out=z)
                else:
                    torch.addmm(shift, self.x[rows], w.t(), out=z)
                if self.s is not None and bt is not None:
                    z.addmm_(self.s[rows], bt)
                if self.inner is None:
                    yield columns, w, rows, z.mul_(self.outer) if self.outer != 1.0 else z, None
                    continue
                z.mul_(self.inner).tanh_()
                cap = torch.square(z).neg_().add_(1.0)
                yield columns, w, rows, z.mul_(self.outer), cap

    def _slabs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, W[columns]) in the wide dtype, rounded to that of x first."""
        if not isinstance(self.weight, torch.Tensor):
            yield from ((columns, w.to(self.wide)) for columns, w in decoded_rows(self.weight, self.dtype))
            return
        V = self.weight.shape[0]
        for start in range(0, V, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, V))
            yield columns, self.weight[columns].to(self.dtype).to(self.wide)


def _kept(targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows that count; None where all do."""
    counted = targets != ignore_index
    return None if bool(counted.all()) else counted.nonzero()[:, 0]


def _take(t: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return t if kept is None else t.index_select(0, kept)


def _spread(t: torch.Tensor, kept: torch.Tensor | None, n: int) -> torch.Tensor:
    """The rows of t at their places among n, zeros elsewhere."""
    return t if kept is None else t.new_zeros(n, *t.shape[1:]).index_copy_(0, kept, t)


def _inside(y: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows whose target is one of the columns, which of them it is)."""
    at = ((y >= columns.start) & (y < columns.stop)).nonzero()[:, 0]
    return at, y[at] - columns.start
