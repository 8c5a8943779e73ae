"""Every LoRA kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.down_project import _down_project_da_kernel, _down_project_kernel
from peft_ops.kernels.linear_few_rows import _linear_few_rows_kernel, _sum_splits_low_rank_kernel
from peft_ops.kernels.linear_low_rank import _linear_low_rank_kernel
from peft_ops.kernels.linear_tma import _linear_tma_kernel
from peft_ops.kernels.low_rank import _low_rank_gradients_kernel, _low_rank_update_kernel
from resources import ARCHES, assert_lean

UNIT = {
    _down_project_kernel: ("stride_xk", "stride_ak"),
    _down_project_da_kernel: ("stride_xk",),
    _low_rank_update_kernel: ("stride_yn", "stride_br"),
    _low_rank_gradients_kernel: ("stride_dyn", "stride_br"),
    _linear_low_rank_kernel: ("stride_xk", "stride_wk", "stride_br"),
    _linear_few_rows_kernel: ("stride_xk", "stride_wk", "stride_br"),
    _sum_splits_low_rank_kernel: ("stride_br",),
}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP32 = ("s_ptr", "ds_ptr", "da_ptr", "db_ptr", "total_ptr", "part_ptr")


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


def lean(kernel, arch, dtype, adapter, rank, *, unit=None, name=None, tensor_core=None, **flags):
    name, torch_dtype = name or kernel.__name__.removeprefix("_").removesuffix("_kernel"), TORCH[dtype]
    config, unit = configs.launch(name, arch, torch_dtype), UNIT[kernel] if unit is None else unit
    constants = {key: value for key, value in config.items() if key.isupper()} | flags | dict.fromkeys(unit, 1)
    constants.setdefault("BLOCK_R", configs.block_r(rank, arch, torch_dtype))
    return assert_lean(
        kernel, signature_of(kernel, dtype, adapter, unit), constants, arch, dot=True,
        tensor_core=tensor_core, **{key: config[key] for key in ("num_warps", "num_stages") if key in config},
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
    """Without dropout there is less of the same code: once for every chip and rank."""
    for dropout in (False, True) if (dtype, adapter) == DTYPES[0] else (True,):
        lean(kernel, arch, dtype, adapter, rank, SPLITS=1, DROPOUT=dropout, PRECISION=configs.fp32_precision(arch))


@on_every_chip
@in_every_dtype
@pytest.mark.parametrize("rank", [16, 32])
def test_low_rank_gradients(arch, dtype, adapter, rank):
    """Ranks that a program holds at once; above them ds and db are two reads (configs.gradients_in_one_read)."""
    lean(_low_rank_gradients_kernel, arch, dtype, adapter, rank, PRECISION=configs.fp32_precision(arch))


@on_every_chip
@in_every_dtype
@small_and_large_rank
def test_low_rank_update(arch, dtype, adapter, rank):
    flags = dict(PRECISION=configs.update_precision(arch, TORCH[dtype]))
    lean(_low_rank_update_kernel, arch, dtype, adapter, rank, GROUPS=1, DROPOUT=False, **flags)
    dx_unit = ("stride_yn", "stride_bn")  # dropout is dx's, whose b is aᵀ
    several = [(3, "low_rank_update_groups")] if (dtype, adapter) in (DTYPES[0], DTYPES[-1]) else []
    for groups, entry in ((1, "low_rank_update"), *several):
        masked = dict(unit=dx_unit, name=entry, GROUPS=groups, DROPOUT=True)
        lean(_low_rank_update_kernel, arch, dtype, adapter, rank, **masked, **flags)


@on_every_chip
@small_and_large_rank
@pytest.mark.parametrize("dx", [False, True])
def test_linear_low_rank(arch, rank, dx):
    unit = ("stride_xk", "stride_wn", "stride_bn") if dx else UNIT[_linear_low_rank_kernel]
    flags = dict(BIAS=not dx, DROPOUT=dx, PRECISION=configs.update_precision(arch, torch.bfloat16))
    lean(_linear_low_rank_kernel, arch, "bf16", "fp32", rank, unit=unit, **flags)


@on_every_chip
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("dx", [False, True])
def test_linear_few_rows(arch, rank, dx):
    """The forward's tiles of W are too small for the matrix units of Hopper and Blackwell."""
    unit = ("stride_xk", "stride_wn", "stride_bn") if dx else UNIT[_linear_few_rows_kernel]
    flags = dict(BIAS=not dx, DROPOUT=dx, PRECISION=configs.update_precision(arch, torch.bfloat16))
    lean(_linear_few_rows_kernel, arch, "bf16", "fp32", rank, unit=unit, name="linear_few_rows_dx" if dx else None,
         tensor_core=None if dx else few_rows_unit(arch), PARTS=1 if dx else 16, BLOCK_R=rank, **flags)  # fmt: skip


@on_every_chip
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sum_splits_low_rank(arch, rank, dtype):
    flags = dict(SPLITS=8, PARTS=16, BIAS=True, PRECISION=configs.update_precision(arch, TORCH[dtype]))
    lean(_sum_splits_low_rank_kernel, arch, dtype, "fp32", rank, BLOCK_R=rank,
         tensor_core=few_rows_unit(arch), **flags)  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize(("rank", "rows"), [(16, 128), (64, 128), (16, 8192), (32, 8192)])
@pytest.mark.parametrize("form", ["y", "dx", "dx with dropout"])
def test_linear_tma(arch, rank, rows, form):
    """Narrow tiles and wide ones (rank 64 has the first alone); W by rows for y, by columns for dx; operands come by
    TMA and y goes by it."""
    dropout, by_rows, unit = form == "dx with dropout", form == "y", "stride_br" if form == "y" else "stride_bn"
    config = configs.linear_tma(rows, 4096, rank, dropout, arch)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    constants = dict(config, ROWS=by_rows, BIAS=by_rows, DROPOUT=dropout, PRECISION="tf32", **{unit: 1})
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    tile = lambda rows, columns: f"tensordesc<bf16[{rows}, {columns}]>"
    signature = signature_of(_linear_tma_kernel, "bf16", "fp32", (unit,)) | dict(
        x_desc=tile(m, k), w_desc=tile(n, k) if by_rows else tile(k, n), y_desc=tile(m, n // config["SUBTILES"])
    )
    cost = assert_lean(_linear_tma_kernel, signature, constants, arch, dot=True, **options)
    assert {"UTMALDG", "UTMASTG"} <= set(cost["instructions"])


def few_rows_unit(arch):
    return "HMMA" if arch.startswith("sm_") else None


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9: pointers and strides that are no multiple of 16 get a specialisation of their own."""
    signature = signature_of(_down_project_kernel, "bf16", "fp32", ())
    config = configs.launch("down_project", arch, torch.bfloat16)
    constants = dict(BLOCK_M=config["BLOCK_M"], BLOCK_K=config["BLOCK_K"], BLOCK_R=16, SPLITS=1, DROPOUT=True)
    constants["PRECISION"] = configs.fp32_precision(arch)
    options = dict(num_warps=config["num_warps"], num_stages=config["num_stages"])
    assert_lean(_down_project_kernel, signature, constants, arch, dot=True, divisible=False, **options)
