"""What gives the embeddings of virtual tokens: a table, or a small network over one."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn


class PromptTable(nn.Module):
    """`embedding` [n, d], trained directly: the prompt of Lester et al., 2021."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)

    def forward(self) -> torch.Tensor:
        return self.embedding


class PromptEncoder(nn.Module):
    """Embeddings [n, d] of n virtual tokens from trained ones, by an MLP or by a bidirectional LSTM and an MLP.

    Args:
        n, d: virtual tokens, width of the model.
        hidden_size: H.
        lstm_layers: of the LSTM, H per direction; 0 for none.
        few_shot: Linear(2H or d, H) - ReLU - Linear(H, d) in the place of the longer heads (see PTuningConfig).

    Source: Liu et al., "GPT Understands, Too", 2021, section 3.2; module names as in Hugging Face PEFT's PromptEncoder.
    """

    def __init__(
        self, n: int, d: int, hidden_size: int, lstm_layers: int = 0, dropout: float = 0.0, few_shot: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(n, d, **made)
        self.lstm_head: nn.LSTM | None = None
        if lstm_layers:
            inner = dropout if lstm_layers > 1 else 0.0
            self.lstm_head = nn.LSTM(
                d, hidden_size, lstm_layers, bidirectional=True, batch_first=True, dropout=inner, **made
            )
        width = 2 * hidden_size if lstm_layers else d
        if few_shot:
            widths = [width, hidden_size, d]
        else:
            widths = [width, width, d] if lstm_layers else [d, hidden_size, hidden_size, d]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, **made), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self) -> torch.Tensor:
        embeddings = self.embedding.weight
        if self.lstm_head is not None:
            embeddings = self.lstm_head(embeddings[None])[0][0]
        return self.mlp_head(embeddings)
