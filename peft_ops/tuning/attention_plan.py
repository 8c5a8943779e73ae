"""Where a transformers model attends and where it makes positions: read from its modules."""

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn.attention_interface import WRAPPED, unfused_config
from ..nn.linear_like import is_linear
from ..nn.positions import is_plain_embedding

_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"))
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding", "positions_embed")


@dataclass
class AttentionSite:
    """path: of the attention module. place: 'encoder', 'cross' or 'decoder' (every self-attention outside an encoder
    of an encoder-decoder model). stack: path of the stack of layers around it. The prefix has keys [heads, n, key_dim]
    and values [heads, n, value_dim].
    """

    path: str
    place: str
    stack: str
    heads: int
    key_dim: int
    value_dim: int


@dataclass
class PositionSites:
    """Paths. shifts: tables and rotary embeddings; relative: T5's attention with a table; limits: positions of the
    stacks that have a learned table.
    """

    shifts: list[str]
    relative: list[str]
    limits: dict[str, int]


def attention_sites(model: nn.Module, places: tuple[str, ...]) -> list[AttentionSite]:
    """Every attention module at the places, in the order of the layers.

    Raises:
        TypeError: another model than one of transformers.
        ValueError: no module's attention can be given a prefix, or one cannot; the message names what is missing.
    """
    found = [path for path, module in model.named_modules() if uses_interface(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention that looks its function up in transformers' AttentionInterface "
            "(ALL_ATTENTION_FUNCTIONS.get_interface in its forward): a prefix cannot be put before its keys"
        )
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__} around one")
    encoder = _encoder_path(model)
    wanted = places if encoder is not None else ("decoder",)
    placed = {path: _place(model, path, encoder) for path in _of_the_text(model, found)}
    sites = [_site(model, path, place) for path, place in placed.items() if place in wanted]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no attention at places={list(places)}")
    _check_alike(sites)
    return sites


def position_sites(model: nn.Module, sites: list[AttentionSite]) -> PositionSites:
    """What makes the positions of the stacks whose self-attention has a prefix.

    Raises:
        ValueError: a stack in which nothing is recognised, or one of sounds or images with a table of positions.
    """
    found = PositionSites([], [], {})
    for stack in dict.fromkeys(site.stack for site in sites if site.place != "cross"):
        own = {
            f"{stack}.{path}".strip("."): module
            for path, module in model.get_submodule(stack).named_modules()
            if path and _stack(model, f"{stack}.{path}".strip(".")) == stack
        }
        shifts = [path for path, module in own.items() if _makes_positions(path, module)]
        relative = [path for path, module in own.items() if getattr(module, "has_relative_attention_bias", False)]
        if not shifts and not relative:
            raise ValueError(
                f"{stack or type(model).__name__}: no position embedding recognised (looked for a rotary embedding, "
                f"a table named {', '.join(_POSITION_TABLES)}, T5's relative_attention_bias)"
            )
        found.shifts += shifts
        found.relative += relative
        limits = [_positions(own[path]) for path in shifts if isinstance(own[path], nn.Embedding)]
        if limits and "input_ids" not in inspect.signature(type(model.get_submodule(stack)).forward).parameters:
            raise ValueError(
                f"{stack} takes no tokens and uses every position of its table: there is no room for a prefix; "
                "leave 'encoder' out of places"
            )
        if limits:
            found.limits[stack] = min(limits)
    return found


def config_of(model: nn.Module) -> Any:
    """The config of a transformers model."""
    return model.config


def text_config(model: nn.Module) -> Any:
    """That of its language model, where there is more in it."""
    config = config_of(model)
    return config.get_text_config()


def uses_interface(module: nn.Module) -> bool:
    """Whether a module looks its attention function up under its config's name."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _of_the_text(model: nn.Module, paths: list[str]) -> list[str]:
    """Without the attention of a vision or audio tower, which has a config of its own."""
    if config_of(model).is_encoder_decoder:
        return paths
    text = text_config(model)
    configs = {path: config_of(model.get_submodule(path)) for path in paths}
    return [path for path, c in configs.items() if unfused_config(model.get_submodule(path), c) is text] or paths


def _encoder_path(model: nn.Module) -> str | None:
    if not config_of(model).is_encoder_decoder:
        return None
    root: Any = model
    encoder = root.get_encoder()
    return next(path for path, module in model.named_modules() if module is encoder)


def _place(model: nn.Module, path: str, encoder: str | None) -> str:
    if encoder is not None and path.startswith(f"{encoder}."):
        return "encoder"
    name = f"{path} {type(model.get_submodule(path)).__name__}"
    return "cross" if re.search(r"cross_?att|encoder_attn|EncDec", name, re.IGNORECASE) else "decoder"


def _stack(model: nn.Module, path: str) -> str:
    """The nearest model around the module at `path`."""
    from transformers import PreTrainedModel

    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            break
    return path


def _site(model: nn.Module, path: str, place: str) -> AttentionSite:
    module = model.get_submodule(path)
    name = f"{path} ({type(module).__name__})"
    implementation = unfused_config(module, config_of(module))._attn_implementation or "eager"
    if implementation not in WRAPPED:
        raise ValueError(
            f"{name}: attn_implementation must be one of {', '.join(WRAPPED)} to be put behind a prefix, got "
            f"{implementation!r}: call model.set_attn_implementation first"
        )
    for feature in ("attn_logit_softcapping", "sinks"):
        if getattr(module, feature, None) is not None:
            raise ValueError(f"{name}: attention with {feature} cannot be given a prefix")
    heads, key_dim, value_dim = _shape(module, name)
    return AttentionSite(path, place, _stack(model, path), heads, key_dim, value_dim)


def _shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(key and value heads, D, Dv) from the module's projections, or from its config where they are fused or NF4."""
    dim = next((getattr(module, a) for a in _HEAD_DIMS if isinstance(getattr(module, a, None), int)), None)
    if dim is None or hasattr(module, "kv_lora_rank"):
        raise ValueError(f"{name}: the shape of its keys is not recognised (looked for {', '.join(_HEAD_DIMS)})")
    for k, v in _PROJECTIONS:
        key, value = getattr(module, k, None), getattr(module, v, None)
        if isinstance(key, nn.Module) and isinstance(value, nn.Module) and is_linear(key) and is_linear(value):
            heads = _width(key) // dim
            return heads, dim, _width(value) // heads
    config = config_of(module)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, dim, dim


def _width(linear: Any) -> int:
    return linear.out_features if hasattr(linear, "out_features") else linear.nf


def _check_alike(sites: list[AttentionSite]) -> None:
    shapes: dict[str, Counter] = {place: Counter() for place in (site.place for site in sites)}
    for site in sites:
        shapes[site.place][site.heads, site.key_dim, site.value_dim] += 1
    for place, counts in shapes.items():
        if len(counts) > 1 or any(key_dim != value_dim for _, key_dim, value_dim in counts):
            raise ValueError(
                f"the keys and values of all layers must have one shape, got (heads, key_dim, value_dim) "
                f"{sorted(counts)} in the {place}'s attention"
            )


def _makes_positions(path: str, module: nn.Module) -> bool:
    if is_plain_embedding(module):
        return path.rpartition(".")[2] in _POSITION_TABLES
    names = inspect.signature(type(module).forward).parameters
    leaf = next(module.children(), None) is None
    return leaf and ("position_ids" in names or "past_key_values_length" in names)


def _positions(table: nn.Embedding) -> int:
    """Positions of a table; some tables start with rows that are none (offset, padding)."""
    before = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - before - getattr(table, "offset", 0)
