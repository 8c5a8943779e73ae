"""Other ways to run a contender: under torch.compile, and as one CUDA graph."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.shapes import ON_GPU

GRAPH_ROWS = 16  # rows up to which launches are most of the time
BACKEND = "inductor"  # conftest.py takes "aot_eager" on tiny shapes: tracing without code generation


def compiled(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """torch.compile in its default mode, for one shape: what was compiled for others is dropped first."""

    def built(*arguments) -> nn.Module:
        if BACKEND == "inductor" and not ON_GPU and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("torch.compile finds no C++ compiler for the CPU")
        torch._dynamo.reset()  # after eight shapes of one layer it would run eagerly, silently
        return torch.compile(build(*arguments), backend=BACKEND)

    return built


def captured(step: Callable) -> Callable:
    """The step, forward and backward, as one CUDA graph that every call replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        return outputs

    return replay
