"""Running a problem under configurations: results, whether they agree, and the shared memory that they take."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from .measured import using
from .problems import Problem
from .table_files import LOGGER

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of another order of summation

Results = list[list[torch.Tensor]]
_most_shared: dict[tuple, int] = {}


class Trials:
    """Of one kernel's problem, which was made for a bucket (what shared memory depends on: dtype and rank)."""

    def __init__(self, kernel: str, module: ModuleType, problem: Problem, device: torch.device, bucket: tuple):
        self.kernel, self.problem, self.device, self.bucket = kernel, problem, device, bucket
        self.function = getattr(module, f"_{kernel}_kernel")

    def timed(self, config: dict[str, int]) -> Callable[[], Any]:
        """The problem's first call under a configuration."""
        return partial(self._call, self.problem.calls[0], config)

    def results(self, config: dict[str, int], calls: slice) -> Results:
        """Tensors that calls of the problem give under a configuration."""
        before, results = self._compiled(), []
        for call in self.problem.calls[calls]:
            self.problem.reset()
            given = self._call(call, config)
            tensors = given if isinstance(given, tuple) else (given,)
            results.append([t.clone() for t in tensors if t is not None])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._note_shared(config, before)
        return results

    def agree(self, config: dict[str, int], expected: Results, calls: slice) -> bool:
        """Whether calls run and give what is expected; a wrong result is reported, one that cannot be had is not."""
        try:
            results = self.results(config, calls)
        except Exception as error:  # too much shared memory, a tile that the compiler refuses, ...
            LOGGER.debug("%s %s is skipped: %s", self.kernel, config, error)
            return False
        right = all(
            same(ours, truth)
            for tensors, truths in zip(results, expected[calls], strict=True)
            for ours, truth in zip(tensors, truths, strict=True)
        )
        if not right:
            LOGGER.warning("%s %s is refused: its results are wrong", self.kernel, config)
        return right

    def shared(self, config: dict[str, int]) -> int | None:
        """Most bytes that what was compiled of a configuration takes; None where that is unknown."""
        return _most_shared.get(self._key(config))

    def _call(self, call: Callable, config: dict[str, int]) -> Any:
        with using(self.kernel, config):
            return call()

    def _key(self, config: dict[str, int]) -> tuple:
        return self.kernel, self.device, self.bucket, *sorted(config.items())

    def _compiled(self) -> dict:
        """What Triton has compiled of the kernel so far; nothing in the interpreter."""
        caches = getattr(self.function, "device_caches", None)
        return dict(caches[self.device.index][0]) if caches and self.device.type == "cuda" else {}

    def _note_shared(self, config: dict[str, int], before: dict) -> None:
        after, key = self._compiled(), self._key(config)
        new = [after[compiled].metadata.shared for compiled in after.keys() - before.keys()]
        if new:
            _most_shared[key] = max(*new, _most_shared.get(key, 0))


def tells(results: Results) -> bool:
    """Whether there is something to compare with: numbers, not all of them zero."""
    floats = [t for tensors in results for t in tensors if t.is_floating_point()]
    return bool(results) and all(bool(t.isfinite().all() and t.norm() > 0) for t in floats)


def same(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether two sums differ by their order at most; codes, not at all."""
    if not truth.is_floating_point():
        return torch.equal(ours, truth)
    error = (ours.double() - truth.double()).norm() / truth.double().norm()
    return bool(error <= TOLERANCE[truth.dtype])
