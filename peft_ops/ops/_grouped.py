"""Projections that share x, as the Functions over them compute: one S, one dx, one read of x for all da.

Adapters whose down-projections are one product make a batch: without dropout all of them; with it those of one p and
one rank, each with its own mask. Results of a batch stand side by side: S [M, ΣR], float32.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .._backend import implementation
from ..nf4 import NF4Weight
from ._arguments import mask_seed
from .projection import Projection


class Plan(NamedTuple):
    """What of projections is not differentiable. fixed: (NF4 weight, scaling, p); batches: indices of projections."""

    fixed: tuple[tuple[NF4Weight | None, float, float], ...]
    bias_dtypes: tuple[torch.dtype | None, ...]
    batches: tuple[tuple[int, ...], ...]


class Needs(NamedTuple):
    """Which tensors of a projection need a gradient."""

    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


def plan_of(projections: Sequence[Projection]) -> Plan:
    batches: dict[tuple[float, int], list[int]] = {}
    for i, q in enumerate(projections):
        if q.lora_a is not None:
            batches.setdefault((float(q.dropout_p), q.lora_a.shape[0] if _masked(q) else 0), []).append(i)
    fixed = tuple((_nf4(q.weight), float(q.scaling), float(q.dropout_p)) for q in projections)
    dtypes = tuple(None if q.bias is None else q.bias.dtype for q in projections)
    return Plan(fixed, dtypes, tuple(map(tuple, batches.values())))


def tensors_of(projections: Sequence[Projection], with_bias: bool = True) -> list[torch.Tensor | None]:
    """(dense weight, bias, lora_a, lora_b) of each, flat."""
    return [
        t
        for q in projections
        for t in (
            q.weight if isinstance(q.weight, torch.Tensor) else None, q.bias if with_bias else None, q.lora_a, q.lora_b,
        )
    ]  # fmt: skip


def joined(plan: Plan, tensors: Sequence[torch.Tensor | None]) -> list[Projection]:
    """The projections of a plan and their tensors_of."""
    rows = zip(plan.fixed, tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], strict=True)
    return [
        Projection(dense if nf4 is None else nf4, bias, a, b, scaling, p)  # type: ignore[arg-type]
        for (nf4, scaling, p), dense, bias, a, b in rows
    ]


def needs_of(flags: Sequence[bool]) -> list[Needs]:
    return [Needs(*flags[i : i + 4]) for i in range(0, len(flags), 4)]


def masked(projections: Sequence[Projection]) -> list[int]:
    """Indices of those whose adapter has a dropout mask."""
    return [i for i, q in enumerate(projections) if q.lora_a is not None and _masked(q)]


def mask_seeds(
    projections: Sequence[Projection], seeds: Sequence[int | torch.Tensor] | torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """int64, a seed for each of masked(projections); None where there are none. See `mask_seed`.

    Raises:
        ValueError: `seeds` are not one for each projection.
    """
    indices = masked(projections)
    if seeds is not None and len(seeds) != len(projections):
        raise ValueError(f"seeds must be one for each of {len(projections)} projections, got {len(seeds)}")
    if not indices:
        return None
    if seeds is None:
        return torch.randint(2**63 - 1, (len(indices),), dtype=torch.int64, device=device)
    if isinstance(seeds, torch.Tensor) and len(indices) == len(projections):
        return seeds.contiguous()
    return torch.stack([mask_seed(seeds[i], device) for i in indices])


def seeds_of_each(projections: Sequence[Projection], seeds: torch.Tensor | None) -> list[torch.Tensor | None]:
    """For each projection the seed of its mask, or None."""
    place = {i: n for n, i in enumerate(masked(projections))}
    return [seeds[place[i]] if seeds is not None and i in place else None for i in range(len(projections))]


def batch_seeds(plan: Plan, projections: Sequence[Projection], seeds: torch.Tensor | None) -> list[torch.Tensor | None]:
    """For each batch the seeds of its masks: int64 [G], or [] where it is of one projection; None without masks."""
    if seeds is None:
        return [None] * len(plan.batches)
    place = {i: n for n, i in enumerate(masked(projections))}
    return [_some(seeds, [place[i] for i in batch if i in place]) for batch in plan.batches]


def _some(seeds: torch.Tensor, places: Sequence[int]) -> torch.Tensor | None:
    """seeds [G] at these places, as a view where they are neighbours."""
    if len(places) < 2:
        return seeds[places[0]] if places else None
    if places[-1] - places[0] == len(places) - 1:
        return seeds[places[0] : places[-1] + 1]
    return torch.stack([seeds[i] for i in places])


def project_down(x: torch.Tensor, plan: Plan, projections: Sequence[Projection], seeds: Sequence) -> list[torch.Tensor]:
    """S = drop(x) [A; ...]ᵀ of each batch, in one read of x."""
    down_project = implementation("down_project", x).down_project
    return [
        down_project(x, _rows([projections[i].lora_a for i in batch]), projections[batch[0]].dropout_p, seed)
        for batch, seed in zip(plan.batches, seeds, strict=True)
    ]


def project_up(x: torch.Tensor, plan: Plan, projections: Sequence[Projection], s: Sequence) -> list[torch.Tensor]:
    """y [M, N] of each projection."""
    parts = dict(_columns(plan, projections, s))
    return [_up(x, q, parts.get(i)) for i, q in enumerate(projections)]


def kept_s(plan: Plan, s: Sequence[torch.Tensor], needs: Sequence[Needs]) -> list[torch.Tensor | None]:
    """S of the batches that have a lora_b to train."""
    return [
        whole if any(needs[i].lora_b for i in batch) else None for batch, whole in zip(plan.batches, s, strict=True)
    ]


def needs_x(needs: Sequence[Needs]) -> bool:
    return any(need.weight or need.lora_a for need in needs)


class Backward:
    """Gradients of projections that share x. dys: [M, N] of each, None where nothing came; `s` as kept_s gives it.

    dS and dB are made at once, in one read of each dy; dx and the gradients that ask for x when they are called for.
    """

    def __init__(self, dys, plan: Plan, projections, seeds, s, needs: Sequence[Needs], need_dx: bool):
        self.dys, self.plan, self.projections, self.seeds, self.needs = dys, plan, projections, seeds, needs
        self.ds: dict[int, torch.Tensor] = {}
        self.db: dict[int, torch.Tensor | None] = {}
        for i, part in _columns(plan, projections, s):
            dy, need, q = dys[i], needs[i], projections[i]
            if dy is not None and (need_dx or need.lora_a or need.lora_b):
                gradients = implementation("low_rank", dy).low_rank_gradients
                self.ds[i], self.db[i] = gradients(dy, part if need.lora_b else None, q.lora_b, q.scaling)

    def dx(self) -> torch.Tensor | None:
        """Σ dy W + drop'(dS A): products added up in one buffer, then one low-rank update for each batch."""
        dx = None
        for dy, q in zip(self.dys, self.projections, strict=True):
            if dy is not None:
                dx = _base_dx(dy, q.weight, dx)
        for members, p, seed in self._batches({i for i in self.ds if dx is not None}):
            a, ds = _rows([self.projections[i].lora_a for i in members]), _side_by_side([self.ds[i] for i in members])
            dx = implementation("low_rank", ds if dx is None else dx).low_rank_update_(dx, ds, a.t(), 1.0, p, seed)
        return dx

    def parameters(self, x: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Gradients of tensors_of(projections)."""
        da: dict[int, torch.Tensor] = {}
        for members, p, seed in self._batches({i for i in self.ds if self.needs[i].lora_a}):
            assert x is not None
            ds = _side_by_side([self.ds[i] for i in members])
            whole = implementation("down_project", x).down_project_da(ds, x, p, seed)
            da.update(zip(members, whole.split([self.ds[i].shape[1] for i in members]), strict=True))
        grads: list[torch.Tensor | None] = []
        for i, (dy, q, need) in enumerate(zip(self.dys, self.projections, self.needs, strict=True)):
            dw = (dy.t() @ x).to(q.weight.dtype) if need.weight and dy is not None else None
            dbias = dy.sum(0, dtype=self.plan.bias_dtypes[i]) if need.bias and dy is not None else None
            grads += [dw, dbias, _cast(da.get(i), q.lora_a), _cast(self.db.get(i), q.lora_b)]
        return grads

    def _batches(self, wanted: set[int]) -> Iterator[tuple[list[int], float, torch.Tensor | None]]:
        """(members that are wanted, p, their seeds) of each batch."""
        for batch, seed in zip(self.plan.batches, self.seeds, strict=True):
            members = [i for i in batch if i in wanted]
            if seed is not None and len(members) < len(batch):
                seed = _some(seed, [batch.index(i) for i in members])
            if members:
                yield members, self.projections[members[0]].dropout_p, seed


def _nf4(weight: torch.Tensor | NF4Weight) -> NF4Weight | None:
    return weight if isinstance(weight, NF4Weight) else None


def _masked(q: Projection) -> bool:
    return 0.0 < q.dropout_p < 1.0


def _columns(plan: Plan, projections, s) -> Iterator[tuple[int, torch.Tensor | None]]:
    """(index, its columns of S) of every projection with an adapter; None where S was not kept."""
    for batch, whole in zip(plan.batches, s, strict=True):
        ranks = [projections[i].lora_a.shape[0] for i in batch]
        yield from zip(batch, [None] * len(batch) if whole is None else whole.split(ranks, dim=1), strict=True)


def _up(x: torch.Tensor, q: Projection, s: torch.Tensor | None) -> torch.Tensor:
    if s is not None:
        return implementation("linear_low_rank", x).linear_low_rank(x, q.weight, q.bias, s, q.lora_b, q.scaling)
    if isinstance(q.weight, NF4Weight):
        return implementation("nf4_linear", x).nf4_linear(x, q.weight, q.bias)
    return torch.nn.functional.linear(x, q.weight.to(x.dtype), None if q.bias is None else q.bias.to(x.dtype))


def _base_dx(dy: torch.Tensor, weight: torch.Tensor | NF4Weight, dx: torch.Tensor | None) -> torch.Tensor:
    """dx + dy W, in place where there is a dx."""
    if isinstance(weight, NF4Weight):
        nf4 = implementation("nf4_linear", dy)
        return nf4.nf4_linear_dx(dy, weight) if dx is None else nf4.nf4_linear_dx_add_(dx, dy, weight)
    w = weight.to(dy.dtype)
    return dy @ w if dx is None else dx.addmm_(dy, w)


def _rows(tensors: Sequence) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def _cast(gradient: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    return gradient if gradient is None or like is None else gradient.to(like.dtype)
