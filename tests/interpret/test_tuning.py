"""Kernels under tables and under measurement: right with any configuration, measured once and where it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numerics import assert_as_accurate
from peft_ops.kernels import autotune, candidates, configs, down_project, measured, table_files
from peft_ops.reference import down_project as reference

ROOT = Path(__file__).parents[2]
KEY = "down_project", "default", torch.float32
CPU = dict(device=torch.device("cpu"), width=48, samples=(1, 1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that PEFT_OPS_TABLES names; nothing was measured before."""
    monkeypatch.setenv("PEFT_OPS_TABLES", str(tmp_path))
    monkeypatch.setattr(autotune, "_met", set())
    monkeypatch.setitem(candidates.CANDIDATES, "down_project", ({"BLOCK_M": 16}, {"BLOCK_K": 64}))
    measured.forget()
    yield tmp_path
    measured.forget()


@pytest.fixture
def asked(folder, monkeypatch):
    """As with PEFT_OPS_AUTOTUNE=1, on small operands; the buckets that were measured."""
    buckets, measure = [], autotune.measure

    def small(kernel, arch, dtype, rows, rank, device):
        buckets.append((kernel, rows, rank))
        return measure(kernel, arch, dtype, rows, rank, **CPU)

    monkeypatch.setattr(autotune, "measure", small)
    monkeypatch.setattr(measured, "at_first_use", autotune.at_first_use)
    return buckets


def projected(rows=20, rank=3):
    return down_project.down_project(torch.randn(rows, 70), torch.randn(rank, 70), 0.0, None)


@pytest.mark.parametrize("config", candidates.CANDIDATES["down_project"], ids=str)
def test_every_candidate_is_right(config):
    x, a, seed = torch.randn(70, 300, dtype=torch.float16), torch.randn(5, 300), torch.tensor(7)
    with configs.using("down_project", config):
        s = down_project.down_project(x, a, 0.3, seed)
    same = reference.down_project(x, a, 0.3, seed)
    assert_as_accurate("s", s, same, reference.down_project(x.double(), a.double(), 0.3, seed))


def test_a_table_gives_the_same_result_every_time(folder):
    entry = autotune.measure(*KEY, 70, 16, **CPU)
    entry["config"] = {"BLOCK_M": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    autotune.keep(folder, "default", torch.device("cpu"), "down_project", entry)
    measured.forget()
    x, a = torch.randn(70, 300), torch.randn(5, 300)
    results = [down_project.down_project(x, a, 0.0, None) for _ in range(3)]
    with configs.using("down_project", entry["config"]):
        results.append(down_project.down_project(x, a, 0.0, None))
    assert all(torch.equal(result, results[0]) for result in results)
    with configs.using("down_project", {}):
        designed = down_project.down_project(x, a, 0.0, None)
    torch.testing.assert_close(designed, results[0])
    assert not torch.equal(designed, results[0])  # another order of summation


def test_the_first_use_of_a_bucket_is_measured_and_kept(asked, folder):
    for rows in (20, 32, 17, 33):
        projected(rows)
    assert asked == [("down_project", 20, 16), ("down_project", 33, 16)]
    raw = table_files.read(folder / "default.json")
    assert [entry["rows"] for entry in raw["kernels"]["down_project"]] == [32, 64]
    assert raw["times"] == "meaningless"
    autotune._met.clear()  # the next process
    measured.forget()
    projected(20)
    assert len(asked) == 2


def test_a_measurement_leaves_the_random_state_alone(asked):
    before = torch.get_rng_state()
    configs.launch(*KEY, 20, 16)
    assert asked
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_measured_without_being_asked(folder, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(measured, "at_first_use", None)
    assert projected().norm() > 0
    assert not list(folder.iterdir())


def test_nothing_is_measured_while_capturing_or_tracing(asked, monkeypatch):
    with monkeypatch.context() as capturing:
        capturing.setattr(autotune, "_capturing", lambda arch: True)
        projected()
    call = torch.compile(lambda x: x * configs.launch(*KEY, x.shape[0], 16)["BLOCK_M"], backend="eager", fullgraph=True)
    call(torch.ones(20, 2))
    assert not asked
    projected()
    assert asked  # a call that could not measure does not stand in the way of one that can
    torch._dynamo.reset()


def test_a_kernel_that_cannot_be_measured_runs_as_designed(asked, monkeypatch, caplog):
    monkeypatch.setattr(autotune, "measure", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("too large")))
    assert projected().norm() > 0
    assert projected().norm() > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_wrong_and_failing_candidates_are_not_taken(folder, monkeypatch, caplog):
    wrong, failing = {"BLOCK_M": 16}, {"BLOCK_M": 48}  # no tile is 48 rows
    monkeypatch.setitem(candidates.CANDIDATES, "down_project", (wrong, failing, {"BLOCK_K": 64}))
    right = autotune.Trials.results

    def results(self, config, calls):
        found = right(self, config, calls)
        return [[t + 1 for t in tensors] for tensors in found] if config["BLOCK_M"] == 16 else found

    monkeypatch.setattr(autotune.Trials, "results", results)
    monkeypatch.setattr(autotune.stopwatch, "medians", lambda calls, *how: [9.0, *range(1, len(calls))])
    entry = autotune.measure(*KEY, 20, 16, **CPU)
    assert (entry["tried"], entry["config"]["BLOCK_M"], entry["config"]["BLOCK_K"]) == (2, 64, 64)
    assert (entry["default_us"], entry["best_us"]) == (9.0, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'BLOCK_M': 16" in caplog.text


def test_the_fastest_must_run_every_variant(folder, monkeypatch):
    """Misaligned and transposed operands take more shared memory, on some chips."""
    right = autotune.Trials.results

    def results(self, config, calls):
        if config["BLOCK_M"] == 16 and calls == autotune.VARIANTS:
            raise RuntimeError("out of resource: shared memory")
        return right(self, config, calls)

    monkeypatch.setattr(autotune.Trials, "results", results)
    monkeypatch.setattr(autotune.stopwatch, "medians", lambda calls, *how: [9.0, 1.0, 1.1])
    entry = autotune.measure(*KEY, 20, 16, **CPU)
    assert (entry["tried"], entry["config"]["BLOCK_M"], entry["best_us"]) == (3, 64, 1.1)


def test_the_design_stays_unless_clearly_beaten(folder, monkeypatch):
    monkeypatch.setattr(autotune.stopwatch, "medians", lambda calls, *how: [1.0] + [0.99] * (len(calls) - 1))
    assert autotune.measure(*KEY, 20, 16, **CPU)["config"] == configs.designed(*KEY)


def test_zeros_are_nothing_to_compare_with(folder, monkeypatch):
    monkeypatch.setattr(autotune.Trials, "results", lambda *args: [[torch.zeros(3)]])
    with pytest.raises(RuntimeError, match="zeros"):
        autotune.measure(*KEY, 20, 16, **CPU)


@pytest.fixture
def tune(folder, monkeypatch):
    """The command in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune

    monkeypatch.setattr(measured, "at_first_use", None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tune", "--device", "cpu", "--quick", *arguments])
        return tune.main()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "it needs --out"), (("--out", "x", "--kernels", "down"), "no kernel is called down")],
    ids=["what is shipped is not overwritten", "an unknown kernel"],
)
def test_the_command_refuses(tune, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        tune(*arguments)
    assert message in capsys.readouterr().err


def test_nothing_is_tuned_without_time(tune, folder, capsys):
    assert tune("--out", str(folder), "--ranks", "16", "--kernels", "low_rank_update", "--minutes", "0") == 0
    assert "out of time" in capsys.readouterr().out
    assert not list(folder.iterdir())


def test_the_command_tunes_keeps_and_goes_on(tmp_path):
    """The whole way, from the bare tree: kernels, then routes beside what the table has."""
    command = [sys.executable, "-m", "benchmarks.tree", "benchmarks.tune", "--device", "cpu", "--quick"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PEFT_OPS")}
    for kernels in ("down_project,nf4_dequantize", "routes"):
        arguments = ["--out", str(tmp_path), "--ranks", "16", "--kernels", kernels]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    raw = table_files.read(tmp_path / "default.json")
    assert raw["times"] == "meaningless"
    assert raw["kernels"].keys() == {"down_project", "nf4_dequantize"}
    assert raw["routes"].keys() == table_files.ROUTES.keys()
    parsed = table_files.parsed(raw, "x")
    assert all(parsed.kernels.values())
    assert all(parsed.routes.values())
