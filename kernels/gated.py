"""h = act(g) · u of a gated MLP, and its gradients, in one pass each."""

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate, derivative
from .launch import device_guard


@triton.jit
def _gated_kernel(g_ptr, u_ptr, h_ptr, SIZE, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """h [SIZE] = act(g) · u, float32, one rounding."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + i, (activate(g, ACTIVATION) * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_gradients_kernel(
    dh_ptr, g_ptr, u_ptr, h_ptr, du_ptr, SIZE, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """h [SIZE] = act(g) · u, du = dh · act(g), and dg = dh · u · act'(g) in the place of dh; float32, one rounding."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + i, mask=inside, other=0.0).to(tl.float32)
    act = activate(g, ACTIVATION)
    tl.store(h_ptr + i, (act * u).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + i, (dh * act).to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_ptr + i, (dh * u * derivative(g, ACTIVATION)).to(dh_ptr.dtype.element_ty), mask=inside)


def gated(g: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """See peft_ops.reference.gated."""
    g, u = g.contiguous(), u.contiguous()
    h = g.new_empty(g.shape)
    if g.numel():
        config = configs.launch("gated", configs.arch_of(g.device), g.dtype)
        with device_guard(g):
            _gated_kernel[(triton.cdiv(g.numel(), config["BLOCK"]),)](
                g, u, h, g.numel(), ACTIVATION=activation, **config
            )
    return h


def gated_gradients(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See peft_ops.reference.gated; dg lies where a contiguous dh did."""
    dh, g, u = dh.contiguous(), g.contiguous(), u.contiguous()
    h, du = g.new_empty(g.shape), g.new_empty(g.shape)
    if g.numel():
        config = configs.launch("gated_gradients", configs.arch_of(g.device), g.dtype)
        with device_guard(g):
            _gated_gradients_kernel[(triton.cdiv(g.numel(), config["BLOCK"]),)](
                dh, g, u, h, du, g.numel(), ACTIVATION=activation, **config
            )
    return h, dh, du
