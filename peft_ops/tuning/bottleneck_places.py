"""Where in a transformer an adapter can go: blocks recognised by their parts, whatever the classes are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

Hooks = tuple[tuple[str, str], ...]  # (path of the module that gets the hook, method of PlacedAdapter)
_SUM = {"dense", "LayerNorm", "dropout"}  # BertSelfOutput, BertOutput: LayerNorm(dropout(dense(h)) + r)
_INLINE = (  # (norm, attention, norm, feed-forward network, what else there may be)
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", ()),
    ("ln_1", "attn", "ln_2", "mlp", ("crossattention", "ln_cross_attn")),
)
_WRAPPED = {"SelfAttention": "mh_adapter", "EncDecAttention": "cross_adapter", "DenseReluDense": "output_adapter"}
LOOKED_FOR = (
    "attention.output and output, each of dense, dropout and LayerNorm, as in BERT; "
    "input_layernorm, self_attn, post_attention_layernorm and mlp, as in Llama; ln_1, attn, ln_2 and mlp, as in GPT-2; "
    "layer, a list of SelfAttention, EncDecAttention or DenseReluDense with layer_norm and dropout, as in T5"
)


@dataclass(frozen=True)
class Place:
    """A sublayer that can take an adapter.

    location: AdapterHub's name of the kind: 'mh_adapter', 'cross_adapter', 'output_adapter'.
    layer: number of the block, counted through the model.
    path: where the adapter is put. key: the same place in AdapterHub's files, up to the adapter's name.
    norm: path of the sublayer's LayerNorm, whose width, device and dtype are the adapter's.
    after, behind, beside: the hooks of each form (see AdapterConfig.form).
    """

    location: str
    layer: int
    path: str
    key: str
    norm: str
    after: Hooks
    behind: Hooks
    beside: Hooks


def find_places(model: nn.Module) -> list[Place]:
    """Every place of a model, block by block.

    Raises:
        ValueError: there is none (the message has what was looked for); a block of which only parts are known.
    """
    places: list[Place] = []
    layer = 0
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found = next(filter(None, (kind(prefix, module, layer) for kind in (_summed, _inline, _wrapped))), [])
        places += found
        layer += bool(found)
    if not places:
        raise ValueError(f"model ({type(model).__name__}) has no block that adapters know; looked for: {LOOKED_FOR}")
    return places


def _names(module: nn.Module | None) -> set[str]:
    return set() if module is None else {name for name, _ in module.named_children()}


def _summed(prefix: str, block: nn.Module, layer: int) -> list[Place]:
    """BERT: the residual is added within attention.output and output, before their LayerNorm."""
    if not {"attention", "intermediate", "output"} <= _names(block):
        return []
    paths = {"attention.output": "mh_adapter", "crossattention.output": "mh_adapter", "output": "output_adapter"}
    found = {path: _child(block, path) for path in paths}
    if not all(
        _names(part) == _SUM for path, part in found.items() if part is not None or not path.startswith("cross")
    ):
        return []
    return [
        Place(
            paths[path], layer, f"{prefix}{path}.adapter", f"{prefix}{path}.adapters", f"{prefix}{path}.LayerNorm",
            after=((f"{prefix}{path}.dropout", "after"),),
            behind=((f"{prefix}{path}.LayerNorm", "behind_norm"),),
            beside=((f"{prefix}{path}", "into_residual"),),
        )
        for path, part in found.items() if part is not None
    ]  # fmt: skip


def _inline(prefix: str, block: nn.Module, layer: int) -> list[Place]:
    """Llama, GPT-2: the block adds the residual itself, so a hook at the norm keeps it where the form needs it."""
    names = _names(block)
    for norm, attention, second_norm, network, others in _INLINE:
        parts = {norm, attention, second_norm, network}
        if parts <= names and names <= parts | set(others) and not hasattr(block, "residual_multiplier"):
            of_attention = f"{prefix}{attention}", (f"{prefix}{norm}", "keep")
            of_network = f"{prefix}{network}", (f"{prefix}{second_norm}", "keep")
            return [
                Place(
                    "mh_adapter", layer, f"{prefix}attention_adapter", f"{prefix}attention_adapters.adapters",
                    f"{prefix}{norm}",
                    after=((of_attention[0], "after"),),
                    behind=(of_attention[1], (of_attention[0], "after_kept")),
                    beside=(of_attention[1], (of_attention[0], "beside_kept")),
                ),
                Place(
                    "output_adapter", layer, f"{prefix}output_adapter", f"{prefix}output_adapters.adapters",
                    f"{prefix}{second_norm}",
                    after=((of_network[0], "after"),),
                    behind=((prefix.removesuffix("."), "after"),),
                    beside=(of_network[1], (of_network[0], "beside_kept")),
                ),
            ]  # fmt: skip
    return []


def _wrapped(prefix: str, block: nn.Module, layer: int) -> list[Place]:
    """T5: a block is a list of sublayers, each r + dropout(body(layer_norm(r)))."""
    sublayers = list((_child(block, "layer") or nn.ModuleList()).named_children())
    kinds = [_names(sublayer) - {"layer_norm", "dropout"} for _, sublayer in sublayers]
    if not any(kind & _WRAPPED.keys() for kind in kinds):
        return []
    places = []
    for (name, sublayer), kind in zip(sublayers, kinds, strict=True):
        path = f"{prefix}layer.{name}"
        if len(kind) != 1 or not kind <= _WRAPPED.keys() or not {"layer_norm", "dropout"} <= _names(sublayer):
            raise ValueError(f"{path} is of {', '.join(sorted(_names(sublayer)))}; looked for: {LOOKED_FOR}")
        places.append(
            Place(
                _WRAPPED[kind.pop()], layer, f"{path}.adapter", f"{path}.adapters", f"{path}.layer_norm",
                after=((f"{path}.dropout", "after"),), behind=((path, "after"),), beside=((path, "beside"),),
            )
        )  # fmt: skip
    return places


def _child(module: nn.Module, path: str) -> nn.Module | None:
    child: nn.Module | None = module
    for name in path.split("."):
        child = None if child is None else child._modules.get(name)
    return child


def layer_norms(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Paths of the LayerNorms and RMSNorms, by class or by the end of its name (transformers has one per model)."""
    return [
        path for path, module in modules
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    ]  # fmt: skip
