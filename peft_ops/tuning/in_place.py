"""Full and partial fine-tuning: weights of the model itself are trained, and no copy of what they were is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from ..nn.nf4_linear import NF4Storage
from .adaptation import Adaptation
from .checkpointing import close_embeddings, close_inputs, open_inputs
from .config import MethodConfig, check_names
from .layers import layer_stacks
from .matching import is_within
from .trained import get_tensor


@dataclass(frozen=True)
class InPlaceConfig(MethodConfig):
    """What the configs of full and partial fine-tuning share.

    fp32_masters: `optimizer_for` keeps a float32 master of every trained 16-bit parameter; see MasterWeights. An
        optimizer of your own making has to be wrapped in MasterWeights.
    layers_pattern: path, or end of the path, of the list that the layers are in (an nn.ModuleList or nn.Sequential), or
        a regular expression for it; None finds it.
    modules_to_save, task_type: see MethodConfig.
    """

    fp32_masters: bool = False
    layers_pattern: Collection[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("fp32_masters", self.fp32_masters)
        check_names("layers_pattern", self.layers_pattern)


@dataclass
class InPlaceAdaptation(Adaptation):
    """trained: names of parameters (tied ones once) and of the buffers beside them. There are no originals.
    opened: whether the layers see to reentrant checkpointing themselves.
    """

    config: InPlaceConfig
    opened: bool = False

    def install(self, model: nn.Module) -> None:
        layers = [path for stack in layer_stacks(model, self.config.layers_pattern) for path in stack]
        self.opened = open_inputs(model, layers)

    def start_training(self, model: nn.Module) -> None:
        for name in self.trained:
            tensor = get_tensor(model, name)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)

    def prepare_checkpointing(self, model: nn.Module) -> None:
        if self.opened:
            close_embeddings(model)
        else:
            super().prepare_checkpointing(model)

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        raise ValueError(
            f"{self.method} trains the weights in place and keeps no copy of the base model: load the base again"
        )

    def merge(self, model: nn.Module, requantize: bool) -> None:
        """The trained weights stay where they are."""
        close_inputs(model)


def trained_names(model: nn.Module, chosen: Callable[[str], bool]) -> list[str]:
    """Names of the parameters that are `chosen` by a name of theirs (each once), and of the buffers that are.

    Raises:
        ValueError: a weight in NF4 or another integer type; one tied to a tensor that is not chosen; nothing is chosen.
    """
    for path, module in model.named_modules():
        if isinstance(module, NF4Storage) and chosen(f"{path}.packed"):
            raise ValueError(f"{path} is quantised to NF4 and cannot be trained in place: leave it out, or use LoRA")
    names = []
    for aliases in _parameters(model):
        taken = [name for name in aliases if chosen(name)]
        if not taken:
            continue
        parameter = get_tensor(model, taken[0])
        if not parameter.is_floating_point():
            raise ValueError(f"{taken[0]} ({parameter.dtype}) cannot be trained in place: leave it out, or use LoRA")
        outside = [name for name in aliases if name not in taken and not _held_around(name, taken)]
        if outside:
            raise ValueError(
                f"{taken[0]} is tied to {outside[0]}, which is to stay frozen: train both, neither, or untie them"
            )
        names.append(taken[0])
    kept = model.state_dict().keys()
    names += [name for name, _ in model.named_buffers() if name in kept and chosen(name)]
    if not any(isinstance(get_tensor(model, name), nn.Parameter) for name in names):
        raise ValueError("the config leaves nothing to train")
    return names


def chosen_within(paths: Collection[str]) -> Callable[[str], bool]:
    """Whether a tensor lies in one of the modules."""
    return lambda name: is_within(name, paths)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _parameters(model: nn.Module) -> list[list[str]]:
    """All names of every parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _held_around(name: str, taken: list[str]) -> bool:
    """The tensor is a parameter of a module that a chosen one lies in, as the bias of BERT's output head is."""
    owner = name.rpartition(".")[0]
    return any(is_within(other, [owner]) or not owner for other in taken)
