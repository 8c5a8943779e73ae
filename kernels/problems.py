"""Operands for a kernel and bucket, and calls of its launcher on them: what tuning measures."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import bottleneck_adapter, dora, down_project, linear_logprob, linear_low_rank, low_rank, nf4, nf4_linear
from .measured import using

BLOCKSIZE = 64
P = 0.1


class Problem(NamedTuple):
    """calls: the first is timed; the others are variants that the fastest configuration must run too, those that take
    the most shared memory among them. reset: undoes a call that works in place, before one that is compared."""

    calls: tuple[Callable[[], Any], ...]
    reset: Callable[[], Any] = lambda: None


class Weight(NamedTuple):
    """What launchers read of an NF4 weight (peft_ops.nf4.NF4Weight)."""

    packed: torch.Tensor
    absmax: torch.Tensor | None
    blocksize: int
    shape: torch.Size
    absmax_codes: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None


class Operands:
    """Random tensors of a bucket, from a generator of their own: the seeds of a training run stay as they are.

    rows: what the kernel runs over, M of activations, N of weights, or elements; rank: R; width: of everything else.
    Activations and weights have `dtype`, adapters float32, as `get_peft_model` makes them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int, rank: int, width: int):
        self.device, self.dtype, self.rows, self.rank, self.width = device, dtype, rows, rank, width
        self.generator = torch.Generator(device).manual_seed(0)
        self.seed = torch.tensor(1 << 40, device=device)

    def wide(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def narrow(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator, dtype=self.dtype)

    def strange(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As from t(), a slice (no pointer or stride is a multiple of 16 bytes), and both."""
        across, sliced = self.narrow(columns, rows).t(), self.narrow(rows, columns + 1)[:, 1:]
        return across, sliced, self.narrow(columns, rows + 1)[:, 1:].t()

    def nf4(self, N: int, K: int) -> tuple[Weight, Weight]:
        """(with float32 scales, with nested ones)."""
        (packed, absmax), shape = nf4.nf4_quantize(self.narrow(N, K), BLOCKSIZE), torch.Size((N, K))
        nested = Weight(packed, None, BLOCKSIZE, shape, *nf4.absmax_quantize(absmax))
        return Weight(packed, absmax, BLOCKSIZE, shape), nested


def _down_project(o: Operands) -> Problem:
    x, a, call = o.narrow(o.rows, o.width), o.wide(o.rank, o.width), down_project.down_project
    variants = [partial(call, strange, a, 0.0, None) for strange in o.strange(o.rows, o.width)]
    return Problem((partial(call, x, a, 0.0, None), partial(call, x, a, P, o.seed),
                    partial(call, x, a.to(o.dtype), 0.0, None), *variants))  # fmt: skip


def _down_project_da(o: Operands) -> Problem:
    ds, x, call = o.wide(o.rows, o.rank), o.narrow(o.rows, o.width), down_project.down_project_da
    variants = [partial(call, ds, strange, 0.0, None) for strange in o.strange(o.rows, o.width)]
    return Problem((partial(call, ds, x, 0.0, None), partial(call, ds, x, P, o.seed), *variants))


def _low_rank_update(o: Operands) -> Problem:
    y = torch.zeros(o.rows, o.width, device=o.device, dtype=o.dtype)
    s, a, b = o.wide(o.rows, o.rank), o.wide(o.rank, o.width), o.wide(o.width, o.rank)
    call = partial(low_rank.low_rank_update_, y, s)
    return Problem((partial(call, b, 1e-3, 0.0, None), partial(call, a.t(), 1e-3, P, o.seed)), y.zero_)


def _low_rank_gradients(o: Operands) -> Problem:
    dy, s, b = o.narrow(o.rows, o.width), o.wide(o.rows, o.rank), o.wide(o.width, o.rank)
    call = partial(low_rank.low_rank_gradients, dy)
    variants = [partial(low_rank.low_rank_gradients, strange, s, b, 1.0) for strange in o.strange(o.rows, o.width)]
    return Problem((partial(call, s, b, 1.0), partial(call, None, b, 1.0), partial(call, s, b.to(o.dtype), 1.0),
                    *variants))  # fmt: skip


def _linear_low_rank(o: Operands) -> Problem:
    x, w, s = o.narrow(o.rows, o.width), o.narrow(o.width, o.width), o.wide(o.rows, o.rank)
    a, b, bias = o.wide(o.rank, o.width), o.wide(o.width, o.rank), o.narrow(o.width)
    call = partial(on_route, "linear", "fused", linear_low_rank.linear_low_rank)
    forward, variants = partial(call, x, w), [partial(call, t, w, None, s, b, 1.0) for t in o.strange(o.rows, o.width)]
    backward = partial(on_route, "linear_dx", "fused", linear_low_rank.linear_low_rank_dx, x, w)
    return Problem((partial(forward, None, s, b, 1.0), partial(forward, bias, s, b, 1.0),
                    partial(backward, s, a, P, o.seed), *variants))  # fmt: skip


def _nf4_linear(o: Operands) -> Problem:
    x, weights = o.narrow(o.rows, o.width), o.nf4(o.width, o.width)
    call, (_, sliced, _) = partial(on_route, "nf4_linear", "fused", nf4_linear.nf4_linear), o.strange(o.rows, o.width)
    return Problem(tuple(partial(call, t, weight, None) for t in (x, sliced) for weight in weights))


def _nf4_linear_dx(o: Operands) -> Problem:
    dy, weights = o.narrow(o.rows, o.width), o.nf4(o.width, o.width)
    call, (_, sliced, _) = partial(on_route, "nf4_linear_dx", "fused", nf4_linear.nf4_linear_dx), o.strange(*dy.shape)
    return Problem(tuple(partial(call, t, weight) for t in (dy, sliced) for weight in weights))


def _nf4_dequantize(o: Operands) -> Problem:
    return Problem(tuple(partial(nf4.nf4_dequantize, weight, o.dtype) for weight in o.nf4(_lines(o), o.width)))


def _nf4_quantize(o: Operands) -> Problem:
    return Problem((partial(nf4.nf4_quantize, o.narrow(_lines(o), o.width), BLOCKSIZE),))


def _lines(o: Operands) -> int:
    return max(1, o.rows // o.width)


def _dora_norm(o: Operands) -> Problem:
    w, a, b = o.narrow(o.rows, o.width), o.wide(16, o.width), o.wide(o.rows, 16)
    variants = [partial(dora.dora_norm, strange, a, b, 1.0) for strange in o.strange(o.rows, o.width)]
    return Problem((partial(dora.dora_norm, w, a, b, 1.0), partial(dora.dora_norm, w, a.to(o.dtype), b, 1.0),
                    *variants))  # fmt: skip


def _nf4_dora_norm(o: Operands) -> Problem:
    a, b = o.wide(16, o.width), o.wide(o.rows, 16)
    return Problem(tuple(partial(dora.dora_norm, weight, a, b, 1.0) for weight in o.nf4(o.rows, o.width)))


def _dora_update(o: Operands) -> Problem:
    """The vendor's product that it follows is made small."""
    x, w, s = o.narrow(o.rows, 16), o.narrow(o.width, 16), o.wide(o.rows, o.rank)
    b, g, bias = o.wide(o.width, o.rank), o.wide(o.width), o.narrow(o.width)
    return Problem(tuple(partial(dora.dora_linear, x, w, c, s, b, 1.0, g, True) for c in (None, bias)))


def _dora_gradients(o: Operands) -> Problem:
    dy, u, g = o.narrow(o.rows, o.width), o.narrow(o.rows, o.width), o.wide(o.width)
    return Problem((partial(dora.dora_gradients, dy, u, g, True), partial(dora.dora_gradients, dy, u, g, False)))


def _up_project(o: Operands) -> Problem:
    s, w, x = o.wide(o.rows, o.rank), o.wide(o.width, o.rank), o.narrow(o.rows, o.width)
    biases = o.wide(o.rank), o.wide(o.width)
    forward = partial(bottleneck_adapter.up_project, s, biases[0], w, biases[1], "gelu", 1.0, x, o.dtype)
    dx = partial(bottleneck_adapter.up_project, s, None, w, None, "linear", 1.0, x, o.dtype)
    return Problem((forward, dx))


def _up_project_gradients(o: Operands) -> Problem:
    dy, s, w, bias = o.narrow(o.rows, o.width), o.wide(o.rows, o.rank), o.wide(o.width, o.rank), o.wide(o.rank)
    how = s, bias, w, "gelu", 1.0, True, True
    return Problem(tuple(partial(bottleneck_adapter.up_project_gradients, t, *how)
                         for t in (dy, *o.strange(o.rows, o.width))))  # fmt: skip


def _logprob(o: Operands) -> Problem:
    forward, _ = _head(o)
    return Problem((forward,))


def _logprob_gradients(o: Operands) -> Problem:
    forward, backward = _head(o)
    _, norm, entropy, _ = forward()
    return Problem((partial(backward, norm, entropy, o.wide(o.rows), o.wide(o.rows), True, False, False),))


def _head(o: Operands) -> tuple[Callable, Callable]:
    """Log-probs and entropy of a dense head, and their gradients."""
    vocabulary = 8 * o.width
    x, w = o.narrow(o.rows, o.width), o.narrow(vocabulary, o.width) * o.width**-0.5
    targets = torch.randint(vocabulary, (o.rows,), device=o.device, generator=o.generator)
    given = x, w, None, None, None, 1.0, targets, -100, None, 1.0
    forward = partial(linear_logprob.linear_logprob, *given, need_entropy=True, slope_rows=0)
    return forward, partial(linear_logprob.linear_logprob_gradients, *given)


def on_route(name: str, choice: Any, call: Callable, *arguments) -> Any:
    """What call(*arguments) returns on a route."""
    with using(f"route {name}", choice):
        return call(*arguments)


# The module that holds a kernel, and what makes its problem. In linear_low_rank float32 has no kernel.
PROBLEMS: dict[str, tuple[ModuleType, Callable[[Operands], Problem]]] = {
    "down_project": (down_project, _down_project),
    "down_project_da": (down_project, _down_project_da),
    "low_rank_update": (low_rank, _low_rank_update),
    "low_rank_gradients": (low_rank, _low_rank_gradients),
    "nf4_linear": (nf4_linear, _nf4_linear),
    "nf4_linear_dx": (nf4_linear, _nf4_linear_dx),
    "nf4_dequantize": (nf4, _nf4_dequantize),
    "nf4_quantize": (nf4, _nf4_quantize),
    "linear_low_rank": (linear_low_rank, _linear_low_rank),
    "dora_norm": (dora, _dora_norm),
    "nf4_dora_norm": (dora, _nf4_dora_norm),
    "dora_update": (dora, _dora_update),
    "dora_gradients": (dora, _dora_gradients),
    "up_project": (bottleneck_adapter, _up_project),
    "up_project_gradients": (bottleneck_adapter, _up_project_gradients),
    "logprob": (linear_logprob, _logprob),
    "logprob_gradient": (linear_logprob, _logprob_gradients),
    "add_product": (linear_logprob, _logprob_gradients),
}
WITH_RANK = frozenset((
    "down_project", "down_project_da", "low_rank_update", "low_rank_gradients", "linear_low_rank", "dora_update",
    "up_project", "up_project_gradients",
))  # fmt: skip
