"""The benchmarks: contenders compute the same function, bytes are counted right, the report says what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import gpu, measure, peers, report, tree  # noqa: E402


@pytest.mark.parametrize("name", ["PEFT", "addmm"])
def test_lora_contenders_compute_what_ours_computes(name):
    linear = nn.Linear(24, 16, bias=False).requires_grad_(False)
    a, b, dy = torch.randn(peers.R, 24), torch.randn(16, peers.R), torch.randn(5, 16)
    x = torch.randn(5, 24, requires_grad=True)

    def computed(build):
        layer = build(linear, 0.0)
        adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter, value in zip(adapters, (a, b), strict=True):
                parameter.copy_(value)
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *adapters], dy)

    for ours, theirs in zip(computed(peers.ours_lora), computed(peers.LORA[name]), strict=True):
        assert ours.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dora_contenders_compute_the_same():
    linear = nn.Linear(24, 16, bias=False).requires_grad_(False)
    values = torch.randn(peers.R, 24), torch.randn(16, peers.R), torch.rand(16)
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)
    results = []
    for build in (peers.ours_dora, peers.peft_dora):
        layer = build(linear, 0.0)
        adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        adapters.sort(key=lambda parameter: [value.shape for value in values].index(parameter.shape))
        with torch.no_grad():
            for parameter, value in zip(adapters, values, strict=True):
                parameter.copy_(value)
        results.append(torch.autograd.grad(layer(x), [x, *adapters], dy))
    for ours, theirs in zip(*results, strict=True):
        assert ours.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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


def case(op, contender, median, **info):
    stats = {"median": median, "iqr": median / 10, "min": median, "mean": median, "data": [median]}
    shape = {"M": 4, "N": 8, "K": 16, "variant": "p=0.1", "op": op, "contender": contender}
    named = {"group": op, "name": contender, "fullname": contender, "params": {}, "param": ""}
    return named | {"extra_info": shape | info, "stats": stats, "options": {}}


@pytest.fixture
def results():
    op = "lora_linear forward + backward"
    return {
        "machine_info": {"device": "Chip", "node": "host-7", "cpu": {}, "versions": {"torch": "2.13.0", "peft": None}},
        "commit_info": {"id": "0123456789abcdef", "branch": "b", "project": "p", "dirty": False},
        "datetime": "2026-01-02T00:00:00", "version": "5.3.1",
        "benchmarks": [
            case(op, "peft-ops", 2e-3, saved_bytes=70_000), case(op, "nn.Linear", 1e-3, saved_bytes=0),
            case(op, "PEFT", 5e-3, saved_bytes=8_500_000), case("nf4 quantize", "bitsandbytes", 3e-5),
        ],
    }  # fmt: skip


def test_report_shows_wins_losses_and_what_is_missing(results, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 8×16 | 4 | p=0.1 | 2 ms | 1 ms (0.50×) | 5 ms (2.50×) | 2.00× | 10% |" in text
    assert "| 8×16 | 4 | p=0.1 | 0.07 | 0.00 | 8.50 |" in text
    assert "| 8×16 | 4 | p=0.1 | 30 µs | 10% |" in text
    assert "peft (missing)" in text
    kept = (tmp_path / "out" / "benchmark.json").read_text()
    assert "host-7" not in kept
    assert "data" not in json.loads(kept)["benchmarks"][0]["stats"]
    assert (tmp_path / "out" / "lora_linear.png").stat().st_size > 5000


def test_results_folder_is_named_after_the_device():
    assert report.slug("NVIDIA H200") == "nvidia-h200"
    assert report.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"


def test_kernels_are_found_in_a_bare_tree():
    assert tree._Kernels.find_spec("peft_ops.kernels").origin == str(ROOT / "kernels" / "__init__.py")
    assert tree._Kernels.find_spec("kernels") is None


def test_a_step_reports_its_exit_code_and_is_stopped_at_its_limit(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        assert gpu.run("version", ["pytest", "--version"], 60, log)["status"] == 0
        assert gpu.run("missing", ["no_such_module"], 60, log)["status"] == 1
        assert gpu.run("slow", ["pytest", "--version"], 0, log)["status"] == 124
    assert "No module named no_such_module" in (tmp_path / "log.txt").read_text()
