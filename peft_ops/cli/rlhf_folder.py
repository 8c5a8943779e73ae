"""What the stages of a run leave in its folder, and which of it belongs together."""

import json
from pathlib import Path
from typing import Any

from .files import write_json
from .rlhf_plan import NEEDS, PLANS, Plan, taken
from .rlhf_trainer import StageHistory

Result = dict[str, Any]
_RESULT = "result.json"


def write_result(
    folder: Path, stage: str, plan: Plan, fingerprint: str, parents: dict[str, str], history: StageHistory
) -> None:
    """Of a finished stage. fingerprint: of its parameters; parents: those of the stages that it started from."""
    known = {"plan": taken(stage, plan), "fingerprint": fingerprint, "parents": parents}
    write_json(folder / _RESULT, known | {"seconds": sum(history.seconds), "history": vars(history)})


def read_result(folder: Path) -> Result | None:
    """Of a finished stage; None where it is not, or the file is no such result."""
    try:
        result = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
        Plan(**result["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def results(out: Path) -> dict[str, Result]:
    """Of the finished stages, without those that started from a stage which was trained anew since."""
    found: dict[str, Result] = {}
    for name in PLANS:
        result = read_result(out / name)
        if result is None:
            continue
        if all(need in found and found[need]["fingerprint"] == result["parents"].get(need) for need in NEEDS[name]):
            found[name] = result
    return found


def forget(folder: Path) -> None:
    """The next run of the stage starts over."""
    for name in (_RESULT, "checkpoint.pt"):
        (folder / name).unlink(missing_ok=True)
