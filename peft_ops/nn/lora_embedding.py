"""An embedding with a low-rank adapter beside it."""

import math
from typing import Any, ClassVar

import torch
from torch import nn

from ..ops import lora_embedding
from .lora_layer import LoRALayer
from .lora_linear import check_adapter_arguments

_SCALED = "ScaledWordEmbedding"  # end of the names of transformers' embeddings that multiply by `embed_scale`
_SCALED_FORWARD = {"super", "forward", "embed_scale", "to", "weight", "dtype"}  # all that the forward of one names


def is_embedding(layer: nn.Module) -> bool:
    """An nn.Embedding with nn.Embedding's forward, or one that only multiplies its result by `embed_scale`."""
    if not isinstance(layer, nn.Embedding) or "forward" in vars(layer):
        return False
    return type(layer).forward is nn.Embedding.forward or _is_scaled(layer)


def _is_scaled(layer: nn.Module) -> bool:
    code = getattr(type(layer).forward, "__code__", None)
    return type(layer).__name__.endswith(_SCALED) and code is not None and set(code.co_names) <= _SCALED_FORWARD


class LoRAEmbedding(LoRALayer):
    """y = c · (E[x] + scaling · A[:, x]ᵀ Bᵀ) with E frozen and A, B trained; c is 1 or the embedding's `embed_scale`.

    `weight` [V, d] has the name that it has in the layer replaced; `lora_embedding_A` [r, V] starts at zero and
    `lora_embedding_B` [d, r] as N(0, 1), as in PEFT, both float32 where the base has 16 bits. There is no dropout, as
    in PEFT: lora_dropout is what other layers of the adapter have.

    Made by from_embedding. `padding_idx` and `scale_grad_by_freq` hold for A as they do for the weight.

    Source: Hugging Face PEFT; loralib (Hu et al., "LoRA", 2021), `Embedding`.
    """

    ADAPTER: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")
    weight: nn.Parameter  # [V, d]
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool
    embed_scale: float | torch.Tensor
    _scaled: bool

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError("a LoRAEmbedding is made by LoRAEmbedding.from_embedding(nn.Embedding(...), r=...)")

    @staticmethod
    def from_embedding(
        embedding: nn.Module, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> "LoRAEmbedding":  # fmt: skip
        """An adapter over the very weight of an embedding, which is frozen, not copied.

        init_lora_weights: True or 'gaussian' as above; False draws A from N(0, 1) too, for tests.

        Raises:
            TypeError: another kind of layer, or an nn.Embedding with a forward of its own.
            ValueError: r < 1, lora_dropout outside [0, 1], an unknown initialisation, an embedding with max_norm.
        """
        check_adapter_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        check_embedding(embedding)
        layer = LoRAEmbedding.__new__(LoRAEmbedding)
        nn.Module.__init__(layer)
        layer._share_base(embedding)
        layer._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        return layer.train(embedding.training)

    def _share_base(self, embedding: nn.Module) -> None:
        self._share_attributes(embedding)
        self.register_parameter("weight", embedding._parameters["weight"])
        _share_buffers(embedding, self)
        self._scaled = _is_scaled(embedding)

    def _add_adapter(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init: bool | str) -> None:
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, self.num_embeddings, device=device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, r, device=device, dtype=dtype))
        nn.init.normal_(self.lora_embedding_B)
        if init is False:
            nn.init.normal_(self.lora_embedding_A)
        self._freeze_base()

    def _scale(self) -> float | torch.Tensor | None:
        """c as the base layer uses it, in the dtype of the weight where it is a buffer."""
        if not self._scaled:
            return None
        scale = self.embed_scale
        return scale.to(self.weight.dtype) if isinstance(scale, torch.Tensor) else scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.adapter_enabled:
            y, scale = nn.functional.embedding(x, self.weight, self.padding_idx), self._scale()
            return y if scale is None else y * scale
        return lora_embedding(
            x, self.weight, self.lora_embedding_A, self.lora_embedding_B, self.scaling,
            self.padding_idx, self.scale_grad_by_freq, self._scale(),
        )  # fmt: skip

    def _adapted_weight(self, dtype: torch.dtype) -> torch.Tensor:
        a, b = self.lora_embedding_A.to(dtype), self.lora_embedding_B.to(dtype)
        return self.weight.to(dtype, copy=True).addmm_(a.t(), b.t(), alpha=self.scaling)

    def _base_tensors(self, matrix: torch.Tensor) -> dict[str, Any]:
        return {"weight": nn.Parameter(matrix, requires_grad=False)}

    def to_embedding(self) -> nn.Module:
        """The layer that was replaced, of its own class, with the adapter merged in.

        Raises:
            ValueError: the merged weight holds NaN or infinite values.
        """
        weight = self.weight if self.merged else self._base_tensors(self.merged_weight())["weight"]
        layer = self._rebuilt(weight=weight)
        _share_buffers(self, layer)
        return layer

    def to_base(self) -> nn.Module:
        return self.to_embedding()

    def base(self) -> nn.Module:
        layer = self._rebuilt(weight=self._parameters["weight"])
        _share_buffers(self, layer)
        return layer

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._repr_of_adapter()}"


def _share_buffers(source: nn.Module, into: nn.Module) -> None:
    for name, buffer in source._buffers.items():
        into.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def check_embedding(layer: nn.Module) -> None:
    """Raises TypeError unless `layer` is an embedding by is_embedding, ValueError where it has max_norm."""
    if not is_embedding(layer):
        own = " with a forward of its own" if isinstance(layer, nn.Embedding) else ""
        raise TypeError(
            "embedding must be an nn.Embedding with nn.Embedding's forward, or one that multiplies by embed_scale, "
            f"got {type(layer).__name__}{own}"
        )
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise TypeError(f"embedding.weight must be a floating-point parameter, got {getattr(weight, 'dtype', None)}")
    if layer.max_norm is not None:
        raise ValueError(
            f"the embedding has max_norm={layer.max_norm}, by which its forward rewrites the weight: no adapter fits"
        )
