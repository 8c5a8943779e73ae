"""The text's positions behind a prefix of n tokens: position n + i for its token i, as if the prefix were text.

Models make positions where they use them, so they are moved there: by hooks that are methods of modules registered in
the model, and so are copied and pickled with it.
"""

import inspect
from typing import Any

import torch
from torch import nn


class PositionShift(nn.Module):
    """Adds n to the positions that a table of embeddings or a rotary embedding is asked for.

    A plain nn.Embedding is asked by position, and its padding index stays; other modules name an argument position_ids
    or past_key_values_length.
    """

    enabled: bool = True

    def __init__(self, n: int, target: nn.Module) -> None:
        super().__init__()
        self.n, self.padding_idx, self.plain = n, getattr(target, "padding_idx", None), is_plain_embedding(target)
        self.names = list(inspect.signature(type(target).forward).parameters)[1:]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A forward pre-hook. Raises ValueError where positions come from the mask alone."""
        if not self.enabled:
            return None
        if self.plain:
            ids, pad = args[0], self.padding_idx
            moved = ids + self.n if pad is None else torch.where(ids == pad, ids, ids + self.n)
            return (moved, *args[1:]), kwargs
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.n
        elif "attention_mask" in self.names:  # positions counted in the mask, cut by the length of the past
            raise ValueError(f"{type(module).__name__} needs position_ids where there is a prefix: pass them")
        else:
            given["past_key_values_length"] = given.get("past_key_values_length", 0) + self.n
        return (), given


class RelativeShift(nn.Module):
    """Takes the place of `compute_bias` of a T5 attention with a table of relative positions: n columns come first.

    T5 hands the bias of its first layer on to the others, so all of them get [1, H, T, n + S].
    """

    enabled: bool = True

    def __init__(self, n: int, attention: Any) -> None:
        super().__init__()
        self.n, self._attention = n, (attention,)  # a tuple hides it: this module is its child

    def compute_bias(self, query_length: int, key_length: int, device=None, past_seen_tokens=0) -> torch.Tensor:
        """As transformers calls it; past_seen_tokens is a tensor where the cache is static."""
        n, attention = self.n if self.enabled else 0, self._attention[0]
        return type(attention).compute_bias(attention, query_length, n + key_length, device, past_seen_tokens + n)


class PrefixedStack(nn.Module):
    """Looks at what goes into a stack of layers with prefixes.

    Args:
        n: virtual tokens.
        stack: the stack, whose forward has input_ids, inputs_embeds and past_key_values.
        positions: how many there are, or None.
    """

    enabled: bool = True

    def __init__(self, n: int, stack: nn.Module, positions: int | None) -> None:
        super().__init__()
        self.n, self.positions = n, positions
        self.names = list(inspect.signature(type(stack).forward).parameters)[1:]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook.

        Raises:
            ValueError: prefix and text together have more tokens than the model has positions; attention weights are
                asked for.
        """
        if not self.enabled:
            return
        given = dict(zip(self.names, args, strict=False)) | kwargs
        asked = given.get("output_attentions")
        if getattr(module.config, "output_attentions", False) if asked is None else asked:
            raise ValueError("output_attentions must be False: attention over a prefix does not compute the weights")
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()  # a tensor for a static cache: to look would wait for it
        if tokens is not None and self.positions is not None and isinstance(past, int):
            self._check_length(past + tokens.shape[1], self.positions)

    def _check_length(self, text: int, positions: int) -> None:
        if self.n + text > positions:
            raise ValueError(
                f"the text must have at most {positions - self.n} tokens: the model has {positions} "
                f"positions and the prefix takes {self.n}, got {text} tokens"
            )


def is_plain_embedding(module: nn.Module) -> bool:
    """A table that is asked by position, with nothing of its own in forward."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
