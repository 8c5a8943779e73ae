"""What a method does to one model: found by reading it, then carried out, then kept on it.

The life of an Adaptation: `plan` (reads the model, raises all that can be wrong) -> `install` (puts modules in;
cannot fail) -> kept at the root of the model, where it copies and pickles with it. Methods subclass it, one to a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .config import MethodConfig
from .trained import get_tensor, set_tensor, trainable_copy

_ATTRIBUTE = "_peft_ops"


@dataclass
class Adaptation:
    """The base of every method.

    config: as resolved for the model (names and paths written out).
    trained: names of tensors of the base that are trained whole: heads, biases, modules_to_save. Where `originals` are
        kept, copies of them are trained.
    originals: what stood at those names before (a tied tensor itself, not a copy); while `disabled`, the two are
        exchanged.
    """

    method: ClassVar[str] = ""  # for messages
    config: Any  # of the method's own class, a MethodConfig
    trained: list[str] = field(default_factory=list)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    disabled: bool = False

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> Adaptation:
        """What `install` will do; the model is only read. Raises TypeError or ValueError for all that can be wrong."""
        raise NotImplementedError

    def install(self, model: nn.Module) -> None:
        """Put the method into a frozen model. Every check was made by `plan`."""

    def prepare_checkpointing(self, model: nn.Module) -> None:
        """Called where gradient checkpointing is on: if it is reentrant, an input has to require a gradient."""
        getattr(model, "enable_input_require_grads", lambda: None)()

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it is entered, what `install` put in does nothing and the model computes as before it."""
        return nullcontext()

    def merge(self, model: nn.Module, requantize: bool) -> None:
        """Take the method out of the model, folded into plain weights.

        Raises:
            ValueError: it cannot be expressed in them.
        """
        raise ValueError(f"{self.method} adds to what the model computes and cannot be merged into its weights")

    def eject(self, model: nn.Module) -> None:
        """Drop what only training needs, such as a prompt encoder, and keep what it computes.

        Raises:
            ValueError: there is nothing of the kind.
        """
        raise ValueError(f"{self.method} has no part that only training needs: there is nothing to eject")

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        """Name and shape of every tensor that is trained, in an adapted model or in one still to be adapted."""
        return {name: get_tensor(model, name).shape for name in self.trained}

    @contextmanager
    def switched_off(self, model: nn.Module) -> Iterator[None]:
        """The base model for a while; nests."""
        if self.disabled:
            yield
            return
        with self.off(model):
            self.exchange(model)
            try:
                yield
            finally:
                self.exchange(model)

    def start_training(self, model: nn.Module) -> None:
        """Put trainable copies in the place of the `trained` tensors."""
        for name in self.trained:
            original = self.originals[name] = get_tensor(model, name)
            set_tensor(model, name, trainable_copy(original))

    def exchange(self, model: nn.Module) -> None:
        """Trained tensors and their originals change places; the latter are moved to where the former are."""
        for name, kept in self.originals.items():
            current = get_tensor(model, name)
            if (kept.device, kept.dtype) != (current.device, current.dtype):
                moved = kept.detach().to(current.device, current.dtype)
                kept = nn.Parameter(moved, requires_grad=False) if isinstance(kept, nn.Parameter) else moved
            set_tensor(model, name, kept)
            self.originals[name] = current
        self.disabled = not self.disabled


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """The adaptation of a model, or None."""
    return vars(model).get(_ATTRIBUTE)


def require_adaptation(model: nn.Module) -> Adaptation:
    """Raises ValueError where the model is not adapted."""
    adaptation = adaptation_of(model)
    if adaptation is None:
        raise ValueError(
            f"model ({type(model).__name__}) is not adapted: call peft_ops.adapt on this very module first"
        )
    return adaptation


def require_enabled(model: nn.Module) -> None:
    """Raises ValueError inside adapters_disabled(model), where the model's tensors are not the adapted ones."""
    adaptation = adaptation_of(model)
    if adaptation is not None and adaptation.disabled:
        raise ValueError("adapters are disabled: do this outside adapters_disabled(model)")


def set_adaptation(model: nn.Module, adaptation: Adaptation | None) -> None:
    if adaptation is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = adaptation
