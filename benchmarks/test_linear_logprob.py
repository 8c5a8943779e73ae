"""Log-probabilities of a large vocabulary: frozen heads (PEFT's case), an adapter on the head, a trained head."""

from functools import partial

import pytest
import torch

from benchmarks.head_peers import CROSS_ENTROPY, LOGPROB, Head
from benchmarks.measure import peak_bytes, sample, saved_bytes
from benchmarks.peers import R
from benchmarks.shapes import DEVICE, ON_GPU

DTYPES = {"bfloat16": torch.bfloat16} | ({} if ON_GPU else {"float32": torch.float32})
HEADS = ("frozen", "LoRA", "trained")


def problem(shape, head, dtype):
    hidden = torch.randn(shape.M, shape.K, device=DEVICE, dtype=DTYPES[dtype], requires_grad=True)
    weight = (torch.randn(shape.N, shape.K, device=DEVICE) * shape.K**-0.5).to(hidden.dtype)
    weight.requires_grad_(head == "trained")
    a, b = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((R, shape.K), (shape.N, R)))
    targets = torch.randint(shape.N, (shape.M,), device=DEVICE)
    return hidden, Head(weight, *((a * 0.1).detach().requires_grad_(), b) if head == "LoRA" else (None, None)), targets


def run(benchmark, step, forward, owned):
    if owned is not None:
        benchmark.extra_info["saved_bytes"] = saved_bytes(forward, owned)
    benchmark.extra_info["peak_bytes"] = peak_bytes(step)
    sample(benchmark, step, ON_GPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contender", LOGPROB)
def test_forward(benchmark, note, head_shape, contender, dtype):
    note("linear_logprob forward", head_shape, dtype)
    arguments = problem(head_shape, "frozen", dtype)

    @torch.no_grad()
    def step():
        return LOGPROB[contender](*arguments)

    run(benchmark, step, step, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("contender", LOGPROB)
def test_forward_backward(benchmark, note, head_shape, contender, head, dtype):
    if contender == "TRL" and head == "LoRA":
        pytest.skip("TRL's head leaves the adapter out")
    note("linear_logprob forward + backward", head_shape, f"{head} head, {dtype}")
    hidden, layer, targets = problem(head_shape, head, dtype)
    leaves = [t for t in (hidden, *layer) if t is not None and t.requires_grad]
    direction = torch.randn(head_shape.M, device=DEVICE)
    forward = partial(LOGPROB[contender], hidden, layer, targets)
    run(
        benchmark,
        lambda: torch.autograd.grad(forward(), leaves, direction),
        forward,
        [hidden, targets, *layer_of(layer)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contender", LOGPROB)
def test_large(benchmark, note, large_head_shape, contender, dtype):
    test_forward_backward(benchmark, note, large_head_shape, contender, "frozen", dtype)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("contender", CROSS_ENTROPY)
def test_cross_entropy(benchmark, note, head_shape, contender, head):
    if not ON_GPU and contender in ("Liger", "cut-cross-entropy"):
        pytest.skip("runs on a GPU alone")
    note("linear_cross_entropy forward + backward", head_shape, f"{head} head, bfloat16")
    hidden, layer, targets = problem(head_shape, head, "bfloat16")
    leaves = [t for t in (hidden, *layer) if t is not None and t.requires_grad]
    forward = partial(CROSS_ENTROPY[contender], hidden, layer, targets)
    run(benchmark, lambda: torch.autograd.grad(forward(), leaves), forward, [hidden, targets, *layer_of(layer)])


def layer_of(head: Head) -> list[torch.Tensor]:
    return [t for t in head if t is not None]
