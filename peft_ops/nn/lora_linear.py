"""A linear layer with a low-rank adapter beside it."""

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from ..nf4 import NF4Weight
from ..ops import Projection
from ..ops.lora_linear import lora_linear
from .linear_like import check_linear, is_conv1d
from .lora_layer import LoRALayer
from .nf4_linear import NF4Linear
from .projection_group import ProjectionGroup


class LoRALinear(LoRALayer):
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ with W and bias frozen and A, B trained.

    `weight` and `bias` have the names and the layout of the layer replaced, so its checkpoints load; `lora_A` [r, in]
    starts as nn.Linear's weight does, `lora_B` [out, r] at zero, both float32 where the base has 16 bits.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        r: rank, at least 1.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: of x on its way into lora_A, in training mode only.

    Raises:
        TypeError, ValueError: an argument that is not a number, r < 1, lora_dropout outside [0, 1].

    Source: Hu et al., "LoRA", 2021, section 4.1; Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023.
    """

    ADAPTER: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    weight: nn.Parameter | NF4Weight  # [out, in]; [in, out] where fan_in_fan_out
    bias: nn.Parameter | None
    _group: weakref.ref[ProjectionGroup] | None = None  # of layers that are called with the same x

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, r: int = 8, lora_alpha: float = 16,
        lora_dropout: float = 0.0, use_rslora: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_adapter_arguments(r, lora_alpha, lora_dropout)
        super().__init__()
        self._share_base(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, True)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, use_rslora: bool = False,
        init_lora_weights: bool | str = True, use_dora: bool = False,
    ) -> "LoRALinear":  # fmt: skip
        """An adapter over the very tensors of an nn.Linear, a Conv1D or an NF4Linear, which are frozen, not copied.

        init_lora_weights: True as above; 'gaussian' draws A from N(0, 1/r²); False draws B like A, for tests.
        use_dora: gives a DoRALinear, as DoRALinear.from_linear does without it.

        Raises:
            TypeError: another kind of layer.
            ValueError: r < 1, lora_dropout outside [0, 1], an unknown initialisation.
        """
        from .dora_linear import DoRALinear, NF4DoRALinear
        from .nf4_lora_linear import NF4LoRALinear

        check_adapter_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        use_dora = use_dora or issubclass(cls, DoRALinear)
        dense, nf4 = (DoRALinear, NF4DoRALinear) if use_dora else (LoRALinear, NF4LoRALinear)
        kind = nf4 if isinstance(linear, NF4Linear) else dense
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer._share_base(linear)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        return layer.train(linear.training)

    def _share_base(self, linear: nn.Module) -> None:
        check_linear(linear)
        self.fan_in_fan_out = is_conv1d(linear)
        self._share_attributes(linear)
        self.register_parameter("weight", linear._parameters["weight"])
        self.register_parameter("bias", linear._parameters.get("bias"))
        self.out_features, self.in_features = self._matrix().shape

    def _add_adapter(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init: bool | str) -> None:
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        self._freeze_base()

    def _matrix(self) -> torch.Tensor | NF4Weight:
        """The base weight as the ops take it: [out, in], dense or NF4."""
        assert isinstance(self.weight, torch.Tensor)
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._base_class.forward(self, x)  # of weight and bias, to the bit what the replaced layer gives

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.adapter_enabled:
            return self._base_forward(x)
        if self._group is not None and not torch.compiler.is_compiling():
            group = self._group()
            y = None if group is None else group.result(self, x)
            if y is not None:
                return y
        weight, bias, a, b, scaling, p = self.linear_terms()
        assert a is not None
        assert b is not None
        return lora_linear(x, weight, bias, a, b, scaling, p)

    def linear_terms(self) -> Projection:
        """What forward computes now, for an op that takes its parts; lora_a and lora_b are None where the adapter is
        off or merged.

        Raises:
            TypeError: it is not a weight and a low-rank term (DoRA's).
        """
        if self.merged or not self.adapter_enabled:
            return Projection(self._matrix(), self.bias)
        p = self.lora_dropout if self.training else 0.0
        return Projection(self._matrix(), self.bias, self.lora_A, self.lora_B, self.scaling, p)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no group: a copied ProjectionGroup takes its members in again."""
        return {name: value for name, value in vars(self).items() if name != "_group"}

    def _adapted_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """A fresh W + scaling · B A."""
        return self._wide_base(dtype).addmm_(self.lora_B.to(dtype), self.lora_A.to(dtype), alpha=self.scaling)

    def _wide_base(self, dtype: torch.dtype) -> torch.Tensor:
        """A fresh [out, in] copy of the base weight."""
        matrix = self._matrix()
        assert isinstance(matrix, torch.Tensor)
        return matrix.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def _base_tensors(self, matrix: torch.Tensor) -> dict[str, Any]:
        """What to store for a base weight of these values [out, in]."""
        return {"weight": nn.Parameter(matrix.t().contiguous() if self.fan_in_fan_out else matrix, requires_grad=False)}

    def to_linear(self) -> nn.Module:
        """The layer that was replaced, of its own class, with the adapter merged in; the bias is shared.

        Raises:
            ValueError: the merged weight holds NaN or infinite values.
        """
        weight = self._parameters["weight"] if self.merged else self._base_tensors(self.merged_weight())["weight"]
        return self._rebuilt(weight=weight, bias=self.bias)

    def to_base(self) -> nn.Module:
        return self.to_linear()

    def base(self) -> nn.Module:
        return self._rebuilt(weight=self._parameters["weight"], bias=self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + self._repr_of_adapter()
        )


def check_adapter_arguments(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str = True
) -> None:
    """Raises TypeError or ValueError naming the argument that no adapter can have."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha}")
    if not 0.0 <= lora_dropout <= 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1], got {lora_dropout}")
    if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
