"""Every prefix-attention kernel, in every shipped configuration, compiles lean for every chip."""

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels.prefix_attention import _prefix_dq_kernel, _prefix_gradients_kernel, _prefix_merge_kernel
from resources import ARCHES, assert_lean

KERNELS = (_prefix_merge_kernel, _prefix_dq_kernel, _prefix_gradients_kernel)
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = ("stride_qd", "stride_kd", "stride_vd", "stride_dd", "stride_gd", "stride_bn")
FP32 = ("lse_ptr", "dkey_ptr", "dvalue_ptr", "bias_ptr")


def signature_of(kernel, dtype, prefix, unit):
    types = {}
    for name in kernel.arg_names:
        if (name.isupper() and name not in ("G", "T", "D", "DV")) or name in unit:
            continue
        if name.endswith("seed_ptr"):
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = f"*{'fp32' if name in FP32 else prefix if name in ('key_ptr', 'value_ptr') else dtype}"
        else:
            types[name] = "fp32" if name in ("score_scale", "value_scale") else "i32"
    return types


def lean(kernel, arch, dtype, prefix, head_dim, *, rows=1 << 20, n=1 << 10, divisible=True, tensor_core=None, **flags):
    name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    config = configs.prefix_attention(name, arch, TORCH[dtype], rows, n, head_dim)
    flags = dict(BIAS=False, DROPOUT=False, PREFIX_DROPOUT=False) | flags
    unit = tuple(name for name in UNIT if name in kernel.arg_names) if divisible else ()
    constants = {key: value for key, value in config.items() if key.isupper()} | flags | dict.fromkeys(unit, 1)
    constants |= dict(BLOCK_D=head_dim, BLOCK_DV=head_dim, PRECISION=configs.fp32_precision(arch))
    if kernel is _prefix_gradients_kernel:
        constants.setdefault("DQ", False)
    return assert_lean(
        kernel, signature_of(kernel, dtype, prefix, unit), constants, arch, dot=True, divisible=divisible,
        tensor_core=tensor_core, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "prefix"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_head_dimension(kernel, arch, dtype, prefix, head_dim):
    lean(kernel, arch, dtype, prefix, head_dim)
