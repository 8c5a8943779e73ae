"""The layers of a model, from the bottom up, and what lies around them."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .matching import is_within, names_match, output_heads

_STACKS = (nn.ModuleList, nn.Sequential)


def layer_stacks(model: nn.Module, names: Collection[str] | str | None = None) -> list[list[str]]:
    """Paths of the layers, a list for each stack of them; [] where there are none.

    The stack is the nn.ModuleList, of those in no other, that has as many entries as the model's config says it has
    layers, or the most parameters. An encoder-decoder model has two: the encoder's, then the decoder's.

    names: the stacks instead (nn.ModuleList or nn.Sequential), matched as target_modules are, in the model's order.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _STACKS if names else nn.ModuleList) and len(module)
    }
    if names:
        found = [path for path in lists if names_match(names, path)]
    else:
        outer = [path for path in lists if not is_within(path.rpartition(".")[0], lists)]
        found = []
        for part in _parts(model):
            within = {id(module) for module in part.modules()}
            found += _largest(model, {path: lists[path] for path in outer if id(lists[path]) in within})
    return [[f"{path}.{name}" for name, _ in lists[path].named_children()] for path in dict.fromkeys(found)]


def layer_paths(model: nn.Module, names: Collection[str] | str | None = None) -> list[str]:
    """Paths of the layers in the order in which data goes through them: an encoder's, then its decoder's.

    Raises:
        ValueError: the model has none, or none in the stacks that are named.
    """
    paths = [path for stack in layer_stacks(model, names) for path in stack]
    if not paths:
        where = f" at layers_pattern={names!r}" if names else ""
        lists = [path for path, module in model.named_modules() if isinstance(module, _STACKS) and path]
        raise ValueError(
            f"{type(model).__name__} has no list of layers{where} (an nn.ModuleList, or what layers_pattern names); "
            f"its lists are {', '.join(lists[:8]) or '(there are none)'}"
        )
    return paths


def embedding_paths(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """What comes before the layers: every nn.Embedding outside them, and modules whose path speaks of embeddings."""
    heads, layers = output_heads(model, classification=True), list(layers)
    found: list[str] = []
    for path, module in model.named_modules():
        named = isinstance(module, nn.Embedding) or "embed" in path.rpartition(".")[2]
        if named and path not in heads and not is_within(path, [*layers, *found]):
            found.append(path)
    return found


def norm_paths(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """What comes after the layers: normalisations that are not in them, nor in the embeddings or the head."""
    layers = list(layers)
    before = [*layers, *embedding_paths(model, layers), *output_heads(model, classification=True)]
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and path and not is_within(path, before)
    ]


def _parts(model: nn.Module) -> list[nn.Module]:
    """Encoder and decoder of a transformers model that has both."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    return [model]


def _largest(model: nn.Module, lists: dict[str, nn.Module]) -> list[str]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)

    def rank(path: str) -> tuple[bool, int]:
        module = lists[path]
        assert isinstance(module, nn.ModuleList)
        return len(module) == count, sum(p.numel() for p in module.parameters())

    return [max(lists, key=rank)] if lists else []
