"""What the stages of RLHF have in common: adapters by name over one base, steps that are functions of their number."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import LoRAConfig, adapt, adapter_names, save_adapter, set_adapter
from ..tuning.named import activated
from ..tuning.optimizer import trained_parameters
from .data import batch_rows
from .errors import UserError
from .rlhf_data import Pair, Pairs
from .rlhf_plan import Plan
from .tokenizer import Tokenizer
from .training import Options

Metrics = dict[str, float]


@dataclass(frozen=True)
class Shared:
    """What all stages work on: one model with an adapter per stage, the pairs.

    adapter: the config of the adapters after the first, which is in the model and called sft. heads: by name, those
    that one stage trains and another uses.
    """

    model: Any
    tokenizer: Tokenizer
    pairs: Pairs
    adapter: LoRAConfig
    device: torch.device
    heads: dict[str, nn.Linear] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.tokenizer.end[0]


def add_adapter(model: Any, name: str, config: LoRAConfig, source: str) -> None:
    """A new adapter that starts as a copy of `source`."""
    adapt(model, config, adapter_name=name)
    with activated(model, source):
        tensors = {key: p.detach().clone() for key, p in trained_parameters(model).items()}
    with activated(model, name), torch.no_grad():
        for key, p in trained_parameters(model).items():
            p.copy_(tensors[key])


class Stage(ABC):
    """A stage: its adapter, further parameters of its own, a step and a measurement."""

    name: str
    number: int  # keeps the random draws of stages apart

    def __init__(self, shared: Shared, plan: Plan, options: Options) -> None:
        self.shared, self.plan, self.options = shared, plan, options
        if self.name not in adapter_names(shared.model):
            add_adapter(shared.model, self.name, shared.adapter, "sft")
        set_adapter(shared.model, self.name)
        parameters = {f"model.{name}": p for name, p in trained_parameters(shared.model).items()}
        for key, head in self.own_heads().items():
            parameters |= {f"{key}.{name}": p for name, p in head.named_parameters()}
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True
        )

    def own_heads(self) -> dict[str, nn.Linear]:
        """Modules that the stage trains beside its adapter."""
        return {}

    @abstractmethod
    def step(self, number: int) -> Metrics:
        """One step, a pure function of the parameters, the optimizer's state and the step's number."""

    @abstractmethod
    def evaluate(self) -> Metrics:
        """Measured on what is held out."""

    def save(self, folder: Path) -> None:
        save_adapter(self.shared.model, folder / "adapter")

    def batch(self, number: int) -> list[Pair]:
        """The pairs of a step."""
        train = self.shared.pairs.train
        seed = self.options.seed * 8 + self.number
        return [train[i] for i in batch_rows(len(train), self.options.batch_size, seed, number).tolist()]

    def generator(self, number: int) -> torch.Generator:
        """For the draws of a step; -1: of every measurement."""
        return torch.Generator().manual_seed(((self.options.seed * 8 + self.number) << 32) + number + 1)

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimizer."""
        if not math.isfinite(loss.item()):
            raise UserError(f"{self.name}: the loss is {loss.item()}: give a smaller --lr")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
