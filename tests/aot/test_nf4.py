"""Every NF4 kernel, in every shipped configuration, compiles lean for every chip."""

import re

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.nf4 import (
    LEVELS_OF_4_BYTES,
    _absmax_quantize_kernel,
    _nf4_dequantize_kernel,
    _nf4_quantize_kernel,
)
from peft_ops.kernels.nf4_linear import _nf4_linear_dx_kernel, _nf4_linear_kernel, _sum_splits_kernel
from peft_ops.kernels.nf4_tables import NF4_LEVELS, nf4_tables
from resources import ARCHES, assert_lean, compile_for, sass

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


def shuffle(arch):
    return arch.startswith("sm_")


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
@pytest.mark.parametrize(
    ("blocksize", "dtype", "nested", "lines"),
    [(64, "bf16", False, False), (64, "fp32", True, True), (4096, "bf16", True, True), (4096, "fp32", False, True),
     (4096, "fp32", True, False)],
)  # fmt: skip
def test_dequantize(arch, blocksize, dtype, nested, lines):
    """Every pair of values; the configuration depends on the block size alone."""
    lean(_nf4_dequantize_kernel, arch, configs.nf4_blocks("nf4_dequantize", blocksize),
         dict(out_ptr=dtype, absmax_ptr="u8" if nested else "fp32"),
         BLOCKSIZE=blocksize, NESTED=nested, LINES=lines, SHUFFLE=shuffle(arch), EVEN=nested)  # fmt: skip


def test_shuffles_find_the_levels():
    """The PTX block, lane by lane, as the PTX manual defines shfl.sync.idx: what the interpreter cannot run."""
    levels = nf4_tables(torch.device("cpu")).pairs[:16].view(torch.float32)[1::2].tolist()
    assert levels == list(NF4_LEVELS)
    random = [(77 + 2654435761 * lane) % 2**32 for lane in range(32)]
    registers = {"$8": random, "$9": [levels[lane % 16] for lane in range(32)]}
    for name, *operands in re.findall(r"(shr|shfl)\S* (\S+), (\S+), (\w+|\$8)(?:, (\w+))?", LEVELS_OF_4_BYTES.value):
        out, source, index, packed = operands
        if name == "shr":
            registers[out] = [value >> int(index) for value in registers[source]]
            continue
        segments, bound = int(packed, 16) >> 8, int(packed, 16) & 31
        lanes = [(lane & segments) | (at & 31 & ~segments) for lane, at in enumerate(registers[index])]
        assert all(to <= (lane & segments) | (bound & ~segments) for lane, to in enumerate(lanes))
        registers[out] = [registers[source][to] for to in lanes]
    for byte in range(4):
        nibbles = [value >> 8 * byte & 255 for value in random]
        assert registers[f"${byte}"] == [levels[value >> 4] for value in nibbles]
        assert registers[f"${byte + 4}"] == [levels[value & 15] for value in nibbles]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_lane_takes_part_in_a_shuffle(arch):
    """No shuffle stands under a predicate."""
    constants = dict(configs.nf4_linear("nf4_linear", 16, arch, torch.bfloat16), BLOCKSIZE=64, NESTED=True,
                     SHUFFLE=True, EVEN=False, BIAS=False, PRECISION="tf32x3")  # fmt: skip
    options = {key: constants.pop(key) for key in OPTIONS}
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), "bf16") | {"absmax_ptr": "u8"}
    signature = signature_of(_nf4_linear_kernel, constants, pointers)
    code = sass(compile_for(_nf4_linear_kernel, signature, constants, arch, enable_fp_fusion=False, **options))
    assert code.count("SHFL.IDX") >= 32
    assert not re.search(r"@!?U?P\d+\s+SHFL", code)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_and_sums_are_rounded_apart(arch, dtype):
    """map · nested + offset and code · absmax: a fused multiply-add would give other bits than the format."""
    pointers = dict(out_ptr=dtype, absmax_ptr="u8")
    constants = dict(BLOCKSIZE=64, BLOCKS=64, NESTED=True, LINES=False, SHUFFLE=shuffle(arch), EVEN=True)
    signature = signature_of(_nf4_dequantize_kernel, constants, pointers)
    compiled = compile_for(_nf4_dequantize_kernel, signature, constants, arch, num_warps=4, enable_fp_fusion=False)
    code = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
    assert re.search(r"mul\S*f32", code)
    assert not re.search(r"(fma|mad)\S*f32", code)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "rows", "blocksize", "nested"),
    [("bf16", 16, 64, True), ("bf16", 16, 32, True), ("bf16", 32, 64, True), ("bf16", 64, 64, True),
     ("bf16", 64, 32, True), ("bf16", 128, 64, True), ("fp16", 16, 64, True), ("fp32", 16, 64, True),
     ("bf16", 16, 64, False), ("bf16", 128, 64, False), ("fp32", 16, 64, False)],
)  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_linear(arch, blocksize, dtype, rows, nested, backward):
    """Every configuration with nested scales and even K; plain scales and odd K on the smallest and largest tiles."""
    kernel, name = (_nf4_linear_dx_kernel, "nf4_linear_dx") if backward else (_nf4_linear_kernel, "nf4_linear")
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "dy_ptr", "dx_ptr"), dtype)
    flags = {} if backward else {"BIAS": True}
    config = configs.nf4_linear(name, rows, arch, DTYPES[dtype])
    few_rows_left = backward and config["BLOCK_M"] < 64
    lean(kernel, arch, config, {**pointers, "absmax_ptr": "u8" if nested else "fp32"}, dot=True,
         few_rows_left=few_rows_left, BLOCKSIZE=blocksize, NESTED=nested, SHUFFLE=shuffle(arch), EVEN=nested,
         PRECISION=configs.fp32_precision(arch), **flags)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("bias", [False, True])
def test_sum_splits(arch, bias):
    lean(_sum_splits_kernel, arch, dict(num_warps=4), dict(y_ptr="bf16", bias_ptr="bf16"),
         SPLITS=8, BLOCK=512, BIAS=bias)  # fmt: skip
