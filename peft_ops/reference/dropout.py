"""The dropout mask of every op: a pure function of (seed, row, column), so that nothing of it is ever saved."""

import torch

_MASK32 = 0xFFFFFFFF


def _philox_4x32(counter: torch.Tensor, seed: torch.Tensor, rounds: int) -> list[torch.Tensor]:
    """Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in wrapping int64 arithmetic."""
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the products wrap at 2**64; their 32-bit halves stay right
        c0 = (b >> 32).bitwise_and_(_MASK32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(_MASK32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(_MASK32), a.bitwise_and_(_MASK32)
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def threshold(p: float) -> int:
    """Of 16 random bits: an element is kept where they are not below it. p moves in steps of 2**-16."""
    return min(round(p * 2**16), 2**16 - 1)


def dropout_keep(shape: tuple[int, int], p: float, seed: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """bool [M, K]: True where an element is kept; rows are numbered from `first_row`.

    Eight neighbours in a row share one Philox call of 7 rounds, 16 bits each. `seed` is a 0-dim int64 tensor on the
    device of the mask.
    """
    M, K = shape
    octets = -(-K // 8)
    counter = torch.arange(first_row * octets, (first_row + M) * octets, device=seed.device)
    w0, w1, w2, w3 = _philox_4x32(counter, seed, rounds=7)
    words = torch.stack((w0 | (w1 << 32), w2 | (w3 << 32)), dim=-1)  # little-endian: element i is 16-bit word i
    bits = words.view(torch.int16).view(M, octets * 8)[:, :K]
    return (bits ^ -(2**15)) >= threshold(p) - 2**15  # signs flipped: an unsigned comparison


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor | None, first_row: int = 0) -> torch.Tensor:
    """keep * x / (1 - p) for x [M, K]; x itself at p = 0, zeros at p = 1."""
    if p == 0.0:
        return x
    if p >= 1.0:
        return torch.zeros_like(x)
    assert seed is not None
    return torch.where(dropout_keep((x.shape[0], x.shape[1]), p, seed, first_row), x, 0.0) * (1.0 / (1.0 - p))


def seed_groups(seed: torch.Tensor | None, R: int) -> list[tuple[slice, torch.Tensor | None]]:
    """(columns, seed) of each group of R columns: of an int64 [G], G equal groups with a seed each; else one group.

    Raises:
        ValueError: R is no multiple of G.
    """
    if seed is None or seed.dim() == 0:
        return [(slice(0, R), seed)]
    groups = seed.shape[0]
    if R % groups:
        raise ValueError(f"{groups} seeds need a multiple of {groups} rows of a, got {R}")
    return [(slice(i * (R // groups), (i + 1) * (R // groups)), seed[i]) for i in range(groups)]
