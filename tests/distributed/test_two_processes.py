"""Case 42: DDP and FSDP2 over two processes give the gradients of one; 37: a DTensor is refused. gloo, on CPUs."""

import copy
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import peft_ops

SIZES = {"even rows": (64, 128), "uneven rows": (65, 128), "blocks across rows": (64, 96)}
CASES = [("ddp", "lora", "even rows"), ("ddp", "qlora", "even rows"), *(("fsdp2", "qlora", size) for size in SIZES)]


def model_of(method, size):
    torch.manual_seed(0)
    hidden, width = SIZES[size]
    model = nn.Sequential(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, 8))
    config = peft_ops.QLoRAConfig if method == "qlora" else peft_ops.LoRAConfig
    peft_ops.adapt(model, config(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False))
    return model


def loss_of(model, rank, world):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    return model(x).square().mean()


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def one_of_two(rank, folder):
    """Runs in each process; raises where its gradients or packed bytes are not those of one process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    for case in CASES:
        compare(rank, *case)
    sharded = distribute_tensor(torch.ones(4, 32), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(TypeError, match="x is a DTensor; kernels take local tensors"):
        peft_ops.ops.lora_linear(sharded, torch.ones(8, 32), None, torch.ones(2, 32), torch.ones(8, 2), 1.0)
    with pytest.raises(TypeError, match="x is a DTensor; kernels take local tensors"):
        peft_ops.ops.bottleneck_adapter(sharded, torch.ones(2, 32), None, torch.ones(32, 2), None, residual=sharded)
    dist.barrier()
    os._exit(0)  # tearing gloo down beside a process that has left already can wait for ever


def compare(rank, wrap, method, size):
    case = f"{wrap}, {method}, {size}"
    alone = model_of(method, size)
    loss_of(alone, 0, 1).backward()
    model = copy.deepcopy(alone)
    model.zero_grad()
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    for layer in (model[0], model[2], model) if wrap == "fsdp2" else ():
        fully_shard(layer)
    loss_of(wrapped, rank, 2).backward()
    parameters = dict(model.named_parameters())
    trained = [name for name, p in alone.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    for name, expected in alone.named_parameters():
        if name in trained:
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(
                full(parameters[name].grad), expected.grad, msg=lambda m, n=name: f"{case}: {n}: {m}"
            )
        else:
            assert torch.equal(full(parameters[name]), expected), f"{case}: {name}"


@pytest.mark.unpoisoned
def test_gradients_are_those_of_one_process(tmp_path):
    both = torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not both.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes do not end"
    finally:
        for process in both.processes:
            process.kill()
