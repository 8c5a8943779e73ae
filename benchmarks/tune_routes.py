"""Which route is faster: the vendor's GEMM or ours, decoding inside a GEMM or before it, how large a slab."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.shapes import OF_MODELS, SQUARE
from peft_ops.kernels import autotune, configs, linear_low_rank, nf4_linear, problems, stopwatch, trials
from peft_ops.kernels.table_files import DTYPES
from peft_ops.kernels.table_files import ROUTES as CHOICES

RANK = 16
DENSE_ROWS, NF4_ROWS, SLAB_ROWS = (16, 128, 1024, 8192), (16, 32, 64, 128), 8192
SLABS = tuple(n << 20 for n in (8, 16, 32, 64))
BETTER = 0.97  # than what is taken without a table: below that it is noise


def routes(
    device: torch.device, arch: str, dtypes: list[str], quick: bool, revision: str
) -> Iterator[tuple[str, dict[str, Any], Callable[..., dict[str, Any]]]]:
    """(route, operands as tables name them, what measures a choice), for rows and weights of models."""
    shapes = [(64, 128)] if quick else [SQUARE, *OF_MODELS]
    for dtype in (DTYPES[name] for name in dtypes):
        given = dict(device=device, dtype=dtype, samples=1 if quick else 15, revision=revision)
        operands = {"dtype": str(dtype).removeprefix("torch.")}
        for N, K in shapes:
            for rows in DENSE_ROWS[:1] if quick else DENSE_ROWS:
                for name in ("linear", "linear_dx") if dtype != torch.float32 else ():
                    out, k = (N, K) if name == "linear" else (K, N)
                    measure = partial(_dense, name, rows=rows, N=N, K=K, **given)
                    yield name, operands | {"rows": rows, "out": out, "k": k}, measure
        for name in ("nf4_linear", "nf4_linear_dx"):
            for out, k in _one_for_each_width(shapes if name == "nf4_linear" else [shape[::-1] for shape in shapes]):
                for rows in NF4_ROWS[:1] if quick else NF4_ROWS:
                    measure = partial(_nf4, name, rows=rows, out=out, k=k, **given)
                    yield name, operands | {"rows": rows, "out": out}, measure
        N, K = shapes[-1] if quick else OF_MODELS[0]
        yield "nf4_slab_bytes", operands, partial(_slab, rows=16 if quick else SLAB_ROWS, N=N, K=K, **given)


def _one_for_each_width(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return list({out: (out, k) for out, k in reversed(shapes)}.values())


def _dense(name: str, rows: int, N: int, K: int, device, dtype, **how) -> dict[str, Any]:
    o = problems.Operands(device, dtype, rows, RANK, K)
    w, a = o.narrow(N, K), o.wide(RANK, K)
    if name == "linear":  # with the down-projection, whose partial sums one of the routes takes as they are
        x, b = o.narrow(rows, K), o.wide(N, RANK)
        call = lambda: linear_low_rank.lora_linear(x, w, None, a, b, 1.0, 0.0, None)[0]  # noqa: E731
    else:
        call = partial(linear_low_rank.linear_low_rank_dx, o.narrow(rows, N), w, o.wide(rows, RANK), a, 0.0, None)
    return _chosen(name, CHOICES[name], "vendor", call, device, **how)


def _nf4(name: str, rows: int, out: int, k: int, device, dtype, **how) -> dict[str, Any]:
    o = problems.Operands(device, dtype, rows, 0, k)
    if name == "nf4_linear":
        call = partial(nf4_linear.nf4_linear, o.narrow(rows, k), o.nf4(out, k)[0], None)
    else:
        call = partial(nf4_linear.nf4_linear_dx, o.narrow(rows, k), o.nf4(k, out)[0])
    default = "fused" if configs.nf4_fused_by_design(rows, out, dtype) else "slab"
    return _chosen(name, CHOICES[name], default, call, device, **how)


def _slab(rows: int, N: int, K: int, device, dtype, **how) -> dict[str, Any]:
    o = problems.Operands(device, dtype, rows, 0, K)
    linear = partial(nf4_linear.nf4_linear, o.narrow(rows, K), o.nf4(N, K)[0], None)
    call = partial(problems.on_route, "nf4_linear", "slab", linear)
    return _chosen("nf4_slab_bytes", SLABS, configs.NF4_SLAB_BYTES, call, device, **how)


def _chosen(
    name: str, choices, default: Any, call: Callable, device: torch.device, samples: int, revision: str
) -> dict[str, Any]:  # fmt: skip
    """The fastest of the choices whose results are the default's; the default unless one is clearly better."""
    with torch.no_grad():
        expected = problems.on_route(name, default, call)
        if not (math.isfinite(expected.norm()) and expected.norm() > 0):
            raise RuntimeError(f"{name}: {default} gives zeros or no numbers")
        calls = {choice: partial(problems.on_route, name, choice, call) for choice in choices}
        calls = {choice: run for choice, run in calls.items() if choice == default or _right(run, expected)}
        times = dict(zip(calls, stopwatch.medians(list(calls.values()), device, samples), strict=True))
    best = min(times, key=times.__getitem__)
    return {
        "choice": best if times[best] < BETTER * times[default] else default,
        "us": {str(choice): round(took, 2) for choice, took in times.items()},
        "measured": autotune.evidence(device, revision),
    }


def _right(run: Callable, expected: torch.Tensor) -> bool:
    try:
        return trials.same(run(), expected)
    except Exception as error:  # a route that this device does not have
        print(f"skipped: {error}")
        return False
