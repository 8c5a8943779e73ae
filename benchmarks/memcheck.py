"""`python -m benchmarks.tree benchmarks.memcheck`: every op once, ragged shapes, for a memory checker to watch.

Forward and backward of small layers, so that a kernel that reads or writes beyond a tensor is seen; results are the
business of tests.
"""

import torch
from torch import nn

import peft_ops
from benchmarks.block_peers import MLP, QKV, apart, fused_mlp, fused_qkv
from benchmarks.peers import ours_adapter, ours_dora, ours_lora, ours_qlora
from benchmarks.shapes import DEVICE, DTYPE
from peft_ops import nf4, ops

M, N, K = 33, 131, 67
OPTIONS = {"device": DEVICE, "dtype": DTYPE}


def main() -> None:
    x = torch.randn(M, K, **OPTIONS, requires_grad=True)
    for layer in layers():
        layer(x).float().square().sum().backward()
    weight = nf4.quantize(torch.randn(N, K, **OPTIONS), 64, True)
    for rows in (1, M):
        ops.nf4_linear(x[:rows], weight).sum().backward()
    ops.linear_logprob(x, torch.randn(300, K, **OPTIONS), None, torch.arange(M, device=DEVICE)).logp.sum().backward()
    text = [torch.randn(2, 4, 33, 32, **OPTIONS, requires_grad=True) for _ in range(3)]
    prefix = [torch.randn(4, 5, 32, device=DEVICE, requires_grad=True) for _ in range(2)]
    ops.prefix_attention(*text, *prefix, is_causal=True).sum().backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every op ran")


def layers() -> list[nn.Module]:
    linear = nn.Linear(K, N, bias=False, **OPTIONS).requires_grad_(False)
    plain = [build(linear, p) for build in (ours_lora, ours_qlora) for p in (0.0, 0.1)]
    fused = hasattr(peft_ops, "fuse")
    blocks = [
        (fused_mlp if fused else apart)(MLP(K, N, **OPTIONS), 0.1),
        (fused_qkv if fused else apart)(QKV(K, N, **OPTIONS), 0.1),
    ]
    return [*plain, ours_dora(linear, 0.1), ours_adapter(nn.Linear(K, K, **OPTIONS), 0.0), *blocks]


if __name__ == "__main__":
    main()
