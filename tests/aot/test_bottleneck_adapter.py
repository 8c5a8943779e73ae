"""Every bottleneck adapter kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.bottleneck_adapter import (
    _bottleneck_gradient_kernel,
    _up_project_gradients_kernel,
    _up_project_kernel,
)
from peft_ops.kernels.down_project import _down_project_kernel
from peft_ops.reference.activations import ACTIVATIONS
from resources import ARCHES, assert_lean

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_ACTIVATIONS_DTYPE, PARAMETERS = (
    ("x_ptr", "residual_ptr", "y_ptr", "dy_ptr"),
    ("a_ptr", "bias_ptr", "w_ptr", "up_bias_ptr"),
)
FORWARD_UNIT, DX_UNIT = ("stride_wr", "stride_resn"), ("stride_wn", "stride_resn")  # dx: the weight is W_downᵀ


def lean(kernel, arch, dtype, adapter, m=64, unit=(), dot=True, divisible=True, **flags):
    """dtype: of x, residual, y, dy; adapter: of the parameters; sums are float32."""
    config = configs.launch(kernel.__name__.removeprefix("_").removesuffix("_kernel"), arch, TORCH[dtype])
    constants = {key: value for key, value in config.items() if key.isupper()} | dict.fromkeys(unit, 1) | flags
    if "BLOCK_R" in kernel.arg_names:
        constants["BLOCK_R"] = configs.block_r(m, arch, TORCH[dtype])
    types = {}
    for name in (name for name in kernel.arg_names if name not in constants):
        if name == "seed_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype if name in IN_ACTIVATIONS_DTYPE else adapter if name in PARAMETERS else 'fp32'}"
        else:
            types[name] = "fp32" if name in ("scaling", "keep_scale") else "i32"
    options = dict(num_warps=config["num_warps"], num_stages=config.get("num_stages", 1))
    return assert_lean(kernel, types, constants, arch, dot=dot, divisible=divisible, **options)


def up_project(arch, dtype, adapter, activation, *, dx=False, **options):
    precision = configs.update_precision(arch, TORCH[dtype])
    flags = dict(ACTIVATION=activation, BIAS=not dx, UP_BIAS=not dx, RESIDUAL=True, PRECISION=precision)
    lean(_up_project_kernel, arch, dtype, adapter, **({"unit": DX_UNIT if dx else FORWARD_UNIT} | options | flags))


def gradients(arch, dtype, activation, **options):
    flags = dict(ACTIVATION=activation, SPLITS=1, BIAS=True, NEED_DW=True, NEED_DBIAS=True)
    flags["PRECISION"] = configs.fp32_precision(arch)
    lean(_up_project_gradients_kernel, arch, dtype, "fp32", **({"unit": ("stride_dyn",)} | options | flags))


on_every_chip = pytest.mark.parametrize("arch", ARCHES)
in_every_dtype = pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
widths = pytest.mark.parametrize("m", [16, 64])


@on_every_chip
@widths
@pytest.mark.parametrize(("dtype", "adapter"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])
def test_forward_and_dx(arch, dtype, adapter, m):
    up_project(arch, dtype, adapter, "gelu", m=m)
    up_project(arch, dtype, adapter, "linear", m=m, dx=True)


@on_every_chip
@widths
@in_every_dtype
def test_gradients(arch, dtype, m):
    gradients(arch, dtype, "gelu", m=m)


@on_every_chip
@in_every_dtype
def test_the_way_down_against_a_transposed_weight(arch, dtype):
    """dh = dy W_up is the down-projection with W_upᵀ for its weight."""
    flags = dict(SPLITS=1, DROPOUT=False, PRECISION=configs.fp32_precision(arch))
    lean(_down_project_kernel, arch, dtype, "fp32", unit=("stride_xk", "stride_ar"), **flags)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
def test_every_activation(activation):
    up_project("sm_90", "bf16", "fp32", activation)
    gradients("sm_90", "bf16", activation)


@on_every_chip
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])
def test_bottleneck_gradient(arch, activation):
    lean(_bottleneck_gradient_kernel, arch, "fp32", "fp32", dot=False, ACTIVATION=activation, BIAS=True)


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9: pointers and strides that are no multiple of 16 get a specialisation of their own."""
    up_project(arch, "bf16", "fp32", "gelu", unit=(), divisible=False)
    gradients(arch, "bf16", "gelu", unit=(), divisible=False)
