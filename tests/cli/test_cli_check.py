"""`peft-ops check` passes here, and fails where any op is wrong."""

import json

import pytest
import torch

from peft_ops import _backend
from peft_ops.cli import check, main


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", ((17, 131, 67, 3),))


def test_check_passes_and_writes(few_shapes, tmp_path, device, capsys):
    assert main(["check", "--json", str(tmp_path / "check.json"), "--device", str(device)]) == 0
    results = json.loads((tmp_path / "check.json").read_text())["results"]
    assert all(row["passed"] for row in results)
    assert {row["dtype"] for row in results} == {"float32", "float16", "bfloat16"}
    assert "lora_linear, nf4 nested, p=0.1" in capsys.readouterr().out


OPS = [
    ("nf4", "nf4_quantize"), ("nf4", "absmax_quantize"), ("nf4", "nf4_dequantize"), ("nf4_linear", "nf4_linear"),
    ("nf4_linear", "nf4_linear_dx"), ("down_project", "down_project"), ("down_project", "down_project_da"),
    ("linear_low_rank", "lora_linear"), ("linear_low_rank", "linear_low_rank_dx"),
    ("low_rank", "low_rank_gradients"), ("low_rank", "low_rank_update_"),
    ("gated", "gated"), ("gated", "gated_gradients"), ("linear_low_rank", "linear_low_rank"),
    ("dora", "dora_norm"), ("dora", "dora_linear"), ("dora", "dora_gradients"),
    ("bottleneck_adapter", "up_project"), ("bottleneck_adapter", "up_project_gradients"),
    ("low_rank", "low_rank_gradients"), ("prefix_attention", "prefix_merge_"), ("prefix_attention", "prefix_gradients"),
    ("attention", "attention"), ("attention", "attention_gradients"),
]  # fmt: skip
SABOTAGE = [(*op, 0.0) for op in OPS] + [
    (*op, float("nan")) for op in OPS if not op[1].endswith("_quantize")
]  # refuses NaN itself


@pytest.mark.parametrize(("op", "function", "value"), SABOTAGE)
def test_check_fails_where_an_op_is_wrong(few_shapes, monkeypatch, capsys, op, function, value):
    module = _backend.implementation(op, torch.empty(1))
    right = getattr(module, function)

    def spoil(result):
        if isinstance(result, tuple):
            return tuple(map(spoil, result))
        return torch.full_like(result, value) if result.is_floating_point() else torch.zeros_like(result)

    monkeypatch.setattr(module, function, lambda *args: spoil(right(*args)))
    assert main(["check", "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out
