"""The contenders: small builders, one signature to an op; each skips by its name where its package is missing.

Layers: `build(linear, p) -> nn.Module` over a frozen nn.Linear; adapters of rank 16 wherever there are any.
NF4: `build(w, nested) -> (quantise, dequantise, dequantise into a tensor that is there)`, functions without arguments.
Attention: `attend(query, key, value)`, causal.
Prefix attention: `attend(query, key, value, prefix_key, prefix_value, is_causal)`.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contenders import COMPILED, FLOOR, GRAPH, OURS
from benchmarks.variants import compiled
from peft_ops import nf4
from peft_ops.nn import BottleneckAdapter, DoRALinear, LoRALinear, NF4Linear
from peft_ops.ops import attention, prefix_attention

R, ALPHA = 16, 32
BLOCKSIZE = 64
BOTTLENECK = 64


def _needs(package: str):
    return pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)


def frozen_linear(linear: nn.Linear, p: float) -> nn.Module:
    """The floor: no adapter, dX alone in the backward."""
    return linear


def ours_lora(linear: nn.Linear, p: float) -> nn.Module:
    return LoRALinear.from_linear(linear, r=R, lora_alpha=ALPHA, lora_dropout=p)


def ours_nf4(linear: nn.Linear, p: float) -> nn.Module:
    return NF4Linear.from_linear(linear, blocksize=BLOCKSIZE, double_quant=True)


def ours_qlora(linear: nn.Linear, p: float) -> nn.Module:
    return LoRALinear.from_linear(ours_nf4(linear, p), r=R, lora_alpha=ALPHA, lora_dropout=p)


def ours_dora(linear: nn.Linear, p: float) -> nn.Module:
    return DoRALinear.from_linear(linear, r=R, lora_alpha=ALPHA, lora_dropout=p)


def peft_dora(linear: nn.Linear, p: float) -> nn.Module:
    return peft_lora(linear, p, use_dora=True)


def peft_lora(linear: nn.Linear, p: float, use_dora: bool = False) -> nn.Module:
    """PEFT's layer, eager, with the float32 adapters that get_peft_model makes on a 16-bit base."""
    peft = _needs("peft")
    model = nn.Sequential(linear)
    model.is_loaded_in_4bit = type(linear).__name__ == "Linear4bit"
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"], use_dora=use_dora)
    return peft.get_peft_model(model, config).base_model.model[0]


def bitsandbytes_linear(linear: nn.Linear, p: float) -> nn.Module:
    bnb = _needs("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, blocksize=BLOCKSIZE, quant_type="nf4")
    return layer.to(linear.weight.device)  # this quantises, the scales too


def peft_qlora(linear: nn.Linear, p: float) -> nn.Module:
    return peft_lora(bitsandbytes_linear(linear, p), p)


def addmm_lora(linear: nn.Linear, p: float) -> nn.Module:
    """Vendor matrix products and in-place low-rank updates, adapters in the dtype of the base; no dropout."""
    if p:
        pytest.skip("addmm has no dropout")
    return _AddmmLoRA(linear)


class _AddmmLoRA(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.lora_A = nn.Parameter(self.weight.new_empty(R, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(linear.out_features, R))

    def forward(self, x):
        return _Addmm.apply(x, self.weight, self.lora_A, self.lora_B, ALPHA / R)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b, scaling):
        s = x @ a.t()
        ctx.save_for_backward(x, s, w, a, b)
        ctx.scaling = scaling
        return (x @ w.t()).addmm_(s, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, s, w, a, b = ctx.saved_tensors
        ds = dy @ b * ctx.scaling
        return (dy @ w).addmm_(ds, a), None, ds.t() @ x, dy.t() @ s * ctx.scaling, None


def ours_adapter(linear: nn.Linear, p: float) -> nn.Module:
    """Float32 parameters, whatever the dtype of x."""
    return BottleneckAdapter(linear.in_features, BOTTLENECK, device=linear.weight.device, dtype=torch.float32)


def eager_adapter(linear: nn.Linear, p: float) -> nn.Module:
    """As AdapterHub computes it, with parameters in the dtype of x."""
    return EagerAdapter(linear.in_features).to(linear.weight)


def eager_adapter_float32(linear: nn.Linear, p: float) -> nn.Module:
    """The same with float32 parameters, for which x is widened."""
    return EagerAdapter(linear.in_features).to(linear.weight.device)


class EagerAdapter(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.down = nn.Sequential(nn.Linear(features, BOTTLENECK), nn.GELU())
        self.up = nn.Linear(BOTTLENECK, features)

    def forward(self, x):
        up = self.up(self.down(x.to(self.up.weight.dtype)))
        return x + up.to(x.dtype)


ADAPTER = {"peft-ops": ours_adapter, "eager": eager_adapter, "eager float32": eager_adapter_float32}
LORA = {OURS: ours_lora, FLOOR: frozen_linear, "PEFT": peft_lora, "addmm": addmm_lora}
NF4_LINEAR = {OURS: ours_nf4, FLOOR: frozen_linear, "bitsandbytes": bitsandbytes_linear}
DORA = {OURS: ours_dora, "LoRA": ours_lora, FLOOR: frozen_linear, "PEFT": peft_dora}
QLORA = {OURS: ours_qlora, "LoRA": ours_lora, FLOOR: frozen_linear, "PEFT + bitsandbytes": peft_qlora}
for _layers in (LORA, NF4_LINEAR):
    _layers |= {name + GRAPH: build for name, build in _layers.items() if name != "addmm"}
LORA |= {"PEFT" + COMPILED: compiled(peft_lora)}


def ours_codec(w: torch.Tensor, nested: bool) -> tuple[Callable, Callable, Callable | None]:
    weight, out = nf4.quantize(w, BLOCKSIZE, nested), torch.empty_like(w)
    into = partial(nf4.dequantize, weight, out=out) if "out" in signature(nf4.dequantize).parameters else None
    return lambda: nf4.quantize(w, BLOCKSIZE, nested), lambda: nf4.dequantize(weight), into


def bitsandbytes_codec(w: torch.Tensor, nested: bool) -> tuple[Callable, Callable, Callable]:
    """On a CPU its dequantize_nf4 refuses `out`: there the third is what its users have, a fresh output."""
    functional = _needs("bitsandbytes").functional
    options = {"blocksize": BLOCKSIZE, "compress_statistics": nested}
    packed, state = functional.quantize_nf4(w, **options)
    decode = partial(functional.dequantize_nf4, packed, state)
    into = partial(decode, out=torch.empty_like(w)) if w.is_cuda else decode
    return lambda: functional.quantize_nf4(w, **options), decode, into


def bitsandbytes_c_codec(w: torch.Tensor, nested: bool) -> tuple[None, None, Callable]:
    """Into a given tensor on a CPU, by the C function below dequantize_nf4, which no function of its own calls so."""
    if w.is_cuda:
        pytest.skip("on a GPU dequantize_nf4 takes out")
    functional = _needs("bitsandbytes").functional
    packed, state = functional.quantize_nf4(w, blocksize=BLOCKSIZE, compress_statistics=nested)
    return None, None, partial(_bitsandbytes_into, functional, packed, state, torch.empty_like(w))


def _bitsandbytes_into(functional, packed: torch.Tensor, state, out: torch.Tensor) -> torch.Tensor:
    """backends/cpu/ops.py of bitsandbytes, with an output that is given."""
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2).add_(state.offset)
    c_function = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[out.dtype]
    addresses = (functional.get_ptr(t) for t in (packed, absmax, out))
    sizes = map(ctypes.c_longlong, (state.blocksize, *out.shape))
    getattr(functional.lib, f"cdequantize_blockwise_cpu_nf4_{c_function}")(*addresses, *sizes)
    return out


CODECS = {OURS: ours_codec, "bitsandbytes": bitsandbytes_codec, "bitsandbytes C": bitsandbytes_c_codec}


def torchs_attention(query, key, value) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


ATTENTION = {OURS: partial(attention, is_causal=True), "SDPA": torchs_attention}


def ours_prefix(query, key, value, prefix_key, prefix_value, is_causal: bool) -> torch.Tensor:
    return prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=is_causal)


def text_alone(query, key, value, prefix_key, prefix_value, is_causal: bool) -> torch.Tensor:
    """The floor: no prefix."""
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


def joined_prefix(query, key, value, prefix_key, prefix_value, is_causal: bool) -> torch.Tensor:
    """What PEFT's past_key_values amount to in transformers: a cache that joins keys and values at every forward, and a
    mask, since a causal one over a prefix is no square; keys are repeated for grouped queries where there is a mask.
    """
    return attend_joined(query, *joined(key, value, prefix_key, prefix_value), is_causal)


def joined(key, value, prefix_key, prefix_value) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of [prefix; text]."""
    pairs = ((prefix_key, key), (prefix_value, value))
    keys, values = (torch.cat((p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t), 2) for p, t in pairs)
    return keys, values


def attend_joined(query, keys, values, is_causal: bool) -> torch.Tensor:
    if not is_causal:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    T, total, groups = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    mask = torch.ones(T, total, dtype=torch.bool, device=query.device).tril(total - T)
    if groups > 1:
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    return scaled_dot_product_attention(query, keys, values, mask)


PREFIX = {OURS: ours_prefix, "joined SDPA": joined_prefix, "SDPA without prefix": text_alone}
