"""What the library sets out to show, as data: on an H200-class GPU, and on two cores of a server with AVX-512.

The report holds a run against what is of its kind of device.

A target is met where every measured row meets it, and missing where no row was measured.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.contenders import COMPILED, FLOOR, FUSED, GRAPH, OURS

SQUARE, MLP_UP, MLP_DOWN, GQA, LARGE = (4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192)
LAYER = (2048, 2048)  # on a CPU
Rows = dict[tuple, dict[str, dict]]  # (N, K, M, variant) -> contender -> statistics and extra_info


class Target(NamedTuple):
    """`ours` against `theirs` in rows of `op`: quantity "time" or "saved_bytes"; None: the copy rate is held against.

    at_most: ours over theirs. at_least: theirs over ours, a speed-up (of the copy rate: the share of it).
    """

    suite: str
    op: str
    weights: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    variants: tuple[str, ...]
    theirs: str | None
    at_most: float | None = None
    at_least: float | None = None
    ours: str = OURS
    quantity: str = "time"

    def __str__(self) -> str:
        cases = ", ".join(filter(None, (f"M = {spoken(self.rows)}" if self.rows != (0,) else "", *self.variants)))
        what = "bytes saved" if self.quantity == "saved_bytes" else "time" if self.at_most else "speed"
        bound = f"≤ {self.at_most:.2f}×" if self.at_most else f"≥ {self.at_least:.2f}×"
        return f"{self.op}, {cases}: {what} {bound} {self.theirs or 'the copy rate'}"

    def measured(self, rows: Rows, ceilings: dict[str, float]) -> Iterator[tuple[tuple, float]]:
        """(row, figure) of every row that has both sides."""
        for row, cells in rows.items():
            n, k, m, variant = row
            if (n, k) not in self.weights or m not in self.rows or variant not in (self.variants or (variant,)):
                continue
            if self.ours in cells and (figure := self._figure(cells, ceilings)) is not None:
                yield row, figure

    def _figure(self, cells: dict[str, dict], ceilings: dict[str, float]) -> float | None:
        ours = cells[self.ours]
        if self.theirs is None:
            rate = ceilings.get("copy_bytes_per_s")
            return ours["least_bytes"] / ours["median"] / rate if rate and "least_bytes" in ours else None
        key = "median" if self.quantity == "time" else self.quantity
        mine, other = ours.get(key), cells.get(self.theirs, {}).get(key)
        if not mine or not other:
            return None
        return mine / other if self.at_most else other / mine

    def worst(self, rows: Rows, ceilings: dict[str, float]) -> tuple[tuple, float] | None:
        choose: Callable = max if self.at_most else min
        return choose(self.measured(rows, ceilings), key=lambda found: found[1], default=None)

    def met(self, figure: float) -> bool:
        return figure <= self.at_most if self.at_most else figure >= self.at_least


def spoken(rows: tuple[int, ...]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{rows[0]}…{rows[-1]}"


# On a GPU.
_TRAINED, _DECODED, _BOTH = (SQUARE, MLP_UP), (SQUARE, MLP_UP, MLP_DOWN, GQA, LARGE), ("p=0.0", "p=0.1")
_LORA = ("test_lora_linear", "lora_linear forward + backward", _TRAINED)
_QLORA = ("test_qlora_linear", "qlora_linear forward + backward", _TRAINED, (8192,), _BOTH)
_BITS = ("test_nf4_linear", "nf4_linear forward", _DECODED)
_MLP = ("test_gated_mlp", "gated_mlp forward + backward", (MLP_UP,), (8192,))
GPU = (
    Target(*_LORA, (8192,), _BOTH, FLOOR, at_most=1.10),
    Target(*_LORA, (8192,), ("p=0.0",), "PEFT", at_least=1.20),
    Target(*_LORA, (8192,), ("p=0.1",), "PEFT", at_least=1.35),
    Target(*_LORA, (8192,), ("p=0.0",), "addmm", at_least=1.08),
    Target(*_LORA, (512,), _BOTH, "PEFT", at_least=2.0),
    Target("test_nf4", "nf4 dequantize", _DECODED, (0,), (), None, at_least=0.85),
    Target("test_nf4", "nf4 dequantize", _DECODED, (0,), (), "bitsandbytes", at_least=1.0),
    Target(*_BITS, (1,), (), FLOOR, at_least=3.0),
    Target(*_BITS, (1, 4, 16, 64), (), "bitsandbytes", at_least=1.0),
    Target(*_QLORA, "LoRA", at_most=1.15),
    Target(*_QLORA, "PEFT + bitsandbytes", at_least=1.15),
    Target("test_dora_linear", "dora_linear forward + backward", _TRAINED, (8192,), _BOTH, "LoRA", at_most=1.15),
    Target(*_MLP, ("p=0.0",), "PEFT", at_most=0.60, ours=FUSED, quantity="saved_bytes"),
    Target(*_MLP, ("p=0.1",), "PEFT", at_most=0.45, ours=FUSED, quantity="saved_bytes"),
)  # fmt: skip

# On a CPU.
_CODEC = ((SQUARE,), (0,), ("plain", "nested"), "bitsandbytes")
_BITS_ON_CPU = ("test_nf4_linear", "nf4_linear forward", (SQUARE,))
_LORA_ON_CPU = ("test_lora_linear", "lora_linear forward + backward", (LAYER,), (1024,))
_STEP, _NARROW, _WIDE = ("test_llama_step", "Llama step"), (((896, 256),), (4096,)), (((3584, 1024),), (1024,))
_LORA_P0, _LORA_P1, _QLORA_P0, _QLORA_P1 = _STEPS = tuple(
    f"{method}, p={p}, length 128" for method in ("LoRA", "QLoRA") for p in ("0.0", "0.1")
)
CPU = (
    Target("test_nf4", "nf4 dequantize into out", *_CODEC, at_least=5.0),
    Target("test_nf4", "nf4 quantize", *_CODEC, at_least=20.0),
    Target(*_BITS_ON_CPU, (1,), ("training mode",), "bitsandbytes", at_least=12.0),
    Target(*_BITS_ON_CPU, (16,), ("training mode",), "bitsandbytes", at_least=4.0),
    Target(*_BITS_ON_CPU, (256,), ("training mode",), "bitsandbytes", at_least=1.4),
    Target(*_BITS_ON_CPU, (1,), ("",), "bitsandbytes", at_least=1.0),
    Target(*_LORA_ON_CPU, ("p=0.0",), FLOOR, at_most=1.10),
    Target(*_LORA_ON_CPU, ("p=0.1",), FLOOR, at_most=1.20),
    Target("test_qlora_linear", "qlora_linear forward + backward", (LAYER,), (1024,), _BOTH, FLOOR, at_most=1.25),
    *(Target(*_STEP, *model, _STEPS, "full fine-tuning", at_most=1.0) for model in (_NARROW, _WIDE)),
    Target(*_STEP, *_NARROW, (_LORA_P0,), "PEFT", at_least=1.45),
    Target(*_STEP, *_NARROW, (_LORA_P1,), "PEFT", at_least=1.9),
    Target(*_STEP, *_NARROW, (_QLORA_P0,), "PEFT", at_least=1.3),
    Target(*_STEP, *_NARROW, (_QLORA_P1,), "PEFT", at_least=1.8),
    Target(*_STEP, *_WIDE, (_LORA_P0, _QLORA_P0), "PEFT", at_least=1.1),
    Target(*_STEP, *_WIDE, (_LORA_P1, _QLORA_P1), "PEFT", at_least=1.4),
)  # fmt: skip


def targets_of(machine: dict) -> tuple[Target, ...]:
    """Those of the device that results name in `machine_info`."""
    return GPU if "multiprocessors" in machine else CPU


SUITES = (
    "test_lora_linear", "test_nf4_linear", "test_nf4", "test_qlora_linear", "test_dora_linear", "test_gated_mlp",
    "test_qkv", "test_llama_step", "test_linear_logprob", "test_attention", "test_prefix_attention",
    "test_bottleneck_adapter",
)  # fmt: skip


def importance(suite: str, function: str, params: dict, on_gpu: bool) -> tuple:
    """A sort key, most important first: rows that targets need, whole training steps, the rest; compiled ones last."""
    named = "backward" if function.endswith("backward") else "forward" if function == "test_forward" else ""
    shape = next((value for value in params.values() if hasattr(value, "M")), None)
    wanted = shape is not None and any(
        target.suite == suite and target.op.endswith(named) and shape.M in target.rows
        and (shape.N, shape.K) in target.weights and (GRAPH not in params["contender"])
        for target in (GPU if on_gpu else CPU)
    )  # fmt: skip
    place = SUITES.index(suite) if suite in SUITES else len(SUITES)
    compiled, steps = COMPILED in params["contender"], suite == "test_llama_step"
    return (0 if wanted and not compiled else 1 if steps or wanted else 3 if compiled else 2, place)
