"""Virtual tokens in the input of a transformers model, put there by hooks; nothing of them is seen from outside."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class VirtualTokens(nn.Module):
    """Holds the encoder of n virtual tokens and the hooks that put them in.

    Before the input: `before` and `after` go on a stack of layers whose forward takes inputs_embeds. The embeddings
    enter where the cache is empty; attention_mask, position_ids and token_type_ids grow by n; hidden states lose their
    first n places again, unless other layers must see them (`trims` False: an encoder with a decoder over it, whose
    `longer_memory` then widens the mask). In a template: `hide_ids` and `replace` go on the input embedding.

    positions: how many the model has, None where it has no table of them. arguments, decoder_arguments: names of those
    that the forward of the stack, and of the decoder over it, takes, in order.
    """

    def __init__(
        self, encoder: nn.Module, n: int, positions: int | None, pseudo_token_id: int | None,
        arguments: list[str], decoder_arguments: list[str] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.n, self.positions, self.pseudo_token_id = encoder, n, positions, pseudo_token_id
        self.arguments, self.decoder_arguments, self.trims = arguments, decoder_arguments, decoder_arguments is None
        self.enabled = True
        self._added = 0  # by `before`, for `after`
        self._pseudo: torch.Tensor | None = None  # found by `hide_ids`, for `replace`

    def before(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the stack."""
        self._added = 0
        if not self.enabled:
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = self._longer(kwargs["attention_mask"], "attention_mask")
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = positions = positions + self.n
        if seen:  # with the virtual tokens in front
            return (), kwargs
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            embeddings = stack.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
        batch, length, _ = embeddings.shape
        if self.positions is not None and self.n + length > self.positions:
            raise ValueError(
                f"{self.n} virtual tokens and {length} tokens of input are more than the {self.positions} positions "
                "that the model has"
            )
        prompt = self.encoder().to(embeddings.dtype).expand(batch, -1, -1)
        kwargs["inputs_embeds"] = torch.cat((prompt, embeddings), dim=1)
        if positions is not None:
            first = torch.arange(self.n, device=positions.device, dtype=positions.dtype)
            kwargs["position_ids"] = torch.cat((first.expand(*positions.shape[:-1], -1), positions), dim=-1)
        types = kwargs.get("token_type_ids")
        if types is not None:
            kwargs["token_type_ids"] = torch.cat((types.new_zeros(batch, self.n), types), dim=1)
        self._added = self.n
        return (), kwargs

    def after(self, stack: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the stack."""
        if not (self._added and self.trims):
            return None
        if isinstance(output, tuple):
            return (output[0][:, self.n :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.n :]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(states[:, self.n :] for states in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(weights[:, :, self.n :] for weights in output.attentions)
        return output

    def longer_memory(
        self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of a decoder: what it sees of the encoder is n longer than the mask that came with it."""
        assert self.decoder_arguments is not None
        kwargs = dict(zip(self.decoder_arguments, args, strict=False)) | kwargs
        mask, memory = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if self.enabled and mask is not None and memory is not None and memory.shape[1] == mask.shape[-1] + self.n:
            kwargs["encoder_attention_mask"] = self._longer(mask, "encoder_attention_mask")
        return (), kwargs

    def _longer(self, mask: Any, name: str) -> torch.Tensor:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            given = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"{name} must be [batch, tokens] in a model with virtual tokens, got {given} "
                "(a compiled or static cache makes a mask of four: generate with the default cache)"
            )
        return torch.cat((mask.new_ones(mask.shape[0], self.n), mask), dim=1)

    def hide_ids(self, embedding: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Forward pre-hook of the input embedding: pseudo tokens need not be in its vocabulary."""
        self._pseudo = None
        if not self.enabled:
            return None
        pseudo = torch.eq(args[0], self.pseudo_token_id)  # type: ignore[arg-type]
        counts = pseudo.sum(-1)
        self._check_counts((counts == self.n) | (counts == 0), counts)
        self._pseudo = pseudo
        return (args[0].masked_fill(pseudo, 0),)

    def replace(self, embedding: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the input embedding: the i-th pseudo token of a row is the i-th virtual token."""
        if self._pseudo is None:
            return None
        pseudo, self._pseudo = self._pseudo, None
        index = (pseudo.cumsum(-1) - 1).clamp_(0, self.n - 1)
        return torch.where(pseudo[..., None], self.encoder().to(output.dtype)[index], output)

    def _check_counts(self, right: torch.Tensor, counts: torch.Tensor) -> None:
        """Without waiting for a GPU, which reports it as an assertion of its own."""
        message = f"a row must hold {self.n} pseudo tokens (id {self.pseudo_token_id}), as the template has, or none"
        if right.device.type == "cpu" and not torch.compiler.is_compiling():
            if not right.all():
                raise ValueError(f"{message}; got {counts[~right].tolist()}")
        elif not right.is_meta:
            torch._assert_async(right.all(), message)

    def extra_repr(self) -> str:
        where = "before the input" if self.pseudo_token_id is None else f"in the place of token {self.pseudo_token_id}"
        return f"{self.n} virtual tokens {where}" + ("" if self.enabled else ", disabled")


def argument_names(module: nn.Module) -> list[str]:
    """Of a module's forward, in order."""
    return list(inspect.signature(module.forward).parameters)
