"""A step of `make gpu`: a process with a time limit, its output kept, its outcome as a dict."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 20  # after an interrupt: pytest-benchmark writes what it has


class Step(NamedTuple):
    """arguments of benchmarks.tree, under the command `prefix`; `missing`: why it cannot run here, which is no failure.

    unsupported: (text, reason); a step that fails with the text in its output could not run here either.
    """

    name: str
    arguments: list[str]
    limit_s: float
    prefix: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    missing: str | None = None
    unsupported: tuple[str, str] | None = None


def run(step: Step, log: TextIO) -> dict:
    """name, status (exit code, 124 out of time, None where it cannot run here), seconds, limit_s, note."""
    print(f"== {step.name}: {' '.join(step.arguments)}", file=log, flush=True)
    print(f"{step.name} ...", end=" ", flush=True)
    outcome, began = {"name": step.name, "status": None, "seconds": 0.0, "limit_s": step.limit_s}, time.monotonic()
    if step.missing:
        outcome["note"] = step.missing
    else:
        start = log.tell()
        command = [*step.prefix, sys.executable, "-m", "benchmarks.tree", *step.arguments]
        variables = os.environ | step.variables
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=variables, start_new_session=True)
        outcome["status"] = waited(process, step.limit_s)
        if (
            outcome["status"]
            and step.unsupported
            and step.unsupported[0] in Path(log.name).read_bytes()[start:].decode()
        ):
            outcome |= {"status": None, "note": step.unsupported[1]}
    outcome["seconds"] = round(time.monotonic() - began, 1)
    told = f"status {outcome['status']}, {outcome['seconds']} s" if "note" not in outcome else outcome["note"]
    print(f"== {step.name}: {told}\n", file=log, flush=True)
    print(told, flush=True)
    return outcome


def waited(process: subprocess.Popen, limit_s: float) -> int:
    """Exit code of a step, 124 where it had to be interrupted, and killed if that did not end it."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return 124


def revision() -> str | None:
    """Of the working tree; None where it carries no git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
