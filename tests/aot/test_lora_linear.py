"""Every LoRA kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.down_project import _down_project_da_kernel, _down_project_kernel
from peft_ops.kernels.linear_low_rank import _linear_low_rank_kernel
from peft_ops.kernels.low_rank import _low_rank_gradients_kernel, _low_rank_update_kernel
from resources import ARCHES, assert_lean

UNIT = {
    _down_project_kernel: ("stride_xk", "stride_ak"),
    _down_project_da_kernel: ("stride_xk",),
    _low_rank_update_kernel: ("stride_yn", "stride_br"),
    _low_rank_gradients_kernel: ("stride_dyn", "stride_br"),
    _linear_low_rank_kernel: ("stride_xk", "stride_wk", "stride_br"),
}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP32 = ("s_ptr", "ds_ptr", "da_ptr", "db_ptr")


def signature_of(kernel, dtype, adapter, unit):
    """{argument: type}: adapters (a, b) in their own dtype, sums in float32, everything else in `dtype`."""
    types = {}
    for name in kernel.arg_names:
        if (name.isupper() and name not in ("M", "N", "K", "R")) or name in unit:
            continue
        if name == "seed_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = f"*{'fp32' if name in FP32 else adapter if name in ('a_ptr', 'b_ptr') else dtype}"
        else:
            types[name] = "fp32" if name in ("scale", "scaling", "keep_scale") else "i32"
    return types


def lean(kernel, arch, dtype, adapter, rank, *, unit=None, entry="", **flags):
    name, torch_dtype = entry or kernel.__name__.removeprefix("_").removesuffix("_kernel"), TORCH[dtype]
    config, unit = configs.launch(name, arch, torch_dtype), UNIT[kernel] if unit is None else unit
    constants = {key: value for key, value in config.items() if key.isupper()} | flags | dict.fromkeys(unit, 1)
    constants["BLOCK_R"] = configs.block_r(rank, arch, torch_dtype)
    return assert_lean(
        kernel, signature_of(kernel, dtype, adapter, unit), constants, arch, dot=True,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


DTYPES = [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")]
on_every_chip = pytest.mark.parametrize("arch", ARCHES)
in_every_dtype = pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
small_and_large_rank = pytest.mark.parametrize("rank", [16, 64])


@on_every_chip
@in_every_dtype
@small_and_large_rank
@pytest.mark.parametrize("kernel", [_down_project_kernel, _down_project_da_kernel])
def test_down_project(kernel, arch, dtype, adapter, rank):
    for dropout in (False, True) if rank == 64 else (False,):
        lean(kernel, arch, dtype, adapter, rank, SPLITS=1, DROPOUT=dropout, PRECISION=configs.fp32_precision(arch))


@on_every_chip
@in_every_dtype
@small_and_large_rank
def test_low_rank_gradients(arch, dtype, adapter, rank):
    flags = dict(NEED_DB=True, PRECISION=configs.fp32_precision(arch))
    lean(_low_rank_gradients_kernel, arch, dtype, adapter, rank, **flags)


@on_every_chip
@in_every_dtype
@small_and_large_rank
def test_low_rank_update(arch, dtype, adapter, rank):
    flags = dict(PRECISION=configs.update_precision(arch, TORCH[dtype]))
    lean(_low_rank_update_kernel, arch, dtype, adapter, rank, GROUPS=1, DROPOUT=False, **flags)
    dx_unit = ("stride_yn", "stride_bn")  # dropout is dx's, whose b is aᵀ
    for groups, entry in ((1, "low_rank_update"), (3, "low_rank_update_groups")):
        masked = dict(unit=dx_unit, entry=entry, GROUPS=groups, DROPOUT=True)
        lean(_low_rank_update_kernel, arch, dtype, adapter, rank, **masked, **flags)


@on_every_chip
@small_and_large_rank
@pytest.mark.parametrize("dx", [False, True])
def test_linear_low_rank(arch, rank, dx):
    unit = ("stride_xk", "stride_wn", "stride_bn") if dx else UNIT[_linear_low_rank_kernel]
    flags = dict(BIAS=not dx, DROPOUT=dx, PRECISION=configs.update_precision(arch, torch.bfloat16))
    lean(_linear_low_rank_kernel, arch, "bf16", "fp32", rank, unit=unit, **flags)


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9: pointers and strides that are no multiple of 16 get a specialisation of their own."""
    signature = signature_of(_down_project_kernel, "bf16", "fp32", ())
    config = configs.launch("down_project", arch, torch.bfloat16)
    constants = dict(BLOCK_M=config["BLOCK_M"], BLOCK_K=config["BLOCK_K"], BLOCK_R=16, SPLITS=1, DROPOUT=True)
    constants["PRECISION"] = configs.fp32_precision(arch)
    options = dict(num_warps=config["num_warps"], num_stages=config["num_stages"])
    assert_lean(_down_project_kernel, signature, constants, arch, dot=True, divisible=False, **options)
