"""`peft-ops rlhf`: every stage runs, resumes to the bit, leaves the base alone; wrong arguments are one line."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import peft_ops
from peft_ops import cli
from peft_ops.cli import embedded, main, rlhf, rlhf_online
from peft_ops.cli.embedded import Recipe
from peft_ops.cli.rlhf_plan import NEEDS, PLANS
from peft_ops.cli.rlhf_trainer import StageTrainer
from peft_ops.rlhf import completion_hidden, pad

TINY = Recipe(hidden_size=32, intermediate_size=32, layers=1, heads=2, sequence_length=32, steps=2, batch_size=2)
FAST = ("--device", "cpu", "--dtype", "fp32", "--r", 2, "--checkpoint-every", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    """One base for all tests, few documents, few pairs."""
    monkeypatch.setenv("PEFT_OPS_CACHE", str(cache))
    monkeypatch.setattr(cli.embedded, "Recipe", lambda: TINY)
    documents = embedded.python_source()[:3]
    monkeypatch.setattr(embedded, "python_source", lambda: documents)
    for stage, plan in PLANS.items():
        monkeypatch.setitem(PLANS, stage, replace(plan, steps=3, batch_size=4, max_new_tokens=6))
    monkeypatch.setattr(rlhf, "_TRAIN", 32)
    monkeypatch.setattr(rlhf, "_HELD_OUT", 8)
    # what so small a model writes never parses: a reward that its samples differ in
    monkeypatch.setattr(rlhf_online, "verified_share", lambda prompt, text: len(set(text)) / 8)


@pytest.fixture
def run(tmp_path):
    """Runs `peft-ops rlhf` in a folder; options given later win."""

    def run(*options, stage="all", out="run"):
        given = ["--stage", stage, "--out", tmp_path / out, *FAST, *options]
        return main(["rlhf", *map(str, given)])

    return run


@pytest.fixture
def outcome(tmp_path):
    """(steps, measurements, fingerprint) of a stage in a folder."""

    def outcome(stage, out="run"):
        result = json.loads((tmp_path / out / stage / "result.json").read_text())
        return result["history"]["steps"], result["history"]["held_out"], result["fingerprint"]

    return outcome


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_all_stages_run_and_write(run, outcome, tmp_path, cache, capsys, method):
    assert run("--method", method) == 0
    out, shown = tmp_path / "run", capsys.readouterr().out
    for stage in PLANS:
        assert f"{stage}  step 3/3" in shown
        assert len(outcome(stage)[0]) == 3
        assert (out / stage / "adapter" / "adapter_model.safetensors").is_file()
    assert len({outcome(stage)[2] for stage in PLANS}) == len(PLANS)
    for text in ("reward: accuracy of pairs", "dpo: accuracy of pairs", "ppo: reward", "ppo: KL", "grpo: reward"):
        assert text in shown
    report = json.loads((out / "report.json").read_text())
    assert list(report["stages"]) == list(PLANS)
    assert report["method"] == method
    assert (out / "rlhf.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| grpo | reward: verifiable" in (out / "report.md").read_text()

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert load_file(out / "reward" / "score_head.safetensors")["score.weight"].shape == (1, 32)
    model = AutoModelForCausalLM.from_pretrained(next(cache.iterdir()))
    if method == "qlora":
        peft_ops.adapt(model, peft_ops.QLoRAConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    for stage in PLANS:
        peft_ops.load_adapter(model, out / stage / "adapter", adapter_name=stage)


@pytest.mark.parametrize("stage", PLANS)
def test_a_resumed_stage_equals_an_uninterrupted_one(run, outcome, monkeypatch, capsys, stage):
    assert run(stage=stage, out="whole") == 0
    step = StageTrainer._step

    def dies_in_step_3(trainer):
        if trainer.stage.name == stage and trainer.done == 2:
            raise MemoryError
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "_step", dies_in_step_3)
        with pytest.raises(MemoryError):
            run(stage=stage, out="broken")
    capsys.readouterr()
    assert run(stage=stage, out="broken") == 0
    assert f"{stage}: resumed from" in capsys.readouterr().out
    for name in (*NEEDS[stage], stage):
        assert outcome(name, "whole") == outcome(name, "broken")


def test_an_interruption_says_how_to_go_on_and_finished_stages_rest(run, outcome, monkeypatch, capsys):
    step = StageTrainer._step

    def interrupted(trainer):
        if trainer.stage.name == "dpo" and trainer.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "_step", interrupted)
        assert run(stage="dpo") == 130
    assert "stopped after step 2 of 3" in capsys.readouterr().err
    ran = []
    monkeypatch.setattr(StageTrainer, "_step", lambda trainer: (ran.append(trainer.stage.name), step(trainer)))
    assert run(stage="dpo") == 0
    assert ran == ["dpo"]
    assert run(stage="dpo") == 0
    assert ran == ["dpo"]
    assert "dpo: finished before, 3 steps" in capsys.readouterr().out


def test_a_stage_takes_what_it_needs_from_the_folder_or_runs_it_first(run, outcome, tmp_path, capsys):
    assert run("--lr", 0.01, stage="sft") == 0
    sft = outcome("sft")
    assert run(stage="ppo") == 0  # another lr, which is of ppo alone
    shown = capsys.readouterr().out
    assert "sft: taken from the folder, ppo needs it" in shown
    assert "reward: runs first, ppo needs it" in shown
    assert outcome("sft") == sft
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["ppo", "reward", "sft"]


def test_another_run_in_the_folder_is_refused(run, outcome, tmp_path, capsys):
    assert run(stage="dpo") == 0
    assert run("--beta", 0.3, stage="dpo") == 2
    error = capsys.readouterr().err
    assert "--beta was 0.1, is 0.3" in error
    assert "--restart" in error
    assert run("--r", 3, stage="dpo") == 2
    assert "--r was 2, is 3" in capsys.readouterr().err
    assert run("--beta", 0.3, "--restart", stage="dpo") == 0

    assert run("--lr", 0.02, "--restart", stage="sft") == 0  # dpo began with another sft
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["stages"]) == ["sft"]
    assert run("--beta", 0.3, stage="dpo") == 2
    assert "sft was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("sft", ["--beta", "0.1"], "--beta is no option of --stage sft (it takes --steps, --batch-size, --lr)"),
        ("reward", ["--group-size", "4"], "--group-size is no option of --stage reward"),
        ("grpo", ["--group-size", "1"], "argument --group-size: must be at least 2, got 1"),
        ("all", ["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        ("magic", [], "invalid choice"),
        ("sft", ["--method", "full"], "invalid choice"),
        ("sft", ["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl: No such file"),
        ("sft", ["--device", "abacus"], "--device abacus: expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_arguments_are_one_clear_message(run, capsys, stage, options, message):
    try:
        code = run(*options, stage=stage)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_pairs_of_the_users(run, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": str(i)} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, pairs)))
    assert run("--data", file, stage="dpo") == 0
    assert "18 pairs to learn from, 2 of" in capsys.readouterr().out
    for line, message in (
        ('{"prompt": "x", "chosen": "y"}', 'line 21: expected the fields "prompt", "chosen" and "rejected"; found'),
        ('{"prompt": "", "chosen": "y", "rejected": "z"}', "line 21: an empty prompt"),
        (json.dumps({"prompt": "x" * 3000, "chosen": "y", "rejected": "z"}), "line 21: 3001 tokens, the model takes"),
    ):
        file.write_text("\n".join([*map(json.dumps, pairs), line]))
        assert run("--data", file, stage="dpo") == 2
        assert message in capsys.readouterr().err
    file.write_text(json.dumps(pairs[0]))
    assert run("--data", file, stage="dpo") == 2
    assert "has 1 prompts: at least 2 are needed" in capsys.readouterr().err


def test_the_base_is_one_and_stays_as_it_was(cache, tmp_path):
    args = cli.parser().parse_args(["rlhf", "--stage", "all", "--out", str(tmp_path / "run"), *map(str, FAST)])
    cpu, dtype = torch.device("cpu"), torch.float32
    folder = rlhf.embedded_folder(args, rlhf.make_console(), cpu, dtype)
    shared = rlhf.prepare(args, folder, rlhf.pairs_of(args), cpu, dtype)

    def base():
        named = shared.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in named.items() if "lora_" not in name}

    before = base()
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    for name, plan in rlhf.plans(args).items():
        stage = rlhf.STAGES[name](shared, plan, rlhf.options_of(args, plan, dtype))
        stage.step(0)
        assert all(tensor is before[key] for key, tensor in base().items())
    assert peft_ops.adapter_names(shared.model)[0] == "grpo"
    for name, tensor in base().items():
        assert torch.equal(tensor, values[name])
        assert tensor.grad is None


def test_the_reference_is_what_sft_left(cache, tmp_path):
    """Before the first step the KL of PPO and GRPO and the implicit rewards of DPO are 0."""
    args = cli.parser().parse_args(["rlhf", "--stage", "all", "--out", str(tmp_path / "run"), *map(str, FAST)])
    cpu, dtype = torch.device("cpu"), torch.float32
    folder = rlhf.embedded_folder(args, rlhf.make_console(), cpu, dtype)
    shared = rlhf.prepare(args, folder, rlhf.pairs_of(args), cpu, dtype)
    stages = {}
    for name, plan in rlhf.plans(args).items():
        stages[name] = rlhf.STAGES[name](shared, plan, rlhf.options_of(args, plan, dtype))
        if name in ("sft", "reward"):
            stages[name].step(0)
        else:
            measured = stages[name].evaluate()
            assert measured.get("kl", 0.0) == pytest.approx(0, abs=1e-5)
            assert measured.get("margin", 0.0) == pytest.approx(0, abs=1e-5)
            assert measured == stages[name].evaluate()  # the same draws


def test_log_probs_of_samples_are_those_that_they_were_drawn_with(tmp_path):
    """Where the end token was ruled out, the softmax is over the others."""
    args = cli.parser().parse_args(["rlhf", "--out", str(tmp_path / "run"), *map(str, FAST)])
    cpu, dtype, least = torch.device("cpu"), torch.float32, 3
    folder = rlhf.embedded_folder(args, rlhf.make_console(), cpu, dtype)
    shared = rlhf.prepare(args, folder, rlhf.pairs_of(args), cpu, dtype)
    batch = pad([[5, 6], [7], [8, 9, 10]], [[1, 2, 3, 4, 0], [9, 0], [1, 2, 3, 0]])
    hidden = completion_hidden(shared.model, batch)
    found = rlhf_online.log_probs(shared, hidden, batch, least, hidden)
    logits = shared.model.lm_head(hidden)
    logits[:, :least, 0] = -torch.inf
    chosen = batch.completions.clone()
    expected = logits.log_softmax(-1).gather(2, chosen[..., None])[..., 0]
    drawn = batch.mask & ((chosen != 0) | (torch.arange(5) >= least))
    torch.testing.assert_close(found.logp[drawn], expected[drawn], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reference[drawn], expected[drawn], rtol=1e-4, atol=1e-5)
    assert found.logp[~batch.mask].eq(0).all()
