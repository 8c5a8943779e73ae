"""`make gpu` and the comparison of two revisions: steps end within their time, both versions are really measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import compare, sanitizer, tree  # noqa: E402
from benchmarks.steps import Step, run  # noqa: E402


def test_kernels_are_found_in_a_bare_tree():
    assert tree._Kernels.find_spec("peft_ops.kernels").origin == str(ROOT / "kernels" / "__init__.py")
    assert tree._Kernels.find_spec("kernels") is None


def test_a_step_reports_its_exit_code_and_is_stopped_at_its_limit(tmp_path):
    with open(tmp_path / "log.txt", "a") as log:
        assert run(Step("version", ["pytest", "--version"], 60), log)["status"] == 0
        assert run(Step("missing", ["no_such_module"], 60), log)["status"] == 1
        assert run(Step("slow", ["pytest", "--version"], 0), log)["status"] == 124
    assert "No module named no_such_module" in (tmp_path / "log.txt").read_text()


def test_a_step_that_cannot_run_here_is_no_failure(tmp_path):
    unsupported = ("No module named no_such_module", "not available: no device")
    with open(tmp_path / "log.txt", "a") as log:
        assert run(Step("tool", ["pytest"], 60, missing="not available: no tool"), log)["status"] is None
        outcome = run(Step("device", ["no_such_module"], 60, unsupported=unsupported), log)
        assert run(Step("other", ["another_module"], 60, unsupported=unsupported), log)["status"] == 1
    assert (outcome["status"], outcome["note"]) == (None, "not available: no device")


def test_the_sanitizer_is_found_beside_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch()
    assert sanitizer.step(9).prefix[0] == str(tool)
    monkeypatch.setattr(sanitizer, "candidates", lambda: iter(()))
    assert "not on this machine" in sanitizer.step(9).missing


SLEEPS = """import time
import pytest
import peft_ops

@pytest.mark.parametrize("contender", ["peft-ops", "other"])
def test_sleep(benchmark, contender):
    benchmark.pedantic(time.sleep, args=(peft_ops.SECONDS,), rounds=3)
"""
IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two revisions of a library that sleeps 20 ms and, in the working tree, 5 ms."""
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)
    files = {"benchmarks/__init__.py": "", "benchmarks/tree.py": (ROOT / "benchmarks" / "tree.py").read_text(),
             "benchmarks/test_sleep.py": SLEEPS, "peft_ops/__init__.py": "SECONDS = 0.02\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "slow"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "peft_ops" / "__init__.py").write_text("SECONDS = 0.005\n")
    return tmp_path


def test_compare_measures_both_revisions(repository, capsys):
    assert compare.main(["HEAD"], repository) == 0
    out = capsys.readouterr()
    (row,) = [line for line in out.out.splitlines() if "test_sleep[peft-ops]" in line]
    assert 0.2 < float(row.split("|")[4].strip(" ×")) < 0.6
    assert row.endswith("| faster |")
    assert "other" not in out.out
    versions = [line.rpartition(": ")[2] for line in out.err.splitlines() if line.startswith("round")]
    assert versions == ["REF", "the working tree", "the working tree", "REF"]
    worktrees = ["git", "-C", str(repository), "worktree", "list"]
    assert len(subprocess.run(worktrees, capture_output=True, text=True, check=True).stdout.splitlines()) == 1


def test_a_difference_within_the_noise_is_called_so():
    lines = compare.table(
        {"a": [1.0, 1.2], "b": [1.0, 1.01]}, {"a": [1.15, 1.1], "b": [2.0, 2.0], "c": [1.0, 1.0]}, "REF"
    )
    assert "within noise" in lines[2]
    assert "slower" in lines[3]
    assert lines[-1] == "1 cases are of one version alone."


def suite(tmp_path, *options):
    """A dry run of one suite, its results."""
    results = tmp_path / "r.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_nf4.py", "--quick", "-q", "-p", "no:cacheprovider"]
    whole = [*command, f"--benchmark-json={results}", *options]
    done = subprocess.run(whole, cwd=ROOT, env=compare.alone(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return json.loads(results.read_text()) if results.exists() else {}


def test_results_say_what_was_left_out_and_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no GPU\\nand more')")
    results = suite(tmp_path)
    assert {case["extra_info"]["contender"] for case in results["benchmarks"]} == {"peft-ops"}
    assert results["benchmarks"][0]["extra_info"]["least_bytes"] > 0
    assert results["machine_info"]["ceilings"]["copy_bytes_per_s"] > 0
    assert results["machine_info"]["caches"] == "warm caches"  # of a dry run
    expected = {"suite": "test_nf4", "contender": "bitsandbytes", "reason": "RuntimeError: no GPU", "cases": 6}
    assert expected in results["left_out"]


def test_nothing_begins_after_the_limit(tmp_path):
    assert suite(tmp_path, "--within=0.000001") == {}
