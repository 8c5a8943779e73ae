"""What only the LoRA kernels can get wrong: routes, far offsets, writes outside their output."""

import pytest
import torch

from far import far_rows
from numerics import assert_as_accurate
from peft_ops.kernels import configs, down_project, linear_low_rank, low_rank
from peft_ops.reference import down_project as reference_down
from peft_ops.reference import linear_low_rank as reference_linear
from peft_ops.reference import low_rank as reference_low_rank

SEED = torch.tensor(2**40 + 7)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 70])
def test_fused_gemm(monkeypatch, dtype, p, M):
    """The route that no table takes yet: one GEMM with the low-rank term inside."""
    monkeypatch.setattr(configs, "FUSED_LINEAR_MAX_M", 1 << 30)
    K, N, R = 131, 70, 20
    x, w, bias, s, b, a = (
        random(M, K, dtype=dtype), random(N, K, dtype=dtype), random(N, dtype=dtype),
        random(M, R), random(N, R), random(R, K),
    )  # fmt: skip
    y = linear_low_rank.linear_low_rank(x, w, bias, s, b, 0.5)
    same = reference_linear.linear_low_rank(x, w, bias, s, b, 0.5)
    exact = reference_linear.linear_low_rank(*(t.double() for t in (x, w, bias, s, b)), 0.5)
    assert_as_accurate("y", y, same, exact)
    dx = linear_low_rank.linear_low_rank_dx(y, w, s, a, p, SEED)
    same = reference_linear.linear_low_rank_dx(y, w, s, a, p, SEED)
    exact = reference_linear.linear_low_rank_dx(*(t.double() for t in (y, w, s, a)), p, SEED)
    assert_as_accurate("dx", dx, same, exact, times=3.0)


@pytest.mark.unpoisoned
def test_offsets_beyond_2_to_the_31():
    """Case 8, for every operand that is as large as the activations."""
    x, a, s, b, ds = random(3, 40), random(4, 40), random(3, 4), random(40, 4), random(3, 4)
    far = far_rows(x)
    torch.testing.assert_close(
        down_project.down_project(far, a, 0.3, SEED), reference_down.down_project(x, a, 0.3, SEED)
    )
    torch.testing.assert_close(
        down_project.down_project_da(ds, far, 0.3, SEED), reference_down.down_project_da(ds, x, 0.3, SEED)
    )
    ours, theirs = low_rank.low_rank_gradients(far, s, b, 0.5), reference_low_rank.low_rank_gradients(x, s, b, 0.5)
    torch.testing.assert_close(ours, theirs)
    low_rank.low_rank_update_(far, s, b, 0.5, 0.3, SEED)
    torch.testing.assert_close(far, reference_low_rank.low_rank_update_(x, s, b, 0.5, 0.3, SEED))


@pytest.mark.unpoisoned
def test_columns_beyond_2_to_the_31():
    x, a = random(40, 3), random(4, 3)
    far = far_rows(x.t().contiguous()).t()
    torch.testing.assert_close(
        down_project.down_project(far, a, 0.3, SEED), reference_down.down_project(x, a, 0.3, SEED)
    )
    torch.testing.assert_close(down_project.down_project_da(random(40, 2), far, 0.0, None).shape, torch.Size((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("R", "groups"), [(3, 3), (40, 2)])
def test_groups_are_those_of_the_reference(dtype, R, groups):
    """A seed for each group of columns: blocks of r that end within their group, several of them, tails."""
    seeds, x, a = torch.arange(groups) + 2**40, random(70, 131, dtype=dtype), random(groups * R, 131)
    ds = random(70, groups * R)
    args = {"s": (x, a), "da": (ds, x), "dx": (random(70, 131, dtype=dtype), ds, a.t(), 0.5)}
    functions = {"s": "down_project", "da": "down_project_da", "dx": "low_rank_update_"}
    for name, given in args.items():
        of = [low_rank, reference_low_rank] if name == "dx" else [down_project, reference_down]
        ours, same, exact = (
            getattr(module, functions[name])(
                *(t.clone().to(wide) if torch.is_tensor(t) else t for t in given), 0.4, seeds
            )
            for module, wide in ((of[0], None), (of[1], None), (of[1], torch.float64))
        )
        assert_as_accurate(name, ours, same, exact, times=3.0)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_update_writes_inside_its_view_alone(p):
    """Case 10: y is a window into a larger tensor whose frame must not change."""
    frame = torch.full((23, 90), 5.0)
    y = frame[2:19, 7:80]
    y.copy_(random(17, 73))
    s, b, expected = random(17, 3), random(73, 3), y.clone()
    low_rank.low_rank_update_(y, s, b, 0.5, p, SEED)
    torch.testing.assert_close(y, reference_low_rank.low_rank_update_(expected, s, b, 0.5, p, SEED))
    outside = torch.ones(23, 90, dtype=torch.bool)
    outside[2:19, 7:80] = False
    assert (frame[outside] == 5.0).all()


def test_masked_lanes_do_not_turn_infinities_into_nan():
    """Case 11: an infinite value beside the tail of a block."""
    x = random(3, 70)
    x[1, 69] = float("inf")
    s = down_project.down_project(x, torch.ones(2, 70), 0.0, None)
    assert s[1].isinf().all()
    assert s[[0, 2]].isfinite().all()


def test_an_infinite_element_that_dropout_drops_is_gone():
    x = random(64, 8)
    x[:, 3] = float("inf")
    ours, theirs = (m.down_project(x, torch.ones(2, 8), 0.5, SEED) for m in (down_project, reference_down))
    assert 0 < ours.isfinite().sum() < ours.numel()
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 300])
@pytest.mark.parametrize("arch", ["default", "sm_80", "sm_90", "gfx942", "sm_999"])
def test_every_rank_has_a_block_on_every_chip(rank, arch):
    block = configs.block_r(rank, arch, torch.bfloat16)
    assert block in (16, 32, 64)
    assert configs.launch("down_project", arch, torch.bfloat16)["BLOCK_M"] > 0
