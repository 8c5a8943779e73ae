"""The loss of a causal language model; over a large vocabulary it is taken of hidden states, and no logits are made."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from ..nn import head_of
from .data import IGNORED, Sequences

_SMALL = 4096  # a vocabulary whose logits are no larger than what the layers keep
_fits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def loss_sum(model: Any, sequences: Sequences, dtype: torch.dtype) -> torch.Tensor:
    """The cross entropy of every label that counts, summed, in float32."""
    wider = next(model.parameters()).dtype.itemsize > dtype.itemsize
    with torch.autocast(sequences.tokens.device.type, dtype if wider else torch.bfloat16, enabled=wider):
        if loss_of_hidden_states(model):
            hidden = model.base_model(input_ids=sequences.tokens, use_cache=False).last_hidden_state
            return -head_of(model).log_probs(hidden, sequences.labels, ignore_index=IGNORED).logp.sum()
        logits = model(input_ids=sequences.tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences.labels.flatten(), reduction="sum")


def loss_of_hidden_states(model: Any) -> bool:
    """Whether the vocabulary is large, and head_of(model) makes the model's logits of its base's last hidden states.

    That is tried out on four tokens, once for a model.
    """
    if model not in _fits:
        config = getattr(model, "config", None)
        large = config is not None and config.get_text_config().vocab_size > _SMALL
        _fits[model] = large and model.base_model is not model and _agree(model)
    return _fits[model]


@torch.no_grad()
def _agree(model: Any) -> bool:
    tokens, training = torch.arange(4, device=next(model.parameters()).device)[None], model.training
    model.eval()
    try:
        expected = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)[..., 0]
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        found = head_of(model).log_probs(hidden, torch.zeros_like(tokens)).logp
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.05, atol=0.05)
    except (TypeError, ValueError, AttributeError):  # another kind of head, or of output
        return False
    finally:
        model.train(training)
