"""The output head of a language model as the log-prob op takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..nf4 import NF4Weight
from ..ops import TokenLogProbs, linear_logprob
from .linear_like import is_conv1d
from .lora_linear import LoRALinear
from .nf4_linear import NF4Linear
from .nf4_lora_linear import NF4LoRALinear


@dataclass(frozen=True)
class Head:
    """weight [V, K] (dense or NF4), bias [V], lora_a [r, K], lora_b [V, r] and what follows the product.

    The logits of hidden states h are cap(logit_scale · (h Wᵀ + bias + scaling · drop(h) Aᵀ Bᵀ)), cap(z) =
    softcap · tanh(z / softcap).
    """

    weight: torch.Tensor | NF4Weight
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def log_probs(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, ignore_index: int = -100,
        entropy: bool = False, reference_hidden: torch.Tensor | None = None,
    ) -> TokenLogProbs:  # fmt: skip
        """See ops.linear_logprob."""
        return linear_logprob(
            hidden, self.weight, self.bias, targets, self.lora_a, self.lora_b, self.scaling, self.dropout_p,
            logit_scale=self.logit_scale, softcap=self.softcap, temperature=temperature, ignore_index=ignore_index,
            entropy=entropy, reference_hidden=reference_hidden,
        )  # fmt: skip


def head_of(model: Any) -> Head:
    """The head of a transformers causal LM as it is now: read it again after every change of the model.

    Raises:
        TypeError: the head is of a kind that the op cannot take (DoRA, PiSSA, LoftQ, another class of layer).
    """
    layer = model.get_output_embeddings()
    scale, softcap = _after_the_product(model.config.get_text_config())
    if isinstance(layer, LoRALinear) and layer.adapter_enabled and not layer.merged:
        if type(layer) not in (LoRALinear, NF4LoRALinear):
            raise TypeError(f"the output head is a {type(layer).__name__}: only plain LoRA on it is a low-rank term")
        p = layer.lora_dropout if layer.training else 0.0
        return Head(layer._matrix(), layer.bias, layer.lora_A, layer.lora_B, layer.scaling, p, scale, softcap)
    if isinstance(layer, LoRALinear):
        return Head(layer._matrix(), layer.bias, logit_scale=scale, softcap=softcap)
    if not isinstance(layer, torch.nn.Linear | NF4Linear) and not is_conv1d(layer):
        raise TypeError(f"the output head is a {type(layer).__name__}, not a linear layer")
    weight = layer.weight.t() if is_conv1d(layer) else layer.weight
    return Head(weight, layer.bias, logit_scale=scale, softcap=softcap)


def _after_the_product(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a text config; families give the scale names of their own."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name), softcap
    scaling = getattr(config, "logits_scaling", None)  # a divisor, but for HyperCLOVA X
    if scaling is None:
        return 1.0, softcap
    return (scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap
