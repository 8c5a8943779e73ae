"""The kernels of a gated MLP compile lean for every chip, with every activation."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.gated import _gated_gradients_kernel, _gated_kernel
from peft_ops.reference.activations import ACTIVATIONS
from resources import ARCHES, assert_lean

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("kernel", [_gated_kernel, _gated_gradients_kernel])
def test_gated(kernel, dtype, arch):
    lean(kernel, "silu", dtype, arch)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "silu"])
def test_every_activation(activation):
    lean(_gated_gradients_kernel, activation, "bf16", "sm_90")


@pytest.mark.parametrize("arch", ARCHES)
def test_misaligned_pointers_and_sizes_compile(arch):
    """Case 9."""
    lean(_gated_gradients_kernel, "silu", "bf16", arch, divisible=False)


def lean(kernel, activation, dtype, arch, divisible=True):
    config = configs.launch(kernel.__name__.removeprefix("_").removesuffix("_kernel"), arch, TORCH[dtype])
    signature = {n: "i32" if n == "SIZE" else f"*{dtype}" for n in kernel.arg_names if n not in ("BLOCK", "ACTIVATION")}
    constants = dict(BLOCK=config["BLOCK"], ACTIVATION=activation)
    assert_lean(
        kernel, signature, constants, arch, dot=False, divisible=divisible, num_warps=config["num_warps"]
    )  # fmt: skip
