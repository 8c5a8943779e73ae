"""The benchmarks' contenders compute the same function, and what they need is counted right."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import block_peers, costs, head_peers, llama, measure, peers, shapes, variants  # noqa: E402


def computed(layer, values, x, dy):
    """Output and gradients of a layer whose adapters hold `values`, found by their shapes in order."""
    adapters, places, values = [p for p in layer.parameters() if p.requires_grad], [], list(values)
    with torch.no_grad():
        for parameter in adapters:
            places.append(next(i for i, v in enumerate(values) if v.shape == parameter.shape and i not in places))
            parameter.copy_(values[places[-1]])
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *adapters], dy)
    return [y, gradients[0], *(gradients[1 + places.index(i)] for i in range(len(values)))]


def assert_same(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.norm() > 0
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["PEFT", "addmm"])
def test_lora_contenders_compute_what_ours_computes(name):
    linear = nn.Linear(24, 16, bias=False).requires_grad_(False)
    values = torch.randn(peers.R, 24), torch.randn(16, peers.R)
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)
    ours, theirs = (computed(build(linear, 0.0), values, x, dy) for build in (peers.ours_lora, peers.LORA[name]))
    assert_same(ours, theirs)


@pytest.mark.unpoisoned
def test_compiled_peft_computes_what_ours_computes():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    linear = nn.Linear(24, 16, bias=False).requires_grad_(False)
    values = torch.randn(peers.R, 24), torch.randn(16, peers.R)
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)
    built = (peers.ours_lora, peers.LORA["PEFT compiled"])
    assert_same(*(computed(build(linear, 0.0), values, x, dy) for build in built))


def test_compiled_contenders_are_left_out_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(variants, "ON_GPU", False)
    with pytest.raises(pytest.skip.Exception, match="C\\+\\+ compiler"):
        peers.LORA["PEFT compiled"](nn.Linear(8, 8, bias=False), 0.0)


def test_dora_contenders_compute_the_same():
    linear = nn.Linear(24, 16, bias=False).requires_grad_(False)
    values = torch.randn(peers.R, 24), torch.randn(16, peers.R), torch.rand(16)
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)
    assert_same(*(computed(build(linear, 0.0), values, x, dy) for build in (peers.ours_dora, peers.peft_dora)))


BLOCKS = {
    "gated_mlp": (block_peers.GATED_MLP, lambda: block_peers.MLP(24, 40)),
    "qkv": (block_peers.PROJECTIONS, lambda: block_peers.QKV(24, 8)),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["peft-ops fused", "PEFT", "PEFT compiled"])
@pytest.mark.parametrize("block", BLOCKS)
def test_block_contenders_compute_what_ours_computes(block, name, monkeypatch):
    monkeypatch.setattr(variants, "BACKEND", "aot_eager")
    built, make = BLOCKS[block]
    torch.manual_seed(0)
    base = make()
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, base(torch.zeros(1, 24)).shape[1])
    ours = built["peft-ops"](copy.deepcopy(base), 0.0)
    values = [torch.randn(p.shape) * 0.3 for p in ours.parameters() if p.requires_grad]
    theirs = built[name](copy.deepcopy(base), 0.0)
    assert_same(computed(ours, values, x, dy), computed(theirs, values, x, dy), 1e-3)


@pytest.mark.gpu
def test_ligers_mlp_computes_what_ours_computes():
    pytest.importorskip("liger_kernel")
    base = block_peers.MLP(32, 48, device="cuda")
    x, dy = torch.randn(5, 32, device="cuda", requires_grad=True), torch.randn(5, 32, device="cuda")
    layers = [block_peers.GATED_MLP[name](copy.deepcopy(base), 0.0) for name in ("peft-ops", "PEFT + Liger")]
    values = [torch.randn(p.shape, device="cuda") * 0.3 for p in layers[0].parameters() if p.requires_grad]
    assert_same(*(computed(layer, values, x, dy) for layer in layers), 1e-3)


@pytest.mark.parametrize(("method", "checkpointed"), [("LoRA", False), ("LoRA", True), ("QLoRA", False)])
def test_llama_contenders_take_the_same_step(method, checkpointed, monkeypatch):
    if method == "QLoRA":
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
    monkeypatch.setattr(llama, "DTYPE", torch.float32)
    shape = shapes.Step(16, 128, 64, 8, 2, 4, 2, 64, method, 0.0, checkpointed)
    steps = []
    for name in ("peft-ops", "PEFT"):
        model = llama.LLAMA[name](shape)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.1)
        torch.manual_seed(2)
        step, optimizer = llama.training_step(model, shape)
        loss = step()
        assert len(optimizer.state) == len(trained) == 2 * 7 * 2
        gradients = [10 * optimizer.state[p]["exp_avg"] for p in trained]  # AdamW's first average
        steps.append((loss, torch.cat([gradient.flatten() for gradient in gradients])))
    (ours, our_gradient), (theirs, their_gradient) = steps
    tolerance = (
        1e-2 if method == "QLoRA" else 1e-4
    )  # bitsandbytes on a CPU misses the nearest 8-bit code of a few scales
    assert abs(ours - theirs) < tolerance * theirs
    assert our_gradient.norm() > 0
    assert (our_gradient - their_gradient).norm() < tolerance * their_gradient.norm()


@pytest.mark.gpu
def test_a_captured_step_repeats_the_eager_one():
    linear = nn.Linear(64, 48, bias=False, device="cuda").requires_grad_(False)
    layer = peers.peft_lora(linear, 0.0)
    x, dy = torch.randn(4, 64, device="cuda", requires_grad=True), torch.randn(4, 48, device="cuda")
    replay = variants.captured(lambda: torch.autograd.grad(layer(x), [x], dy))
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    torch.testing.assert_close(replay()[0], torch.autograd.grad(layer(x), [x], dy)[0])


def test_costs_are_those_of_the_budget():
    M, N, K, R = 8192, 4096, 4096, 16
    forward = costs.cost("lora_linear forward", shapes.Shape(M, N, K))
    assert forward.flops == 2 * M * N * K + 2 * M * R * (K + N)
    assert forward.least_bytes == 2 * (M * K + M * N + N * K) + 4 * R * (N + K)
    both = costs.cost("lora_linear forward + backward", shapes.Shape(M, N, K))
    assert both.flops - forward.flops == 2 * M * N * K + 4 * M * R * (K + N)
    backward = 2 * (2 * M * K + 2 * M * N + N * K) + 2 * 4 * R * (N + K)
    assert both.least_bytes - forward.least_bytes == backward
    assert costs.cost("nf4 dequantize", shapes.Shape(0, N, K), "nested").least_bytes == N * K * (
        2.5 + (1 + 1 / 64) / 64
    )
    parts = [costs.cost("lora_linear forward", shapes.Shape(64, *nk)) for nk in ((96, 32), (96, 32), (32, 96))]
    block = costs.cost("gated_mlp forward", shapes.Shape(64, 96, 32))
    assert block.flops == sum(part.flops for part in parts)
    assert 2 * 2 * 64 * 32 < block.least_bytes < sum(part.least_bytes for part in parts)


@pytest.mark.parametrize("name", ["eager", "eager float32"])
def test_adapter_contenders_compute_what_ours_computes(name):
    linear, x, dy = nn.Linear(24, 24), torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    ours, theirs = (peers.ADAPTER[contender](linear, 0.0) for contender in ("peft-ops", name))
    for ours_name, theirs_name in {"down_weight": "down.0.weight", "down_bias": "down.0.bias", "up_weight": "up.weight",
                                   "up_bias": "up.bias"}.items():  # fmt: skip
        with torch.no_grad():
            getattr(ours, ours_name).copy_(torch.randn_like(getattr(ours, ours_name)))
            theirs.get_parameter(theirs_name).copy_(getattr(ours, ours_name))
    y, truth = ours(x), theirs(x)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, truth)), rtol=1e-4, atol=1e-4)


def test_attention_contenders_compute_what_ours_computes():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    theirs, ours = (peers.ATTENTION[name](q, k, v) for name in ("SDPA", "peft-ops"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_prefix_contenders_compute_what_ours_computes(is_causal):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    prefix = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    ours = peers.ours_prefix(q, k, v, *prefix, is_causal)
    torch.testing.assert_close(ours, peers.joined_prefix(q, k, v, *prefix, is_causal))
    assert not torch.allclose(ours, peers.text_alone(q, k, v, *prefix, is_causal))


def test_peft_adapters_are_float32_on_a_16_bit_base():
    layer = peers.peft_lora(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16), 0.1)
    assert {p.dtype for name, p in layer.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("contenders", [peers.NF4_LINEAR, peers.QLORA], ids=["nf4_linear", "qlora_linear"])
def test_4_bit_contenders_compute_what_ours_computes(contenders):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    linear = nn.Linear(128, 64, bias=False).requires_grad_(False)
    theirs = next(build for name, build in contenders.items() if "bitsandbytes" in name)
    x, dy = torch.randn(5, 128, requires_grad=True), torch.randn(5, 64)
    layers = [build(copy.deepcopy(linear), 0.0) for build in (contenders["peft-ops"], theirs)]
    values = [torch.randn(p.shape) * 0.3 for p in layers[0].parameters() if p.requires_grad]
    assert_same(*(computed(layer, values, x, dy) for layer in layers), 1e-2)


@pytest.mark.parametrize("nested", [False, True])
def test_codecs_decode_the_same(nested):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    w = torch.randn(64, 128)
    ours, *theirs = (decode() for build in peers.CODECS.values() for decode in build(w, nested)[1:] if decode)
    assert (ours - w).norm() < 0.1 * w.norm()
    for decoded in theirs:
        assert_same([ours], [decoded], 2e-2)  # a nested scale may be the next code on a CPU


@pytest.mark.parametrize("name", ["chunked torch", "logits", "TRL"])
def test_head_contenders_compute_what_ours_computes(name):
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(40, 16)
    head, targets, dy = head_peers.Head(weight), torch.randint(40, (7,)), torch.randn(7)
    results = []
    for build in (head_peers.ours, head_peers.LOGPROB[name]):
        logp = build(hidden, head, targets)
        results.append([logp, *torch.autograd.grad(logp, [hidden], dy)])
    assert_same(*results)
    loss = head_peers.logits_loss(hidden, head, targets)
    torch.testing.assert_close(head_peers.ours_loss(hidden, head, targets), loss)


def test_qlora_peer_is_the_4_bit_layer_of_peft():
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    layer = peers.peft_qlora(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), 0.0)
    assert type(layer).__name__ == "Linear4bit"
    assert layer.base_layer.weight.quant_state.nested


def test_saved_bytes_counts_each_storage_once_without_x_and_parameters():
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: x @ w, [x, w]) == 0
    assert measure.saved_bytes(lambda: (x @ w).exp().square(), [x, w]) == 6 * 8 * 4
    assert measure.saved_bytes(lambda: x @ w, [w]) == x.nbytes


@pytest.mark.gpu
def test_device_instants_subtract_to_seconds():
    start = measure.DeviceInstant()
    torch.cuda._sleep(10_000_000)
    assert 1e-3 < measure.DeviceInstant() - start < 1.0
