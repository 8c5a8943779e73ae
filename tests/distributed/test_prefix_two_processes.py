"""Prefixes sharded by FSDP2 over two processes, gloo on CPUs: with their layers, the shared encoder with the root."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from prefix_models import adapted, loss_of, trained
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CASES = [
    ("llama", {}),
    ("llama", {"prefix_projection": True, "encoder_hidden_size": 12}),
    ("t5", {}),  # its first layer computes the bias of positions that all layers use
    ("t5", {"prefix_projection": True, "encoder_hidden_size": 12}),
]


def one_of_two(rank, folder):
    """Runs in each process; raises where its gradients are not those of one process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    for name, fields in CASES:
        alone, model = (adapted(name, **fields).train() for _ in range(2))
        model.load_state_dict(alone.state_dict())
        loss_of(alone, name).backward()
        layers = model.model.layers if name == "llama" else [*model.encoder.block, *model.decoder.block]
        for part in (*layers, model):
            fully_shard(part)
        loss_of(model, name).backward()
        for key, parameter in trained(model).items():
            assert isinstance(parameter, DTensor)
            expected = trained(alone)[key].grad
            assert expected.abs().max() > 0
            torch.testing.assert_close(
                parameter.grad.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    dist.barrier()
    os._exit(0)  # tearing gloo down beside a process that has left already can wait for ever


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
