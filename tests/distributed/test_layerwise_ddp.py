"""The layer-by-layer schedule over two processes with DistributedDataParallel moves what one process moves."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peft_ops


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, dtype=torch.float64) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def trained(mode, rank, world):
    torch.manual_seed(0)
    model = peft_ops.adapt(Model(), peft_ops.FullConfig())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = peft_ops.optimizer_for(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    schedule = peft_ops.LayerwiseSchedule(model, optimizer, steps_per_layer=2, mode=mode)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).chunk(world)[rank]
    states = []
    for _ in range(6):
        wrapped(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        states.append([p.detach().clone() for p in model.parameters()])
    return states


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    for mode in ("cumulative", "single"):
        alone = trained(mode, 0, 1)
        for actual, expected in zip(trained(mode, rank, 2), alone, strict=True):
            torch.testing.assert_close(actual, expected, msg=lambda m, mode=mode: f"{mode}: {m}")
        assert [torch.equal(a, b) for a, b in zip(alone[0], alone[1], strict=True)] == [False] * 2 + [True] * 4
    dist.barrier()
    os._exit(0)  # tearing gloo down beside a process that has left already can wait for ever


@pytest.mark.unpoisoned
def test_layer_by_layer_in_two_processes(tmp_path):
    both = torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not both.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes do not end"
    finally:
        for process in both.processes:
            process.kill()
