"""`python -m benchmarks.report results.json [--out DIR]`: a results file of pytest-benchmark as a table and pictures.

Writes benchmark.json (without samples, host name and paths), report.md and one picture per family of ops; without --out
into benchmarks/results/<device>/.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

OURS, FLOOR = "peft-ops", "nn.Linear"
RESULTS = Path(__file__).parent / "results"
KEPT = ("min", "q1", "median", "q3", "max", "iqr", "rounds")
PICTURES = {
    "lora_linear": ("lora_linear forward", "lora_linear forward + backward"),
    "nf4": ("nf4 quantize", "nf4 dequantize"),
    "prefix_attention": ("prefix_attention forward + backward", "prefix_attention decode"),
    "nf4_linear": ("nf4_linear forward", "nf4_linear forward + backward", "qlora_linear forward + backward"),
    "bottleneck_adapter": ("bottleneck_adapter forward", "bottleneck_adapter forward + backward"),
    "linear_logprob": (
        "linear_logprob forward",
        "linear_logprob forward + backward",
        "linear_cross_entropy forward + backward",
    ),
    "dora_linear": ("dora_linear forward + backward",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = trimmed(json.loads(args.results.read_text()))
    out = args.out or RESULTS / slug(results["machine_info"]["device"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
    names = draw(results, out)
    (out / "report.md").write_text(markdown(results, names))
    print(out / "report.md")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def trimmed(results: dict) -> dict:
    """What a reader of the results needs: still loadable by `--benchmark-compare`."""
    commit = {key: results["commit_info"].get(key) for key in ("id", "time", "dirty")}
    machine = {key: value for key, value in results["machine_info"].items() if key not in ("cpu", "processor", "node")}
    benchmarks = []
    for case in results["benchmarks"]:
        stats = case["stats"]
        full = {
            key: stats[key]
            for key in (*KEPT, "mean", "stddev", "ops", "iterations", "outliers", "total")
            if key in stats
        }
        benchmarks.append(
            {key: case[key] for key in ("group", "name", "fullname", "params", "param", "extra_info")} | {"stats": full}
        )
    return {"machine_info": machine, "commit_info": commit, "datetime": results["datetime"],
            "version": results["version"], "benchmarks": benchmarks}  # fmt: skip


def by_op(results: dict) -> dict[str, dict[tuple, dict[str, dict]]]:
    """op -> (N, K, M, variant) -> contender -> {"median", "iqr", "saved_bytes", ...}, all in the order of the suite."""
    ops: dict = {}
    for case in results["benchmarks"]:
        info = case["extra_info"]
        row = (info["N"], info["K"], info["M"], info["variant"])
        ops.setdefault(info["op"], {}).setdefault(row, {})[info["contender"]] = case["stats"] | info
    return ops


def contenders(rows: dict[tuple, dict]) -> list[str]:
    """In the order of the suite, ours first."""
    return list(dict.fromkeys(name for cells in rows.values() for name in cells))


def markdown(results: dict, pictures: list[str]) -> str:
    machine = results["machine_info"]
    found = ", ".join(f"{name} {number or '(missing)'}" for name, number in machine["versions"].items())
    clock = "device events" if "multiprocessors" in machine else "wall clock"
    lines = [
        f"# {machine['device']}", "",
        f"Commit {(results['commit_info'].get('id') or 'unknown')[:12]}, {results['datetime'][:10]}. {found}.", "",
        f"Median of {clock}, bfloat16 unless said, r = 16. In brackets: times that of {OURS}; below 1 {OURS} loses. "
        f"`{FLOOR}` is the frozen 16-bit layer, the floor. `spread` is the widest interquartile range in the row over "
        "its median.",
    ]  # fmt: skip
    for op, rows in by_op(results).items():
        extra = {f"{OURS} / {FLOOR}": over_floor} if FLOOR in contenders(rows) else {}
        lines += ["", f"## {op}", "", *table(rows, time_cell, extra | {"spread": spread})]
        for key, title in (
            ("saved_bytes", "Saved for backward beyond x and parameters, MB"),
            ("peak_bytes", "Peak memory of a step, MB"),
        ):
            if any(key in cell for cells in rows.values() for cell in cells.values()):
                lines += [
                    "",
                    f"{title}:",
                    "",
                    *table(rows, lambda cells, name, key=key: megabytes(cells[name].get(key))),
                ]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join(lines) + "\n"


def table(rows: dict[tuple, dict], cell: Callable, extra: dict[str, Callable] | None = None) -> list[str]:
    """A line per shape, a column per contender from cell(cells, name), and named columns from extra[name](cells)."""
    names, extra = contenders(rows), extra or {}
    head = ["N×K", *(["M"] if any(row[2] for row in rows) else []), *(["case"] if any(row[3] for row in rows) else [])]
    lines = [markdown_row([*head, *names, *extra]), "|" + "---|" * (len(head) + len(names) + len(extra))]
    for (n, k, m, variant), cells in rows.items():
        left = [f"{n}×{k}", *([str(m)] if "M" in head else []), *([variant] if "case" in head else [])]
        values = [cell(cells, name) if name in cells else "–" for name in names]
        lines.append(markdown_row([*left, *values, *(column(cells) for column in extra.values())]))
    return lines


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def time_cell(cells: dict, name: str) -> str:
    median = cells[name]["median"]
    text = f"{median * 1e3:.3g} ms" if median >= 1e-3 else f"{median * 1e6:.3g} µs"
    return text if name == OURS or OURS not in cells else f"{text} ({median / cells[OURS]['median']:.2f}×)"


def over_floor(cells: dict) -> str:
    return f"{cells[OURS]['median'] / cells[FLOOR]['median']:.2f}×" if {OURS, FLOOR} <= cells.keys() else "–"


def spread(cells: dict) -> str:
    return f"{max(cell['iqr'] / cell['median'] for cell in cells.values()):.0%}"


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.2f}"


def draw(results: dict, out: Path) -> list[str]:
    """One picture per family: a panel per op, a row per shape, a dot per contender at its time over ours."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops, names = by_op(results), []
    for picture, members in PICTURES.items():
        present = [op for op in members if any(OURS in cells for cells in ops.get(op, {}).values())]
        if not present:
            continue
        height = 1.6 + 0.26 * max(len(ops[op]) for op in present)
        figure, panels = pyplot.subplots(1, len(present), figsize=(6.5 * len(present), height), squeeze=False)
        for panel, op in zip(panels[0], present, strict=True):
            panel_of(panel, op, ops[op])
        figure.suptitle(results["machine_info"]["device"], fontsize=10)
        figure.tight_layout()
        names.append(f"{picture}.png")
        figure.savefig(out / names[-1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return names


def panel_of(panel, op: str, rows: dict[tuple, dict]) -> None:
    colours = {OURS: "black", FLOOR: "tab:gray", "PEFT": "tab:orange", "PEFT + bitsandbytes": "tab:orange",
               "addmm": "tab:blue", "LoRA": "tab:blue", "bitsandbytes": "tab:green"}  # fmt: skip
    labels = [" ".join(filter(None, (f"M={m}" if m else "", f"{n}×{k}", variant))) for n, k, m, variant in rows]
    names = contenders(rows)
    for i, name in enumerate(names):
        shift = 0.16 * (i - (len(names) - 1) / 2)  # equal times stay apart
        points = [
            (cells[name]["median"] / cells[OURS]["median"], y + shift)
            for y, cells in enumerate(rows.values())
            if name in cells and OURS in cells
        ]
        if points:
            panel.scatter(*zip(*points, strict=True), label=name, color=colours.get(name), s=26, zorder=3)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if within(panel.get_xlim(), t)]
    panel.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    panel.minorticks_off()
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.set_title(op, fontsize=10, pad=22)
    panel.set_xlabel(f"time over that of {OURS}: right is slower")
    panel.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def within(limits: tuple[float, float], tick: float) -> bool:
    return limits[0] <= tick <= limits[1]


if __name__ == "__main__":
    main()
