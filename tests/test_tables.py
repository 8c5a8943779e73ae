"""Measured tables: which one serves an architecture, which bucket a shape, and what a broken one costs (a warning)."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("triton")
from peft_ops.kernels import arches, autotune, candidates, configs, measured, problems, table_files

BF16 = torch.bfloat16
DESIGN = configs.launch("down_project", "sm_90", BF16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that PEFT_OPS_TABLES names; no table ships."""
    (tmp_path / "shipped").mkdir()
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("PEFT_OPS_TABLES", str(tmp_path / "own"))
    measured.forget()
    yield tmp_path / "own"
    measured.forget()


def entry(rows=1024, rank=16, dtype="bfloat16", shared=1000, **config):
    return {"dtype": dtype, "rows": rows, "rank": rank, "config": {**DESIGN, **config}, "shared": shared}


def save(folder, arch, entries=(), kernel="down_project", routes=None, **header):
    raw = {"format": 1, "arch": arch, "times": "device", "kernels": {kernel: list(entries)}, "routes": routes or {}}
    (folder / f"{arch}.json").write_text(json.dumps(raw | header))
    measured.forget()


def block_m(rows=1024, rank=16, arch="sm_90", dtype=BF16):
    return configs.launch("down_project", arch, dtype, rows, rank)["BLOCK_M"]


@pytest.mark.parametrize("arch", ["default", "sm_80", "sm_121", "sm_999", "gfx950", "gfx90a", "gfx1201", "other"])
def test_without_a_table_the_design_holds(folder, arch):
    for kernel in configs.LAUNCH:
        assert configs.launch(kernel, arch, BF16, 4096, 16) == configs.launch(kernel, arch, BF16)
    assert configs.linear_route(1, 64, 64, BF16, arch) == "vendor"
    assert configs.nf4_fused(16, 4096, BF16, arch)
    assert not configs.nf4_fused(65, 4096, BF16, arch)
    assert configs.nf4_slab(1 << 20, 1 << 10, 1, arch) == configs.NF4_SLAB_BYTES >> 10


@pytest.mark.parametrize(
    ("arch", "order"),
    [
        ("sm_90", ["sm_90", "sm_89", "sm_86", "sm_80", "sm_75", "sm_100", "sm_103", "sm_120"]),
        ("sm_86", ["sm_86", "sm_80", "sm_89", "sm_75", "sm_90", "sm_100", "sm_103", "sm_120"]),
        ("sm_121", ["sm_120", "sm_103", "sm_100", "sm_90", "sm_89", "sm_86", "sm_80", "sm_75"]),
        ("gfx950", ["gfx942", "gfx90a", "gfx1100"]),
        ("gfx1201", ["gfx1100", "gfx950", "gfx942", "gfx90a"]),
        ("default", []),
    ],
)
def test_the_nearest_architecture_stands_in(arch, order):
    """The same major version first, lower before higher; then lower ones; then any of the vendor."""
    known = {*order, "sm_75", "sm_80", "gfx90a", "nonsense", "sm_x", "gfx"}
    found = {other: arches.nearness(arch, other) for other in known}
    assert sorted((other for other in found if found[other] is not None), key=found.get)[: len(order)] == order


def test_an_unknown_gpu_uses_the_nearest_table_and_says_so_once(folder, caplog):
    save(folder, "sm_80", [entry(BLOCK_M=16)])
    save(folder, "sm_90", [entry(BLOCK_M=32)])
    with caplog.at_level(logging.DEBUG, "peft_ops"):
        assert [block_m(arch="sm_103") for _ in range(3)] == [32] * 3
        assert block_m(arch="gfx942") == configs.launch("down_project", "gfx942", BF16)["BLOCK_M"]
    said = [record.message for record in caplog.records if "sm_103" in record.message]
    assert len(said) == 1
    assert "sm_90.json" in said[0]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_the_nearest_bucket_of_rows(folder):
    save(folder, "sm_90", [entry(16, BLOCK_M=16), entry(128, BLOCK_M=32), entry(8192, BLOCK_M=128)])
    by_rows = {1: 16, 16: 16, 32: 16, 33: 32, 128: 32, 1024: 32, 1025: 128, 8192: 128, 1 << 20: 128}
    assert {rows: block_m(rows) for rows in by_rows} == by_rows


def test_a_configuration_serves_its_rank_and_lower_ones(folder):
    save(folder, "sm_90", [entry(rank=32, BLOCK_M=32), entry(rank=16, BLOCK_M=16)])
    assert [block_m(rank=rank) for rank in (16, 32, 64)] == [16, 32, DESIGN["BLOCK_M"]]


def test_one_16_bit_dtype_stands_in_for_the_other_alone(folder):
    save(folder, "sm_90", [entry(BLOCK_M=16)])
    float32 = configs.launch("down_project", "sm_90", torch.float32)["BLOCK_M"]
    assert block_m(dtype=torch.float16) == 16
    assert block_m(dtype=torch.float32) == float32
    save(folder, "sm_90", [entry(BLOCK_M=16), entry(dtype="float16", BLOCK_M=32), entry(dtype="float32", BLOCK_M=128)])
    assert [block_m(dtype=dtype) for dtype in (BF16, torch.float16, torch.float32)] == [16, 32, 128]


BROKEN = [
    entry(SPLITS=2), entry(PROGRAMS=64), entry(BLOCK_R=16), entry(BLOCK_M=48), entry(BLOCK_M=8), entry(BLOCK_M=1 << 20),
    entry(BLOCK_M="64"), entry(BLOCK_M=True), entry(num_warps=3), entry(num_warps=64), entry(num_stages=0),
    entry(shared=1 << 20), entry(shared=-1), entry(rows=-1), entry(dtype="int8"), "no entry", {},
    {**entry(), "config": {"BLOCK_M": 64}}, {**entry(), "config": None},
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_bad_entry_is_dropped_with_one_warning(folder, caplog, broken):
    """The number of parts of a reduction (SPLITS, PROGRAMS) and BLOCK_R are no table's to say."""
    save(folder, "sm_90", [broken, entry(8192, BLOCK_M=32)])
    assert [block_m(rows) for rows in (1, 1024, 8192)] == [32] * 3
    measured._ladders.clear()
    assert block_m() == 32
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"format": 2, "arch": "sm_90"}', '{"format": 1, "arch": "sm_80"}',
             '{"format": 1, "arch": "sm_90", "kernels": []}', '{"format": 1, "arch": "sm_90", "routes": {"x": 1}}'],
)  # fmt: skip
def test_a_file_that_is_no_table_is_left_out_with_one_warning(folder, caplog, text):
    (folder / "sm_90.json").write_text(text)
    assert block_m() == DESIGN["BLOCK_M"]
    assert block_m(arch="sm_100", rows=3) == 64
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_missing_folder_is_an_empty_one(folder, monkeypatch):
    monkeypatch.setenv("PEFT_OPS_TABLES", str(folder / "nowhere"))
    measured.forget()
    assert block_m() == DESIGN["BLOCK_M"]


def test_what_does_not_fit_the_smaller_chip_is_not_taken_there(folder, caplog):
    """Half of what there is, since the same tile compiles to other sizes elsewhere."""
    save(folder, "sm_100", [entry(shared=200_000, BLOCK_M=128), entry(16, shared=50_000, BLOCK_M=32),
                            entry(1, shared=None, BLOCK_M=16)])  # fmt: skip
    assert [block_m(8192, arch=arch) for arch in ("sm_100", "sm_103", "sm_120")] == [128, 32, 32]
    assert block_m(1, arch="sm_121") == 32
    assert not caplog.records


def test_the_users_bucket_comes_before_the_shipped_one(folder):
    shipped = folder.parent / "shipped"
    save(shipped, "sm_90", [entry(16, BLOCK_M=32), entry(8192, BLOCK_M=32)])
    save(folder, "sm_90", [entry(8192, BLOCK_M=128)])
    save(folder, "sm_80", [entry(16, BLOCK_M=16)])
    assert [block_m(rows) for rows in (16, 8192)] == [32, 128]


def test_meaningless_times_do_not_ship(folder, caplog):
    save(folder.parent / "shipped", "sm_90", [entry(BLOCK_M=16)], times="meaningless")
    assert block_m() == DESIGN["BLOCK_M"]
    assert "not taken on a device" in caplog.text


def test_shipped_tables_are_whole(caplog):
    for table in table_files.read_tables(measured.SHIPPED, shipped=True):
        for kernel in table.kernels:
            keys = tuple(configs.designed(kernel, table.arch, BF16))
            assert measured._usable(table, kernel, table.arch, keys) == table.kernels[kernel]
    assert not caplog.records


def test_routes_by_rows_and_the_nearest_weight(folder):
    def choice(rows, out, k, taken):
        return {"dtype": "bfloat16", "rows": rows, "out": out, "k": k, "choice": taken}

    linear = [choice(16, 4096, 4096, "fused"), choice(8192, 4096, 4096, "vendor"), choice(16, 1024, 4096, "vendor")]
    nf4 = [choice(16, 4096, 0, "fused"), choice(128, 4096, 0, "slab")]
    save(folder, "sm_90", routes={"linear": linear, "nf4_linear": nf4, "nf4_slab_bytes": [choice(0, 0, 0, 1 << 20)]})
    route = configs.linear_route
    assert [route(rows, 4096, 4096, BF16, "sm_90") for rows in (1, 256, 257, 9000)] == ["fused"] * 2 + ["vendor"] * 2
    assert [route(1, out, 4096, BF16, "sm_90") for out in (2049, 2047, 1024)] == ["fused", "vendor", "vendor"]
    assert route(1, 8192, 8192, BF16, "sm_90") == "fused"
    assert route(1, 16384, 8192, BF16, "sm_90") == "vendor"  # nothing near
    assert route(1, 4096, 4096, BF16, "sm_90", dx=True) == "vendor"
    assert route(1, 4096, 4096, BF16, "sm_100") == "vendor"  # another major version says nothing of vendors
    assert route(1, 4096, 4096, torch.float32, "sm_90") == "vendor"
    fused = [configs.nf4_fused(rows, 4096, BF16, "sm_90") for rows in (0, 1, 32, 64, 65)]
    assert fused == [False, True, True, False, False]
    assert configs.nf4_fused(17, 1 << 20, BF16, "sm_90")  # nothing near: as designed
    assert configs.nf4_slab(1 << 20, 1 << 10, 1, "sm_90") == 1 << 10


@pytest.mark.parametrize("wrong", [{"choice": "tensor"}, {"choice": 3}, {"rows": "x"}, {"dtype": 1}])
def test_a_wrong_choice_is_dropped_with_one_warning(folder, caplog, wrong):
    good = {"dtype": "bfloat16", "rows": 16, "out": 64, "k": 64, "choice": "fused"}
    save(folder, "sm_90", routes={"linear": [good | wrong, good]})
    assert configs.linear_route(8, 64, 64, BF16, "sm_90") == "fused"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_table_reads_as_it_was_written(tmp_path):
    raw = {"format": 1, "arch": "sm_90", "kernels": {}, "routes": {}}
    for rows in (128, 16, 128):
        table_files.put(raw, "kernels", "down_project", entry(rows, BLOCK_M=rows))
    table_files.put(raw, "routes", "linear", {"dtype": "bfloat16", "rows": 1, "out": 2, "k": 3, "choice": "vendor"})
    table_files.write(tmp_path / "new" / "sm_90.json", raw)
    assert table_files.read(tmp_path / "new" / "sm_90.json") == raw
    assert [item["rows"] for item in raw["kernels"]["down_project"]] == [16, 128]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sm_90.json"]


def test_an_override_is_of_its_thread_and_ends(folder):
    with configs.using("down_project", {"BLOCK_M": 16}):
        others = []
        thread = threading.Thread(target=lambda: others.append(block_m()))
        thread.start()
        thread.join()
        assert (block_m(), others) == (16, [DESIGN["BLOCK_M"]])
        with configs.using("down_project", {}):
            assert block_m() == DESIGN["BLOCK_M"]
        assert block_m() == 16
    assert block_m() == DESIGN["BLOCK_M"]


def test_candidates_can_stand_in_tables():
    assert problems.PROBLEMS.keys() == candidates.CANDIDATES.keys()
    for kernel, tried in candidates.CANDIDATES.items():
        design = configs.designed(kernel, "sm_90", BF16, 16)
        for config in (design, *({**design, **given} for given in tried)):
            assert config.keys() == design.keys()
            assert table_files._entry(entry() | {"config": config}).config == config


def test_lookups_trace_with_rows_that_change(folder):
    """torch.compile takes tables as constants, and splits at the limits between buckets alone."""
    save(folder, "sm_90", [entry(16, BLOCK_M=16), entry(1024, BLOCK_M=128)],
         routes={"linear": [{"dtype": "float32", "rows": 1, "out": 4, "k": 4, "choice": "fused"}]})  # fmt: skip
    assert measured._files is None  # also where the files are read while tracing

    def call(x):
        config = configs.launch("down_project", "sm_90", BF16, x.shape[0], 16)
        return x * config["BLOCK_M"] + (configs.linear_route(x.shape[0], 4, 4, x.dtype, "sm_90") == "fused")

    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, backend=frames, fullgraph=True)
    for rows in (5, 6, 7, 100, 300, 2000):
        assert (compiled(torch.ones(rows, 4)) == (17 if rows <= 128 else 129)).all()
    assert frames.frame_count <= 4
    torch._dynamo.reset()


def test_nothing_is_measured_unless_asked():
    """In one process, launchers imported anew: without the variable, with 0, with 1."""
    code = (
        "import importlib, os, sys; from peft_ops.kernels import launchers, measured\n"
        "for given in (None, '0', '1'):\n"
        "    os.environ.update({} if given is None else {'PEFT_OPS_AUTOTUNE': given})\n"
        "    importlib.reload(launchers)\n"
        "    print(measured.at_first_use is not None, 'peft_ops.kernels.autotune' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PEFT_OPS_AUTOTUNE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["False False", "False False", "True True"]


@pytest.mark.gpu
def test_a_measurement_on_a_gpu_is_an_entry(folder):
    device = torch.device("cuda", torch.cuda.current_device())
    arch = configs.arch_of(device)
    found = autotune.measure("down_project", arch, BF16, 100, 16, device=device, width=512, samples=(3, 3), most=3)
    assert (found["rows"], found["rank"]) == (128, 16)
    assert found["shared"] > 0
    assert 0 < found["best_us"] <= found["default_us"]
    autotune.keep(folder, arch, device, "down_project", found)
    measured.forget()
    assert configs.launch("down_project", arch, BF16, 100, 16) == found["config"]


@pytest.mark.gpu
def test_nothing_is_measured_while_a_graph_is_captured(folder, monkeypatch):
    from peft_ops.kernels import down_project

    monkeypatch.setattr(autotune, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(measured, "at_first_use", autotune.at_first_use)
    monkeypatch.setattr(autotune, "_met", set())
    x, a = torch.randn(48, 64, device="cuda"), torch.randn(4, 64, device="cuda")
    with configs.using("down_project", {}):
        down_project.down_project(x, a, 0.0, None)  # compiled before
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        down_project.down_project(x, a, 0.0, None)
