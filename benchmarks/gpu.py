"""`python -m benchmarks.gpu --out DIR`: everything that needs a GPU, from the bare working tree, within 8 minutes.

Tests marked gpu, `peft-ops check`, the benchmark suite and its report, each with a time limit of its own; a step that
fails does not stop the next. Writes at most 8 files: environment.json (machine, steps), log.txt, check.json,
benchmark.json, report.md and pictures. The exit status is 0 where every step succeeded.
`--device cpu --quick` runs the same on a machine without a GPU, on tiny shapes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS_WITHOUT_GPU = ("--ignore=tests/aot", "--ignore=tests/interpret", "--continue-on-collection-errors")
GRACE_S = 15  # after an interrupt: pytest-benchmark writes what it has


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    environment = {"machine": machine(), "steps": []}
    if args.device == "cuda" and not environment["machine"].get("multiprocessors"):
        parser.error("torch finds no GPU here; --device cpu --quick is a dry run")
    with open(out / "log.txt", "w") as log, tempfile.TemporaryDirectory() as scratch:
        for step in steps(out, Path(scratch) / "results.json", args.quick):
            environment["steps"].append(run(*step, log))
            (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    return int(any(step["status"] for step in environment["steps"]))


def steps(out: Path, results: Path, quick: bool) -> list[tuple[str, list[str], int]]:
    """(name, arguments of benchmarks.tree, seconds allowed)."""
    pytest = ["pytest", "-p", "no:cacheprovider", "-q", "--color=no"]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []  # most of the time is compilation
    suite = [*pytest, "benchmarks", f"--benchmark-json={results}", "--benchmark-quiet", *(["--quick"] if quick else [])]
    return [
        ("tests", [*pytest, *workers, "-m", "gpu", "tests", *TESTS_WITHOUT_GPU], 140),
        ("check", ["peft_ops.cli:main", "check", "--json", str(out / "check.json")], 50),
        ("benchmarks", suite, 200),
        ("report", ["benchmarks.report", str(results), "--out", str(out)], 30),
    ]


def run(name: str, arguments: list[str], limit_s: int, log) -> dict:
    """Runs a step in a process of its own, its output kept."""
    print(f"== {name}: {' '.join(arguments)}", file=log, flush=True)
    print(f"{name} ...", end=" ", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.tree", *arguments]
    step = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    status = waited(step, limit_s)
    took = {"name": name, "status": status, "seconds": round(time.monotonic() - began, 1), "limit_s": limit_s}
    print(f"== {name}: status {status} after {took['seconds']} s\n", file=log, flush=True)
    print(f"status {status}, {took['seconds']} s", flush=True)
    return took


def waited(step: subprocess.Popen, limit_s: float) -> int:
    """Exit code of a step, 124 where it had to be interrupted, and killed if that did not end it."""
    try:
        return step.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(step.pid, signal.SIGINT)
    try:
        step.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(step.pid, signal.SIGKILL)
        step.wait()
    return 124


def machine() -> dict:
    """In a process of its own: this one never holds the GPU."""
    code = "import json; from benchmarks.machine import description; print(json.dumps(description()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
