"""Architectures: a device's, which stands in for another, and what fits it."""

import torch

# Bytes of shared memory that one program may have (CUDA programming guide, "Compute Capabilities"; CDNA3 ISA: LDS).
# Architectures that are not here are taken for the smallest of their vendor.
SHARED_LIMIT = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx942": 65536,
}  # fmt: skip
SMALLEST = {"sm": 101376, "gfx": 65536}

Version = tuple[str, int, int, int]

_arches: dict[torch.device, str] = {}
_multiprocessors: dict[torch.device, int] = {}


def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., or "default" where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return "default"
    if device not in _arches:
        properties = torch.cuda.get_device_properties(device)
        amd = properties.gcnArchName.split(":")[0] if torch.version.hip else ""
        _arches[device] = amd or f"sm_{properties.major}{properties.minor}"
    return _arches[device]


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel a device runs at once; 3 where there is no GPU."""
    if device.type != "cuda":
        return 3
    if device not in _multiprocessors:
        _multiprocessors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessors[device]


def version(arch: str) -> Version | None:
    """("sm", 9, 0, 0) of "sm_90", ("gfx", 9, 4, 2) of "gfx942"; None where a name is neither."""
    try:
        if arch.startswith("sm_"):
            number = arch[3:].rstrip("af")
            return "sm", int(number[:-1]), int(number[-1]), 0
        if arch.startswith("gfx"):
            return "gfx", int(arch[3:-2]), int(arch[-2], 16), int(arch[-1], 16)
    except (ValueError, IndexError):
        pass
    return None


def nearness(arch: str, other: str) -> tuple | None:
    """A sort key of what may stand in for `arch`: itself; then the same major version, lower before higher; then
    others, lower before higher; near ones first. None for another vendor."""
    if arch == other:
        return (0,)
    mine, theirs = version(arch), version(other)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return None
    higher = theirs > mine
    return 1, mine[1] != theirs[1], higher, *(number if higher else -number for number in theirs[1:])


def same_major(arch: str, other: str) -> bool:
    return arch == other or (version(arch) or ())[:2] == (version(other) or (None,))[:2]


def fits(shared: int | None, measured_on: str, arch: str) -> bool:
    """Whether a configuration that took so much shared memory on one architecture will run on another.

    The same one compiles to other sizes elsewhere: up to 1.8 times as much on sm_90 as on sm_80, where a tile that the
    matrix unit takes from registers has to lie in shared memory. So it may take half of what there is.
    """
    limit = SHARED_LIMIT.get(arch)
    if measured_on == arch:
        return shared is None or limit is None or shared <= limit
    if limit is None:
        limit = SMALLEST["gfx" if arch.startswith("gfx") else "sm"]
    return shared is not None and 2 * shared <= limit
