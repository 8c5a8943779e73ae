"""A linear layer with or without an adapter, as ops that take several of them are given it."""

from typing import NamedTuple

import torch

from ..nf4 import NF4Weight
from ._arguments import check_adapter, check_linear, check_probability


class Projection(NamedTuple):
    """x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ: weight [N, K] (dense or NF4), bias [N], lora_a [r, K], lora_b [N, r].

    Without an adapter lora_a and lora_b are None. The order is that of lora_linear's arguments.
    """

    weight: torch.Tensor | NF4Weight
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def check_projection(name: str, x: torch.Tensor, projection: Projection) -> None:
    """It fits x [..., K]; messages start with `name`. Raises what lora_linear does."""
    weight, bias, a, b, _, p = projection
    try:
        check_linear(x, weight, bias)
        if (a is None) != (b is None):
            raise ValueError("lora_a and lora_b must both be given, or neither")
        if a is not None and b is not None:
            check_adapter(x, weight, a, b)
            check_probability("dropout_p", p)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
