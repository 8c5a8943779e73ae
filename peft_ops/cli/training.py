"""The training loop: AdamW, warm-up and cosine; resumable to the bit, as every step is a function of (seed, step)."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .. import LayerwiseSchedule, lora_plus_groups
from ..tuning.adaptation import adaptation_of
from ..tuning.optimizer import trained_parameters
from .data import IGNORED, Sequences, Split, batch
from .errors import UserError, as_user_error
from .loss import loss_sum

_FINAL_LR = 0.1  # of the peak, where the cosine ends


@dataclass(frozen=True)
class Options:
    """How to train. dtype: what is computed in; weights that are wider are cast by autocast.

    layerwise: layers are trained from the bottom up, each joining after an equal share of the steps. lora_plus: B's
    learning rate over A's.
    """

    steps: int
    batch_size: int
    lr: float
    accumulation: int = 1
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    evaluate_every: int = 20
    checkpoint_every: int = 50
    layerwise: bool = False
    lora_plus: float | None = None

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to a tenth of it."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (_FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class History:
    """losses, seconds: one per step. held_out: (steps done, loss). Losses are means in nats per token."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Observer(Protocol):
    """What is shown while training."""

    def step(self, done: int, loss: float, tokens_per_second: float) -> None: ...

    def held_out(self, done: int, loss: float) -> None: ...


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name: what the method of an adapted model trains, now or later; of another model, what requires a gradient."""
    if adaptation_of(model) is not None:
        return trained_parameters(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def counted(sequences: Sequences) -> int:
    """How many labels count."""
    return int((sequences.labels != IGNORED).sum())


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Sequences, options: Options) -> float:
    """Mean loss over `sequences`, without dropout."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    parts = [sequences[i : i + options.batch_size].to(device) for i in range(0, len(sequences), options.batch_size)]
    total = sum(loss_sum(model, part, options.dtype).item() for part in parts)
    model.train(training)
    return total / counted(sequences)


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """AdamW over what is trained; with "adamw8bit", that of bitsandbytes, whose state is 8-bit."""
    groups: list[dict[str, Any]] = [{"params": list(trained(model).values()), "lr": 1.0}]
    if options.lora_plus is not None:
        groups = lora_plus_groups(model, 1.0, options.lora_plus, options.weight_decay)
    for group in groups:
        group["share"] = group["lr"]  # of the learning rate of a step
    settings: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    device = groups[0]["params"][0].device.type
    if device != "cuda":
        raise UserError(f"--optim adamw8bit needs a GPU, got --device {device}")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--optim adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(groups, **settings)


class Trainer:
    """A model, its optimizer and how far they are."""

    def __init__(self, model: nn.Module, data: Split, options: Options, observer: Observer | None = None) -> None:
        self.model, self.data, self.options, self.observer = model, data, options, observer
        self.optimizer = make_optimizer(model, options)
        self.schedule: LayerwiseSchedule | None = None
        if options.layerwise:
            layers = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
            self.schedule = LayerwiseSchedule(model, self.optimizer, max(1, options.steps // layers))
        self.history = History()
        self.device = next(model.parameters()).device

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history.losses)

    def run(self, after_step: Callable[["Trainer"], None] = lambda trainer: None) -> History:
        """Train to the last step; `after_step` is called between steps, when everything is consistent."""
        self.model.train()
        while self.done < self.options.steps:
            if self.done % self.options.evaluate_every == 0:
                self._evaluate()
            self.step()
            after_step(self)
        self._evaluate()
        return self.history

    def _evaluate(self) -> None:
        if self.history.held_out and self.history.held_out[-1][0] == self.done:
            return
        loss = evaluate(self.model, self.data.held_out, self.options)
        self.history.held_out.append((self.done, loss))
        if self.observer:
            self.observer.held_out(self.done, loss)

    def step(self) -> None:
        """One step of the optimizer."""
        options, started = self.options, time.perf_counter()
        torch.manual_seed((options.seed << 32) + self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr_at(self.done) * group["share"]
        sequences = batch(self.data.train, options.batch_size * options.accumulation, options.seed, self.done)
        count, total = counted(sequences), 0.0
        for i in range(0, len(sequences), options.batch_size):
            loss = loss_sum(self.model, sequences[i : i + options.batch_size].to(self.device), options.dtype) / count
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise UserError(f"the loss is {total} at step {self.done + 1}: give a smaller --lr")
        nn.utils.clip_grad_norm_(trained(self.model).values(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        seconds = time.perf_counter() - started
        self.history.losses.append(total)
        self.history.seconds.append(seconds)
        if self.observer:
            self.observer.step(self.done, total, sequences.tokens.numel() / seconds)

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on."""
        return {
            "parameters": {name: p.detach() for name, p in trained(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "history": vars(self.history),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state(self, state: dict[str, Any], source: object) -> None:
        """Go on from `state`; UserError naming `source` where it does not fit the model, which then stays as it was."""
        parameters = trained(self.model)
        expected = {name: p.shape for name, p in parameters.items()}
        found = {name: t.shape for name, t in state["parameters"].items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(f"{source} does not fit the model: {', '.join(wrong[:5])} differ; --restart starts over")
        with as_user_error(f"{source} does not fit the optimizer: "):
            self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            with as_user_error(f"{source} does not fit the schedule: "):
                self.schedule.load_state_dict(state["schedule"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["parameters"][name])
        self.history = History(**state["history"])
