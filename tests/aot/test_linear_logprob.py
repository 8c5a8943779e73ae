"""Every kernel of linear_logprob, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.linear_logprob import _add_product_kernel, _logprob_gradient_kernel, _logprob_kernel
from resources import ARCHES, assert_lean

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT32 = ("s_ptr", "parts_ptr", "norm_ptr", "entropy_ptr", "dlogp_ptr", "dentropy_ptr", "dbias_ptr", "dx_ptr")
SCALARS = ("scaling", "inner", "outer", "rate")
CONV1D = ("stride_wn",)  # a transposed weight; its rows are the unit stride
LINEAR = ("stride_wk",)


def lean(kernel, arch, dtype, *, weight=LINEAR, adapter="fp32", divisible=True, **flags):
    name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    config = configs.logprob(name, arch, TORCH[dtype], flags.get("LOW_RANK", False), divisible)
    unit = ("stride_xk", *weight, "stride_br") if divisible else ()
    constants = {key: value for key, value in config.items() if key.isupper()} | dict.fromkeys(unit, 1)
    constants |= {"PRECISION": configs.fp32_precision(arch), "BLOCK_R": configs.block_r(16, arch, TORCH[dtype])} | flags
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_ptr"):
            kind = "i64" if argument == "targets_ptr" else "fp32" if argument in FLOAT32 else dtype
            signature[argument] = f"*{adapter if argument == 'b_ptr' else kind}"
        else:
            signature[argument] = "fp32" if argument in SCALARS else "i32"
    return assert_lean(
        kernel, signature, constants, arch, dot=True, divisible=divisible,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


on_every_chip = pytest.mark.parametrize("arch", ARCHES)
PLAIN = dict(BIAS=False, LOW_RANK=False, CAP=False, ENTROPY=False, NEED_DBIAS=False)
EVERYTHING = dict(BIAS=True, LOW_RANK=True, CAP=True, ENTROPY=True, NEED_DBIAS=True)
LORA, CAPPED = PLAIN | dict(LOW_RANK=True, ENTROPY=True), PLAIN | dict(BIAS=True, CAP=True, NEED_DBIAS=True)
MIXES = pytest.mark.parametrize(
    ("dtype", "flags"),
    [("bf16", PLAIN), ("bf16", EVERYTHING), ("bf16", LORA), ("bf16", CAPPED), ("fp32", PLAIN), ("fp32", EVERYTHING)],
    ids=["bf16-plain", "bf16-everything", "bf16-lora", "bf16-capped", "fp32-plain", "fp32-everything"],
)


@on_every_chip
@MIXES
def test_forward(arch, dtype, flags):
    lean(_logprob_kernel, arch, dtype, **flags)


@on_every_chip
@MIXES
def test_gradient(arch, dtype, flags):
    lean(_logprob_gradient_kernel, arch, dtype, **flags)


@on_every_chip
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_add_product(arch, dtype):
    lean(_add_product_kernel, arch, dtype)


@on_every_chip
def test_transposed_heads_and_16_bit_adapters(arch):
    lean(_logprob_kernel, arch, "fp16", weight=CONV1D, adapter="fp16", **EVERYTHING)
    lean(_logprob_gradient_kernel, arch, "bf16", weight=CONV1D, adapter="bf16", **EVERYTHING)
    lean(_add_product_kernel, arch, "bf16", weight=CONV1D)


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9."""
    lean(_logprob_kernel, arch, "bf16", divisible=False, **PLAIN)
    lean(_logprob_gradient_kernel, arch, "bf16", divisible=False, **PLAIN)
    lean(_add_product_kernel, arch, "bf16", divisible=False)
