"""The README's Python runs as it stands, top to bottom."""

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert namespace["layer"].lora_B.grad.abs().sum() > 0
    assert namespace["layer"].weight.grad is None


def test_the_example_trains(tmp_path, capsys):
    pytest.importorskip("transformers")
    example = runpy.run_path(str(README.parent / "examples" / "train_qlora.py"))
    losses = example["main"](str(tmp_path / "adapter"), steps=15)
    assert losses[-1] < losses[0] - 0.5
    assert "trainable" in capsys.readouterr().out
