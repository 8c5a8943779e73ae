"""Prompts and completions as padded batches, sampling, and the hidden states that log-probs are taken of.

Prompts are padded on the left and completions on the right, so that every completion starts in the same column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class Completions:
    """prompts: int64 [B, P]; completions: int64 [B, C]. prompt_mask, mask: bool, False on padding.

    The mask of a completion holds its end token and nothing after it.
    """

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    completions: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: torch.Tensor | slice) -> Completions:
        return Completions(self.prompts[rows], self.prompt_mask[rows], self.completions[rows], self.mask[rows])

    @property
    def targets(self) -> torch.Tensor:
        """The completions, -100 where the mask is False."""
        return torch.where(self.mask, self.completions, IGNORED)

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat([self.prompts, self.completions], dim=1)

    @property
    def attention_mask(self) -> torch.Tensor:
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    @property
    def last(self) -> torch.Tensor:
        """Where each completion ends: int64 [B], an index into [B, C]; 0 for one without tokens."""
        return (self.mask.sum(dim=1) - 1).clamp(min=0)

    def lists(self) -> list[list[int]]:
        """The tokens of every completion, without padding."""
        return [row[kept].tolist() for row, kept in zip(self.completions, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> Completions:
        return Completions(*(t.to(device) for t in (self.prompts, self.prompt_mask, self.completions, self.mask)))


def pad(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Completions:
    """Lists of tokens as one batch; every prompt has at least one token.

    Raises:
        ValueError: an empty prompt, or lists of different length.
    """
    if len(prompts) != len(completions) or not all(prompts):
        raise ValueError("every completion needs a prompt of at least one token")
    wide, long = max(map(len, prompts)), max(1, *map(len, completions))
    left = [([0] * (wide - len(p)) + list(p), [False] * (wide - len(p)) + [True] * len(p)) for p in prompts]
    right = [(list(c) + [0] * (long - len(c)), [True] * len(c) + [False] * (long - len(c))) for c in completions]
    return Completions(*(torch.tensor(column) for side in (left, right) for column in zip(*side, strict=True)))


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count what is no padding; 0 on padding at the left."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def completion_hidden(model: Any, batch: Completions) -> torch.Tensor:
    """[B, C, K]: hidden[b, t] predicts completions[b, t], for Head.log_probs.

    model: a causal language model of transformers, whose backbone is run; no logits are made.
    """
    return sequence_hidden(model, batch)[:, batch.prompts.shape[1] - 1 : -1]


def sequence_hidden(model: Any, batch: Completions) -> torch.Tensor:
    """[B, P + C, K]: the backbone's last hidden states."""
    mask = batch.attention_mask
    output = model.base_model(
        input_ids=batch.tokens, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    )
    return output.last_hidden_state


@torch.no_grad()
def sample(
    model: Any, prompts: torch.Tensor, prompt_mask: torch.Tensor, max_new_tokens: int, end: int,
    temperature: float = 1.0, generator: torch.Generator | None = None, min_new_tokens: int = 0,
) -> Completions:  # fmt: skip
    """Sample a completion of every prompt with a KV cache, until `end` or max_new_tokens.

    prompts: int64 [B, P], padded on the left; prompt_mask: bool [B, P]. temperature 0 takes the likeliest token.
    min_new_tokens: so many come before `end`, which is not drawn earlier.
    generator: on the CPU, where the draws are made, so that they do not depend on the device's generator.

    Raises:
        ValueError: a temperature below 0, or no tokens to sample.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(f"temperature must be >= 0 and max_new_tokens >= 1, got {temperature} and {max_new_tokens}")
    mask, tokens, cache = prompt_mask.long(), prompts, None
    position = position_ids(mask)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    drawn, kept = [], []
    for number in range(max_new_tokens):
        output = model(
            input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        logits = output.logits[:, -1]
        if number < min_new_tokens:
            logits[:, end] = -torch.inf
        token = torch.where(open_rows, _draw(logits, temperature, generator), end)
        drawn.append(token)
        kept.append(open_rows)
        open_rows = open_rows & (token != end)
        if not open_rows.any():
            break
        tokens, position = token[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return Completions(prompts, prompt_mask, torch.stack(drawn, dim=1), torch.stack(kept, dim=1))


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.float() / temperature).softmax(dim=-1).cpu()
    return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
