"""Launch configurations that tuning tries, beside the designed one; what a candidate does not say stays as designed.

Chosen by compiling ahead of time: at rank 16 in bfloat16 nothing here spills on sm_90. Where one spills elsewhere it
loses its measurement, where it does not fit it is skipped.
"""

from itertools import product

Candidates = tuple[dict[str, int], ...]


def _each(names: str, *values: tuple[int, ...]) -> Candidates:
    """One candidate for each tuple of values; M, N, K stand for BLOCK_M and so on, w, s for num_warps and num_stages,
    e for elements."""
    keys = {"w": "num_warps", "s": "num_stages", "e": "elements"}
    given = [keys.get(name, f"BLOCK_{name}") for name in names]
    return tuple(dict(zip(given, numbers, strict=True)) for numbers in values)


_UPDATES = _each("MNws", (16, 128, 4, 2), (16, 256, 4, 2), (32, 128, 4, 2), (32, 256, 8, 2), (64, 64, 4, 2),
                 (64, 128, 8, 2), (64, 256, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2))  # fmt: skip
_NORMS = _each("NKws", (16, 64, 4, 3), (32, 64, 4, 3), (32, 128, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2),
               (128, 64, 8, 2))  # fmt: skip
_DECODES = _each("ew", *product((1024, 2048, 4096, 8192, 16384), (4, 8)))
_LOGITS = _each("MNKws", (64, 128, 64, 4, 3), (64, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4))
_GEMMS = _each("MNKws", (64, 128, 64, 4, 3), (64, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
               (128, 256, 64, 8, 3), (256, 128, 64, 8, 3))  # fmt: skip

CANDIDATES: dict[str, Candidates] = {
    "down_project": _each(
        "MKws", (16, 64, 4, 4), (16, 128, 4, 3), (32, 64, 4, 4), (32, 128, 8, 3), (64, 64, 4, 4), (64, 128, 4, 3),
        (64, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3),
    ),
    "down_project_da": _each(
        "MKws", (32, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (64, 128, 8, 3), (128, 64, 4, 3),
        (128, 64, 8, 3), (128, 128, 8, 2),
    ),
    "low_rank_update": _UPDATES,
    "low_rank_gradients": _each(
        "MNws", (16, 128, 4, 3), (32, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3),
        (32, 256, 8, 2), (64, 256, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2),
    ),
    "nf4_linear": _each(
        "MNKws", (16, 64, 64, 4, 4), (16, 128, 64, 4, 3), (16, 128, 128, 4, 3), (16, 128, 128, 8, 4),
        (32, 64, 64, 4, 4), (32, 128, 128, 8, 3), (64, 64, 64, 4, 4), (64, 128, 64, 8, 3), (64, 128, 128, 8, 3),
    ),
    "nf4_linear_dx": _each(
        "MNKws", (16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 128, 128, 8, 3), (32, 64, 64, 4, 4),
        (32, 64, 128, 8, 3), (64, 64, 64, 4, 4), (64, 64, 128, 8, 3), (64, 128, 128, 8, 3),
    ),
    "nf4_dequantize": _DECODES,
    "nf4_quantize": _DECODES[:-2],
    "linear_low_rank": (*_each("MNKws", (16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (64, 64, 64, 4, 4)), *_GEMMS),
    "dora_norm": _NORMS,
    "nf4_dora_norm": _NORMS,
    "dora_update": _UPDATES,
    "dora_gradients": _each("MNw", (16, 128, 4), (16, 256, 4), (32, 64, 4), (32, 256, 8), (64, 128, 8)),
    "up_project": _each(
        "MNws", (32, 64, 4, 2), (32, 128, 8, 2), (32, 256, 8, 2), (64, 64, 4, 2), (64, 256, 8, 2), (128, 64, 8, 2),
        (128, 128, 8, 2),
    ),
    "up_project_gradients": _each(
        "MNws", (32, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 3),
    ),
    "logprob": _LOGITS,
    "logprob_gradient": _LOGITS,
    "add_product": _LOGITS,
}  # fmt: skip
