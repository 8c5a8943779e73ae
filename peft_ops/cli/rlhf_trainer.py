"""What the stages of RLHF have in common: adapters by name over one base, steps that resume to the bit."""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import LoRAConfig, adapt, adapter_names, save_adapter, set_adapter
from ..tuning.optimizer import trained_parameters
from .data import batch_rows
from .errors import UserError, as_user_error
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
    heads: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.tokenizer.end[0]


@contextmanager
def active(model: Any, adapter_name: str) -> Iterator[None]:
    """An adapter is active for a while, then the one before it is again."""
    before = adapter_names(model)[0]
    set_adapter(model, adapter_name)
    try:
        yield
    finally:
        set_adapter(model, before)


def add_adapter(model: Any, name: str, config: LoRAConfig, source: str) -> None:
    """A new adapter that starts as a copy of `source`."""
    adapt(model, config, adapter_name=name)
    with active(model, source):
        tensors = {key: p.detach().clone() for key, p in trained_parameters(model).items()}
    with active(model, name), torch.no_grad():
        for key, p in trained_parameters(model).items():
            p.copy_(tensors[key])


class Stage(ABC):
    """A stage: its adapter, further parameters of its own, a step and a measurement."""

    name: str
    needs: tuple[str, ...] = ("sft",)
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

    def own_heads(self) -> dict[str, nn.Module]:
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


@dataclass
class StageHistory:
    """steps: metrics of every step; seconds: its time. held_out: (steps done, metrics)."""

    steps: list[Metrics] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, Metrics]] = field(default_factory=list)


class StageObserver(Protocol):
    """What is shown while a stage runs."""

    def show(self, done: int, text: str) -> None: ...

    def note(self, done: int, text: str) -> None: ...


class StageTrainer:
    """A stage and how far it is; for RunFolder."""

    def __init__(self, stage: Stage, observer: StageObserver | None = None) -> None:
        self.stage, self.options, self.observer = stage, stage.options, observer
        self.history = StageHistory()

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history.steps)

    def run(self, after_step: Callable[["StageTrainer"], None] = lambda trainer: None) -> StageHistory:
        """To the last step; `after_step` is called between steps, when everything is consistent."""
        while self.done < self.options.steps:
            if self.done % self.options.evaluate_every == 0:
                self._evaluate()
            self._step()
            if self.done == self.options.steps:
                self._evaluate()
            after_step(self)
        return self.history

    def _step(self) -> None:
        started = time.perf_counter()
        for group in self.stage.optimizer.param_groups:
            group["lr"] = self.options.lr_at(self.done)
        metrics = self.stage.step(self.done)
        self.history.steps.append(metrics)
        self.history.seconds.append(time.perf_counter() - started)
        if self.observer:
            self.observer.show(self.done, shown(metrics))

    def _evaluate(self) -> None:
        if self.history.held_out and self.history.held_out[-1][0] == self.done:
            return
        metrics = self.stage.evaluate()
        self.history.held_out.append((self.done, metrics))
        if self.observer:
            self.observer.note(self.done, f"held out: {shown(metrics)}")

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on."""
        return {
            "parameters": {name: p.detach() for name, p in self.stage.parameters.items()},
            "optimizer": self.stage.optimizer.state_dict(),
            "history": vars(self.history),
        }

    def load_state(self, state: dict[str, Any], source: object) -> None:
        """Go on from `state`; UserError naming `source` where it does not fit."""
        parameters = self.stage.parameters
        if {k: t.shape for k, t in state["parameters"].items()} != {k: p.shape for k, p in parameters.items()}:
            raise UserError(f"{source} does not fit the model; --restart starts over")
        with as_user_error(f"{source} does not fit the optimizer: "):
            self.stage.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["parameters"][name])
        self.history = StageHistory(**state["history"])

    def fingerprint(self) -> str:
        """The same for the same parameters, to the bit."""
        digest = hashlib.sha256()
        for name, p in sorted(self.stage.parameters.items()):
            digest.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def shown(metrics: Metrics) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
