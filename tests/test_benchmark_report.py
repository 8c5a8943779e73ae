"""The benchmarks' report says what was measured, and README says what the committed results say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import figures, report, shapes, tables, targets  # noqa: E402
from benchmarks import results as benchmark_results  # noqa: E402


def case(op, contender, median, **info):
    stats = {"median": median, "iqr": median / 10, "min": median, "mean": median, "data": [median]}
    shape = {"M": 4, "N": 8, "K": 16, "variant": "p=0.1", "op": op, "contender": contender}
    named = {"group": op, "name": contender, "fullname": contender, "params": {}, "param": ""}
    return named | {"extra_info": shape | info, "stats": stats, "options": {}}


@pytest.fixture
def results():
    op = "lora_linear forward + backward"
    return {
        "machine_info": {"device": "Chip", "node": "host-7", "cpu": {}, "versions": {"torch": "2.13.0", "peft": None},
                         "ceilings": {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12}},
        "commit_info": {"id": "0123456789abcdef", "branch": "b", "project": "p", "dirty": False},
        "datetime": "2026-01-02T00:00:00", "version": "5.3.1",
        "benchmarks": [
            case(op, "peft-ops", 2e-3, saved_bytes=70_000), case(op, "nn.Linear", 1e-3, saved_bytes=0),
            case(op, "PEFT", 5e-3, saved_bytes=8_500_000), case("nf4 quantize", "bitsandbytes", 3e-5),
            case("nf4 dequantize", "peft-ops", 2e-5), case("nf4 dequantize", "bitsandbytes", 1e-5),
        ],
        "left_out": [{"suite": "test_lora_linear", "contender": "PEFT compiled", "reason": "no compiler", "cases": 2}],
    }  # fmt: skip


@pytest.fixture
def written(results, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text(json.dumps(results))
    arguments = ["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "out"), "--revision", "fedcba9876543210"]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    return tmp_path / "out"


def test_report_shows_wins_losses_and_what_was_left_out(written):
    text = (written / "report.md").read_text()
    assert "Commit fedcba987654, 2026-01-02" in text
    assert "| 8×16 | 4 | p=0.1 | 2 ms | 1 ms (0.50×) | 5 ms (2.50×) | 2.00× | 10% |" in text.replace(" 5% |", "")
    assert "| 8×16 | 4 | p=0.1 | 0.07 | 0.00 | 8.50 |" in text
    assert "| 8×16 | 4 | p=0.1 | 30 µs |" in text
    assert "peft (missing)" in text
    assert "Median of wall clock, warm caches, bfloat16" in text  # results from before caches were emptied
    losses = text[text.index("## Where peft-ops loses") : text.index("## lora_linear")]
    assert "In 1 of 2 comparisons" in losses
    assert "| nf4 dequantize | M=4 8×16 p=0.1 | peft-ops | 20 µs | bitsandbytes | 10 µs | 2.00× | 10% |" in losses
    assert "| test_lora_linear | PEFT compiled | no compiler | 2 |" in text


def test_report_keeps_results_without_names_and_samples(written):
    kept = (written / "benchmark.json").read_text()
    assert "host-7" not in kept
    assert "data" not in json.loads(kept)["benchmarks"][0]["stats"]
    assert (written / "speed.png").stat().st_size > 5000
    assert (written / "memory.png").stat().st_size > 5000


def test_the_heading_says_whether_caches_were_emptied(results):
    results["machine_info"]["caches"] = benchmark_results.EMPTIED
    assert "wall clock, caches emptied before every sample, bfloat16" in "\n".join(tables.heading(results))
    results["machine_info"] |= {"caches": benchmark_results.WARM, "multiprocessors": 1}
    assert "device events, warm caches, bfloat16" in "\n".join(tables.heading(results))


def test_the_roof_is_the_larger_of_bytes_and_operations():
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12}
    assert benchmark_results.floor_seconds({"flops": 1e9, "least_bytes": 5e6}, ceilings) == 5e-3
    assert benchmark_results.floor_seconds({"flops": 1e10, "least_bytes": 5e6}, ceilings) == 1e-2
    cell = {"median": 2e-2, "iqr": 0, "flops": 1e10, "least_bytes": 5e6}
    assert tables.of_roof({"peft-ops": cell}, ceilings) == "50%"


def test_a_graph_is_held_against_our_graph():
    cells = {name: {"median": s} for name, s in {"peft-ops": 4.0, "peft-ops (graph)": 1.0, "PEFT (graph)": 2.0}.items()}
    assert tables.time_cell(cells, "PEFT (graph)") == "2 s (2.00×)"
    assert tables.losses({"op": {(8, 8, 1, ""): cells}}) == ["In no row that was measured is a peer faster."]


def rows_of(target, ours, theirs):
    """Cells of every row that a target asks for; the last of them is the given one, the others meet it by far."""
    key = "median" if target.quantity == "time" else target.quantity
    rows = {}
    for weight in target.weights:
        for m in target.rows:
            for variant in target.variants or ("",):
                rows[(*weight, m, variant)] = {
                    target.ours: {key: 1e-9, "median": 1e-9, "least_bytes": 1.0}, target.theirs: {key: 1.0},
                }  # fmt: skip
    last = [*rows][-1]
    rows[last] = {target.ours: {key: ours, "median": ours, "least_bytes": 1.0}, target.theirs: {key: theirs}}
    return rows


@pytest.mark.parametrize("target", [*targets.GPU, *targets.CPU], ids=str)
def test_a_target_is_judged_by_its_worst_row(target):
    bound = target.at_most or 1 / target.at_least
    for factor, met in ((0.99, True), (1.01, False)):
        rows = rows_of(target, bound * factor, 1.0)
        row, figure = target.worst(rows, {"copy_bytes_per_s": 1.0})
        assert row == [*rows][-1]
        assert target.met(figure) is met
        verdict = "**not met**" if not met else "met"
        assert any(verdict in line for line in tables.targets({target.op: rows}, {"copy_bytes_per_s": 1.0}, [target]))
    assert target.worst({}, {}) is None


@pytest.mark.parametrize("on_gpu", [True, False], ids=["GPU", "CPU"])
def test_the_suite_measures_what_the_targets_need(monkeypatch, on_gpu):
    monkeypatch.setattr(shapes, "ON_GPU", on_gpu)
    layers = (shapes.linear_shapes, shapes.nf4_shapes, shapes.few_rows_shapes, shapes.weight_shapes, shapes.mlp_shapes)
    measured = {(s.N, s.K, s.M) for of_layers in layers for s in of_layers(False)}
    steps = {(s.N, s.K, s.M, s.variant) for s in shapes.step_shapes(False)}
    for target in targets.GPU if on_gpu else targets.CPU:
        needed = {(*weight, m) for weight in target.weights[:2] for m in target.rows}
        if target.suite == "test_llama_step":
            assert {(*row, variant) for row in needed for variant in target.variants} <= steps, target
        else:
            assert needed & measured, target
    wanted = (8192, 4096, 4096) if on_gpu else (1024, 2048, 2048)
    case = {"shape": shapes.Shape(*wanted), "contender": "PEFT"}
    first, later = (
        targets.importance("test_lora_linear", name, case, on_gpu) for name in ("test_forward_backward", "test_forward")
    )
    assert first < later


def test_targets_are_those_of_the_device_that_was_measured(results):
    cells = {"peft-ops": {"median": 2.0}, "bitsandbytes": {"median": 1.0}}
    rows = {"nf4_linear forward": {(4096, 4096, 1, ""): cells}}
    for machine, lines in (({}, 1), ({"multiprocessors": 132}, 1)):
        shown = tables.targets(rows, {}, targets.targets_of(machine))
        assert len(shown) == 2 + lines
        assert shown[-1].endswith("| **not met** |")
    assert "No row of a target was measured" in (tables.markdown(results, []))


def test_full_fine_tuning_stands_beside_every_step_on_a_cpu(results):
    """The same row of the report has both sides of the target, whatever the method and the dropout."""
    target = next(t for t in targets.CPU if t.theirs == "full fine-tuning")
    rows = {
        (896, 256, 4096, variant): {target.ours: {"median": s}, "full fine-tuning": {"median": 1.0}}
        for variant, s in zip(target.variants, (0.9, 1.1, 0.8, 0.7), strict=True)
    }
    row, figure = target.worst(rows, {})
    assert (row[3], figure) == (target.variants[1], 1.1)
    assert not target.met(figure)


def test_readme_says_what_the_committed_results_say():
    assert figures.main(["--check"]) == 0, "run python -m benchmarks.figures"


def test_figures_come_from_the_results_of_every_device(results, tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "results" / "chip"
    folder.mkdir(parents=True)
    (folder / "benchmark.json").write_text(json.dumps(results))
    readme.write_text(
        "a\n<!-- numbers: layers -->\nold\n<!-- /numbers -->\n<!-- numbers: steps -->\n<!-- /numbers -->\nb\n"
    )
    assert figures.main(["--check"], readme, folder.parent) == 1
    assert figures.main([], readme, folder.parent) == 0
    text = readme.read_text()
    assert "| LoRA 8×16, M = 4, p = 0.1 | 2 ms | 2.00× | PEFT | 2.50× | 0.07 MB | 8.50 MB |" in text
    assert "- Chip, commit 0123456789, 2026-01-02 ([all of it](benchmarks/results/chip/report.md))" in text
    assert "old" not in text
    assert "Not measured yet." in text
    assert text.startswith("a\n")
    assert text.endswith("b\n")


def test_results_folder_is_named_after_the_device():
    assert benchmark_results.slug("NVIDIA H200") == "nvidia-h200"
    assert benchmark_results.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"
