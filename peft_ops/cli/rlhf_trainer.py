"""Running a stage of RLHF, resumable to the bit."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import UserError, as_user_error
from .rlhf_stage import Metrics, Stage


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
