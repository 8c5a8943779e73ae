"""The base model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .adaptation import adaptation_of
from .lora_layers import layers_off, lora_layers


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what it did before it was adapted (over NF4: with the quantised weights).

    Trained biases and modules_to_save step aside for the originals, merged adapters are taken out. Nests, and ends the
    same way by an exception. A checkpointed forward run here must also be run backward here: it is computed again then.

    Raises:
        ValueError: the model has no adapters; full or partial fine-tuning, which keep no copy of the base.
    """
    adaptation = adaptation_of(model)
    if adaptation is None and not lora_layers(model):
        raise ValueError(f"model ({type(model).__name__}) has no adapters to disable")
    with layers_off(model) if adaptation is None else adaptation.switched_off(model):
        yield model
