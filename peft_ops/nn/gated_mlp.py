"""The gated MLP of a Llama-like block in one op, over the block's own layers."""

from typing import Any

import torch
from torch import nn

from ..ops import Projection
from ..ops.gated_mlp import activation_of, gated_mlp
from .linear_like import dense_weight, is_linear
from .lora_linear import LoRALinear
from .nf4_linear import NF4Linear
from .projection_group import hooked

PARTS = ("gate_proj", "up_proj", "down_proj")


class GatedMLP(nn.Module):
    """y = down_proj(act_fn(gate_proj(x)) · up_proj(x)), kept for the backward as x, gate_proj(x) and up_proj(x) alone.

    It has the children of the block that it stands for, under their names. Where one of them cannot be part of the op
    (DoRA, a layer with hooks, an unknown activation) they are called one after the other.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, section 2.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Any

    @classmethod
    def from_block(cls, block: nn.Module) -> "GatedMLP":
        """Over the very children of a block with gate_proj, up_proj, down_proj and act_fn, and with its attributes.

        Raises:
            TypeError: the block has no such parts, or others beside them; its forward was replaced.
        """
        others = set(block._modules) - {*PARTS, "act_fn"}
        missing = [name for name in (*PARTS, "act_fn") if not hasattr(block, name)]
        if missing or others or block._parameters or block._buffers:
            found = missing or others or {*block._parameters, *block._buffers}
            raise TypeError(f"block {'lacks' if missing else 'has also'} {', '.join(sorted(found))}")
        if "forward" in vars(block):
            raise TypeError("the forward of block was replaced")
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        vars(mlp).update({k: v for k, v in vars(block).items() if not k.startswith("_") and k != "training"})
        vars(mlp)["_modules"] = block._modules  # the very dict: a child exchanged in one is so in the other
        act = mlp.act_fn
        vars(mlp)["_known"] = (act, None if isinstance(act, nn.Module) and hooked(act) else activation_of(act))
        mlp.training = block.training
        return mlp

    def op_terms(self) -> tuple[Projection, Projection, Projection, str] | None:
        """What the op computes of x; None where the children have to be called."""
        layers = [self._modules[name] for name in PARTS]
        known, activation = vars(self)["_known"]
        if activation is None or known is not self.act_fn or (isinstance(known, nn.Module) and hooked(known)):
            return None
        gate, up, down = (None if layer is None else projection_of(layer) for layer in layers)
        return None if gate is None or up is None or down is None else (gate, up, down, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = self.op_terms()
        if terms is not None:
            return gated_mlp(x, *terms)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def projection_of(layer: nn.Module) -> Projection | None:
    """What a linear layer computes, with its adapter as it is now; None where it is of a kind that an op cannot take,
    or calling it does more."""
    if hooked(layer):
        return None
    if isinstance(layer, LoRALinear):
        try:
            return layer.linear_terms()
        except TypeError:  # DoRA's
            return None
    if isinstance(layer, NF4Linear):
        return Projection(layer.weight, layer.bias)
    if not is_linear(layer) or layer._parameters.get("weight") is None:
        return None
    return Projection(dense_weight(layer), layer._parameters.get("bias"))
