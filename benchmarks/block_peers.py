"""Contenders for what holds several projections: the gated MLP of a Llama, and query, key and value of one x.

`build(block, p) -> nn.Module` over a frozen block; adapters of rank 16 on every projection.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft_ops
from benchmarks.contenders import COMPILED, FLOOR, FUSED, OURS
from benchmarks.peers import ALPHA, R, _needs
from benchmarks.variants import compiled
from peft_ops.nn import LoRALinear


class Block(nn.Module):
    """Bias-free linear layers by name, frozen; {name: (out_features, in_features)}."""

    def __init__(self, projections: dict[str, tuple[int, int]], **options):
        super().__init__()
        for name, (n, k) in projections.items():
            self.add_module(name, nn.Linear(k, n, bias=False, **options))
        self.requires_grad_(False)


class MLP(Block):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(self, hidden: int, inner: int, **options):
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        super().__init__(shapes, **options)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class QKV(Block):
    """Query, key and value, side by side [M, hidden + 2 · of_keys]."""

    def __init__(self, hidden: int, of_keys: int, **options):
        super().__init__(
            {"q_proj": (hidden, hidden), "k_proj": (of_keys, hidden), "v_proj": (of_keys, hidden)}, **options
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)


def frozen(block: Block, p: float) -> nn.Module:
    return block


def apart(block: Block, p: float) -> nn.Module:
    """Our layers, one by one, as the block calls them."""
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            block.set_submodule(name, LoRALinear.from_linear(child, r=R, lora_alpha=ALPHA, lora_dropout=p))
    return block


def fused_mlp(block: Block, p: float) -> nn.Module:
    if not hasattr(peft_ops.nn, "GatedMLP"):
        pytest.skip("this revision has no GatedMLP")  # benchmarks.compare
    return peft_ops.nn.GatedMLP.from_block(apart(block, p))


def fused_qkv(block: Block, p: float) -> nn.Module:
    if not hasattr(peft_ops, "fuse"):
        pytest.skip("this revision has no fuse")  # benchmarks.compare
    fused = peft_ops.fuse(apart(block, p))
    assert fused.projections, fused.left
    return block


def peft_block(block: Block, p: float) -> nn.Module:
    names = [name for name, child in block.named_children() if isinstance(child, nn.Linear)]
    config = _needs("peft").LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=names)
    return _needs("peft").get_peft_model(block, config).base_model.model


def liger_mlp(block: Block, p: float) -> nn.Module:
    """Liger's SwiGLU between PEFT's layers."""
    module = _needs("liger_kernel.transformers.swiglu")
    sizes = {"hidden_size": block.gate_proj.in_features, "intermediate_size": block.gate_proj.out_features}
    with torch.device("meta"):
        liger = module.LigerSwiGLUMLP(SimpleNamespace(hidden_act="silu", **sizes))
    for name in ("gate_proj", "up_proj", "down_proj"):
        liger.set_submodule(name, block.get_submodule(name))
    return peft_block(liger, p)


GATED_MLP = {
    FUSED: fused_mlp, OURS: apart, FLOOR: frozen, "PEFT": peft_block, "PEFT + Liger": liger_mlp,
    "PEFT" + COMPILED: compiled(peft_block),
}  # fmt: skip
PROJECTIONS = {
    FUSED: fused_qkv, OURS: apart, FLOOR: frozen, "PEFT": peft_block, "PEFT" + COMPILED: compiled(peft_block),
}  # fmt: skip
