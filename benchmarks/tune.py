"""`python -m benchmarks.tune --out DIR`: measures launch configurations and routes into DIR/<arch>.json.

The most important kernels first, within --minutes; what the table has already and this run does not reach stays, and a
run that goes on with a table begins with what it lacks. Without --out the table that the package ships is written.
`--device cpu --quick` takes the whole way in Triton's interpreter: its times mean nothing, its table says so and is not
read where tables ship.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("down_project", "low_rank_update", "low_rank_gradients", "nf4_linear", "nf4_dequantize", "linear_low_rank")
ROUTES = "routes"
LATER = (
    "down_project_da", "nf4_linear_dx", "dora_norm", "nf4_dora_norm", "dora_update", "dora_gradients", "up_project",
    "up_project_gradients", "logprob", "logprob_gradient", "add_product", "nf4_quantize",
)  # fmt: skip
ROWS = {
    **dict.fromkeys(("nf4_linear", "nf4_linear_dx"), (16, 64, 32, 128)),
    **dict.fromkeys(("nf4_dequantize", "nf4_quantize"), (1 << 24,)),  # elements of 4096 x 4096
    **dict.fromkeys(("dora_norm", "nf4_dora_norm"), (4096,)),
    **dict.fromkeys(("logprob", "logprob_gradient", "add_product"), (8192, 1024)),
}
OF_ACTIVATIONS = 8192, 16, 1024, 128
TINY = dict(width=64, samples=(1, 1), most=2)


class Bucket(NamedTuple):
    kernel: str
    dtype: torch.dtype
    rows: int
    rank: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=names, default=(*FIRST, ROUTES, *LATER), help="names, or routes; all of them")
    parser.add_argument("--minutes", type=float, default=6.0, help="no measurement begins after that (6)")
    parser.add_argument("--out", type=Path, help="folder of the table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a dry run: one tiny bucket and two candidates a kernel")
    parser.add_argument("--dtypes", type=names, help="of bfloat16 (the default), float16, float32")
    parser.add_argument("--ranks", type=lambda text: [int(r) for r in names(text)], default=[16, 64])
    args = parser.parse_args()
    if unknown := {*args.kernels} - {*FIRST, ROUTES, *LATER}:
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}")
    if args.quick and args.out is None:
        parser.error("--quick is a dry run, whose times are none to ship: it needs --out")
    if args.device == "cpu":
        if not args.quick:
            parser.error("--device cpu is a dry run: it needs --quick")
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated
        args.dtypes = args.dtypes or ["float16"]  # the interpreter has no bfloat16
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --quick is a dry run")
    args.dtypes = args.dtypes or ["bfloat16"]
    return tune(args)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def tune(args: argparse.Namespace) -> int:
    """0 where everything that was begun was measured."""
    from peft_ops.kernels import autotune, configs, measured, table_files

    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    arch, folder = configs.arch_of(device), args.out or measured.SHIPPED
    os.environ["PEFT_OPS_TABLES"] = str(folder)
    measured.at_first_use = None
    path = folder / f"{arch}.json"
    old = table_files.read(path) if path.exists() else {}
    raw = autotune.header(arch, device) | {"revision": revision()}
    raw |= {section: old.get(section, {}) for section in ("kernels", "routes")}
    raw["times"] = "meaningless" if args.quick else raw["times"]
    if old.get("times", raw["times"]) != raw["times"]:
        sys.exit(f"{path}: its times are {old['times']}, those of this run {raw['times']}")
    deadline, failed = time.monotonic() + 60 * args.minutes, 0
    for section, name, operands, measure in work(args, device, arch, raw):
        if time.monotonic() > deadline:
            print("out of time: run again to go on")
            break
        try:
            entry = operands | measure()
        except Exception as error:  # one kernel that fails leaves the others their measurements
            print(f"{name}: not measured: {error}")
            failed += 1
            continue
        table_files.put(raw, section, name, entry)
        table_files.write(path, raw)
        measured.forget()  # routes are measured with the configurations that were found
        print(name, *(f"{key}={value}" for key, value in entry.items() if key != "measured"), flush=True)
    return int(failed > 0)


def work(args, device: torch.device, arch: str, raw: dict) -> Iterator[tuple[str, str, dict, Any]]:
    """(section of the table, name, operands, what measures it): the most important first, of these what it lacks."""
    from benchmarks.tune_routes import routes
    from peft_ops.kernels import autotune

    tiny = TINY if args.quick else {}
    kernels = [
        ("kernels", b.kernel, {"dtype": str(b.dtype).removeprefix("torch."), "rows": b.rows, "rank": b.rank},
         partial(autotune.measure, b.kernel, arch, b.dtype, b.rows, b.rank, device=device, revision=revision(), **tiny))
        for b in wanted(args, arch) if b.kernel in args.kernels
    ]  # fmt: skip
    lowest = min((item[2]["rank"] for item in kernels if item[2]["rank"]), default=0)
    first = [item for item in kernels if item[1] in FIRST and item[2]["rank"] in (0, lowest)]
    choices = routes(device, arch, args.dtypes, args.quick, revision()) if ROUTES in args.kernels else ()
    later = [item for item in kernels if item not in first]
    for phase in (first, [("routes", *choice) for choice in choices], later):
        yield from sorted(phase, key=lambda item: has(raw, *item[:3]))


def wanted(args, arch: str) -> Iterator[Bucket]:
    """Every bucket to measure; ranks as `configs.block_r` groups them."""
    from peft_ops.kernels import configs
    from peft_ops.kernels.problems import WITH_RANK
    from peft_ops.kernels.table_files import DTYPES

    for kernel in (*FIRST, *LATER):
        kinds = ["float32"] if kernel == "nf4_dora_norm" else args.dtypes
        for dtype in (DTYPES[kind] for kind in kinds if kernel != "linear_low_rank" or kind != "float32"):
            blocks = {configs.block_r(rank, arch, dtype): None for rank in args.ranks}
            rows = ROWS.get(kernel, OF_ACTIVATIONS)
            for rank in blocks if kernel in WITH_RANK else (0,):
                yield from (Bucket(kernel, dtype, m, rank) for m in ((16,) if args.quick else rows))


def has(raw: dict, section: str, name: str, operands: dict) -> bool:
    return any(operands.items() <= item.items() for item in raw[section].get(name, []))


def revision() -> str:
    """Of the working tree; empty where git knows none."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
