"""LoRA layers whose factors start from the weight itself: PiSSA over a dense base, PiSSA and LoftQ over a 4-bit one."""

import math
from dataclasses import replace

import torch
from torch import nn

from .. import nf4
from ..ops import Projection, lora_linear
from .linear_like import check_linear, dense_weight
from .lora_init import Factors, loftq, principal_factors
from .lora_linear import LoRALinear, check_adapter_arguments
from .nf4_linear import NF4Linear
from .nf4_lora_linear import NF4LoRALinear


class PrincipalLoRALinear(LoRALinear):
    """PiSSA: y = x Wᵀ + bias + scaling · drop(x) (B A − B₀ A₀)ᵀ, where scaling · B₀ A₀ is W's best of rank r, and A, B
    start as A₀, B₀.

    That is the authors' x (W − scaling · B₀ A₀)ᵀ + scaling · x (B A)ᵀ with W left as it is: nothing is rounded, ties
    and the base model stay, and a low-rank product of rank 2 r is all that it costs. (With dropout theirs drops B A
    alone; here the layer starts as the base with dropout too.) `initial_a`, `initial_b` are buffers.

    Source: Meng et al., "PiSSA", 2024, section 3.
    """

    initial_a: torch.Tensor
    initial_b: torch.Tensor

    @classmethod
    def decompose(
        cls, linear: nn.Module, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, use_rslora: bool = False,
        iterations: int = 0,
    ) -> "PrincipalLoRALinear":  # fmt: skip
        """Over the very tensors of an nn.Linear or a Conv1D. iterations: see nn.lora_init.principal_factors.

        Raises:
            TypeError: another kind of layer, a 4-bit one among them.
            ValueError: r < 1, lora_dropout outside [0, 1].
        """
        check_adapter_arguments(r, lora_alpha, lora_dropout)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._share_base(linear)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, True)
        w = layer._matrix()
        assert isinstance(w, torch.Tensor)
        _start(layer, None if w.is_meta else principal_factors(w, r, layer.scaling, iterations))
        return layer.train(linear.training)

    def linear_terms(self) -> Projection:
        terms = super().linear_terms()
        if terms.lora_a is None:
            return terms
        a, b = self._factors()
        return terms._replace(lora_a=a, lora_b=b)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [2 r, in], b [out, 2 r]) of B A − B₀ A₀."""
        return torch.cat((self.lora_A, self.initial_a)), torch.cat((self.lora_B, -self.initial_b), dim=1)

    def _adapted_weight(self, dtype: torch.dtype) -> torch.Tensor:
        initial = self.initial_b.to(dtype), self.initial_a.to(dtype)
        return super()._adapted_weight(dtype).addmm_(*initial, alpha=-self.scaling)


class ResidualNF4LoRALinear(NF4LoRALinear):
    """QLoRA whose 4-bit base holds what the factors leave of the weight: Q close to W − scaling · B₀ A₀.

    Where adapters are disabled the layer computes Q + scaling · B₀ A₀: the model before training, not Q alone.

    Source: Meng et al., "PiSSA", 2024, section 4 (QPiSSA); Li et al., "LoftQ", 2023, algorithm 1.
    """

    initial_a: torch.Tensor
    initial_b: torch.Tensor

    @classmethod
    def quantize(
        cls, linear: nn.Module, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, use_rslora: bool = False,
        pissa_iterations: int | None = None, loftq_iterations: int = 1, blocksize: int = 64, double_quant: bool = True,
    ) -> "ResidualNF4LoRALinear":  # fmt: skip
        """Of an nn.Linear or a Conv1D, whose bias is shared. pissa_iterations: None is LoftQ.

        Raises:
            TypeError: another kind of layer; a weight that is not float32, float16 or bfloat16.
            ValueError: arguments out of range, NaN or infinite weights.
        """
        check_adapter_arguments(r, lora_alpha, lora_dropout)
        check_linear(linear)
        w, scaling = dense_weight(linear), lora_alpha / (math.sqrt(r) if use_rslora else r)
        factors: Factors | None = None
        if w.is_meta:
            base = NF4Linear.from_linear(linear, blocksize, double_quant)
        else:
            if pissa_iterations is None:
                weight, *factors_ = loftq(w, r, scaling, loftq_iterations, blocksize, double_quant)
                factors = (factors_[0], factors_[1])
            else:
                factors = principal_factors(w.float(), r, scaling, pissa_iterations)
                weight = nf4.quantize(w.float() - scaling * (factors[1] @ factors[0]), blocksize, double_quant)
            base = NF4Linear.from_weight(replace(weight, dtype=w.dtype), linear._parameters.get("bias"))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._share_base(base)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, True)
        _start(layer, factors)
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.adapter_enabled or self.merged:
            return super().forward(x)
        return lora_linear(x, self.weight, self.bias, self.initial_a, self.initial_b, self.scaling)

    def linear_terms(self) -> Projection:
        if self.adapter_enabled or self.merged:
            return super().linear_terms()
        return Projection(self.weight, self.bias, self.initial_a, self.initial_b, self.scaling)


def _start(layer: PrincipalLoRALinear | ResidualNF4LoRALinear, factors: Factors | None) -> None:
    """The trained factors and the initial ones from `factors`; None on the meta device, where nothing is computed."""
    if factors is not None:
        with torch.no_grad():
            layer.lora_A.copy_(factors[0])
            layer.lora_B.copy_(factors[1])
    layer.register_buffer("initial_a", layer.lora_A.detach().clone())
    layer.register_buffer("initial_b", layer.lora_B.detach().clone())
