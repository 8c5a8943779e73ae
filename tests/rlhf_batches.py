"""Batches for the tests of losses: random ones, and ones at the edges of what floating point and masks can be."""

import torch

INF, NAN = float("inf"), float("nan")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def mask_of(*lengths, T=None):
    """[B, T] bool, the first `length` tokens of each row."""
    return torch.arange(T or max(lengths))[None] < torch.tensor(lengths)[:, None]


def tokens(B=4, T=7, dtype=torch.float64, scale=1.0):
    """Log-probs [B, T]."""
    return -torch.rand(B, T, dtype=dtype) * 3 * scale


def sequences(B=6, dtype=torch.float64, scale=10.0):
    """Summed log-probs [B]."""
    return -torch.rand(B, dtype=dtype) * scale - 0.1


def poisoned(tensor, mask, value=NAN):
    """The tensor with `value` where the mask is False; a leaf that requires a gradient where the tensor does."""
    return torch.where(mask, tensor.detach(), value).requires_grad_(tensor.requires_grad)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def close(ours, theirs, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, check_dtype=False)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
