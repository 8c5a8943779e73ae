"""The embedded default, and what a comparison measures."""

import json
from types import SimpleNamespace

import pytest
import torch

import peft_ops
from peft_ops.cli import compare as comparison
from peft_ops.cli import main, measure
from peft_ops.cli.data import Sequences, Split
from peft_ops.cli.errors import UserError
from peft_ops.cli.training import Options


class SimpleModel(torch.nn.Module):
    """logits = sigmoid(w[tokens]), with known sizes of what it saves."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4, 16))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.nn.functional.embedding(input_ids, self.w).sigmoid())


def test_saved_bytes_count_activations_once_and_no_parameter():
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    sequences = Sequences(tokens, torch.ones(2, 8, dtype=torch.int64))
    # float32 [16, 16] twice, of sigmoid and log-softmax; the labels; the total weight of the loss, a scalar.
    assert measure.saved_for_backward(SimpleModel(), sequences, torch.float32) == 2 * 16 * 16 * 4 + 16 * 8 + 4


def test_base_bits():
    layers = [torch.nn.Linear(256, 128), peft_ops.nn.LoRALinear(256, 128)]
    assert measure.base_bits(torch.nn.Sequential(*layers)) == 32
    assert measure.base_bits(torch.nn.Sequential(*layers).bfloat16()) == 16
    quantised = peft_ops.nn.NF4Linear.from_linear(layers[0])
    for layer in (quantised, peft_ops.nn.LoRALinear.from_linear(quantised)):
        assert 4.125 < measure.base_bits(torch.nn.Sequential(layer)) < 4.14
    assert measure.base_bits(peft_ops.nn.NF4Linear.from_linear(layers[0], double_quant=False)) == 4.5


def test_peak_memory_counts_weights_gradients_states_and_activations():
    data = Split(*(Sequences(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)),) * 2)
    model = SimpleModel()
    peak = measure.peak_memory(model, data, Options(steps=2, batch_size=2, lr=0.1))
    weights = model.w.nbytes
    assert torch.equal(model.w, torch.ones(4, 16))
    assert model.w.grad is None
    activations = 16 * 16 * 4
    assert 4 * weights + 2 * activations <= peak <= 4 * weights + 8 * activations


COMPARED = ["full", "lora", "qlora"]


@pytest.fixture
def compare(small_embedded, tmp_path):
    def run(*options):
        given = ["--out", tmp_path / "compare", "--steps", 60, "--sequence-length", 64]
        given += ["--device", "cpu", "--dtype", "fp32"]
        return main(["compare", *map(str, given), "--methods", *COMPARED, *map(str, options)])

    return run


def test_methods_are_compared_from_one_base(compare, tmp_path, capsys):
    assert compare() == 0
    shown = capsys.readouterr().out
    assert "pre-training" in shown
    results = json.loads((tmp_path / "compare" / "compare.json").read_text())["methods"]
    by_name = {row["method"]: row for row in results}
    assert list(by_name) == COMPARED
    for row in results:
        assert row["held_out_after"] < row["held_out_before"] - 0.1
        assert row["peak_bytes"] > row["saved_bytes"] > 0
        assert f"{row['trainable']:,}" in shown
    assert by_name["lora"]["trainable"] == by_name["qlora"]["trainable"] < by_name["full"]["trainable"]
    assert by_name["lora"]["held_out_before"] == by_name["full"]["held_out_before"]
    assert by_name["qlora"]["base_bits"] <= 4.2
    assert by_name["lora"]["saved_bytes"] < by_name["full"]["saved_bytes"]
    assert by_name["qlora"]["peak_bytes"] < by_name["lora"]["peak_bytes"] < by_name["full"]["peak_bytes"]
    assert 4 * by_name["lora"]["trainable"] < by_name["lora"]["checkpoint_bytes"] < by_name["full"]["checkpoint_bytes"]
    for chart in ("compare.png", "losses.png"):
        assert (tmp_path / "compare" / chart).stat().st_size > 10_000


def test_an_interrupted_comparison_goes_on_with_the_next_method(compare, tmp_path, capsys, monkeypatch):
    train, trained = comparison.train, []

    def stops_at(name):
        def run(method, *args):
            if method.name == name:
                raise KeyboardInterrupt
            trained.append(method.name)
            return train(method, *args)

        monkeypatch.setattr(comparison, "train", run)

    stops_at("qlora")
    assert compare("--steps", 4) == 130
    stops_at(None)
    assert compare("--steps", 4) == 0
    assert trained == COMPARED
    assert "full: taken over" in capsys.readouterr().out
    assert compare("--steps", 4) == 0  # nothing is left of a comparison that was finished
    assert trained == 2 * COMPARED


def test_a_method_that_fails_does_not_end_the_others(compare, tmp_path, capsys, monkeypatch):
    train = comparison.train

    def fails(method, *args):
        if method.name == "lora":
            raise UserError("no such layer")
        return train(method, *args)

    monkeypatch.setattr(comparison, "train", fails)
    assert compare("--steps", 4) == 0
    assert "lora left out: no such layer" in capsys.readouterr().out
    results = json.loads((tmp_path / "compare" / "compare.json").read_text())["methods"]
    assert [row["method"] for row in results] == ["full", "qlora"]


def test_finetune_without_model_and_data(small_embedded, tmp_path):
    given = ["--steps", "40", "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "fp32"]
    assert main(["finetune", *given, "--sequence-length", "64"]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["held_out_after"] < result["held_out_before"] - 0.1
