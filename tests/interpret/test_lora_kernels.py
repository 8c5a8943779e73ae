"""What only the LoRA kernels can get wrong: routes, far offsets, writes outside their output."""

import pytest
import torch

from far import far_rows
from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.kernels import configs, down_project, linear_few_rows, linear_low_rank, linear_tma, low_rank, nf4_linear
from peft_ops.reference import down_project as reference_down
from peft_ops.reference import linear_low_rank as reference_linear
from peft_ops.reference import low_rank as reference_low_rank

SEED = torch.tensor(2**40 + 7)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize("route", ["fused", "few rows", "tma"])
def test_routes(monkeypatch, route, dtype, p, M):
    """The routes that no table takes yet: the low-rank term inside the GEMM."""
    monkeypatch.setattr(configs, "linear_route", lambda *_: route)
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


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run, one for every launch."""
    names = []

    class Kernel:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module in (down_project, linear_few_rows, linear_low_rank, linear_tma, low_rank, nf4_linear):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__:
                monkeypatch.setattr(module, name, Kernel(value, name))
    return names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rank", "p"), [(1, 0.0), (20, 0.4), (64, 0.0)])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 8, 8), (70, 136, 72), (300, 72, 136), (259, 72, 520)])
def test_tma(monkeypatch, launched, M, K, N, rank, p, dtype):
    """Rows that start at multiples of 16 bytes; one tile or several a program, narrow and wide, tails everywhere."""
    monkeypatch.setattr(configs, "linear_route", lambda *_: "tma")
    monkeypatch.setattr(configs, "PROGRAMS", 16)
    x, w, bias = random(M, K, dtype=dtype), (random(N, K) / K**0.5).to(dtype), random(N, dtype=dtype)
    s, b, a = random(M, rank), random(N, rank), random(rank, K)
    exact = [t.double() for t in (x, w, bias, s, b)]
    y = linear_low_rank.linear_low_rank(x, w, bias, s, b, 0.5)
    same = reference_linear.linear_low_rank(x, w, bias, s, b, 0.5)
    assert_as_accurate("y", y, same, reference_linear.linear_low_rank(*exact, 0.5))
    dx = linear_low_rank.linear_low_rank_dx(same, w, s, a, p, SEED)
    wide = reference_linear.linear_low_rank_dx(same.double(), exact[1], s.double(), a.double(), p, SEED)
    assert_as_accurate("dx", dx, reference_linear.linear_low_rank_dx(same, w, s, a, p, SEED), wide, times=3.0)
    assert launched == ["_linear_tma_kernel"] * 2


def test_tma_takes_aligned_tensors_alone(monkeypatch, launched):
    monkeypatch.setattr(configs, "linear_route", lambda *_: "tma")
    w = random(72, 64).half()
    for x, rank in ((random(5, 65).half()[:, 1:], 3), (random(64, 5).half().t(), 3), (random(5, 64).half(), 65)):
        s, b = random(5, rank), random(72, rank)
        y = linear_low_rank.linear_low_rank(x, w, None, s, b, 0.5)
        same = reference_linear.linear_low_rank(x, w, None, s, b, 0.5)
        exact = reference_linear.linear_low_rank(x.double(), w.double(), None, s.double(), b.double(), 0.5)
        assert_as_accurate("y", y, same, exact)
    assert launched == ["_linear_low_rank_kernel"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("M", "rank", "p"), [(1, 1, 0.0), (5, 20, 0.4), (17, 64, 0.0)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_few_rows_add_the_parts_of_s(monkeypatch, launched, base, dtype, M, rank, p):
    """Two launches over a dense W, three over NF4; the parts of the down-projection are summed in them."""
    monkeypatch.setattr(configs, "linear_route", lambda *_: "few rows")
    monkeypatch.setattr(configs, "splits", lambda programs, steps, least=4: min(steps, 3))
    monkeypatch.setattr(configs, "nf4_fused", lambda *_: True)
    K, N = 320, 131
    x, bias, a, b = random(M, K, dtype=dtype), random(N, dtype=dtype), random(rank, K), random(N, rank)
    w = random(N, K, dtype=dtype)
    weight = nf4.quantize(w, 64, True) if base == "nf4" else w
    y, s = linear_low_rank.lora_linear(x, weight, bias, a, b, 0.5, p, SEED)
    if base == "nf4":
        assert launched == ["_down_project_kernel", "_nf4_linear_kernel", "_sum_splits_low_rank_kernel"]
    elif dtype != torch.float32:
        assert launched == ["_down_project_kernel", "_linear_few_rows_kernel"]
    same = reference_linear.lora_linear(x, weight, bias, a, b, 0.5, p, SEED)
    wide = weight if base == "dense" else nf4.dequantize(weight, dtype)
    exact = reference_linear.lora_linear(*(t.double() for t in (x, wide, bias, a, b)), 0.5, p, SEED)
    assert_as_accurate("s", s, same[1], exact[1])
    assert_as_accurate("y", y, same[0], exact[0])
    if base == "nf4":
        silent, _ = linear_low_rank.lora_linear(x, weight, bias, a, torch.zeros_like(b), 0.5, p, SEED)
        assert torch.equal(silent, nf4_linear.nf4_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("need_db", [False, True])
def test_gradients_in_one_read_or_two(monkeypatch, launched, dtype, one, need_db):
    monkeypatch.setattr(configs, "gradients_in_one_read", lambda *_: one)
    dy, s, b = random(70, 300, dtype=dtype), random(70, 37) if need_db else None, random(300, 37)
    ours, same = (m.low_rank_gradients(dy, s, b, 0.5) for m in (low_rank, reference_low_rank))
    exact = reference_low_rank.low_rank_gradients(dy.double(), s if s is None else s.double(), b.double(), 0.5)
    for name, *tensors in zip(("ds", "db"), ours, same, exact, strict=True):
        if tensors[0] is None:
            assert not need_db
            assert tensors[2] is None
        else:
            assert_as_accurate(name, *tensors, times=3.0)
    assert ("_low_rank_gradients_kernel" in launched) == (one and need_db)


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
