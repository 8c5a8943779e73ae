"""Full fine-tuning: every parameter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .config import MethodConfig, check_names
from .in_place import InPlaceAdaptation, InPlaceConfig, trained_names
from .matching import is_within, names_match, near_names
from .trained import saved_modules


@dataclass(frozen=True)
class FullConfig(InPlaceConfig):
    """Full fine-tuning for `adapt`: all parameters are trained, in place and in the dtype that they have.

    exclude_modules: modules that stay frozen: names matched exactly or as the last components of a module's path, or a
        regular expression that matches the whole path. For tables that are no weights (the encoder's positions of
        Whisper), routers, a vision tower.
    fp32_masters, layers_pattern: as for PartialConfig; the latter for LayerwiseSchedule.
    modules_to_save, task_type: taken for the sake of one interface; what they name is trained anyway.

    Raises:
        TypeError, ValueError: values of the wrong type, an unknown task type.
    """

    exclude_modules: Collection[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("exclude_modules", self.exclude_modules)


@dataclass
class FullAdaptation(InPlaceAdaptation):
    """Every parameter is trained."""

    method: ClassVar[str] = "full fine-tuning"
    config: FullConfig

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> FullAdaptation:
        """Raises ValueError: quantised weights; exclude_modules or modules_to_save matches no module."""
        assert isinstance(config, FullConfig)
        saved_modules(model, config)
        excluded = []
        if config.exclude_modules:
            excluded = [path for path, _ in model.named_modules() if path and names_match(config.exclude_modules, path)]
            if not excluded:
                wanted = config.exclude_modules
                near = near_names(model, [wanted] if isinstance(wanted, str) else wanted)
                raise ValueError(f"exclude_modules={wanted!r} matches no module; {near}")
        return cls(config, trained_names(model, lambda name: not is_within(name, excluded)))
