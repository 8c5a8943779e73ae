"""The tables that NF4 kernels look values up in, made once per device."""

from typing import NamedTuple

import torch

NESTED_BLOCKSIZE = 256
# The 16 levels of Dettmers et al., "QLoRA", 2023, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Tables(NamedTuple):
    """pairs: int64 [256], two float32 levels per byte, the high nibble's in the low word; thresholds: float32 [15],
    the midpoints of neighbouring levels; map, map_thresholds: float32 [256] and [255], of the nested absmax."""

    pairs: torch.Tensor
    thresholds: torch.Tensor
    map: torch.Tensor
    map_thresholds: torch.Tensor


def _dynamic_map() -> torch.Tensor:
    """Dettmers, "8-bit Approximations for Parallelism in Deep Learning", 2015, section 2.1."""
    positive = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append((bounds[:-1] + bounds[1:]) / 2.0 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0], device="cpu"))).sort().values


def _host_tables() -> Tables:
    levels = torch.tensor(NF4_LEVELS, device="cpu")
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=-1).view(torch.int64).view(-1)
    level_map = _dynamic_map()
    return Tables(pairs, (levels[1:] + levels[:-1]) / 2, level_map, (level_map[1:] + level_map[:-1]) / 2)


with torch.inference_mode(False):  # tables outlive the mode that the first import happens to run in
    _HOST = _host_tables()
_of_device: dict[torch.device, Tables] = {}


def nf4_tables(device: torch.device) -> Tables:
    """The tables on a device; kept, but not from inside a graph that torch.compile captures."""
    tables = _of_device.get(device)
    if tables is None:
        with torch.inference_mode(False):
            tables = Tables(*(t.to(device) for t in _HOST))
        if not torch.compiler.is_compiling():
            _of_device[device] = tables
    return tables
