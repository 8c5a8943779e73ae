"""The embedded default, and what the demo measures."""

import json
from types import SimpleNamespace

import torch

import peft_ops
from peft_ops.cli import main, measure
from peft_ops.cli.data import Sequences


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


def test_the_demo_learns_with_every_method(small_embedded, tmp_path, capsys):
    run = ["demo", "--out", str(tmp_path / "demo"), "--steps", "60", "--device", "cpu", "--dtype", "fp32"]
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "pre-training" in shown
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())["methods"]
    by_name = {row["method"]: row for row in results}
    assert list(by_name) == ["lora", "qlora", "full"]
    for row in results:
        assert row["held_out_after"] < row["held_out_before"] - 0.1
        assert f"{row['trainable']:,}" in shown
    assert by_name["lora"]["trainable"] == by_name["qlora"]["trainable"] < by_name["full"]["trainable"]
    assert by_name["lora"]["held_out_before"] == by_name["full"]["held_out_before"]
    assert by_name["qlora"]["base_bits"] <= 4.2
    assert 0 < by_name["lora"]["saved_bytes"] < by_name["full"]["saved_bytes"]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert main(run) == 0
    assert "pre-training" not in capsys.readouterr().out


def test_finetune_without_model_and_data(small_embedded, tmp_path):
    given = ["--steps", "40", "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "fp32"]
    assert main(["finetune", *given, "--sequence-length", "64"]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["held_out_after"] < result["held_out_before"] - 0.1
