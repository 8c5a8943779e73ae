"""float32 masters of 16-bit parameters: small updates add up instead of being rounded away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

_MASTER = "master"
_HALVES = (torch.float16, torch.bfloat16)


class MasterWeights(Optimizer):
    """An optimizer whose 16-bit parameters are updated in float32 and rounded once after every step.

    A bfloat16 parameter keeps 8 bits: an update below 1/512 of it is lost, every time. The first step with a gradient
    makes a master, a float32 copy of the parameter (4 bytes an element); the optimizer's own state is then float32 too.
    Gradients are cast at the step and are left as they are. What else writes to a parameter (a checkpoint that is
    loaded) counts: the master follows wherever it no longer rounds to the parameter.

    Everything but step, state_dict and load_state_dict is the wrapped optimizer's: groups, learning-rate schedulers,
    clipping of gradients, add_param_group. state_dict holds the masters. torch.amp.GradScaler refuses float16
    gradients: use bfloat16, without one.

    Args:
        optimizer: any torch optimizer that has not stepped yet, over parameters of any dtype; those that are not
            float16 or bfloat16 are left to it.

    Raises:
        TypeError: not an optimizer.
        ValueError: it has state already: it has stepped, or is one (Adagrad) that makes its state at once, in 16 bits.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.1.
    """

    def __init__(self, optimizer: Optimizer) -> None:  # Optimizer's own is not called: the wrapped one has been set up
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if optimizer.state:
            raise ValueError("optimizer has state already: wrap it in MasterWeights before its first step")
        self.optimizer = optimizer
        self._masters: dict[torch.Tensor, torch.Tensor] = {}  # of a parameter
        self._versions: dict[torch.Tensor, int] = {}  # of a parameter when it was last rounded

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: vars(self)[name] for name in ("optimizer", "_masters", "_versions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"MasterWeights({self.optimizer!r})"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the closure, where there is one, is called once, before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: p.grad for p in self._halves() if p.grad is not None}
        masters = {p: self._master(p) for p in gradients}
        try:
            for p, gradient in gradients.items():
                masters[p].grad = gradient.float()
            with self._over_masters():
                self.optimizer.step()
        finally:
            for master in masters.values():
                master.grad = None
        for p, master in masters.items():
            p.copy_(master)
            self._versions[p] = p._version
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with "master" in the state of every parameter that has one."""
        with self._over_masters():
            packed = self.optimizer.state_dict()
        masters = {i: self._masters[p] for i, p in self._numbered() if p in self._masters}
        state = {i: {**packed["state"].get(i, {}), _MASTER: master} for i, master in masters.items()}
        return packed | {"state": packed["state"] | state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where groups or masters do not fit; a state without masters starts them anew."""
        halves, loaded = set(self._halves()), {}
        for i, p in self._numbered():
            master = state_dict["state"].get(i, {}).get(_MASTER)
            if master is not None and master.shape != p.shape:
                raise ValueError(f"the master of parameter {i} is {tuple(master.shape)}, expected {tuple(p.shape)}")
            if p in halves and i in state_dict["state"]:
                loaded[p] = p.float() if master is None else master.detach().to(p.device, torch.float32, copy=True)
        state = {i: {k: v for k, v in kept.items() if k != _MASTER} for i, kept in state_dict["state"].items()}
        before, self._masters = self._masters, loaded
        try:
            with self._over_masters():
                self.optimizer.load_state_dict(state_dict | {"state": {i: kept for i, kept in state.items() if kept}})
        except BaseException:
            self._masters = before
            raise
        self._versions = {}

    def _halves(self) -> Iterator[torch.Tensor]:
        return (p for _, p in self._numbered() if p.dtype in _HALVES)

    def _numbered(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Parameters as state_dict numbers them."""
        return enumerate(p for group in self.optimizer.param_groups for p in group["params"])

    def _master(self, p: torch.Tensor) -> torch.Tensor:
        if p not in self._masters:
            self._masters[p] = p.detach().float()
        elif self._versions.get(p) != p._version:
            master = self._masters[p]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        return self._masters[p]

    @contextmanager
    def _over_masters(self) -> Iterator[None]:
        """The wrapped optimizer has the masters in the place of their parameters."""
        kept = [group["params"] for group in self.optimizer.param_groups]
        try:
            for group in self.optimizer.param_groups:
                group["params"] = [self._masters.get(p, p) if p.dtype in _HALVES else p for p in group["params"]]
            yield
        finally:
            for group, params in zip(self.optimizer.param_groups, kept, strict=True):
                group["params"] = params
