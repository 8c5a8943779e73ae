"""The keys and values that a layer's attention sees before those of the text."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .attention_interface import register


class Prefix(nn.Module):
    """Keys [n_kv, n, D] and values [n_kv, n, Dv] of one attention module, trained as they are.

    It lies in the attention module as its child `peft_prefix`, so that it is moved, saved and sharded with its layer;
    nn.attention_interface looks there. They start from N(0, 1), as Hugging Face PEFT's do, or at zero.

    Args:
        n: virtual tokens. heads: key and value heads (fewer than the query's under grouped-query attention).
        key_dim, value_dim: of one head.
        config: what stood in the attention module's `config`, which names the attention that is wrapped.
        dropout: of the keys and of the values, a mask of its own for every row of the batch, in training mode only.
        zero: start at zero. device, dtype: as for nn.Linear.

    Source: Li and Liang, "Prefix-Tuning", 2021; Liu et al., "P-Tuning v2", 2021.
    """

    def __init__(
        self, n: int, heads: int, key_dim: int, value_dim: int, config: Any = None,
        dropout: float = 0.0, zero: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.heads, self.key_dim, self.value_dim = n, heads, key_dim, value_dim
        self.config, self.dropout = config, dropout
        self._add_parameters(zero, device, dtype)

    def _add_parameters(self, zero: bool, device, dtype) -> None:
        start = torch.zeros if zero else torch.randn
        self.key = nn.Parameter(start(self.heads, self.n, self.key_dim, device=device, dtype=dtype))
        self.value = nn.Parameter(start(self.heads, self.n, self.value_dim, device=device, dtype=dtype))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys [n_kv, n, D] and the values [n_kv, n, Dv]."""
        return self.key, self.value

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys [n, n_kv · D] and the values [n, n_kv · Dv] as checkpoints have them, one row a virtual token."""
        key, value = self.forward()
        return key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)

    def set_rows(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take the values of such rows."""
        with torch.no_grad():
            self.key.copy_(key.view(self.n, self.heads, self.key_dim).transpose(0, 1))
            self.value.copy_(value.view(self.n, self.heads, self.value_dim).transpose(0, 1))

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a model pickled by another process
        super().__setstate__(state)
        register()

    def extra_repr(self) -> str:
        return f"n={self.n}, heads={self.heads}, key_dim={self.key_dim}, value_dim={self.value_dim}" + (
            f", dropout={self.dropout}" if self.dropout else ""
        )


class PrefixEncoder(nn.Module):
    """What the layers of one stack share of the reparametrisation: hidden = tanh(embedding W₁ᵀ + b₁), [n, h].

    Args:
        n: virtual tokens. width: of their embeddings. hidden_size: h. device, dtype: as for nn.Linear.

    Source: Li and Liang, "Prefix-Tuning", 2021, section 4.3.
    """

    def __init__(self, n: int, width: int, hidden_size: int, device=None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, width, device=device, dtype=dtype)
        self.linear = nn.Linear(width, hidden_size, device=device, dtype=dtype)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.linear(self.embedding.weight))


class ProjectedPrefix(Prefix):
    """Keys and values = hidden W₂ᵀ + b₂, where W₂ [n_kv · (D + Dv), h] is this layer's part of the second linear layer.

    They are computed where they are used and from parameters alone: once per layer and forward whatever the batch,
    again where gradient checkpointing runs the layer again. The encoder is a child of the model, not of this module.
    """

    def __init__(self, *args, encoder: PrefixEncoder, **kwargs) -> None:
        self._encoder = (encoder,)  # a tuple hides it: it is registered once, at the root of the model
        super().__init__(*args, **kwargs)

    def _add_parameters(self, zero: bool, device, dtype) -> None:
        hidden_size = self._encoder[0].linear.out_features
        out = self.heads * (self.key_dim + self.value_dim)
        self.linear = nn.Linear(hidden_size, out, device=device, dtype=dtype)
        if zero:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.linear.weight
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            both = self.linear(self._encoder[0]())
        key, value = both.split([self.heads * self.key_dim, self.heads * self.value_dim], dim=1)
        shape = (self.n, self.heads, -1)
        return key.view(shape).transpose(0, 1), value.view(shape).transpose(0, 1)

    @torch.no_grad()
    def plain(self) -> Prefix:
        """A Prefix of the keys and values that this one computes."""
        prefix = Prefix(
            self.n, self.heads, self.key_dim, self.value_dim, self.config, self.dropout, zero=True,
            device=self.linear.weight.device, dtype=self.linear.weight.dtype,
        )  # fmt: skip
        prefix.set_rows(*self.rows())
        return prefix.train(self.training)
