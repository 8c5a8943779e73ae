"""DoRA: a LoRA layer whose adapted weight is split into a magnitude per output and a direction."""

import torch
from torch import nn

from ..ops import Projection, dora_linear, dora_norm
from .lora_linear import LoRALinear
from .nf4_lora_linear import NF4LoRALinear


class DoRALinear(LoRALinear):
    """y = g ∘ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + bias with g = magnitude / ‖W + scaling · B A‖ of each row.

    A LoRALinear in everything else. `lora_magnitude_vector` [out] is trained with A and B, and starts as the norm, so
    that g = 1. It belongs to the base weight: where another is loaded into the layer, reset_magnitude() follows.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5; the norm detached (4.3).
    """

    ADAPTER = (*LoRALinear.ADAPTER, "lora_magnitude_vector")
    lora_magnitude_vector: nn.Parameter

    def _add_adapter(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init: bool | str) -> None:
        super()._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init)
        self.lora_magnitude_vector = nn.Parameter(self.lora_B.new_empty(self.out_features))
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Make the magnitude the norm of W + scaling · B A as they are, so that the layer computes what LoRA does."""
        if not self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector.copy_(dora_norm(self._matrix(), self.lora_A, self.lora_B, self.scaling))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.adapter_enabled:
            return self._base_forward(x)
        p = self.lora_dropout if self.training else 0.0
        return dora_linear(
            x, self._matrix(), self.bias, self.lora_A, self.lora_B, self.lora_magnitude_vector, self.scaling, p
        )

    def linear_terms(self) -> Projection:
        if self.merged or not self.adapter_enabled:
            return super().linear_terms()
        raise TypeError(
            f"a {type(self).__name__} scales its outputs: it is no weight and low-rank term; use LoRA on it"
        )

    def _adapted_weight(self, dtype: torch.dtype) -> torch.Tensor:
        weight = super()._adapted_weight(dtype)
        norm = torch.linalg.vector_norm(weight, dim=1).clamp_min_(1e-18)
        return weight.mul_((self.lora_magnitude_vector.to(dtype) / norm)[:, None])


class NF4DoRALinear(DoRALinear, NF4LoRALinear):
    """DoRA over a 4-bit base; made by LoRALinear.from_linear(nf4_linear, ..., use_dora=True)."""
