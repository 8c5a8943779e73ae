"""What only the kernels of linear_logprob can get wrong: far offsets, slabs and workspaces, writes outside them."""

import pytest
import torch

from far import far_rows
from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.kernels import configs, linear_logprob
from peft_ops.reference import linear_logprob as reference


def problem(M=70, K=24, V=300, R=3, dtype=torch.float32):
    x, weight, bias = torch.randn(M, K).to(dtype), torch.randn(V, K).to(dtype), torch.randn(V).to(dtype)
    s, b, targets = torch.randn(M, R), torch.randn(V, R), torch.randint(V, (M,))
    targets[::5] = -100
    return x, weight, bias, s, b, 0.5, targets, -100, 0.3, 4.0


def backward(module, arguments, **needs):
    """Forward, then every gradient."""
    M = arguments[0].shape[0]
    logp, norm, entropy, _ = module.linear_logprob(*arguments, True, 0)
    torch.manual_seed(1)
    dlogp, dentropy = torch.randn(M), torch.randn(M)
    needs = {"need_dx": True, "need_dw": True, "need_dbias": True} | needs
    return logp, entropy, *module.linear_logprob_gradients(*arguments, norm, entropy, dlogp, dentropy, **needs)


def assert_same(ours, theirs):
    for name, mine, other in zip(("logp", "entropy", "dx", "dw", "dbias", "ds", "db"), ours, theirs, strict=True):
        if other is not None:
            assert other.norm() > 0, name
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("far", ["x", "weight", "both transposed"])
def test_offsets_beyond_2_to_the_31(far):
    """Case 8."""
    arguments = list(problem(M=3, K=3, V=3))
    if far == "both transposed":
        near = [arguments[0], arguments[1]]
        arguments[:2] = (far_rows(t.t().contiguous()).t() for t in near)
    else:
        arguments[far == "weight"] = far_rows(arguments[far == "weight"])
    needs = {"need_dw": False}  # its result would be as far
    assert_same(backward(linear_logprob, arguments, **needs), backward(reference, arguments, **needs))


@pytest.mark.parametrize("workspace", [1, 70 * 4 * 256, 64 << 20])
def test_any_workspace_gives_the_same(monkeypatch, workspace):
    """Columns of the vocabulary a few at a time, or all."""
    arguments = problem()
    expected = backward(reference, arguments)
    monkeypatch.setattr(configs, "LOGPROB_WORKSPACE", workspace)
    assert_same(backward(linear_logprob, arguments), expected)


@pytest.mark.parametrize("K", [64, 24])
@pytest.mark.parametrize("nested", [False, True])
def test_an_nf4_head_by_slabs(monkeypatch, nested, K):
    """Decoded a few rows at a time, also where blocks cross rows; each slab's share of the workspace cut again."""
    monkeypatch.setattr(configs, "NF4_SLAB_BYTES", 64 * K * 4)
    monkeypatch.setattr(configs, "logprob_columns", lambda rows, itemsize: 48)
    arguments = list(problem(K=K))
    arguments[1] = nf4.quantize(arguments[1], 32, nested)
    needs = {"need_dw": False}
    assert_same(backward(linear_logprob, arguments, **needs), backward(reference, arguments, **needs))


def test_parts_of_the_vocabulary_join_in_any_number(monkeypatch):
    """Shares of the vocabulary whose largest logits are far apart."""
    arguments = list(problem(V=700))
    arguments[2] = torch.linspace(-300, 300, 700)
    arguments[8], arguments[9] = None, 1.0
    for programs in (1, 4, 256):
        monkeypatch.setattr(configs, "PROGRAMS", programs)
        monkeypatch.setattr(configs, "splits", lambda p, steps, least=1: max(1, min(configs.PROGRAMS, steps)))
        assert_same(backward(linear_logprob, arguments), backward(reference, arguments))


def test_rows_that_are_all_ignored_are_skipped():
    """A whole block of rows without a target, beside one with: zeros, and nothing of what it holds."""
    arguments = list(problem(M=300))
    arguments[0][:256], arguments[3][:256] = float("nan"), float("nan")
    arguments[6][:256] = -100
    ours = backward(linear_logprob, arguments)
    assert all(t.isfinite().all() for t in ours)
    assert_same(ours, backward(reference, arguments))


@pytest.mark.parametrize("kernel", ["logprob_gradient", "add_product"])
def test_nothing_is_written_outside(kernel, monkeypatch):
    """Case 10: canaries around what the kernels write."""
    x, weight, *_ = problem(M=19, K=24, V=45)
    targets = torch.randint(45, (19,))
    head = linear_logprob.Head(x, weight, None, None, None, 1.0, None, 1.0)
    frame = torch.full((25, 60), 7.0)
    if kernel == "logprob_gradient":
        make = torch.Tensor.new_empty

        def framed(self, *shape, **kwargs):
            return frame.as_strided(shape, (45, 1), 60) if shape == (19, 45) else make(self, *shape, **kwargs)

        monkeypatch.setattr(torch.Tensor, "new_empty", framed)
        norm = torch.stack((torch.zeros(19), torch.full((19,), 4.0)))
        linear_logprob._logit_gradients(
            head, slice(0, 45), weight, -100, False, targets, norm, None, torch.randn(19), None
        )
        written = frame.view(-1)[60 : 60 + 19 * 45]
    else:
        dx = frame.as_strided((19, 24), (24, 1), 60).zero_()
        linear_logprob._add_product(head, dx, torch.randn(19, 45), weight)
        written = frame.view(-1)[60 : 60 + 19 * 24]
    assert (written != 7.0).all()
    assert (frame.view(-1)[:60] == 7.0).all()
    assert (frame.view(-1)[60 + written.numel() :] == 7.0).all()


def test_sums_over_slabs_are_float32(monkeypatch):
    """dx of a 16-bit x is rounded once, however many slabs it is summed from."""
    arguments = list(problem(M=33, V=2000, dtype=torch.float16))
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    truth, same = backward(reference, exact)[2], backward(reference, arguments)[2]
    monkeypatch.setattr(configs, "logprob_columns", lambda rows, itemsize: 16)
    assert_as_accurate("dx", backward(linear_logprob, arguments)[2], same, truth, times=3.0)
