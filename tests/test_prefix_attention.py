"""ops.prefix_attention against attention over joined keys in float64: on the reference, the interpreter, a GPU."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops._backend import implementation
from peft_ops.ops import prefix_attention
from peft_ops.reference import formulas
from peft_ops.reference.dropout import dropout_keep

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def problem(B=2, H=4, heads=2, T=13, S=17, D=24, Dv=None, n=5, dtype=torch.float32, prefix=None, device="cpu"):
    """{name: leaf}: H heads of query share `heads` of keys; the prefix in a dtype of its own."""
    shapes = {
        "query": (B, H, T, D), "key": (B, heads, S, D), "value": (B, heads, S, Dv or D),
        "prefix_key": (heads, n, D), "prefix_value": (heads, n, Dv or D),
    }  # fmt: skip
    dtypes = {name: prefix or dtype if name.startswith("prefix") else dtype for name in NAMES}
    return {name: torch.randn(shapes[name]).to(device, dtypes[name]).requires_grad_() for name in NAMES}


def mask_of(kind, leaves, rows=None):
    """{argument: value}: over the text, none of whose `rows` sees any."""
    (B, H, T, _), S, device = leaves["query"].shape, leaves["key"].shape[2], leaves["query"].device
    if kind in ("none", "causal"):
        return {"is_causal": kind == "causal"}
    seen = torch.rand(B, 1, T, S, device=device) < 0.7
    if rows is not None:
        seen[:, :, rows] = False
    if kind == "bool":
        return {"mask": seen}
    dtype = leaves["query"].dtype
    least = {"-inf": -math.inf, "lowest": torch.finfo(dtype).min}[kind]
    return {"mask": torch.randn(B, H, T, S, device=device).to(dtype).masked_fill(~seen, least)}


def dropped(pk, pv, B, p, seed):
    """[B, Hkv, n, ...] of the prefix: keys are the first rows of one mask, values the rows that follow."""
    if p == 0.0:
        return pk.expand(B, *pk.shape), pv.expand(B, *pv.shape)
    (heads, n, D), Dv = pk.shape, pv.shape[-1]
    keep = dropout_keep((2 * B * heads * n, max(D, Dv)), p, torch.tensor(seed, device=pk.device))
    of_key, of_value = keep.view(2, B, heads, n, -1)
    return (t * m[..., : t.shape[-1]] / (1 - p) for t, m in ((pk, of_key), (pv, of_value)))


def joined(q, k, v, pk, pv, mask=None, is_causal=False, prefix_bias=None, scaling=None, prefix_dropout_p=0.0, seed=7,
           fused=False):  # fmt: skip
    """Attention over keys and values that are concatenated, and repeated for every head of query.

    fused: by torch's own function, in the dtype of q.
    """
    B, H, T, S, n = *q.shape[:3], k.shape[2], pk.shape[1]
    pk, pv = dropped(pk, pv, B, prefix_dropout_p, seed)
    keys, values = (
        torch.cat((p.to(t.dtype), t), 2).repeat_interleave(H // k.shape[1], 1) for p, t in ((pk, k), (pv, v))
    )
    add = q.new_zeros(B, H, T, n + S)
    if prefix_bias is not None:
        add[..., :n] += prefix_bias
    if is_causal:
        mask = torch.arange(S, device=q.device) <= torch.arange(T, device=q.device)[:, None]
    if mask is not None:
        add[..., n:] += (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        )
    if fused:
        return scaled_dot_product_attention(q, keys, values, add, scale=scaling)
    scores = q @ keys.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling) + add
    return scores.softmax(-1) @ values


def gradients(function, leaves, direction, **options):
    """{name: tensor}: y and the gradient of <y, direction> for every leaf that requires one."""
    y = function(*(leaves[name] for name in NAMES), **options)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), direction.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def double(t):
    wide = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.detach().double().requires_grad_(t.requires_grad) if wide else t


def direction_of(leaves):
    return torch.randn(*leaves["query"].shape[:3], leaves["value"].shape[3], device=leaves["query"].device)


def assert_accurate(leaves, direction=None, same_dtype=joined, **options):
    options = {"seed": 7, **options} if options.get("prefix_dropout_p") else options
    direction = direction_of(leaves) if direction is None else direction
    ours = gradients(prefix_attention, leaves, direction, **options)
    plain = gradients(same_dtype, leaves, direction, **options, **({"fused": True} if same_dtype is joined else {}))
    wide = {name: double(t) for name, t in options.items()}
    exact = gradients(
        joined, {name: double(t) for name, t in leaves.items()}, direction.to(ours["y"].dtype).double(), **wide
    )
    for name, truth in exact.items():
        assert_as_accurate(name, ours[name], plain[name], truth, times=2.0 if name == "y" else 3.0)
    return ours


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "-inf", "lowest"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(dtype, mask, device):
    leaves = problem(dtype=dtype, device=device)
    assert_accurate(leaves, **mask_of(mask, leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_float32_prefix_beside_a_16_bit_text(dtype, p, device):
    """Case 24: its gradients are float32, over a few rows as exact as if query had been widened, which it is not."""
    leaves = problem(T=19, dtype=dtype, prefix=torch.float32, device=device)

    def widened(q, k, v, pk, pv, prefix_dropout_p=0.0, seed=7):
        seed = torch.tensor(seed, device=q.device)
        return formulas.prefix_attention(q, k, v, pk, pv, 24**-0.5, None, False, None, 0.0, prefix_dropout_p, seed)

    ours = assert_accurate(leaves, same_dtype=widened, prefix_dropout_p=p)
    assert ours["dprefix_key"].dtype == ours["dprefix_value"].dtype == torch.float32
    assert ours["y"].dtype == ours["dquery"].dtype == dtype


@pytest.mark.parametrize(
    ("B", "H", "heads", "T", "S", "D", "n"),
    [
        (1, 1, 1, 1, 1, 1, 1), (3, 6, 2, 1, 29, 16, 7), (2, 4, 4, 31, 1, 40, 3), (1, 5, 5, 7, 11, 13, 2),
        (2, 7, 1, 5, 3, 80, 67), (5, 2, 1, 3, 4, 8, 17), (1, 2, 2, 67, 37, 32, 131), (70, 2, 2, 1, 3, 16, 5),
        (1, 2, 1, 3, 5, 131, 4), (1, 1, 1, 9, 5, 256, 33),
    ],
)  # fmt: skip
def test_every_shape(B, H, heads, T, S, D, n, device):
    """Case 5: prime sizes, single rows and keys, T < S, T > S, head dimensions that are no power of two, GQA or not."""
    assert_accurate(problem(B, H, heads, T, S, D, n=n, device=device))


def test_more_blocks_than_one(device):
    """Several blocks of rows and of the prefix in every kernel, and split reductions."""
    leaves = problem(2, 2, 1, T=64, S=9, D=8, n=40, device=device)
    assert_accurate(leaves, prefix_dropout_p=0.2)
    assert_accurate(leaves)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode(dtype, device):
    """One row against a cache: causality is in the cache, so there is no mask."""
    assert_accurate(problem(5, 8, 2, T=1, S=37, D=32, n=20, dtype=dtype, device=device))


@pytest.mark.parametrize(("T", "S"), [(5, 11), (11, 5)])
def test_causal_aligns_to_the_top_left(T, S, device):
    assert_accurate(problem(T=T, S=S, device=device), is_causal=True)


@pytest.mark.parametrize(
    "shape", [(13, 17), (17,), (1, 17), (13, 1), (2, 1, 1, 17), (1, 4, 13, 17), (4, 1, 17), (2, 4, 13, 1), (1,)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(shape, kind, device):
    seen = torch.rand(shape, device=device)
    assert_accurate(problem(device=device), mask=seen < 0.6 if kind == "bool" else seen.log())


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_see_no_text_attend_to_the_prefix(dtype, kind, device):
    """Exactly, and finite: in output and gradients."""
    leaves = problem(dtype=dtype, device=device)
    rows = [0, 5, 12]
    ours = assert_accurate(leaves, **mask_of(kind, leaves, rows))
    empty = leaves | {name: leaves[name][:, :, :0] for name in ("key", "value")}
    alone = prefix_attention(*(empty[name] for name in NAMES))
    assert torch.equal(ours["y"][:, :, rows], alone[:, :, rows])
    direction = torch.randn_like(ours["y"])
    none = gradients(prefix_attention, leaves, direction, **mask_of(kind, leaves, slice(None)))
    assert none["dkey"].abs().max() == none["dvalue"].abs().max() == 0
    assert none["dprefix_value"].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_mask_on_16_bit_keys_keeps_its_bits(dtype, device):
    """ALiBi's slopes: a distance of 1000 in bfloat16 is a multiple of 4."""
    if device.type == "cuda":
        pytest.skip("torch's kernels take the mask in the dtype of query there")
    leaves = problem(1, 1, 1, T=3, S=40, dtype=dtype, device=device)
    mask = 1000.0 + torch.randn(3, 40)
    ours = prefix_attention(*(leaves[name] for name in NAMES), mask=mask)
    exact = joined(*(double(leaves[name]) for name in NAMES), mask=mask.double())
    assert (ours - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_text(dtype, p, device):
    """S = 0: attention over the prefix alone."""
    leaves = problem(S=0, dtype=dtype, device=device)
    text = {name: leaves[name].detach() for name in ("key", "value")}
    assert_accurate(leaves | text, prefix_dropout_p=p)
    y = prefix_attention(*(leaves[name] for name in NAMES))
    assert torch.autograd.grad(y.sum(), leaves["key"])[0].shape == (2, 2, 0, 24)


@pytest.mark.parametrize("size", [{"B": 0}, {"T": 0}, {"B": 0, "S": 0}, {"H": 0}])
def test_no_rows(size, device):
    leaves = problem(**size, device=device)
    y = prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=0.1)
    y.sum().backward()
    assert y.shape == leaves["query"].shape
    assert all(leaves[name].grad.abs().max() == 0 for name in NAMES[3:])


@pytest.mark.parametrize("shape", [(4, 13, 5), (1, 4, 13, 5), (13, 5), (4, 1, 5), (5,), (1, 1, 1, 1)])
def test_prefix_bias(shape, device):
    """T5's relative positions, beside a mask that carries those of the text."""
    leaves = problem(device=device)
    assert_accurate(leaves, prefix_bias=torch.randn(shape, device=device), **mask_of("lowest", leaves))


def test_scaling(device):
    assert_accurate(problem(device=device), scaling=0.7)
    assert_accurate(problem(device=device), scaling=1.0, prefix_bias=torch.randn(4, 13, 5, device=device))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dropout_of_the_prefix(dtype, p, device):
    """The mask that the seed gives each batch row, for keys and for values."""
    leaves = problem(dtype=dtype, device=device)
    assert_accurate(leaves, prefix_dropout_p=p, **mask_of("bool", leaves))


def test_dropout_of_a_whole_prefix_leaves_its_keys_at_zero(device):
    """Case 22: p = 1."""
    leaves = problem(device=device)
    y = prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=1.0)
    grads = torch.autograd.grad(y.square().sum(), [leaves[name] for name in NAMES])
    zero = leaves | {name: torch.zeros_like(leaves[name]) for name in NAMES[3:]}
    torch.testing.assert_close(y, joined(*(zero[name] for name in NAMES)))
    assert all(g.abs().max() == 0 for g in grads[3:])
    assert all(g.norm() > 0 for g in grads[:3])


def test_seed_decides_the_mask(device):
    leaves = problem(device=device)
    run = lambda seed: prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=0.3, seed=seed)
    assert torch.equal(run(3), run(3))
    assert torch.equal(run(3), run(torch.tensor(3, device=device)))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(1)
    drawn = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(drawn[0], run(None))
    assert not torch.equal(*drawn)


def test_dropout_of_the_prefix_differs_between_rows_keys_and_values(device):
    """With values of one and a text of nothing, y is the mean of a row's value mask: batch rows are equal otherwise."""
    leaves = problem(B=3, S=0, device=device)
    same = {name: torch.ones_like(leaves[name]) for name in NAMES}
    y = prefix_attention(*(same[name] for name in NAMES), prefix_dropout_p=0.5, seed=1)
    assert not torch.equal(y[0], y[1])
    pk, pv = dropped(same["prefix_key"], same["prefix_value"], 3, 0.5, 1)
    assert not torch.equal(pk, pv)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_of_weights(p, device):
    """SDPA's: of prefix and text alike. At p = 1 nothing is left; else the mean is that without."""
    leaves = {name: t.detach() for name, t in problem(T=3, D=8, device=device).items()}
    run = lambda p: prefix_attention(*(leaves[name] for name in NAMES), dropout_p=p)
    if p == 1.0:
        assert run(p).abs().max() == 0
        return
    clean, runs = run(0.0), torch.stack([run(p) for _ in range(300)])
    assert (runs.mean(0) - clean).norm() < 0.15 * clean.norm()
    assert not torch.equal(runs[0], runs[1])
    query = leaves["query"].requires_grad_()
    torch.manual_seed(3)
    once = torch.autograd.grad(run(p).square().sum(), query)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(once, torch.autograd.grad(run(p).square().sum(), query)[0])


@pytest.mark.parametrize("prefix_p", [0.0, 0.3])
@pytest.mark.parametrize("need_dprefix", [True, False])
def test_dropout_of_weights_in_the_merge(prefix_p, need_dprefix, device):
    """The prefix's part, where the text's kernel drops weights too: rows of the mask are those of [B * H * T, n]."""
    leaves, p = problem(B=3, S=0, n=19, device=device), 0.4
    seeds = [torch.tensor(s, device=device) for s in (11, 7)]
    q, _, _, pk, pv = (leaves[name] for name in NAMES)
    impl = implementation("prefix_attention", q)

    def weighed(q, pk, pv):
        pk, pv = dropped(pk, pv, 3, prefix_p, 7)
        pk, pv = (t.repeat_interleave(2, 1) for t in (pk, pv))
        keep = dropout_keep((3 * 4 * 13, 19), p, seeds[0]).view(3, 4, 13, 19)
        return ((q @ pk.mT * 0.3).softmax(-1) * keep / (1 - p)) @ pv

    exact_inputs = [double(t) for t in (q, pk, pv)]
    exact, plain, direction = weighed(*exact_inputs), weighed(q, pk, pv), torch.randn(3, 4, 13, 24, device=device)
    with torch.no_grad():
        arguments = q, pk, pv, None, 0.3, p, seeds[0], prefix_p, seeds[1]
        out, lse = torch.zeros_like(q), torch.full((3, 4, 13), -math.inf, device=device)
        out, lse = impl.prefix_merge_(out, lse, *arguments)
        grads = impl.prefix_gradients(
            direction, out, lse, q, pk, pv, None, torch.zeros_like(q), need_dprefix, *arguments[4:]
        )
    assert_as_accurate("out", out, plain, exact)
    truths = torch.autograd.grad(exact, exact_inputs, direction.double())
    plains = torch.autograd.grad(plain, (q, pk, pv), direction)
    for name, ours, same, truth in zip(("dq", "dpk", "dpv"), grads, plains, truths, strict=True):
        if name == "dq" or need_dprefix:
            assert_as_accurate(name, ours, same, truth, times=3.0)
        else:
            assert ours is None


@pytest.mark.parametrize("sizes", [{"D": 24, "Dv": 8}, {"D": 8, "Dv": 24}])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_of_another_width_than_keys(sizes, p, device):
    assert_accurate(problem(**sizes, device=device), prefix_dropout_p=p, is_causal=True)


@pytest.mark.parametrize("layout", ["heads last", "sliced", "offset", "transposed"])
def test_strided_inputs(layout, device):
    """Cases 3 and 9: [B, T, H, D] as models have it, every second column, an odd address, D before T."""

    def strided(t):
        *batch, rows, columns = t.shape
        wide = torch.randn(*batch, rows + 1, 2 * columns + 1, device=t.device)
        views = {
            "heads last": lambda: torch.randn(t.transpose(-3, -2).shape, device=t.device).transpose(-3, -2),
            "sliced": lambda: wide[..., :rows, : 2 * columns : 2], "offset": lambda: wide[..., 1:, 1 : columns + 1],
            "transposed": lambda: torch.randn(*batch, columns, rows, device=t.device).mT,
        }  # fmt: skip
        return views[layout]().requires_grad_()

    leaves = {name: strided(t) for name, t in problem(device=device).items()}
    assert_accurate(leaves, is_causal=True, prefix_dropout_p=0.2)


def test_a_prefix_cut_from_one_embedding(device):
    """As P-tuning v2 stores it: [n, 2 * heads * D] of a layer, keys and values side by side."""
    leaves = problem(device=device)
    both = torch.randn(5, 2, 2, 24, device=device).permute(1, 2, 0, 3)
    leaves["prefix_key"], leaves["prefix_value"] = (t.requires_grad_() for t in both.unbind(0))
    assert_accurate(leaves)


@pytest.mark.parametrize("how", ["sum", "sliced", "transposed"])
def test_strided_output_gradients(how, device):
    """Cases 1 and 2."""
    direction = {
        "sum": torch.ones((), device=device).expand(2, 4, 13, 24),
        "sliced": torch.randn(2, 4, 13, 48, device=device)[..., ::2],
        "transposed": torch.randn(2, 13, 4, 24, device=device).transpose(1, 2),
    }[how]
    assert_accurate(problem(device=device), direction=direction, is_causal=True)


@pytest.mark.parametrize("trainable", [(name,) for name in NAMES] + [NAMES[:3], NAMES[3:], ("query", "prefix_value")])
def test_only_what_is_trained_gets_a_gradient(trainable, device):
    """Case 16."""
    leaves = {name: t.detach().requires_grad_(name in trainable) for name, t in problem(device=device).items()}
    assert_accurate(leaves, prefix_dropout_p=0.3)
    prefix_attention(*(leaves[name] for name in NAMES)).square().sum().backward()
    assert {name for name in NAMES if leaves[name].grad is not None} == set(trainable)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saves_no_joined_keys(mask, p, device):
    """Case 17: beyond references to the inputs out, the log-sum-exp and the seed are kept; GQA repeats nothing."""
    leaves = problem(2, 8, 2, T=32, S=64, D=16, n=6, device=device)
    options = mask_of(mask, leaves)
    given = {t.data_ptr() for t in (*leaves.values(), *options.values()) if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=p, **options)
    beyond = [t for t in saved if t.data_ptr() not in given | {y.data_ptr()}]
    state = 4 * 8 if device.type == "cuda" else 0  # of the kernel's dropout
    assert sum(t.nbytes for t in beyond) <= 2 * 8 * 32 * 4 + (8 if p else 0) + state
    assert {leaves[name].data_ptr() for name in NAMES} <= {t.data_ptr() for t in saved}


def test_a_first_layer_keeps_no_keys(device):
    """Where the text needs no gradient, only query is kept for the prefix's."""
    leaves = problem(device=device)
    frozen = [t if name.startswith("prefix") else t.detach() for name, t in leaves.items()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        prefix_attention(*frozen)
    assert not {leaves["key"].data_ptr(), leaves["value"].data_ptr()} & {t.data_ptr() for t in saved}


def test_inputs_and_gradient_stay_as_they_are(device):
    """Case 18."""
    leaves, direction = problem(device=device), torch.randn(2, 4, 13, 24, device=device)
    options = {**mask_of("-inf", leaves), "prefix_bias": torch.randn(4, 13, 5, device=device), "prefix_dropout_p": 0.2}
    given = {**leaves, "mask": options["mask"], "bias": options["prefix_bias"], "direction": direction}
    before = {name: t.detach().clone() for name, t in given.items()}
    gradients(prefix_attention, leaves, direction, **options)
    assert all(torch.equal(before[name], t) for name, t in given.items())


def test_retain_graph_twice_is_identical_and_runs_are_deterministic(device):
    """Cases 15 and 19, for the prefix; on a GPU torch's own kernel sums the text's gradients in any order."""
    leaves, direction = problem(2, 2, 1, T=64, D=8, device=device), torch.randn(2, 2, 64, 8, device=device)
    wanted = NAMES if device.type == "cpu" else NAMES[3:]
    runs = []
    for _ in range(2):
        y = prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=0.3, seed=7)
        inputs = [leaves[name] for name in wanted]
        runs += [torch.autograd.grad(y, inputs, direction, retain_graph=True) for _ in range(2)]
    assert all(g.abs().max() > 0 for g in runs[0])
    assert all(torch.equal(g, h) for run in runs[1:] for g, h in zip(runs[0], run, strict=True))


def test_double_backward_raises(device):
    leaves = problem(device=device)
    y = prefix_attention(*(leaves[name] for name in NAMES))
    (dq,) = torch.autograd.grad(y.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradient_checkpointing_replays_the_masks(reentrant, p, device):
    """Case 21."""
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = problem(device=device)
        run = lambda q, rest=leaves: prefix_attention(
            q, *(rest[n] for n in NAMES[1:]), prefix_dropout_p=0.4, dropout_p=p
        )
        y = wrap(run, leaves["query"])
        y.square().sum().backward()
        results.append([y, *(leaves[name].grad for name in NAMES)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if device.type == "cpu" else 1e-5)


def test_autocast(device):
    """Case 23: query, key and value are cast as by SDPA, the prefix serves as it is; gradients keep their dtype."""
    leaves = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = prefix_attention(*(leaves[name] for name in NAMES), **mask_of("lowest", leaves))
        prefix_attention(*(leaves[name] for name in NAMES)).float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    exact = {name: double(t) for name, t in leaves.items()}
    joined(*(exact[name] for name in NAMES)).square().sum().backward()
    for name in NAMES:
        assert leaves[name].grad.dtype == torch.float32
        assert (leaves[name].grad - exact[name].grad).norm() < 3e-2 * exact[name].grad.norm(), name


def test_inference_saves_nothing(device):
    leaves, saved = problem(device=device), []
    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        y = prefix_attention(*(leaves[name] for name in NAMES), prefix_dropout_p=0.1)
    assert y.is_inference()
    assert not saved


def test_a_nan_stays_in_its_row(device):
    """Case 11: a row of query, and a batch row of the text."""
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["query"][0, 1, 5, 3] = float("nan")
        leaves["value"][1, 1] = float("nan")
    y = prefix_attention(*(leaves[name] for name in NAMES))
    assert y[0, 1, 5].isnan().all()
    assert y[1, 2:].isnan().all()
    y[0, 1, 5] = 0
    assert y[0].isfinite().all()
    assert y[1, :2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_flat_and_confident_scores(dtype, scale, device):
    """Case 14: scores that are all alike, and scores of hundreds whose exponentials would overflow."""
    leaves = problem(dtype=dtype, device=device)
    with torch.no_grad():
        leaves["query"].mul_(scale)
        leaves["prefix_key"][:, 0] *= 2
    assert_accurate(leaves, is_causal=True)


def test_a_prefix_that_outweighs_the_text_and_one_that_vanishes(device):
    """Case 14: merging by the log-sum-exp where one side is exp(±200) of the other."""
    for shift in (200.0, -200.0):
        leaves = problem(device=device)
        bias = torch.full((4, 13, 5), shift, device=device)
        if shift < 0:  # the prefix gets no gradient at all
            leaves |= {name: leaves[name].detach() for name in NAMES[3:]}
            assert_accurate(leaves, prefix_bias=bias)
        else:
            text = {name: leaves[name].detach() for name in NAMES[1:3]}
            assert_accurate(leaves | text, prefix_bias=bias)


def test_gradcheck():
    leaves = problem(1, 2, 1, T=3, S=4, D=4, n=2, dtype=torch.float64)
    arguments = tuple(leaves[name] for name in NAMES)
    options = dict(is_causal=True, prefix_dropout_p=0.3, seed=7, prefix_bias=torch.randn(2, 3, 2).double())
    assert torch.autograd.gradcheck(lambda *t: prefix_attention(*t, **options), arguments)


def test_float64_is_exact(device):
    leaves = problem(dtype=torch.float64, device=device)
    ours = gradients(prefix_attention, leaves, direction_of(leaves), is_causal=True)
    torch.manual_seed(0)
    exact = gradients(joined, leaves, direction_of(leaves), is_causal=True)
    torch.testing.assert_close(ours["y"], exact["y"])


def test_vmap_and_functional_gradients():
    """Case 31: inside functorch transforms the plain formula runs."""
    leaves = {name: t.detach() for name, t in problem().items()}
    args = [leaves[name] for name in NAMES]
    doubled = torch.vmap(lambda q: prefix_attention(q, *args[1:], is_causal=True))(torch.stack((args[0], -args[0])))
    torch.testing.assert_close(doubled[1], prefix_attention(-args[0], *args[1:], is_causal=True))
    loss = lambda pk: prefix_attention(*args[:3], pk, args[4], prefix_dropout_p=0.2, seed=3).square().sum()
    pk = args[3].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(args[3]), torch.autograd.grad(loss(pk), pk)[0])


class TestBadInput:
    @pytest.mark.parametrize(
        ("replaced", "error", "message"),
        [
            ({"query": [1.0]}, TypeError, "query must be a floating-point tensor, got list"),
            ({"key": torch.ones(2, 2, 17, 24).int()}, TypeError, "key must be a floating-point tensor, got torch.int"),
            ({"query": torch.ones(4, 13, 24)}, ValueError, r"query must be \[B, H, T, D\] .* got \(4, 13, 24\)"),
            ({"query": torch.ones(2, 4, 13, 0)}, ValueError, r"query must be \[B, H, T, D\] with D >= 1"),
            ({"key": torch.ones(3, 2, 17, 24)}, ValueError, r"key must be \[2, Hkv, S, 24\] .* got \(3, 2, 17, 24\)"),
            ({"key": torch.ones(2, 3, 17, 24)}, ValueError, r"Hkv a divisor of 4 to fit query, got \(2, 3, 17, 24\)"),
            ({"value": torch.ones(2, 2, 16, 24)}, ValueError, r"value must be \[2, 2, 17, Dv\] .* \(2, 2, 16, 24\)"),
            ({"prefix_key": torch.ones(2, 5, 23)}, ValueError, r"prefix_key must be \[2, n, 24\] .* got \(2, 5, 23\)"),
            ({"prefix_key": torch.ones(4, 5, 24)}, ValueError, r"prefix_key must be \[2, n, 24\] .* got \(4, 5, 24\)"),
            ({"prefix_key": torch.ones(2, 0, 24)}, ValueError, r"with n >= 1 to fit key, got \(2, 0, 24\)"),
            ({"prefix_value": torch.ones(2, 6, 24)}, ValueError, r"prefix_value must be \(2, 5, 24\) .* \(2, 6, 24\)"),
            ({"value": torch.ones(2, 2, 17, 24).half()}, TypeError, "value must have the dtype of query, torch.float"),
            ({"prefix_key": torch.ones(2, 5, 24, device="meta")}, ValueError, "prefix_key is on meta, query on cpu"),
            ({"mask": torch.ones(13, 17).int()}, TypeError, "mask must be a bool or floating-point tensor"),
            ({"mask": torch.ones(13, 22)}, ValueError, r"mask must be broadcastable to .*13, 17\), got \(13, 22\)"),
            ({"mask": torch.ones(1, 2, 4, 13, 17)}, ValueError, r"mask must be broadcastable to \(2, 4, 13, 17\)"),
            ({"mask": torch.ones(13, 17), "is_causal": True}, ValueError, "mask and is_causal cannot be combined"),
            ({"mask": torch.ones(17, requires_grad=True)}, ValueError, "mask requires a gradient.* mask.detach()"),
            ({"prefix_bias": torch.ones(5, requires_grad=True)}, ValueError, "prefix_bias requires a gradient"),
            ({"prefix_bias": torch.ones(5, dtype=torch.bool)}, TypeError, "prefix_bias must be a floating-point"),
            ({"prefix_bias": torch.ones(2, 4, 13, 5)}, ValueError, r"prefix_bias .* \(4, 13, 5\), got \(2, 4, 13, 5\)"),
            ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
            ({"prefix_dropout_p": float("nan")}, ValueError, r"prefix_dropout_p must be in \[0, 1\], got nan"),
        ],
    )  # fmt: skip
    def test_is_named(self, replaced, error, message):
        with pytest.raises(error, match=message):
            prefix_attention(**{**problem(), **replaced})
