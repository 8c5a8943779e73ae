"""Blocks and layers of a model whose layers share x, or keep what can be recomputed, in one op each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..nf4 import NF4Weight
from ..nn import GatedMLP, LoRALinear
from ..nn.dora_linear import DoRALinear
from ..nn.gated_mlp import PARTS, projection_of
from ..nn.projection_group import ProjectionGroup
from .fuse_attention import fuse_attentions, unfuse_attentions
from .trained import replace_module

_MARK = "_peft_ops_fused"  # at the root: groups are made again where adapters are exchanged
_GROUP = "_peft_ops_projections"  # in a module whose layers are in a group
_BLOCK = "_peft_ops_block"  # in a GatedMLP: the module that it stands for
_SIBLINGS = ("q_proj", "k_proj", "v_proj")
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass
class Fused:
    """What `fuse` found, by path.

    mlps: gated MLPs that are one op. projections: {module: names of its layers that are one op}. attentions: modules
    whose attention on a CPU is one op. left: {module: why it stays as it is}.
    """

    mlps: list[str] = field(default_factory=list)
    projections: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def fuse(model: nn.Module) -> Fused:
    """Let gated MLPs, query, key and value projections with LoRA, and attention compute in one op each; in place.

    Blocks are known by their parts: gate_proj, up_proj, down_proj and act_fn; q_proj, k_proj and v_proj that are LoRA
    layers over one in_features. An MLP is tried on two random tokens first, and left where the op computes something
    else. x is then read once for all adapters that share it, and an MLP keeps x, gate_proj(x) and up_proj(x) alone for
    the backward. Names, parameters and results stay (to rounding); DoRA, merged and switched-off layers, layers with
    hooks and torch.compile take the plain way by themselves. `unfuse` undoes it.

    Attention is that of transformers' modules that call "sdpa": they get a copy of their config that names
    ops.attention, which serves on a CPU, without dropout and for more than one token; else all is as before, and what
    the model's own config says later, as by set_attn_implementation, is followed.

    Raises:
        TypeError: model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    fused = Fused()
    for path, module in list(model.named_modules()):
        if isinstance(module, GatedMLP):
            fused.mlps.append(path)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS) and hasattr(module, "act_fn"):
            reason = _fuse_mlp(model, path, module)
            if reason is None:
                fused.mlps.append(path)
            else:
                fused.left[path] = reason
    fused.attentions = fuse_attentions(model)
    vars(model)[_MARK] = True
    regroup(model, fused)
    return fused


def unfuse(model: nn.Module) -> nn.Module:
    """Put back what `fuse` replaced: the very modules, with their children and hooks as they are now."""
    blocks = {path: m for path, m in model.named_modules(remove_duplicate=False) if _BLOCK in vars(m)}
    for path, mlp in blocks.items():
        (block,) = vars(mlp)[_BLOCK]
        block.training = mlp.training
        replace_module(model, path, block)
    unfuse_attentions(model)
    _ungroup(model)
    vars(model).pop(_MARK, None)
    return model


def regroup(model: nn.Module, fused: Fused | None = None) -> None:
    """Of a fused model: groups over the layers that are in it now."""
    if _MARK not in vars(model):
        return
    _ungroup(model)
    fused = Fused() if fused is None else fused
    for path, module in model.named_modules():
        siblings = {n: layer for n in _SIBLINGS if isinstance(layer := module._modules.get(n), LoRALinear)}
        if len(siblings) < 2:
            continue
        reason = _unlike(list(siblings.values()))
        if reason is None:
            vars(module)[_GROUP] = ProjectionGroup(list(siblings.values()))
            fused.projections[path] = tuple(siblings)
        else:
            fused.left[path] = f"{', '.join(siblings)}: {reason}"


def _ungroup(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop(_GROUP, None)
        if isinstance(module, LoRALinear):
            vars(module).pop("_group", None)


def _unlike(layers: list[LoRALinear]) -> str | None:
    if any(isinstance(layer, DoRALinear) for layer in layers):
        return "DoRA scales its outputs"
    if len({layer.in_features for layer in layers}) > 1:
        return "they differ in in_features"
    return None


def _fuse_mlp(model: nn.Module, path: str, block: nn.Module) -> str | None:
    """Put a GatedMLP in the place of a block, wherever it stands; or the reason why not."""
    if not path:
        return "it is the model itself"
    if any(p.is_meta for p in block.parameters()):
        return "it is on the meta device"
    try:
        mlp = GatedMLP.from_block(block)
    except TypeError as error:
        return str(error)
    terms = mlp.op_terms()
    if terms is None:
        names = [name for name in PARTS if projection_of(block._modules[name]) is None]  # type: ignore[arg-type]
        kinds = [f"{name} ({type(block._modules[name]).__name__})" for name in names]
        return f"one op cannot compute {', '.join(kinds) or f'act_fn ({block.act_fn})'}"
    reason = _difference(block, mlp, terms[0].weight)
    if reason is None:
        vars(mlp)[_BLOCK] = (block,)
        for place in [p for p, m in model.named_modules(remove_duplicate=False) if m is block]:
            replace_module(model, place, mlp)
    return reason


def _difference(block: nn.Module, mlp: GatedMLP, weight: torch.Tensor | NF4Weight) -> str | None:
    """Why the two differ on two random tokens, in either state of the block's own `training`; weight: of gate."""
    training = {module: module.training for module in block.modules()}
    x = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(weight.device, weight.dtype)
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        for mode in (False, True):
            block.eval()
            block.training = mode
            with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(x.device.type, enabled=False):
                plain, fused = block.forward(x), mlp.forward(x)
            if not _same(plain, fused):
                return "its forward is not down_proj(act_fn(gate_proj(x)) * up_proj(x))"
    except Exception as error:  # another's forward may raise anything; the block then stays as it is
        return f"its forward raises {type(error).__name__} on two tokens: {error}"
    finally:
        for module, mode in training.items():
            module.training = mode
    return None


def _same(plain: object, fused: torch.Tensor) -> bool:
    if not isinstance(plain, torch.Tensor) or (plain.shape, plain.dtype) != (fused.shape, fused.dtype):
        return False
    error, size = (t.double().norm() for t in (fused - plain, plain))
    return bool(error <= _TOLERANCE[plain.dtype] * size) and bool(size > 0)
