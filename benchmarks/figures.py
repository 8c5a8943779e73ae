"""`python -m benchmarks.figures [--check]`: the number tables of README.md, from the committed results of every device.

A table stands between `<!-- numbers: NAME -->` and `<!-- /numbers -->`; NAME is one of BLOCKS. What lies between is
written anew; --check writes nothing and fails where README differs.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import FLOOR, FUSED, OURS
from benchmarks.results import RESULTS, by_op, load
from benchmarks.tables import markdown_head, markdown_row, rate, seconds, table
from benchmarks.targets import Rows

README = Path(__file__).resolve().parents[1] / "README.md"
MARKED = re.compile(r"(<!-- numbers: ([a-z-]+) -->\n).*?(<!-- /numbers -->)", re.S)
# (op without " forward + backward", what README calls it, the peer)
LAYERS = (
    ("lora_linear", "LoRA", "PEFT"), ("qlora_linear", "QLoRA", "PEFT + bitsandbytes"), ("dora_linear", "DoRA", "PEFT"),
    ("gated_mlp", "gated MLP", "PEFT"), ("qkv projections", "q, k, v", "PEFT"),
    ("attention", "attention", "SDPA"), ("prefix_attention", "prefix attention", "joined SDPA"),
    ("bottleneck_adapter", "adapter", "eager"),
)  # fmt: skip
PREFERRED = [(4096, 4096, 8192), (14336, 4096, 8192), (1024, 4096, 8192)]  # N, K, M of a GPU; else the most rows
METHODS = {
    "full": "full", "top-layers": "top layers", "adapter-parallel": "adapters (parallel)", "lora": "LoRA",
    "qlora": "QLoRA", "prefix-tuning": "prefix-tuning",
}  # fmt: skip


def main(arguments: list[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    before = readme.read_text()
    after = rendered(before, results)
    if not check:
        readme.write_text(after)
    return int(check and after != before)


def rendered(text: str, results: Path) -> str:
    """`text` with every marked table of it written from the results."""
    return MARKED.sub(lambda marked: marked[1] + block(marked[2], results) + marked[3], text)


def block(name: str, results: Path) -> str:
    """A table for each device that has something to show."""
    lines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if shown := BLOCKS[name](folder):
            lines += ["", *shown]
    return "\n".join([*lines, "", ""]) if lines else "\nNot measured yet.\n\n"


def cases(folder: Path, op: str) -> tuple[dict, str, Rows]:
    """The results that have the op, their report, the op's rows; the device's own come before those of its folders."""
    for file in [folder / "benchmark.json", *sorted(folder.glob("*/benchmark.json"))]:
        results = load(file) if file.exists() else {"benchmarks": []}
        if rows := by_op(results).get(op):
            return results, f"benchmarks/results/{file.parent.relative_to(folder.parent)}/report.md", rows
    return {}, "", {}


def source(results: dict, report: str) -> str:
    machine, commit = results["machine_info"], (results["commit_info"].get("id") or "unknown")[:10]
    return f"{machine['device']}, commit {commit}, {results['datetime'][:10]} ([all of it]({report}))"


def layers(folder: Path) -> list[str]:
    """One training step of a layer: times and bytes of ours, the frozen layer and the peer."""
    lines, sources = [], {}
    for op, name, peer in LAYERS:
        results, report, rows = cases(folder, f"{op} forward + backward")
        for (n, k, m, variant), cells in chosen(rows).items():
            if OURS not in cells or peer not in cells:
                continue
            sources.setdefault(report, f"- {source(results, report)}")
            ours, floor, theirs = cells.get(FUSED, cells[OURS]), cells.get(FLOOR), cells[peer]
            fused = " (fused)" if FUSED in cells else ""
            case = ", ".join(filter(None, (f"{name}{fused} {n}×{k}", f"M = {m}", variant.replace("p=", "p = "))))
            over = f"{ours['median'] / floor['median']:.2f}×" if floor else "–"
            row = [case, seconds(ours["median"]), over, peer, f"{theirs['median'] / ours['median']:.2f}×"]
            lines.append(markdown_row([*row, *(megabytes(cell) for cell in (ours, theirs))]))
    head = ["", OURS, "of the frozen layer", "peer", "its time over ours", f"{OURS} saves", "the peer saves"]
    return [*sources.values(), "", *markdown_head(head), *lines] if lines else []


def chosen(rows: Rows) -> Rows:
    """The preferred sizes that are there, or the most rows of x."""
    preferred = {row: cells for row, cells in rows.items() if row[:3] in PREFERRED}
    return preferred or {row: cells for row, cells in rows.items() if row[2] == max(r[2] for r in rows)}


def megabytes(cell: dict, key: str = "saved_bytes") -> str:
    return f"{cell[key] / 1e6:,.2f} MB" if cell[key] < 1e8 else f"{cell[key] / 1e6:,.0f} MB"


def log_probs(folder: Path) -> list[str]:
    """Forward + backward of a frozen head: time and peak memory."""
    results, report, rows = cases(folder, "linear_logprob forward + backward")
    frozen = {row: cells for row, cells in rows.items() if row[3].startswith("frozen")}
    if not frozen:
        return []
    cell = lambda cells, name: f"{seconds(cells[name]['median'])}, {megabytes(cells[name], 'peak_bytes')}"  # noqa: E731
    return [source(results, report), "", *table(frozen, cell)]


def steps(folder: Path) -> list[str]:
    """Tokens per second and peak memory of a Llama's training step."""
    results, report, rows = cases(folder, "Llama step")
    if not rows:
        return []
    cell = lambda cells, name: f"{rate(cells[name]['tokens_per_s'])}, {megabytes(cells[name], 'peak_bytes')}"  # noqa: E731
    return [source(results, report), "", *table(rows, cell)]


def methods(folder: Path) -> list[str]:
    """What `make demo` prints."""
    file = folder / "compare" / "compare.json"
    found = {result["method"]: result for result in load(file)["methods"]} if file.exists() else {}
    lines = [
        markdown_row([
            name, f"{m['trainable']:,}", *(f"{m[key] / 1e6:.1f} MB" for key in ("saved_bytes", "peak_bytes")),
            f"{m['seconds_per_step'] * 1e3:.0f} ms", f"{m['held_out_after']:.3f}",
        ])
        for method, name in METHODS.items() if (m := found.get(method))
    ]  # fmt: skip
    before = f"{found['full']['held_out_before']:.3f}" if "full" in found else ""
    loss = f"held-out loss, from {before}"
    head = ["", "trained", "saved for backward", "peak memory", "time per step", loss]
    return [*markdown_head(head), *lines] if lines else []


BLOCKS: dict[str, Callable[[Path], list[str]]] = {
    "layers": layers, "log-probs": log_probs, "steps": steps, "methods": methods,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
