"""Every NF4 kernel, in every shipped configuration, compiles lean for every chip."""

import re

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.nf4 import _absmax_quantize_kernel, _nf4_dequantize_kernel, _nf4_quantize_kernel
from peft_ops.kernels.nf4_linear import _nf4_linear_dx_kernel, _nf4_linear_kernel, _sum_splits_kernel
from resources import ARCHES, assert_lean, compile_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT32 = ("nested_ptr", "offset_ptr", "map_ptr", "thresholds_ptr", "part_ptr")
OPTIONS = ("num_warps", "num_stages")


def lean(kernel, arch, config, pointers, *, dot=False, few_rows_left=False, **flags):
    """pointers: {argument: element type} beside the float32 tables, uint8 codes and int64 pairs."""
    constants = {**{k: v for k, v in config.items() if k not in OPTIONS}, **flags}
    options = {k: config[k] for k in OPTIONS if k in config}
    return assert_lean(
        kernel, signature_of(kernel, constants, pointers), constants, arch, dot=dot,
        tensor_core="HMMA" if dot and arch.startswith("sm_") and few_rows_left else None,
        enable_fp_fusion=False, **options,
    )  # fmt: skip


def signature_of(kernel, constants, pointers):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        signature[name] = (
            f"*{pointers[name]}" if name in pointers else "*fp32" if name in FLOAT32 else "*i64" if name == "pairs_ptr"
            else "*u8" if name.endswith("_ptr") else "i64" if name in ("n", "packed_bytes") else "i32"
        )  # fmt: skip
    return signature


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantize(arch, blocksize, dtype):
    lean(_nf4_quantize_kernel, arch, configs.nf4_blocks("nf4_quantize", blocksize),
         dict(w_ptr=dtype, absmax_ptr="fp32"), BLOCKSIZE=blocksize)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
def test_absmax_quantize(arch):
    lean(_absmax_quantize_kernel, arch, configs.nf4_blocks("absmax_quantize", 256),
         dict(absmax_ptr="fp32"), BLOCKSIZE=256)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lines", [False, True])
def test_dequantize(arch, blocksize, dtype, nested, lines):
    lean(_nf4_dequantize_kernel, arch, configs.nf4_blocks("nf4_dequantize", blocksize),
         dict(out_ptr=dtype, absmax_ptr="u8" if nested else "fp32"),
         BLOCKSIZE=blocksize, NESTED=nested, LINES=lines)  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_and_sums_are_rounded_apart(arch, dtype):
    """map · nested + offset and code · absmax: a fused multiply-add would give other bits than the format."""
    pointers = dict(out_ptr=dtype, absmax_ptr="u8")
    constants = dict(BLOCKSIZE=64, BLOCKS=64, NESTED=True, LINES=False)
    signature = signature_of(_nf4_dequantize_kernel, constants, pointers)
    compiled = compile_for(_nf4_dequantize_kernel, signature, constants, arch, num_warps=4, enable_fp_fusion=False)
    code = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
    assert re.search(r"mul\S*f32", code)
    assert not re.search(r"(fma|mad)\S*f32", code)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "rows", "blocksize"),
    [("bf16", 16, 64), ("bf16", 16, 32), ("bf16", 32, 64), ("bf16", 64, 64), ("bf16", 64, 32), ("fp16", 16, 64),
     ("fp32", 16, 64)],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_linear(arch, blocksize, dtype, rows, nested, backward):
    kernel, name = (_nf4_linear_dx_kernel, "nf4_linear_dx") if backward else (_nf4_linear_kernel, "nf4_linear")
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "dy_ptr", "dx_ptr"), dtype)
    flags = {} if backward else {"BIAS": True}
    lean(kernel, arch, configs.nf4_linear(name, rows, arch, DTYPES[dtype]),
         {**pointers, "absmax_ptr": "u8" if nested else "fp32"}, dot=True, few_rows_left=backward and rows < 64,
         BLOCKSIZE=blocksize, NESTED=nested, PRECISION=configs.fp32_precision(arch), **flags)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("bias", [False, True])
def test_sum_splits(arch, bias):
    lean(_sum_splits_kernel, arch, dict(num_warps=4), dict(y_ptr="bf16", bias_ptr="bf16"),
         SPLITS=8, BLOCK=512, BIAS=bias)  # fmt: skip
