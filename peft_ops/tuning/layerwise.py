"""Fine-tuning layer by layer, from the bottom up or from the top down."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .adaptation import require_adaptation, require_enabled
from .config import check_choice, check_count
from .in_place import InPlaceConfig
from .layers import embedding_paths, layer_stacks
from .matching import is_within
from .optimizer import trained_parameters
from .trained import get_tensor, saved_modules


class LayerwiseSchedule:
    """Trains an adapted model layer by layer; call `step()` in the training loop after `optimizer.step()`.

    At first the lowest layer is trained; after every `steps_per_layer` calls of `step` the next one joins, until all
    that the model's config trains are trained. Only requires_grad changes: the optimizer holds every parameter from the
    start, so its groups and any learning-rate scheduler stay as they are. A layer's state (Adam's moments and count of
    steps) is made at its first step, a frozen parameter has no gradient and so neither moves, nor decays.

    Embeddings belong to the first layer; the final norm and the output head to the last. modules_to_save and the heads
    of a task_type are trained throughout. The layers of an encoder-decoder model follow upon each other. Where torch
    compiles the model it does so again at every change; wrap a model in DistributedDataParallel with
    find_unused_parameters=True, and before the schedule is made.

    Args:
        model: as adapted by FullConfig, PartialConfig (then of its layers), LoRAConfig or whatever trains in layers.
        optimizer: over all that the model's method trains, as `optimizer_for` makes it. It is only looked at.
        steps_per_layer: calls of `step`, per optimizer step or per epoch as you like, from one layer to the next.
        milestones: the counts of calls instead at which the second, third, ... layer starts.
        mode: 'cumulative' (layers stay trained) or 'single' (one layer at a time; the others are frozen).
        order: 'bottom-up', or 'top-down', the gradual unfreezing of ULMFiT; only that one makes early steps cheaper by
            ending the backward early.

    Raises:
        TypeError: settings of the wrong type.
        ValueError: settings out of range; a model that is not adapted or has no layers that are trained; an optimizer
            that lacks parameters. The model is then left as it was.

    Source: Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018, section 3.3.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, steps_per_layer: int | None = None,
        milestones: Sequence[int] | None = None, mode: str = "cumulative", order: str = "bottom-up",
    ) -> None:  # fmt: skip
        require_enabled(model)
        check_choice("mode", mode, ("cumulative", "single"))
        check_choice("order", order, ("bottom-up", "top-down"))
        self.layers, self._stages, always = _stages_of(model, top_down=order == "top-down")
        self.milestones = _milestones(steps_per_layer, milestones, len(self.layers))
        self.mode, self.order, self.steps = mode, order, 0
        self._model, self._always = model, always
        self._check_optimizer(optimizer)
        self._set_trained()

    @property
    def stage(self) -> int:
        """Which of `layers` was unfrozen last."""
        return bisect_right(self.milestones, self.steps)

    @property
    def trained_layers(self) -> list[str]:
        """Paths of the layers that are trained now."""
        return self.layers[self.stage if self.mode == "single" else 0 : self.stage + 1]

    def step(self) -> bool:
        """Counts one step (or epoch). True where another layer is trained from now on."""
        require_enabled(self._model)
        before = self.stage
        self.steps += 1
        if self.stage != before:
            self._set_trained()
        return self.stage != before

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and what it means something for."""
        return {"steps": self.steps, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at that count, with the layers frozen and trained as they were then.

        Raises:
            TypeError, ValueError: no such state; one of another schedule or of another model.
        """
        require_enabled(self._model)
        expected = self._identity()
        if not isinstance(state, dict) or state.keys() != {"steps", *expected}:
            raise TypeError(f"state must be what LayerwiseSchedule.state_dict gives, got {state!r:.200}")
        check_count("steps", state["steps"], least=0)
        for name in ("mode", "order", "milestones"):
            if state[name] != expected[name]:
                raise ValueError(f"the state is of a schedule with {name}={state[name]!r}, not {expected[name]!r}")
        if state["model"] != expected["model"]:
            raise ValueError(
                f"the state is of another model: names or shapes of its layers are not those of {self._described()}"
            )
        self.steps = state["steps"]
        self._set_trained()

    def __repr__(self) -> str:
        return (
            f"LayerwiseSchedule({self.mode}, {self.order}, milestones={self.milestones}, steps={self.steps}: "
            f"{', '.join(self.trained_layers)})"
        )

    def _set_trained(self) -> None:
        first = self.stage if self.mode == "single" else 0
        trained = {name for stage in self._stages[first : self.stage + 1] for name in stage}.union(self._always)
        for name in [name for stage in self._stages for name in stage]:
            parameter = get_tensor(self._model, name)
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = trained_parameters(self._model)
        missing = [name for name, p in parameters.items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"optimizer lacks {len(missing)} of the {len(parameters)} parameters that are to be trained "
                f"({missing[0]}, ...): make it with peft_ops.optimizer_for(model, ...)"
            )

    def _identity(self) -> dict[str, Any]:
        parameters = trained_parameters(self._model)
        shapes = [[(name, tuple(parameters[name].shape)) for name in stage] for stage in (*self._stages, self._always)]
        fingerprint = hashlib.sha256(repr(shapes).encode()).hexdigest()
        return {"mode": self.mode, "order": self.order, "milestones": self.milestones, "model": fingerprint}

    def _described(self) -> str:
        return f"{type(self._model).__name__} with {len(self.layers)} layers ({self.layers[0]}, ...)"


def _stages_of(model: nn.Module, top_down: bool) -> tuple[list[str], list[list[str]], list[str]]:
    """(paths of the layers that are trained, the names of the parameters of each with what goes along, the rest)."""
    config = require_adaptation(model).config
    stacks = layer_stacks(model, config.layers_pattern if isinstance(config, InPlaceConfig) else None)
    layers = [path for stack in stacks for path in stack]
    parameters, throughout = list(trained_parameters(model)), saved_modules(model, config)[1]
    within: dict[str, list[str]] = {
        path: [name for name in parameters if name.startswith(f"{path}.") and not is_within(name, throughout)]
        for path in layers
    }
    within = {path: names for path, names in within.items() if names}
    if not within:
        raise ValueError(f"{type(model).__name__} as it is adapted has no layers that are trained")
    embeddings, placed = embedding_paths(model, layers), {name for names in within.values() for name in names}
    always = []
    for name in parameters:
        if is_within(name, throughout):
            always.append(name)
        elif name not in placed:
            after = 0 if is_within(name, embeddings) else layers.index(_last_layer(stacks, name))
            home = next((path for path in within if layers.index(path) >= after), list(within)[-1])
            within[home].append(name)
    paths = list(within)[:: -1 if top_down else 1]
    return paths, [within[path] for path in paths], always


def _last_layer(stacks: list[list[str]], name: str) -> str:
    """Of the stack beside which `name` lies (the encoder's final norm: the encoder's), else of the last one."""

    def beside(stack: list[str]) -> str:
        return stack[0].rpartition(".")[0].rpartition(".")[0]

    near = [stack for stack in stacks if beside(stack) and name.startswith(f"{beside(stack)}.")]
    return max(near, key=lambda stack: len(beside(stack)), default=stacks[-1])[-1]


def _milestones(steps_per_layer: int | None, milestones: Sequence[int] | None, layers: int) -> list[int]:
    """The counts of steps at which the second, third, ... layer starts."""
    if (steps_per_layer is None) == (milestones is None):
        raise ValueError("give one of steps_per_layer and milestones")
    if milestones is None:
        check_count("steps_per_layer", steps_per_layer)
        assert steps_per_layer is not None
        return [steps_per_layer * i for i in range(1, layers)]
    for count in milestones:
        check_count("milestones", count)
    if len(milestones) != layers - 1 or sorted(set(milestones)) != list(milestones):
        raise ValueError(
            f"milestones must be {layers - 1} rising counts, one for each of {layers} layers but the first, "
            f"got {list(milestones)}"
        )
    return list(milestones)
