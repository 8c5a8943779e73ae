"""The yardstick: as accurate as plain torch in the same dtype, against a float64 truth."""

import torch

FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_accurate(name, out, same_dtype_torch, exact, times=2.0):
    """‖out − exact‖ ≤ times · ‖torch − exact‖ + floor(dtype), relative to ‖exact‖, where same_dtype_torch is finite.

    out must have its shape and dtype, and be finite where it is. An all-zero truth proves nothing and is refused.
    Use times=3 for gradients.
    """
    out, same_dtype_torch, exact = (t.detach().cpu() for t in (out, same_dtype_torch, exact))
    assert out.shape == exact.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    assert out.dtype == same_dtype_torch.dtype, f"{name}: {out.dtype}, expected {same_dtype_torch.dtype}"
    finite = same_dtype_torch.isfinite()
    assert torch.equal(out.isfinite(), finite), f"{name}: finite in the wrong places"
    ours, theirs, truth = (torch.where(finite, t, 0).double() for t in (out, same_dtype_torch, exact))
    scale = truth.norm()
    assert scale > 0, f"{name}: the truth is zero everywhere; choose inputs that test something"
    error, allowed = ((value - truth).norm() / scale for value in (ours, theirs))
    bound = times * allowed + FLOOR[out.dtype]
    assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.2e}"
