"""A bottleneck adapter: a small trained layer between the layers of a frozen model."""

import math

import torch
from torch import nn

from ..ops.bottleneck_adapter import bottleneck_adapter, known_activation

INITS = ("houlsby", "bert", "mam_adapter")


class BottleneckAdapter(nn.Module):
    """y = residual + scaling · (act(x W_downᵀ + b_down) W_upᵀ + b_up), from in_features down to `bottleneck` and back.

    Parameters `down_weight` [bottleneck, in], `down_bias`, `up_weight` [in, bottleneck], `up_bias`; float32 parameters
    serve a 16-bit x as they are, without a float32 copy of it.

    Args:
        in_features: of x and of the result.
        bottleneck: m, at least 1.
        activation: as for `peft_ops.ops.bottleneck_adapter`.
        scaling: of what is added to the residual; 4.0 in the parallel adapter of He et al.
        init: "houlsby", weights from a normal of std 1e-3 cut off at two std as in their code, biases zero: near the
            identity; "bert", weights from a normal of std 0.02, biases zero, as in AdapterHub; "mam_adapter", W_down as
            LoRA's A (kaiming_uniform, a=√5), W_up and biases zero: the identity.
        bias: whether there are biases.
        device, dtype: of the parameters.

    Raises:
        TypeError: in_features, bottleneck or scaling that is no number.
        ValueError: in_features or bottleneck below 1, a scaling that is not finite, an unknown activation or init.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, sections 2.1 and 3.6; He et al.,
    "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, for "mam_adapter".
    """

    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(
        self, in_features: int, bottleneck: int, activation: str = "gelu", scaling: float = 1.0, init: str = "houlsby",
        bias: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        _check_sizes(in_features=in_features, bottleneck=bottleneck)
        if isinstance(scaling, bool) or not isinstance(scaling, int | float):
            raise TypeError(f"scaling must be a number, got {scaling!r}")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling must be finite, got {scaling}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        known_activation(activation)
        super().__init__()
        self.in_features, self.bottleneck = in_features, bottleneck
        self.activation, self.scaling, self.init = activation, scaling, init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.down_weight, self.up_weight = parameter(bottleneck, in_features), parameter(in_features, bottleneck)
        self.down_bias = parameter(bottleneck) if bias else None
        self.up_bias = parameter(in_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or (self.init == "mam_adapter" and name == "up_weight"):
                nn.init.zeros_(parameter)
            elif self.init == "mam_adapter":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif self.init == "bert":
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.trunc_normal_(parameter, std=1e-3, a=-2e-3, b=2e-3)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """What the branch adds to `residual` [..., in_features]; to x itself, as in Houlsby's adapter, where None."""
        return bottleneck_adapter(
            x, self.down_weight, self.down_bias, self.up_weight, self.up_bias, self.activation, self.scaling,
            x if residual is None else residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, bottleneck={self.bottleneck}, activation={self.activation}, "
            f"scaling={self.scaling:g}, init={self.init}, bias={self.down_bias is not None}"
        )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
