"""`python -m benchmarks.aot [--out FILE]`: what every kernel costs on every chip, read from compiled code.

Needs no GPU. Runs tests/aot, which compile each configuration and fail on spills or where the matrix unit is not used,
and writes benchmarks/results/aot.md: for Hopper what one turn of each main loop keeps busy (issue slots, memory, matrix
unit), then registers, shared memory and occupancy.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARP = 32

# Of one multiprocessor: 32-bit registers, bytes of shared memory (and what each program takes of it), warps, programs.
# NVIDIA, "CUDA C++ Programming Guide" 13.0, table "Technical Specifications per Compute Capability".
CHIPS = {
    "sm_80": dict(registers=65536, shared=164 << 10, reserved=1024, warps=64, programs=32),
    "sm_90": dict(registers=65536, shared=228 << 10, reserved=1024, warps=64, programs=32),
    "sm_100": dict(registers=65536, shared=228 << 10, reserved=1024, warps=64, programs=32),
}
# An H200 by the multiprocessor and cycle: 4.3 TB/s copied and 132 of them at 1.755 GHz; four instructions of a warp;
# 2048 16-bit multiply-adds, of TF32 half as many.
BYTES, ISSUE, FMA = 4.3e12 / 132 / 1.755e9, 4, 2048


def _split(adapter_bytes: int) -> int:
    """Products that a float32 operand against a 16-bit one is made of (peft_ops.kernels.tiles.mixed_dot)."""
    return 3 if adapter_bytes == 4 else 1


# kernel -> what one turn of its longest loop (or, "whole", all of it) moves and multiplies: (bytes of global memory
# that the budget counts, 16-bit multiply-adds). c: its constants; a: bytes of an adapter's element. x, y, dy: 16 bits.
TURN: dict[str, tuple[str, Callable[[dict, int], tuple[float, float]]]] = {
    "_down_project_kernel": ("loop", lambda c, a: (
        2 * c["BLOCK_M"] * c["BLOCK_K"], c["BLOCK_M"] * c["BLOCK_K"] * c["BLOCK_R"] * _split(a))),
    "_down_project_da_kernel": ("loop", lambda c, a: (
        2 * c["BLOCK_M"] * c["BLOCK_K"], c["BLOCK_M"] * c["BLOCK_K"] * c["BLOCK_R"] * 3)),
    "_low_rank_gradients_kernel": ("loop", lambda c, a: (
        2 * c["BLOCK_M"] * c["BLOCK_N"] + 4 * c["BLOCK_M"] * c["BLOCK_R"],
        c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_R"] * (_split(a) + 3))),
    "_low_rank_update_kernel": ("whole", lambda c, a: (
        4 * c["BLOCK_M"] * c["BLOCK_N"], c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_R"] * 2)),
    "_up_project_kernel": ("whole", lambda c, a: (
        4 * c["BLOCK_M"] * c["BLOCK_N"], c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_R"] * 2)),
    "_up_project_gradients_kernel": ("loop", lambda c, a: (
        2 * c["BLOCK_M"] * c["BLOCK_N"], c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_R"] * 3)),
    "_nf4_dequantize_kernel": ("whole", lambda c, a: (
        c["BLOCKS"] * c["BLOCKSIZE"] * (2.5 + _scale(c)), 0)),
    "_nf4_linear_kernel": ("loop", lambda c, a: (
        c["BLOCK_N"] * c["BLOCK_K"] * (0.5 + _scale(c)), c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"])),
    "_nf4_linear_dx_kernel": ("loop", lambda c, a: (
        c["BLOCK_N"] * c["BLOCK_K"] * (0.5 + _scale(c)), c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"])),
    **dict.fromkeys(("_linear_low_rank_kernel", "_logprob_kernel", "_logprob_gradient_kernel", "_add_product_kernel"),
                    ("loop", lambda c, a: (0, c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"]))),
}  # fmt: skip


def _scale(c: dict) -> float:
    """Bytes of absmax a weight."""
    return (1 if c["NESTED"] else 4) / c["BLOCKSIZE"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "aot.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "costs.jsonl"
        status = subprocess.call(
            [sys.executable, "-m", "pytest", "tests/aot", "-q", "-n", "2", "--costs", str(lines)], cwd=ROOT
        )
        costs = [json.loads(line) for line in lines.read_text().splitlines()]
    args.out.write_text(markdown(costs))
    print(args.out)
    return status


def markdown(costs: list[dict]) -> str:
    from benchmarks.machine import versions

    found = versions()
    costs = sorted(costs, key=lambda c: (c["kernel"], list(CHIPS).index(c["arch"]) if c["arch"] in CHIPS else 9,
                                         c["types"], json.dumps(c["flags"])))  # fmt: skip
    lines = [
        "# Every kernel, compiled ahead of time", "",
        f"By `python -m benchmarks.aot`: torch {found['torch']}, triton {found['triton']}; {len(costs)} "
        f"configurations, {sum(c['spills'] for c in costs)} spills. Nothing here is a measurement of time.", "",
        "## What a turn of the main loop keeps busy on Hopper", "",
        "Cycles of one multiprocessor of an H200 for one turn of a program's longest inner loop (or, where `whole`, "
        f"for all of a program): *issue* = instructions × warps / {ISSUE}; *memory* = the bytes that the budget counts "
        f"/ {BYTES:.1f}; *matrix* = multiply-adds / {FMA}. The largest is the floor of the turn; a kernel is at its "
        "budget where issue is below memory or matrix.", "",
        "| kernel | types | issue | memory | matrix | bound by | instructions: matrix, global, shared, float, integer, "
        "control | configuration |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [line for cost in costs if (line := turn(cost))]
    lines += [
        "", "## Registers, shared memory, occupancy", "",
        "The most of all configurations of a kernel on a chip, and the least occupancy: resident warps over the most "
        "that a multiprocessor holds, by registers, shared memory and programs. `make aot` prints every "
        "configuration.", "",
        "| kernel | chip | configurations | registers | shared KiB | occupancy | spills | matrix and copies |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups: dict[tuple[str, str], list[dict]] = {}
    for cost in costs:
        groups.setdefault((name(cost), cost["arch"]), []).append(cost)
    return "\n".join([*lines, *(summary(*key, group) for key, group in groups.items())]) + "\n"


def turn(cost: dict) -> str | None:
    """A line of the table for Hopper; None for kernels, types and chips that it leaves out."""
    if cost["arch"] != "sm_90" or cost["kernel"] not in TURN or not cost["aligned"] or "bf16" not in cost["types"]:
        return None
    part, work = TURN[cost["kernel"]]
    flags, kinds = cost["flags"], cost["loop"]
    count = cost["length"] if part == "whole" else sum(kinds.values())
    if not count:
        return None
    moved, multiplied = work(flags, 4 if "fp32" in cost["types"] else 2)
    cycles = {
        "issue": count * flags["num_warps"] / ISSUE, "memory": moved / BYTES, "matrix": multiplied / FMA,
    }  # fmt: skip
    bound = max(cycles, key=cycles.__getitem__)
    named = ("matrix", "global", "shared", "float", "integer", "control")
    mix = "whole" if part == "whole" else ", ".join(str(kinds.get(kind, 0)) for kind in named)
    numbers = " | ".join(f"{value:.0f}" if value else "–" for value in cycles.values())
    return f"| {name(cost)} | {cost['types']} | {numbers} | {bound} | {mix} | {configuration(flags)} |"


def summary(kernel: str, arch: str, costs: list[dict]) -> str:
    """A line for all configurations of a kernel on a chip."""
    most = {key: max(cost[key] for cost in costs) for key in ("registers", "shared")}
    units = ", ".join(sorted({unit for cost in costs for unit in cost["instructions"]})) or "–"
    least = min((o for cost in costs if (o := occupancy(cost)) is not None), default=None)
    return (
        f"| {kernel} | {arch} | {len(costs)} | {most['registers']} | {most['shared'] / 1024:.0f} | "
        f"{'–' if least is None else f'{least:.0%}'} | {sum(cost['spills'] for cost in costs)} | {units} |"
    )


def occupancy(cost: dict) -> float | None:
    """Resident warps over the most there can be; None for a chip that CHIPS does not know."""
    chip, warps = CHIPS.get(cost["arch"]), cost["flags"].get("num_warps", 4)
    if chip is None:
        return None
    programs = min(
        chip["registers"] // (math.ceil(max(cost["registers"], 1) / 8) * 8 * WARP * warps),
        chip["shared"] // (cost["shared"] + chip["reserved"]), chip["warps"] // warps, chip["programs"],
    )  # fmt: skip
    return programs * warps / chip["warps"]


def name(cost: dict) -> str:
    return cost["kernel"].removeprefix("_").removesuffix("_kernel")


def configuration(flags: dict) -> str:
    """Tiles and flags, what is off left out."""
    return " ".join(
        str(key) if value is True else f"{key}={value}" for key, value in flags.items() if value is not False
    )


if __name__ == "__main__":
    sys.exit(main())
