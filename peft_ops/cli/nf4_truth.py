"""NF4 in float64, from its definition and not from any implementation: what `peft-ops check` holds the others against.

Source: Dettmers et al., "QLoRA", 2023, section 3; the byte layout of bitsandbytes.
"""

import torch

from ..nf4 import NF4Weight
from ..reference.nf4 import NESTED_BLOCKSIZE, NF4_LEVELS


def decoded(weight: NF4Weight) -> torch.Tensor:
    """What the bytes mean: float64, in the shape of the weight."""
    packed = weight.packed.reshape(-1).long()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[: weight.shape.numel()]
    if weight.absmax is not None:
        absmax = weight.absmax.reshape(-1).double()
    else:
        assert weight.absmax_codes is not None
        assert weight.nested_absmax is not None
        assert weight.nested_offset is not None
        relative = _dynamic_map(weight.packed)[weight.absmax_codes.reshape(-1).long()]
        scales = weight.nested_absmax.double().repeat_interleave(NESTED_BLOCKSIZE)[: len(relative)]
        absmax = relative * scales + weight.nested_offset.double()
    return (_levels(codes)[codes] * absmax.repeat_interleave(weight.blocksize)[: len(codes)]).view(weight.shape)


def nearest(w: torch.Tensor, blocksize: int, nested: bool) -> torch.Tensor:
    """What is left of w, in float64, when every element goes to the nearest level."""
    values, absmax = _round(w.double().reshape(-1), blocksize, _levels(w))
    if nested:
        offset = absmax.mean()
        relative, largest = _round(absmax - offset, NESTED_BLOCKSIZE, _dynamic_map(w))
        absmax = relative * largest.repeat_interleave(NESTED_BLOCKSIZE)[: len(relative)] + offset
    return (values * absmax.repeat_interleave(blocksize)[: len(values)]).view(w.shape)


def _dynamic_map(like: torch.Tensor) -> torch.Tensor:
    """[256]: zero, one, and ± the middles of 2**i equal parts of [0.1, 1], times 10**(i - 6), for i from 0 to 6
    (Dettmers, "8-bit Approximations for Parallelism in Deep Learning", 2015, section 2.1)."""
    middles = [(0.1 + 0.9 * (part + 0.5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for part in range(2**i)]
    values = sorted([0.0, 1.0, *middles, *(-m for m in middles)])
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _levels(like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float64, device=like.device)


def _round(flat: torch.Tensor, blocksize: int, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the level next to each element over the largest of its block [n], those largest [blocks])."""
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    largest = blocks.abs().amax(dim=1)
    distance = ((blocks / largest[:, None]).unsqueeze(-1) - levels).abs()
    return levels[distance.argmin(dim=-1)].reshape(-1)[: len(flat)], largest
