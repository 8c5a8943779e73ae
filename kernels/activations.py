"""Activation functions and their derivatives in kernels: float32 in, float32 out, by the names of the reference."""

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    """By exp(-2|z|) where that keeps its bits, by the series around zero."""
    e = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - e) / (1.0 + e)
    q = z * z
    series = z * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0.0, -large, large))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) for float32 z; every activation is zero at zero, so masked lanes stay zero, and NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "leakyrelu":
        z = tl.where(z > 0.0, z, z * 0.01)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":
        z = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z) for float32 z."""
    if ACTIVATION == "relu":
        d = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "leakyrelu":
        d = tl.where(z > 0.0, 1.0, 0.01)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_new":
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        d = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * z * z)
    elif ACTIVATION == "silu":
        g = _sigmoid(z)
        d = g * (1.0 + z * (1.0 - g))
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        d = 1.0 - t * t
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return d
