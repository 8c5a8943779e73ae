"""What the user gets wrong: one clear line, exit code 2."""

from types import SimpleNamespace

import pytest

from peft_ops.cli import errors
from peft_ops.cli.finetune import sequence_length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--steps", "x"], "argument --steps: invalid"),
        (["--lora-dropout", "2"], "argument --lora-dropout: must be between 0 and 1, got 2"),
        (["--method", "magic"], "invalid choice"),
        (["--method", "full", "--r", "4"], "--r is no option of --method full (it takes none of its own)"),
        (["--method", "prompt-tuning", "--layers", "1"], "--layers is no option of --method prompt-tuning"),
        (["--method", "top-layers", "--layers", "2"], "num_top_layers=2, but the model has 1 layers"),
        (["--method", "prompt-tuning", "--virtual-tokens", "64"], "the model takes 0 tokens at most beside 64 virtual"),
        (["--model", "/nowhere"], "--model /nowhere: expected a folder with a transformers model"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: No such file"),
        (["--target-modules", "q_prj"], "q_proj"),
        (["--sequence-length", "65"], "--sequence-length 65: the model takes 64 tokens at most"),
        (["--method", "prompt-tuning", "--init-text", ""], "--init-text '' has no tokens"),
        (["--method", "lora", "--init-text", "x"], "--init-text is no option of --method lora"),
        (["--optim", "adamw8bit"], "--optim adamw8bit needs a GPU, got --device cpu"),
        (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N"),
        (["--device", "abacus"], "--device abacus: expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_arguments_are_one_clear_message(finetune, capsys, options, message):
    try:
        code = finetune(*options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_model_is_named(finetune, tmp_path, model_folder, capsys):
    (tmp_path / "empty").mkdir()
    assert finetune("--model", tmp_path / "empty") == 2
    assert "it has no config.json" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    assert finetune("--model", broken) == 2
    assert f"--model {broken}" in capsys.readouterr().err


def test_without_a_tokenizer_bytes_must_fit(finetune, tmp_path, model_folder, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_folder / name).read_bytes())
    assert finetune("--model", bare) == 2
    assert "no tokenizer, and its vocabulary of 64 is too small for bytes (256)" in capsys.readouterr().err


def test_a_missing_package_is_named(finetune, monkeypatch, capsys):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "matplotlib" else SimpleNamespace())
    assert finetune() == 2
    assert "needs matplotlib: pip install 'peft-ops[cli]'" in capsys.readouterr().err


def test_the_default_sequence_length_is_what_the_model_takes():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    assert sequence_length(model, None, 512) == 64
    assert sequence_length(model, 16, 512) == 16
    assert sequence_length(SimpleNamespace(config=SimpleNamespace()), None, 512) == 512
