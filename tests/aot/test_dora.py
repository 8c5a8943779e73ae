"""Every DoRA kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.dora import (
    _dora_gradients_kernel,
    _dora_norm_kernel,
    _dora_update_kernel,
    _nf4_dora_norm_kernel,
)
from resources import ARCHES, assert_lean

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = dict(
    s_ptr="fp32", g_ptr="fp32", norm_ptr="fp32", dg_ptr="fp32", packed_ptr="u8", nested_ptr="fp32", offset_ptr="fp32",
    map_ptr="fp32", pairs_ptr="i64",
)  # fmt: skip
UNIT = {
    _dora_norm_kernel: ("stride_wk", "stride_ak"),
    _nf4_dora_norm_kernel: ("stride_ak",),
    _dora_update_kernel: ("stride_un", "stride_br"),
    _dora_gradients_kernel: ("stride_dyn", "stride_un"),
}


def lean(kernel, arch, dtype, pointers, *, dot=True, divisible=True, options=None, unit=None, **flags):
    """pointers: {argument: element type} beside those of POINTERS; everything else is of `dtype`."""
    name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    config = configs.launch(name, arch, TORCH[dtype])
    unit = (unit or UNIT[kernel]) if divisible else ()
    constants = {key: value for key, value in config.items() if key.isupper()} | flags | dict.fromkeys(unit, 1)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = f"*{({**POINTERS, **pointers}).get(argument, dtype)}"
        else:
            signature[argument] = "fp32" if argument in ("scaling", "floor") else "i32"
    return assert_lean(
        kernel, signature, constants, arch, dot=dot, divisible=divisible,
        num_warps=config["num_warps"], num_stages=config["num_stages"], **(options or {}),
    )  # fmt: skip


on_every_chip = pytest.mark.parametrize("arch", ARCHES)


@on_every_chip
@pytest.mark.parametrize(("weight", "adapter"), [("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")])
@pytest.mark.parametrize("unit", [("stride_wk", "stride_ak"), ("stride_wn", "stride_ak")], ids=["linear", "conv1d"])
def test_norm(arch, weight, adapter, unit):
    pointers = dict(a_ptr=adapter, b_ptr="fp32")
    lean(_dora_norm_kernel, arch, weight, pointers, unit=unit, SPLITS=4, PRECISION=configs.fp32_precision(arch))


@on_every_chip
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_norm_of_nf4(arch, nested, blocksize):
    pointers = dict(a_ptr="fp32", b_ptr="fp32", absmax_ptr="u8" if nested else "fp32")
    flags = dict(
        BLOCKSIZE=blocksize,
        SPLITS=4,
        NESTED=nested,
        SHUFFLE=arch.startswith("sm_"),
        PRECISION=configs.fp32_precision(arch),
    )
    lean(_nf4_dora_norm_kernel, arch, "fp32", pointers, options=dict(enable_fp_fusion=False), **flags)


@on_every_chip
@pytest.mark.parametrize(
    ("rank", "dtype", "bias"),
    [(16, "bf16", True), (64, "bf16", True), (16, "fp32", True), (64, "fp32", True), (16, "bf16", False)],
)
def test_update(arch, rank, dtype, bias):
    flags = dict(BIAS=bias, PRECISION=configs.update_precision(arch, TORCH[dtype]))
    flags["BLOCK_R"] = configs.block_r(rank, arch, TORCH[dtype])
    lean(_dora_update_kernel, arch, dtype, dict(b_ptr="fp32"), **flags)


@on_every_chip
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("dz", "dg"), [(True, True), (True, False), (False, True)])
def test_gradients(arch, dtype, dz, dg):
    lean(_dora_gradients_kernel, arch, dtype, {}, dot=False, NEED_DZ=dz, NEED_DG=dg)


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9."""
    pointers = dict(a_ptr="fp32", b_ptr="fp32")
    flags = dict(SPLITS=4, PRECISION=configs.fp32_precision(arch))
    lean(_dora_norm_kernel, arch, "bf16", pointers, divisible=False, **flags)
    lean(_dora_gradients_kernel, arch, "bf16", {}, dot=False, divisible=False, NEED_DZ=True, NEED_DG=True)
