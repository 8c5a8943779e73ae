"""The report in words: tables by op, where ours loses, the targets, and what was left out."""

from collections.abc import Callable, Iterable

from benchmarks.contenders import FLOOR, GRAPH, OURS, counterpart, is_peer
from benchmarks.results import by_op, caches_of, ceilings_of, contenders, floor_seconds, shape_name
from benchmarks.targets import Rows, Target, targets_of


def markdown(results: dict, pictures: list[str]) -> str:
    ops, ceilings = by_op(results), ceilings_of(results)
    lines = [*heading(results), *(line for name in pictures for line in ("", f"![{name}]({name})"))]
    wanted = targets_of(results["machine_info"])
    lines += ["", "## Targets", "", *targets(ops, ceilings, wanted), "", "## Where peft-ops loses", "", *losses(ops)]
    for op, rows in ops.items():
        lines += ["", f"## {op}", "", *table(rows, time_cell, columns(rows, ceilings))]
        for key, title, shown in MEASURED:
            if any(key in cell for cells in rows.values() for cell in cells.values()):
                cell = lambda cells, name, key=key, shown=shown: shown(cells[name].get(key))  # noqa: E731
                lines += ["", f"{title}:", "", *table(rows, cell)]
    return "\n".join([*lines, "", "## Left out", "", *left_out(results)]) + "\n"


def heading(results: dict) -> list[str]:
    machine, ceilings = results["machine_info"], ceilings_of(results)
    found = ", ".join(f"{name} {number or '(missing)'}" for name, number in machine["versions"].items())
    clock = "device events" if "multiprocessors" in machine else "wall clock"
    lines = [
        f"# {machine['device']}", "",
        f"Commit {(results['commit_info'].get('id') or 'unknown')[:12]}, {results['datetime'][:10]}. {found}.", "",
        f"Median of {clock}, {caches_of(results)}, bfloat16 unless said, r = 16. In brackets: times that of {OURS} "
        f"(of `{OURS}{GRAPH}` for graphs); below 1 {OURS} loses. `{FLOOR}` is the frozen 16-bit layer. `of the roof` "
        f"is the least time that the op's bytes or operations take at this machine's ceilings over the time of {OURS}; "
        "`spread` is the widest interquartile range in the row over its median.",
    ]  # fmt: skip
    if ceilings:
        copy, matmul = ceilings["copy_bytes_per_s"] / 1e9, ceilings["matmul_flops_per_s"] / 1e12
        lines += ["", f"Ceilings, measured in this run: a copy {copy:.4g} GB/s, read and written bytes together; "
                  f"a bfloat16 matrix product {matmul:.3g} TFLOP/s."]  # fmt: skip
    return lines


def columns(rows: Rows, ceilings: dict[str, float]) -> dict[str, Callable]:
    cells = [cell for of_row in rows.values() for cell in of_row.values()]
    over = {f"{OURS} / {FLOOR}": over_floor} if FLOOR in contenders(rows) else {}
    roof = (
        {"of the roof": lambda of_row: of_roof(of_row, ceilings)}
        if any(floor_seconds(c, ceilings) for c in cells)
        else {}
    )
    return over | roof | {"spread": spread}


def table(rows: Rows, cell: Callable, extra: dict[str, Callable] | None = None) -> list[str]:
    """A line per shape, a column per contender from cell(cells, name), and named columns from extra[name](cells)."""
    names, extra = contenders(rows), extra or {}
    head = ["N×K", *(["M"] if any(row[2] for row in rows) else []), *(["case"] if any(row[3] for row in rows) else [])]
    lines = [*markdown_head([*head, *names, *extra])]
    for (n, k, m, variant), cells in rows.items():
        left = [f"{n}×{k}", *([str(m)] if "M" in head else []), *([variant] if "case" in head else [])]
        values = [cell(cells, name) if name in cells else "–" for name in names]
        lines.append(markdown_row([*left, *values, *(column(cells) for column in extra.values())]))
    return lines


def markdown_head(names: list[str]) -> list[str]:
    return [markdown_row(names), "|" + "---|" * len(names)]


def markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def time_cell(cells: dict, name: str) -> str:
    text, ours = seconds(cells[name]["median"]), counterpart(name, cells)
    return text if ours in (None, name) else f"{text} ({cells[name]['median'] / cells[ours]['median']:.2f}×)"


def seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{s * 1e3:.3g} ms" if s >= 1e-3 else f"{s * 1e6:.3g} µs"


def over_floor(cells: dict) -> str:
    return f"{cells[OURS]['median'] / cells[FLOOR]['median']:.2f}×" if {OURS, FLOOR} <= cells.keys() else "–"


def of_roof(cells: dict, ceilings: dict[str, float]) -> str:
    least = floor_seconds(cells.get(OURS, {}), ceilings)
    return f"{least / cells[OURS]['median']:.0%}" if least else "–"


def spread(cells: dict) -> str:
    return f"{max(cell['iqr'] / cell['median'] for cell in cells.values()):.0%}"


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.2f}"


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


MEASURED = (
    ("tokens_per_s", "Tokens per second", rate),
    ("saved_bytes", "Saved for backward beyond x and parameters, MB", megabytes),
    ("peak_bytes", "Peak memory of a step, MB", megabytes),
)


def losses(ops: dict[str, Rows]) -> list[str]:
    """Every row in which a peer is faster than ours run the same way, the worst first."""
    found = []
    for op, rows in ops.items():
        for row, cells in rows.items():
            for name in filter(is_peer, cells):
                ours = counterpart(name, cells)
                if ours and cells[name]["median"] < cells[ours]["median"]:
                    found.append((cells[name]["median"] / cells[ours]["median"], op, row, name, ours, cells))
    if not found:
        return ["In no row that was measured is a peer faster."]
    compared = sum(counterpart(name, cells) is not None for rows in ops.values() for cells in rows.values()
                   for name in filter(is_peer, cells))  # fmt: skip
    lines = [
        f"In {len(found)} of {compared} comparisons with a peer; the worst first. `ours / peer` above 1 is the loss.",
        "",
    ]
    lines += markdown_head(["op", "shape", "ours", "time", "peer", "time", "ours / peer", "spread"])
    for ratio, op, row, name, ours, cells in sorted(found, key=lambda loss: loss[0]):
        times = seconds(cells[ours]["median"]), seconds(cells[name]["median"])
        noise = spread({key: cells[key] for key in (ours, name)})
        lines.append(markdown_row([op, shape_name(row), ours, times[0], name, times[1], f"{1 / ratio:.2f}×", noise]))
    return lines


def targets(ops: dict[str, Rows], ceilings: dict[str, float], wanted: Iterable[Target]) -> list[str]:
    """Each target with its worst row, where any was measured."""
    lines = []
    for target in wanted:
        rows = ops.get(target.op, {})
        if worst := target.worst(rows, ceilings):
            row, figure = worst
            figures = [figure for _, figure in target.measured(rows, ceilings)]
            met = f"{sum(map(target.met, figures))} of {len(figures)}"
            verdict = "met" if target.met(figure) else "**not met**"
            lines.append(markdown_row([str(target), f"{figure:.2f}×", shape_name(row), met, verdict]))
    if not lines:
        return ["No row of a target was measured (`benchmarks/targets.py`)."]
    return [*markdown_head(["target", "worst", "in", "rows that meet it", ""]), *lines]


def left_out(results: dict) -> list[str]:
    """Contenders that were skipped or failed, with the reason."""
    lines = [
        markdown_row([case["suite"], case["contender"], case["reason"].replace("|", "\\|"), str(case["cases"])])
        for case in results.get("left_out", [])
    ]
    return [*markdown_head(["suite", "contender", "reason", "cases"]), *lines] if lines else ["Nothing."]
