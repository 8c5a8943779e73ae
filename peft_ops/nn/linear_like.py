"""Which layers can be replaced: nn.Linear, and the Conv1D of GPT-2, recognised without importing transformers."""

import torch
from torch import nn

_SAME_FUNCTION = ("FalconLinear",)  # transformers' subclasses with a forward of their own that computes nn.Linear's
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D, or another class of that name and form: y = x W + bias, with weight [in, out]."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """A Conv1D, or an nn.Linear (a subclass too) whose forward computes what nn.Linear's does."""
    if "forward" in vars(layer):
        return False
    kind = type(layer)
    same = kind.forward is nn.Linear.forward or kind.__name__ in _SAME_FUNCTION
    return is_conv1d(layer) or (isinstance(layer, nn.Linear) and same)


def check_linear(layer: nn.Module) -> None:
    """Raises TypeError unless `layer` computes x Wᵀ + bias from a 2-D Parameter `weight` of 16, 32 or 64 bits."""
    if not isinstance(layer, nn.Module) or not is_linear(layer):
        patched = " whose forward was replaced" if "forward" in getattr(layer, "__dict__", ()) else ""
        raise TypeError(
            "linear must be an nn.Linear with nn.Linear's forward, a Conv1D or an NF4Linear, "
            f"got {type(layer).__name__}{patched}"
        )
    weight = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2 or weight.dtype not in _DTYPES:
        given = "no such parameter" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise TypeError(f"linear.weight must be a 2-D floating-point parameter, got {given}")


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as [out_features, in_features], sharing its memory."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.t() if is_conv1d(layer) else weight
