"""Which modules of a model a config names, by the rules of Hugging Face PEFT 0.21."""

import difflib
import re
from collections.abc import Collection, Iterable

from torch import nn

from ..nn import NF4Linear
from ..nn.linear_like import is_linear
from .default_targets import DEFAULT_TARGETS
from .lora_config import LoRAConfig

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")


def resolve_targets(model: nn.Module, config: LoRAConfig, saved: list[str]) -> Collection[str] | str:
    """target_modules with None and 'all-linear' replaced by what they stand for in this model.

    'all-linear' leaves out what is within the `saved` paths, where PEFT fails.

    Raises:
        ValueError: None, and no default for this model's type.
    """
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS:
            raise ValueError(
                f"target_modules must be given: there is no default for model_type {model_type!r}; "
                f"the linear layers are named {', '.join(_last_names(linear_paths(model)))}"
            )
        targets = DEFAULT_TARGETS[model_type]
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        heads = output_heads(model, classification=config.task_type == "SEQ_CLS")
        targets = [path for path in linear_paths(model) if path not in heads and not is_within(path, saved)]
    return targets if isinstance(targets, str) else list(targets)


def target_paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Paths of the modules that a resolved config targets, in the order of the model.

    Raises:
        ValueError: none; the message has the names that come nearest.
    """
    paths = [path for path, _ in model.named_modules() if path]
    matched = [path for path in paths if _is_target(config, path)]
    targets = [path for path in matched if not _is_excluded(config, path)]
    if targets:
        return targets
    names = config.target_modules
    wanted = [names] if isinstance(names, str) else list(names or ())
    if matched:
        raise ValueError(
            f"target_modules={_shown(wanted)} matches only what exclude_modules or modules_to_save takes out: "
            f"{_shown(matched)}"
        )
    layers = "" if config.layers_to_transform is None else f" in layers {config.layers_to_transform}"
    raise ValueError(f"target_modules={_shown(wanted)} matches no module{layers}; {near_names(model, wanted)}")


def is_within(path: str, outer: Iterable[str]) -> bool:
    """`path` is one of the modules `outer` or lies in one."""
    return any(f"{path}.".startswith(f"{module}.") for module in outer)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of every layer that an adapter can go on."""
    return [
        path for path, module in model.named_modules() if path and (is_linear(module) or isinstance(module, NF4Linear))
    ]


def output_heads(model: nn.Module, classification: bool) -> set[str]:
    """The path of the output embedding; in a model without one, where asked for, that of the classification head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and classification:
        head = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    return {path for path, module in model.named_modules() if module is head}


def names_match(names: Collection[str] | str, path: str) -> bool:
    """A string is a regular expression for the whole path; a list has whole paths or their last components."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _is_excluded(config: LoRAConfig, path: str) -> bool:
    if config.exclude_modules and names_match(config.exclude_modules, path):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ())


def _is_target(config: LoRAConfig, path: str) -> bool:
    targets = config.target_modules
    if targets is None or not names_match(targets, path):
        return False
    whole = isinstance(targets, str) or path in targets  # then layers_to_transform has no say, as in PEFT
    return whole or _in_layers(config, path)


def _in_layers(config: LoRAConfig, path: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or (not isinstance(layers, int) and not layers):
        return True
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    patterns = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in lists or ()] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    match = next((m for pattern in patterns if (m := re.match(pattern, path))), None)
    return match is not None and int(match["index"]) in ((layers,) if isinstance(layers, int) else layers)


def near_names(model: nn.Module, wanted: Iterable[str]) -> str:
    """The names of linear layers most like those wanted, or all of them."""
    names = _last_names(linear_paths(model))
    near = [m for name in wanted for m in difflib.get_close_matches(name.rpartition(".")[2], names, cutoff=0.5)]
    if near:
        return f"near names: {', '.join(dict.fromkeys(near))}"
    return f"the linear layers are named {', '.join(names) or '(there are none)'}"


def _last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _shown(names: list[str]) -> str:
    return f"[{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}]"
