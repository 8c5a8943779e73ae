"""Every prefix-attention kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.prefix_attention import _prefix_dq_kernel, _prefix_gradients_kernel, _prefix_merge_kernel
from resources import ARCHES, assert_lean

WIDTHS = {_prefix_merge_kernel: (64, 128, 256), _prefix_dq_kernel: (64, 128, 256), _prefix_gradients_kernel: (64,)}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = ("stride_qd", "stride_kd", "stride_vd", "stride_dd", "stride_gd", "stride_bn")
FP32 = ("lse_ptr", "dkey_ptr", "dvalue_ptr", "bias_ptr")
FLAGS = ("BIAS", "DROPOUT", "PREFIX_DROPOUT")


def signature_of(kernel, dtype, prefix, unit):
    """{argument: type}: the prefix in its own dtype, sums and bias in float32, everything else in `dtype`."""
    types = {}
    for name in kernel.arg_names:
        if (name.isupper() and name not in ("G", "T", "D", "DV")) or name in unit:
            continue
        if name.endswith("_ptr"):
            kind = "i64" if "seed" in name else "fp32" if name in FP32 else dtype
            types[name] = f"*{prefix if name in ('key_ptr', 'value_ptr') else kind}"
        else:
            types[name] = "fp32" if name in ("score_scale", "value_scale") else "i32"
    return types


def lean(kernel, arch, dtype, prefix, width, flags=(), *, rows=1 << 20, n=1 << 10, divisible=True):
    """Compiled, and the matrix unit is used: tiles are too small for the largest instruction of some chips."""
    name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    config = configs.prefix_attention(name, arch, TORCH[dtype], rows, n, width)
    unit = [name for name in UNIT if name in kernel.arg_names] if divisible else []
    block_d = min(configs.PREFIX_COLUMNS, width) if kernel is _prefix_gradients_kernel else width
    own = dict(BLOCK_DV=width, DQ=True, BLOCK_D=block_d, PRECISION=configs.fp32_precision(arch))
    constants = {key: value for key, value in config.items() if key.isupper()}
    constants |= dict.fromkeys(unit, 1) | {key: key in flags for key in FLAGS}
    constants |= {key: value for key, value in own.items() if key in kernel.arg_names}
    cost = assert_lean(
        kernel, signature_of(kernel, dtype, prefix, unit), constants, arch, dot=False, divisible=divisible,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    assert any("MMA" in op or "mfma" in op for op in cost["instructions"]), cost["instructions"]


on_every_chip = pytest.mark.parametrize("arch", ARCHES)
of_every_kernel = pytest.mark.parametrize("kernel", WIDTHS)


@on_every_chip
@pytest.mark.parametrize(("kernel", "width"), [(kernel, width) for kernel in WIDTHS for width in WIDTHS[kernel]])
def test_a_float32_prefix_beside_16_bits(kernel, width, arch):
    lean(kernel, arch, "bf16", "fp32", width)


@on_every_chip
@of_every_kernel
@pytest.mark.parametrize(
    ("dtype", "prefix", "width"),
    [("bf16", "bf16", 128), ("fp16", "fp32", 64), ("fp32", "fp32", 256)],
)
def test_other_dtypes(kernel, dtype, prefix, width, arch):
    lean(kernel, arch, dtype, prefix, width)


@on_every_chip
@of_every_kernel
@pytest.mark.parametrize("flags", [("BIAS", "DROPOUT"), ("DROPOUT", "PREFIX_DROPOUT")], ids=" ".join)
def test_bias_and_dropout(kernel, flags, arch):
    """T5's bias with dropout of weights, P-tuning v2's dropout of the prefix with that of weights."""
    lean(kernel, arch, "bf16", "fp32", 128, flags)


@on_every_chip
def test_few_rows_and_keys(arch):
    """The tile of a decoding step."""
    lean(_prefix_merge_kernel, arch, "bf16", "fp32", 128, rows=4, n=5)


@on_every_chip
def test_misaligned_pointers_and_strides_compile(arch):
    """Case 9: pointers and strides that are no multiple of 16 get a specialisation of their own."""
    lean(_prefix_merge_kernel, arch, "bf16", "fp32", 64, divisible=False)
