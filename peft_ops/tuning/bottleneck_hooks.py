"""A bottleneck adapter in its place: the hooks through which a model runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..nn.bottleneck_adapter import BottleneckAdapter

BEFORE = ("keep", "into_residual")  # hooks that run before the module they hang on; the others run after it


def _while_enabled(hook: Callable) -> Callable:
    @wraps(hook)
    def guarded(self, *args):
        return hook(self, *args) if self.adapter_enabled else None

    return guarded


class PlacedAdapter(BottleneckAdapter):
    """A BottleneckAdapter whose methods are hooks; they hang on the parts of the block that a Place names.

    h is what the sublayer gives, r its residual input, A the adapter. Only what a hook returns is changed: no forward
    of the model is replaced, and the base keeps its parameters and their names.

    norm_sum, norm_again: for `behind_norm`, whether the adapter's residual is the sum that the LayerNorm read (or what
        it gave), and whether the result goes through that LayerNorm.
    """

    adapter_enabled: bool = True
    norm_sum: bool = True
    norm_again: bool = True
    _kept: torch.Tensor | None = None  # r, from the norm at the sublayer's start to its end

    def hang(self, module: nn.Module, name: str) -> None:
        """Register the hook `name` on a module. The handle is kept: unpickled, it keeps new hooks off its number."""
        hook = getattr(self, name)
        register = module.register_forward_pre_hook if name in BEFORE else module.register_forward_hook
        vars(self).setdefault("_handles", []).append(register(hook))

    @_while_enabled
    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """h + A(h); of a block or a sublayer that adds r itself, the same of its sum."""
        return _with_first(output, lambda h: self(h, h))

    @_while_enabled
    def behind_norm(self, norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """On the LayerNorm over s = h + r, which gave n: LN(s + A(n)), s + A(n) or n + A(n)."""
        y = self(output, args[0] if self.norm_sum else output)
        return norm.forward(y) if self.norm_again else y

    @_while_enabled
    def into_residual(self, module: nn.Module, args: tuple) -> tuple:
        """On a module of (h, r) that adds the two: (h, r + A(r))."""
        return args[0], self(args[1], args[1]), *args[2:]

    @_while_enabled
    def beside(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """On a sublayer from r to h + r: its sum + A(r)."""
        return _with_first(output, lambda y: self(args[0], y))

    @_while_enabled
    def keep(self, norm: nn.Module, args: tuple) -> None:
        self._kept = args[0]

    @_while_enabled
    def beside_kept(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """h + A(r)."""
        r = self._take()
        return _with_first(output, lambda h: self(r, h))

    @_while_enabled
    def after_kept(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """h + A(h + r)."""
        r = self._take()
        return _with_first(output, lambda h: self(h + r, h))

    def _take(self) -> torch.Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": None}  # a forward that failed half-way may have left one


def _with_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a module gave, with its (first) tensor changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
