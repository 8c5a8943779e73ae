"""What the table of compiled kernels says: loops found in machine code, occupancy, the busiest unit of a turn."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "aot")]

from benchmarks import aot  # noqa: E402

SASS = """
        /*0010*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0020*/                   LDG.E R2, desc[UR4][R4.64] ;
.L_x_1:
        /*0030*/              @!P0 LDS R2, [R4] ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   FFMA R2, R3, R4, R5 ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
        /*0070*/              @P2  BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def cost(**changed):
    flags = dict(BLOCK_M=64, BLOCK_K=64, BLOCK_R=16, DROPOUT=False, num_warps=4)
    return dict(arch="sm_90", kernel="_down_project_kernel", types="bf16/fp32", aligned=True, registers=128,
                shared=24 << 10, spills=0, instructions={"HGMMA": 4}, length=500, loop={"integer": 400},
                flags=flags) | changed  # fmt: skip


def test_the_longest_inner_loop_is_counted_by_kind():
    resources = pytest.importorskip("resources", reason="triton is not installed", exc_type=ImportError)
    loop = resources._longest_loop(resources._NVIDIA_LINE.findall(SASS))
    assert loop == {"shared": 1, "matrix": 1, "float": 1, "control": 1}


def test_occupancy_is_what_registers_shared_memory_and_programs_leave():
    assert aot.occupancy(cost()) == 16 / 64  # 65536 registers hold 4 programs of 4 warps
    assert aot.occupancy(cost(registers=32, shared=100 << 10)) == 8 / 64  # 228 KiB hold 2
    assert aot.occupancy(cost(registers=16, shared=0)) == 1.0
    assert aot.occupancy(cost(arch="gfx942")) is None


def test_a_turn_is_bound_by_its_busiest_unit():
    assert "| 400 | 441 | 96 | memory |" in aot.turn(cost())
    assert "| 500 | 441 | 96 | issue |" in aot.turn(cost(loop={"integer": 500}))
    assert aot.turn(cost(arch="sm_80")) is None
    assert aot.turn(cost(kernel="_unknown_kernel")) is None


def test_the_table_names_every_kernel_and_chip():
    text = aot.markdown([cost(), cost(arch="gfx942", loop={}), cost(spills=2, kernel="_other_kernel")])
    assert "3 configurations, 2 spills" in text
    assert "| down_project | gfx942 | 1 | 128 | 24 | – | 0 | HGMMA |" in text
    assert "| other | sm_90 | 1 | 128 | 24 | 25% | 2 | HGMMA |" in text
