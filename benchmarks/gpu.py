"""`python -m benchmarks.gpu --out DIR`: everything that needs a GPU, from the bare working tree, within 8 minutes.

Steps, each in a process of its own with a time limit of its own; one that fails does not stop the next:
  tests       those marked gpu
  check       `peft-ops check`: every op against float64
  memcheck    compute-sanitizer over every op on a small ragged shape, where the tool exists and works
  tune        launch configurations by measurement, for --minutes-tune; the suite then runs with them
  benchmarks  the suite, what the targets need first, as far as the time goes
  report      tables and pictures
Writes at most 8 files: environment.json (machine, revision, status of each step, the check's results), log.txt,
benchmark.json, report.md, three pictures and the tuned table. The exit status is 0 where every step succeeded.
--steps and the limits split the work over several calls; `--device cpu --quick` rehearses it without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks import sanitizer
from benchmarks.steps import ROOT, Step, revision, run

STEPS = ("tests", "check", "memcheck", "tune", "benchmarks", "report")
PYTEST = ("pytest", "-p", "no:cacheprovider", "-q", "--color=no")
REPORT_S = 30
TESTS_WITHOUT_GPU = ("--ignore=tests/aot", "--ignore=tests/interpret", "--continue-on-collection-errors")


def main() -> int:
    args = parsed()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # steps could not be interrupted where it is ignored
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = args.revision or revision()
    environment = {"machine": machine(), "revision": commit, "steps": []}
    if args.device == "cuda" and not environment["machine"].get("multiprocessors"):
        sys.exit("torch finds no GPU here; --device cpu --quick is a dry run")
    with open(out / "log.txt", "a") as log, tempfile.TemporaryDirectory() as scratch:
        for step in steps(args, out, Path(scratch), commit):
            environment["steps"].append(run(step, log))
            checked = Path(scratch) / "check.json"
            environment |= {"check": json.loads(checked.read_text())} if checked.exists() else {}
            (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    return int(any(step["status"] not in (0, None) for step in environment["steps"]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS), help=",".join(STEPS))
    parser.add_argument("-k", dest="keyword", help="cases of the suite, as pytest's -k")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all steps; default: %(default)s")
    parser.add_argument("--minutes-tune", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument("--revision", help="of a tree that carries no git")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"--steps: no {', '.join(sorted(unknown))} among {', '.join(STEPS)}")
    return args


def steps(args: argparse.Namespace, out: Path, scratch: Path, commit: str | None) -> Iterator[Step]:
    """Those asked for, each made when its turn comes: the suite gets the time that is left."""
    end = time.monotonic() + 60 * args.minutes
    results, checked = scratch / "results.json", scratch / "check.json"
    tune = ["benchmarks.tune", "--minutes", str(args.minutes_tune), "--out", str(out)]
    tune += ["--device", "cpu", "--quick"] if args.device == "cpu" else []
    report = ["benchmarks.report", str(results), "--out", str(out), *(["--revision", commit] if commit else [])]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []  # most of the time is compilation
    made = {
        "tests": lambda: Step("tests", [*PYTEST, *workers, "-m", "gpu", "tests", *TESTS_WITHOUT_GPU], 110),
        "check": lambda: Step("check", ["peft_ops.cli:main", "check", "--json", str(checked)], 40),
        "memcheck": lambda: sanitizer.step(45),
        "tune": lambda: Step("tune", tune, 60 * args.minutes_tune + 15, missing=missing("benchmarks.tune")),
        "benchmarks": lambda: suite(args, out, results, end - time.monotonic() - REPORT_S),
        "report": lambda: Step("report", report, REPORT_S),
    }
    yield from (made[name]() for name in STEPS if name in args.steps)


def suite(args: argparse.Namespace, out: Path, results: Path, left_s: float) -> Step:
    """What has not begun a quarter of a minute before the end is left out; whatever then still runs is interrupted."""
    within = ["--benchmark-quiet", f"--benchmark-json={results}", f"--within={max(left_s - 15, 1)}"]
    chosen = [*(["--quick"] if args.quick else []), *(["-k", args.keyword] if args.keyword else [])]
    tuned = {"PEFT_OPS_TABLES": str(out)} if args.device == "cuda" and "tune" in args.steps else {}
    return Step("benchmarks", [*PYTEST, "benchmarks", *within, *chosen], max(left_s, 16), variables=tuned)


def missing(module: str) -> str | None:
    return None if find_spec(module) else f"not available: no {module}"


def machine() -> dict:
    """In a process of its own: this one never holds the GPU."""
    code = "import json; from benchmarks.machine import description; print(json.dumps(description()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
