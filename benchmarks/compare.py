"""`python -m benchmarks.compare REF [-k EXPRESSION]`: a git revision and the working tree, measured in one run.

REF is checked out into a temporary worktree and gets the suites of the working tree, so both are measured by the same
code. Their processes alternate (A B, B A, ...), so that a machine that warms up or is shared slows both. Prints the
median of every case, the ratio, and the noise: how far the rounds of one version lie apart. Cases that only one of
them has are counted, not compared. `pytest benchmarks --compare REF` is the same.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Medians = dict[str, list[float]]  # case -> seconds, one of every round


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", help="what `git rev-parse` takes")
    parser.add_argument("-k", dest="keyword", default="peft-ops", help="cases, as pytest's -k; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes of each version, at least 2; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--warm", action="store_true", help="on a CPU, leave the caches as the last call left them")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error("--rounds: one round tells nothing of the noise")
    options = ["-k", args.keyword, *(f"--{name}" for name in ("quick", "warm") if getattr(args, name))]
    with tempfile.TemporaryDirectory() as scratch, worktree(args.ref, root, Path(scratch) / "ref") as other:
        before, after = alternated([other, root], options, args.rounds, Path(scratch))
    print("\n".join(table(before, after, args.ref)))
    return 0 if before.keys() & after.keys() else 1


@contextlib.contextmanager
def worktree(ref: str, root: Path, folder: Path) -> Iterator[Path]:
    """REF in `folder`, with the suites of `root`; gone afterwards."""
    git = ["git", "-C", str(root), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), ref], check=True)
    try:
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        skipped = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(root / "benchmarks", folder / "benchmarks", ignore=skipped)
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def alternated(trees: list[Path], options: list[str], rounds: int, scratch: Path) -> list[Medians]:
    """Medians of each tree, its processes in turns: A B, B A, A B, ..."""
    medians: list[Medians] = [{} for _ in trees]
    for turn in range(rounds):
        order = list(range(len(trees)))
        for i in order if turn % 2 == 0 else reversed(order):
            print(f"round {turn + 1} of {rounds}: {'the working tree' if i else 'REF'}", file=sys.stderr, flush=True)
            for case, seconds in measured(trees[i], options, scratch / f"{turn}-{i}.json").items():
                medians[i].setdefault(case, []).append(seconds)
    return medians


def measured(tree: Path, options: list[str], results: Path) -> dict[str, float]:
    """case -> median, of one process over the code of `tree`."""
    pytest = ["pytest", "-p", "no:cacheprovider", "-q", "benchmarks", "--continue-on-collection-errors"]
    saving = [f"--benchmark-json={results}", "--benchmark-quiet"]
    command = [sys.executable, "-m", "benchmarks.tree", *pytest, *saving, *options]
    done = subprocess.run(command, cwd=tree, env=alone(), capture_output=True, text=True, check=False)
    if not results.exists():
        sys.exit(f"nothing was measured in {tree}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cases = json.loads(results.read_text())["benchmarks"]
    return {case["fullname"].rpartition("benchmarks/")[2]: case["stats"]["median"] for case in cases}


def alone() -> dict[str, str]:
    """The environment without what pytest-xdist leaves in it, which would turn measuring off."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def table(before: Medians, after: Medians, ref: str) -> list[str]:
    """A line per case that both have, then the geometric mean of the ratios."""
    both = [case for case in after if case in before]
    lines = [f"| case | {ref} | working tree | ratio | noise | |", "|---|---|---|---|---|---|"]
    ratios = []
    for case in both:
        old, new = statistics.median(before[case]), statistics.median(after[case])
        noise = max(max(rounds) / min(rounds) for rounds in (before[case], after[case])) - 1
        ratios.append(new / old)
        beyond = max(ratios[-1], 1 / ratios[-1]) > 1 + noise
        verdict = ("slower" if ratios[-1] > 1 else "faster") if beyond else "within noise"
        lines.append(
            f"| {case} | {old * 1e6:.4g} µs | {new * 1e6:.4g} µs | {ratios[-1]:.2f}× | {noise:.0%} | {verdict} |"
        )
    if ratios:
        lines += [
            "",
            f"Time over that of {ref}, geometric mean of {len(both)} cases: {statistics.geometric_mean(ratios):.3f}×.",
        ]
    alone = len(before.keys() ^ after.keys())
    return [*lines, *([f"{alone} cases are of one version alone."] if alone else [])]


if __name__ == "__main__":
    sys.exit(main())
