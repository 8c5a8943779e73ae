"""Training: it learns, it resumes as if never interrupted, it never loses what was saved."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import peft_ops
from peft_ops.cli.data import Sequences, Split
from peft_ops.cli.errors import UserError
from peft_ops.cli.files import write_file, write_folder
from peft_ops.cli.methods import METHODS
from peft_ops.cli.models import load_model
from peft_ops.cli.training import Options, Trainer


@pytest.mark.parametrize("method", METHODS)
def test_finetune_learns_and_writes(finetune, model_folder, tmp_path, method, capsys):
    steps = 60 if method in ("adapter", "loftq") else 30
    assert finetune("--method", method, "--steps", steps) == 0
    out = tmp_path / "run"
    run = json.loads((out / "run.json").read_text())
    share = 0.995 if METHODS[method].family == "prompts" else 0.85  # prompts of a model that knows nothing do little
    assert run["result"]["held_out_after"] < share * run["result"]["held_out_before"]
    assert len(run["history"]["losses"]) == steps
    assert run["arguments"]["method"] == method
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "trainable" in capsys.readouterr().out

    if METHODS[method].trains_base:
        model, tokenizer = load_model(out / "model", torch.float32)
        assert tokenizer.encode("word1 word2") == [4, 5]
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder)
        if method == "qlora":
            peft_ops.adapt(model, peft_ops.QLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        peft_ops.load_adapter(model, out / "adapter")
    tokens = torch.arange(3, 43).repeat(2)[None, :60]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < run["result"]["held_out_before"] - (0.0 if METHODS[method].family == "prompts" else 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(finetune, tmp_path, monkeypatch, capsys, method):
    options = ("--method", method, "--checkpoint-every", 2, "--evaluate-every", 3)
    options += ("--lora-dropout", 0.1) if "lora_dropout" in METHODS[method].options else ()
    assert finetune(*options, out="whole") == 0
    step = Trainer.step

    def dies_in_step_6(trainer):
        if trainer.done == 5:
            raise MemoryError
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", dies_in_step_6)
        with pytest.raises(MemoryError):
            finetune(*options, out="broken")
    assert not (tmp_path / "broken" / "run.json").exists()
    assert finetune(*options, out="broken") == 0
    assert "resumed from" in capsys.readouterr().out
    histories = [json.loads((tmp_path / out / "run.json").read_text())["history"] for out in ("whole", "broken")]
    assert histories[0]["losses"] == histories[1]["losses"]
    assert histories[0]["held_out"] == histories[1]["held_out"]
    assert len(set(histories[0]["losses"])) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_says_how_to_go_on(finetune, losses, monkeypatch, capsys, number):
    step = Trainer.step

    def interrupted(trainer):
        if trainer.done == 2:
            os.kill(os.getpid(), number)
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        assert finetune() == 130
    assert "stopped after step 3 of 8" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert finetune() == 0
    assert finetune(out="whole") == 0
    assert losses("run") == losses("whole")


def test_another_run_in_the_folder_is_refused(finetune, tmp_path, capsys):
    assert finetune() == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert finetune("--lr", 0.02) == 2
    error = capsys.readouterr().err
    assert "--lr was 0.03, is 0.02" in error
    assert "--restart" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert finetune("--lr", 0.02, "--restart") == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_corrupt_checkpoint_is_refused(finetune, tmp_path, capsys, damage):
    assert finetune() == 0
    file = tmp_path / "run" / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        for i in range(len(data) // 2, len(data) // 2 + 64):
            data[i] ^= 0xFF
    else:
        data = b"not a checkpoint"
    file.write_bytes(data)
    assert finetune() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("peft-ops finetune: ")
    assert "checkpoint.pt is corrupt or truncated" in last


def test_an_interrupted_save_leaves_the_previous_one(tmp_path):
    def dies(path):
        (path / "half" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt

    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    write_file(file, lambda path: path.write_text("whole"))
    write_folder(folder, lambda path: (path / "a").write_text("whole"))
    for write, target in ((write_file, file), (write_folder, folder)):
        with pytest.raises(KeyboardInterrupt):
            write(target, dies)
    assert file.read_text() == (folder / "a").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["file.txt", "folder"]
    write_folder(folder, lambda path: (path / "b").write_text("new"))
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_accumulated_batches_equal_one_large_one(finetune, losses):
    assert finetune("--batch-size", 4, out="one") == 0
    assert finetune("--batch-size", 2, "--accumulation", 2, out="two") == 0
    assert losses("one") == pytest.approx(losses("two"), rel=1e-4)


def test_gradient_checkpointing_changes_no_loss(finetune, losses):
    assert finetune("--lora-dropout", 0.1, out="one") == 0
    assert finetune("--lora-dropout", 0.1, "--gradient-checkpointing", out="two") == 0
    assert losses("one") == pytest.approx(losses("two"), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = torch.nn.Embedding(2, 2)
    model.forward = lambda input_ids, use_cache: SimpleNamespace(
        logits=torch.nn.functional.embedding(input_ids, model.weight) / 0
    )
    data = Split(*(Sequences(torch.ones(4, 8, dtype=torch.int64), torch.ones(4, 8, dtype=torch.int64)),) * 2)
    with pytest.raises(UserError, match="smaller --lr"):
        Trainer(model, data, Options(steps=2, batch_size=2, lr=0.1)).run()
