"""The dropout mask of every op: a pure function of (seed, row, column), so that nothing of it is ever saved."""

import torch

_MASK32 = 0xFFFFFFFF


def _philox_4x32(counter: torch.Tensor, seed: torch.Tensor, rounds: int) -> list[torch.Tensor]:
    """Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in wrapping int64 arithmetic."""
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the products wrap at 2**64; their 32-bit halves stay right
        c0, c1 = ((b >> 32) & _MASK32) ^ c1 ^ k0, b & _MASK32
        c2, c3 = ((a >> 32) & _MASK32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def dropout_keep(shape: tuple[int, int], p: float, seed: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """bool [M, K]: True where an element is kept; rows are numbered from `first_row`.

    Eight neighbours in a row share one Philox call of 7 rounds: 16 bits each, kept where bits >= round(p * 2**16), so
    p moves in steps of 2**-16. `seed` is a 0-dim int64 tensor on the device of the mask.
    """
    M, K = shape
    octets = -(-K // 8)
    counter = torch.arange(first_row * octets, (first_row + M) * octets, device=seed.device)
    words = _philox_4x32(counter, seed, rounds=7)
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return bits.view(M, octets * 8)[:, :K] >= round(p * 2**16)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor | None, first_row: int = 0) -> torch.Tensor:
    """keep * x / (1 - p) for x [M, K]; x itself at p = 0, zeros at p = 1."""
    if p == 0.0:
        return x
    if p >= 1.0:
        return torch.zeros_like(x)
    assert seed is not None
    return torch.where(dropout_keep((x.shape[0], x.shape[1]), p, seed, first_row), x, 0.0) * (1.0 / (1.0 - p))
