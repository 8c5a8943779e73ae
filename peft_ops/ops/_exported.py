"""What torch.export keeps: while it traces, an op is one node, `torch.ops.peft_ops.<name>`, instead of its parts.

Kernels cannot be traced as tensors there, and a decoded 4-bit weight would be baked in. Outside export nothing goes
through these: Function and lookup cost a third of a registered op per call. Inference alone: they have no backward.
"""

from collections.abc import Callable

import torch

from ..nf4 import NF4Weight

_LIBRARY = torch.library.Library("peft_ops", "DEF")


def kept_by_export(
    schema: str, run: Callable[..., torch.Tensor], like: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Registers an op and returns it.

    schema: "name(arguments) -> Tensor". run: what it computes, on any device. like: an empty tensor of its result's
    shape and dtype, for tracing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, torch.no_grad()(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peft_ops::{name}", like, lib=_LIBRARY)
    return getattr(torch.ops.peft_ops, name)


def stored_weight(weight: torch.Tensor | NF4Weight) -> tuple[list[torch.Tensor], list[int]]:
    """A weight as `Tensor[] weight, int[] nf4` of a schema: ([weight], []), or its tensors and [blocksize, *shape]."""
    if isinstance(weight, torch.Tensor):
        return [weight], []
    return list(weight._tensors().values()), [weight.blocksize, *weight.shape]


def restored_weight(tensors: list[torch.Tensor], nf4: list[int], dtype: torch.dtype) -> torch.Tensor | NF4Weight:
    """The weight that `stored_weight` took apart; dtype is a 4-bit one's nominal dtype."""
    if not nf4:
        return tensors[0]
    packed, *scales = tensors
    absmax, nested = (scales[0], ()) if len(scales) == 1 else (None, scales)
    return NF4Weight(packed, absmax, nf4[0], torch.Size(nf4[1:]), dtype, *nested)


def rows_of(x: torch.Tensor, tensors: list[torch.Tensor], nf4: list[int]) -> torch.Tensor:
    """An empty [..., N] for x [..., K] and a weight [N, K] as `stored_weight` gives it."""
    return x.new_empty(*x.shape[:-1], nf4[1] if nf4 else tensors[0].shape[0])
