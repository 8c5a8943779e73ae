"""`peft-ops check`: every op on this machine's devices against the float64 truth of its formula."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from .. import nf4, ops
from ..nf4 import NF4Weight
from ..reference import formulas
from . import check_calls as calls
from . import nf4_truth
from .device import pick_device
from .display import make_console
from .files import write_json
from .report import environment

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (M, K, N, R): one row, one rank, prime tails, more rows than a tile. Attention: M rows, heads of K, a prefix of R.
# Not one row and one rank: the relative error of a single number that nearly cancels has no bound.
SHAPES = ((1, 64, 32, 4), (33, 128, 96, 1), (17, 131, 67, 3), (160, 192, 128, 16))


@dataclass(frozen=True)
class Result:
    """The worst error of one output over the shapes, relative to the norm of the truth, and what is allowed."""

    device: str
    op: str
    output: str
    dtype: str
    error: float
    bound: float
    shape: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Above 1 where it fails; a NaN is the worst failure."""
        return math.inf if math.isnan(self.error) else self.error / self.bound

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def run(args: Namespace) -> int:
    """The command; returns its exit code."""
    console = make_console()
    names = args.device or ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices = [pick_device(name) for name in names]
    results = [result for device in devices for result in check(device)]
    for device in devices:
        show(console, [r for r in results if r.device == str(device)], environment(device)["device"])
    failed = sum(not r.passed for r in results)
    console.print(f"{len(results) - failed} of {len(results)} passed" + (f", {failed} FAILED" if failed else ""))
    if args.json:
        rows = [asdict(r) | {"passed": r.passed} for r in results]
        write_json(args.json, {"devices": [environment(d) for d in devices], "results": rows})
    return 1 if failed or not results else 0


def check(device: torch.device) -> list[Result]:
    """The worst result of every (op, output, dtype)."""
    found: dict[tuple[str, str, str], list[tuple[Error, tuple[int, ...]]]] = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            for error in _errors(device, dtype, shape):
                key = (error.op, error.output, str(dtype).removeprefix("torch."))
                found.setdefault(key, []).append((error, shape))
    return [_worst(str(device), *key, of_shapes) for key, of_shapes in found.items()]


class Error(NamedTuple):
    """Of ours, relative to the norm of the truth, and what bounds it: times · (that of plain torch) + floor."""

    op: str
    output: str
    ours: float
    plain: float
    times: float
    floor: float


def _worst(device: str, op: str, output: str, dtype: str, of_shapes: list[tuple[Error, tuple[int, ...]]]) -> Result:
    """Plain torch's error is what it makes of this shape or, if that is more, of all in the mean: a gradient of few
    numbers is exact by luck."""
    usual = math.sqrt(sum(e.plain**2 for e, _ in of_shapes) / len(of_shapes))
    results = [
        Result(device, op, output, dtype, e.ours, e.times * max(e.plain, usual) + e.floor, shape)
        for e, shape in of_shapes
    ]
    return max(results, key=lambda r: r.ratio)


def _errors(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Error]:
    generator = torch.Generator().manual_seed(0)
    M, K, N, R = shape

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device)

    w = randn(N, K, scale=K**-0.5).to(dtype)
    inputs = {
        "x": randn(M, K).to(dtype), "bias": randn(N).to(dtype),
        "a": randn(R, K, scale=K**-0.5), "b": randn(N, R, scale=R**-0.5),
    }  # fmt: skip
    dy, magnitude = randn(M, N).to(dtype), randn(N)
    rows, embedding = torch.arange(M, device=device) * 7 % K, {"table": w.t(), "a": inputs["a"], "b": inputs["b"]}
    yield from _compare("lora_embedding", partial(calls.lora_embedding, rows), w, embedding, dy)
    for residual, width in (("x", K), ("another", N)):
        down = {"x": inputs["x"], "down": inputs["a"], "down_bias": randn(R)}
        adapter = down | {"up": randn(width, R, scale=R**-0.5), "up_bias": randn(width)}
        if residual == "another":
            adapter["residual"] = randn(M, N).to(dtype)
        yield from _compare(
            f"bottleneck_adapter on {residual}", calls.bottleneck_adapter, w, adapter, randn(M, width).to(dtype)
        )
    weights: dict[str, torch.Tensor | NF4Weight] = {"dense": w}
    for name, nested in (("nf4", False), ("nf4 nested", True)):
        packed = weights[name] = nf4.quantize(w, double_quant=nested)
        truth = nf4_truth.decoded(packed)
        yield _round_trip(f"quantize, {name}", w, packed)
        yield _against(f"dequantize, {name}", "w", nf4.dequantize(packed), truth.to(dtype), truth)
        yield from _compare(f"nf4_linear, {name}", calls.nf4_linear, packed, {k: inputs[k] for k in ("x", "bias")}, dy)
    for name, weight in weights.items():
        for p in (0.0, calls.P):
            yield from _compare(f"lora_linear, {name}, p={p:g}", partial(calls.lora_linear, p), weight, inputs, dy)
        a, b = inputs["a"], inputs["b"]
        plain, truth = (formulas.dora_norm(weight, a.to(t), b.to(t), calls.SCALING) for t in (a.dtype, torch.float64))
        yield _against(f"dora_norm, {name}", "norm", ops.dora_norm(weight, a, b, calls.SCALING), plain, truth)
        scaled = inputs | {"magnitude": magnitude}
        yield from _compare(f"dora_linear, {name}, p={calls.P:g}", calls.dora_linear, weight, scaled, dy)
        twice = inputs | {"a2": randn(R, K, scale=K**-0.5)}
        both = randn(M, 2 * N).to(dtype)
        yield from _compare(f"lora_projections, {name}, p={calls.P:g}", calls.lora_projections, weight, twice, both)
        mlp = twice | {"down": randn(N, N, scale=N**-0.5).to(dtype)}
        yield from _compare(f"gated_mlp, {name}, p={calls.P:g}", calls.gated_mlp, weight, mlp, dy)
    targets = torch.arange(M, device=device) * 7 % N
    for name, weight in weights.items():
        for adapter in ({}, {"a": inputs["a"], "b": inputs["b"]}):
            head = {"x": inputs["x"], "bias": inputs["bias"]} | adapter
            op = f"linear_logprob, {name}" + (", adapted" if adapter else "")
            yield from _compare(op, partial(calls.linear_logprob, targets), weight, head, randn(2, M).to(dtype))
    attended = {name: randn(2, heads, M, K).to(dtype) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    attended |= {name: randn(2, R, K).to(dtype) for name in ("pk", "pv")}
    dy = randn(2, 4, M, K).to(dtype)
    text = {"q": attended["q"]} | {name: randn(2, 2, M + 2, K).to(dtype) for name in ("k", "v")}
    yield from _compare("attention", calls.attention, None, text, dy)
    for p in (0.0, calls.P):
        yield from _compare(f"prefix_attention, p={p:g}", partial(calls.prefix_attention, p), None, attended, dy)


def _compare(
    op: str, call: Callable[..., torch.Tensor], weight: torch.Tensor | NF4Weight | None,
    inputs: dict[str, torch.Tensor], dy: torch.Tensor,
) -> Iterator[Error]:  # fmt: skip
    """The output of an op and the gradient of each of its inputs."""

    def outputs(package: ModuleType, wide: bool) -> dict[str, torch.Tensor]:
        leaves = {k: (t.double() if wide else t).clone().requires_grad_() for k, t in inputs.items()}
        y = call(package, weight.double() if wide and isinstance(weight, torch.Tensor) else weight, **leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}

    ours, plain, exact = outputs(ops, False), outputs(formulas, False), outputs(formulas, True)
    for name, truth in exact.items():
        yield _against(op, name, ours[name], plain[name], truth, *((2.0, dy.dtype) if name == "y" else (3.0, None)))


def _against(
    op: str, output: str, ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, times: float = 2.0,
    dtype: torch.dtype | None = None,
) -> Error:  # fmt: skip
    """Against plain torch in the same dtype; the floor is that of `dtype`, or of the dtype of ours."""
    mine, same_dtype = (((t.double() - truth).norm() / truth.norm()).item() for t in (ours, plain))
    return Error(op, output, mine, same_dtype, times, _FLOOR[dtype or ours.dtype])


def _round_trip(op: str, w: torch.Tensor, weight: NF4Weight) -> Error:
    """By how much, relatively, NF4 leaves a larger error in w than the nearest levels do; a thousandth is allowed."""
    candidates = nf4_truth.decoded(weight), nf4_truth.nearest(w, weight.blocksize, weight.nested)
    error, least = ((t - w).norm().item() for t in candidates)
    return Error(op, "excess", error / least - 1, 0.0, 0.0, 1e-3)


def show(console: Console, results: list[Result], device: str) -> None:
    """A table of one device: a row per output, a column per dtype."""
    table = Table(title=f"{device}: relative error / allowed (worst of {len(SHAPES)} shapes)", title_style="bold")
    table.add_column("op")
    table.add_column("output")
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        rows.setdefault((r.op, r.output), {})[r.dtype] = r
    shown = None
    for (op, output), row in rows.items():
        if op != shown and shown is not None:
            table.add_section()
        table.add_row("" if op == shown else op, output, *(_cell(row[dtype]) for dtype in dtypes))
        shown = op
    console.print(table)
    for r in results:
        if not r.passed:
            m, k, n, rank = r.shape
            console.print(f"[bold red]FAIL[/] {r.op}: {r.output} in {r.dtype} at M={m}, K={k}, N={n}, r={rank}")


def _cell(r: Result) -> str:
    text = f"{r.error:.1e} / {r.bound:.1e}"
    return f"{text} [green]ok[/]" if r.passed else f"{text} [bold red]FAIL[/]"
