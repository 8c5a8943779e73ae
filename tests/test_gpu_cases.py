"""What only a GPU can show of every op: repeats, streams, graphs, devices, Inductor (cases 15, 29, 34 to 36).

`step(name, device)` is one op with its leaves; each case runs its forward and backward in another way and holds the
result to the plain one.
"""

import pytest
import torch

from peft_ops import nf4, ops

SIZES = dict(M=200, N=192, K=256, R=16)
OPS = ("lora_linear", "lora_linear p=0.1", "lora_linear nf4", "nf4_linear", "nf4_linear few rows", "dora_linear",
       "bottleneck_adapter", "lora_embedding", "prefix_attention", "linear_logprob")  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)
cuda_alone = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def step(name, device, dtype=torch.bfloat16):
    """(function, leaves): the outputs of the op and the gradients of all leaves, [y, *gradients]."""
    M, N, K, R = SIZES.values()
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, kind=dtype, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, kind)

    x = normal(1 if "few" in name else M, K)
    dense, a, b = normal(N, K, scale=K**-0.5), normal(R, K, kind=torch.float32, scale=K**-0.5), normal(N, R)
    packed = nf4.quantize(dense, double_quant=True)
    kind, p = name.split()[0], 0.1 if "p=0.1" in name else 0.0
    if kind == "lora_linear":
        weight = packed if "nf4" in name else dense
        leaves, call = (x, a, b), lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 0.5, p)
    elif kind == "nf4_linear":
        leaves, call = (x,), lambda x: ops.nf4_linear(x, packed)
    elif kind == "dora_linear":
        magnitude = ops.dora_norm(dense, a, b, 0.5)
        leaves, call = (x, a, b, magnitude), lambda x, a, b, m: ops.dora_linear(x, dense, None, a, b, m, 0.5)
    elif kind == "bottleneck_adapter":
        up = normal(K, R)
        leaves, call = (x, a, up), lambda x, a, up: ops.bottleneck_adapter(x, a, None, up, None, residual=x)
    elif kind == "lora_embedding":
        rows, wide_a = torch.arange(M, device=device), normal(R, M)
        table = normal(M, N)
        leaves, call = (wide_a, b), lambda a, b: ops.lora_embedding(rows, table, a, b, 0.5)
    elif kind == "prefix_attention":
        q, k, v = (normal(2, 4, 64, 32) for _ in range(3))
        leaves, call = (q, k, v, normal(4, 5, 32), normal(4, 5, 32)), ops.prefix_attention
    else:
        targets = (torch.arange(M) % N).to(device)
        leaves, call = (x, a, b), lambda x, a, b: ops.linear_logprob(x, dense, None, targets, a, b).logp

    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    shape = call(*leaves).shape
    dy = torch.randn(*shape, generator=generator).to(device)

    def run():
        y = call(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    return run, leaves


def seeded(run):
    torch.manual_seed(11)
    return run()


def assert_same_bits(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.norm() > 0
        assert torch.equal(mine, theirs)


@every_op
@cuda_alone
def test_100_repeats_give_the_same_bits(name, device):
    """Case 15."""
    run, _ = step(name, device)
    expected = [t.clone() for t in seeded(run)]
    for _ in range(100):
        assert_same_bits(seeded(run), expected)


@every_op
@cuda_alone
def test_a_side_stream_gives_the_same_bits(name, device):
    """Case 35: workspaces too belong to the stream; the default stream is kept busy meanwhile."""
    run, _ = step(name, device)
    expected = seeded(run)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        torch.cuda._sleep(1_000_000)
        seeded(run)
        with torch.cuda.stream(stream):
            got = seeded(run)
        stream.synchronize()
        assert_same_bits(got, expected)


@every_op
@cuda_alone
def test_a_cuda_graph_replays_the_op_on_new_inputs(name, device):
    """Case 34: captured after a warm-up, forward and backward; with dropout every replay draws a new mask."""
    run, leaves = step(name, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(leaf.flip(0))
        graph.replay()
        if "p=" not in name:
            assert_same_bits(captured, run())
    if "p=" in name:
        first = captured[0].clone()
        graph.replay()
        assert not torch.equal(captured[0], first)


@every_op
@cuda_alone
def test_another_device_than_the_current_one(name, device):
    """Case 36."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = seeded(step(name, "cuda:0")[0])
    got = seeded(step(name, "cuda:1")[0])
    assert all(t.device.index == 1 for t in got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), rtol=2e-2, atol=2e-2)


@every_op
@cuda_alone
@pytest.mark.unpoisoned
def test_inductor_gives_what_eager_gives(name, device):
    """Case 29: nothing is fused into the kernels, so what differs are roundings of the code around them."""
    run, _ = step(name, device)
    compiled = torch.compile(lambda: run()[0], fullgraph=True)
    got, expected = seeded(compiled), seeded(run)[0]
    if "p=" in name:  # Inductor draws its random numbers from another generator
        assert got.shape == expected.shape
        assert got.isfinite().all()
        return
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@every_op
def test_the_steps_of_these_cases_run(name):
    """On any machine: what the cases above rest on."""
    got, again = (seeded(step(name, "cpu", torch.float32)[0]) for _ in range(2))
    assert_same_bits(got, again)
