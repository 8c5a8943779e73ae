"""The native library: found, loaded and declared once; functions are called through ctypes with addresses and sizes.

`PEFT_OPS_CPU_ISA` (one of `ISAS`) forces an instruction set; otherwise the best one that the machine runs is taken.
"""

import ctypes
import hashlib
import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import torch  # loads its OpenMP runtime first, which the library then shares

from ..nf4_tables import nf4_tables

ISAS = ("avx512bf16", "avx512", "avx2", "portable")  # best first
_PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {name: i for i, name in enumerate(("linear", "relu", "leakyrelu", "gelu", "gelu_new", "silu", "tanh"))}

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_P4, _P6 = (_P,) * 4, (_P,) * 6
_WEIGHT = (_P, _P, _P, _P, _P, _P, _N)  # packed, absmax, codes, nested, offset, map, blocksize
_DROPOUT = (_I, _P, _N, _F)  # threshold, seeds, groups, scale
_ARGUMENTS = {
    "widen": (_P, _N, _P, _I, _N, _N, _N, _N),
    "down_project": (_P, _P, _I, _N, _P, _N, _N, _N, _N, *_DROPOUT, _I),
    "down_project_da": (_P, _P, _P, _I, _N, _N, _N, _N, *_DROPOUT, _I),
    "low_rank_gradients": (_P, _P, _P, _I, _N, _P, _N, _P, _N, _N, _N, _N, _F, _I),
    "low_rank_update": (_P, _I, _N, _P, _P, _N, _N, _N, _N, *_DROPOUT, _I),
    "nf4_dequantize": (_P, _I, *_WEIGHT, _N, _N, _I),
    "nf4_columns": (_P, _I, *_WEIGHT, _N, _N, _N, _N, _I),
    "nf4_quantize": (_P, _P, _P, _I, _N, _N, _I),
    "absmax_quantize": (_P, _P, _P, _N, _P, _P, _I),
    "nf4_linear": (_P, _P, _I, _N, *_WEIGHT, _P, _N, _N, _N, _I),
    "nf4_linear_dx": (_P, _P, _I, _N, *_WEIGHT, _N, _N, _N, _I),
    "dora_norm": (_P, _P, _I, _N, _P, _N, _P, _N, _N, _N, _I),
    "dora_norm_of_columns": (_P, _P, _I, _N, _P, _P, _N, _N, _N, _N, _I),
    "nf4_dora_norm": (_P, *_WEIGHT, _P, _N, _P, _N, _N, _N, _I),
    "scaled_and_summed": (_P, _P, _P, _I, _N, _P, _N, _P, _N, _N, _I),
    "activated": (_P, _P, _P, _P, _I, _N, _N, _I),
    "gated": (_P, _P, _N, _P, _N, _I, _I, _N, _N, _I),
    "gated_gradients": (_P, _P, _P, _P, _N, _P, _N, _P, _N, _I, _I, _N, _N, _I),
    "attention": (*_P6, _I, _P, _P, _I, _F, _I),
    "attention_gradients": (*_P6, *_P4, _I, _P, _P, _I, _F, _I),
    "prefix_merge": (*_P6, _I, _P, _P, _F, *_DROPOUT, *_DROPOUT, _I),
    "prefix_gradients": (_P, _P, _P, _N, *_P6, _P, _I, _P, _P, _F, *_DROPOUT, *_DROPOUT, _I),
    "low_rank_output": (_P, _I, _N, _P, _I, _N, _P, _P, _N, _P, _P, _N, _N, _N, _F, _I),
}


def _load() -> ctypes.CDLL:
    """
    Raises:
        ImportError: not built, for another machine, or built from other sources than those beside it.
    """
    here = Path(__file__).parent
    forced = os.environ.get("PEFT_OPS_CPU_LIBRARY")  # built apart, with a sanitizer
    paths = [Path(forced)] if forced else [here / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        raise ImportError("peft_ops was installed without its native CPU library: no C++ compiler was found")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} does not load: {error}") from error
    library.peft_ops_sources.restype = ctypes.c_char_p
    sources = sorted(p for p in here.iterdir() if p.suffix in (".cpp", ".h", ".inc"))
    if sources and library.peft_ops_sources().decode() != _digest(sources):
        message = f"{path} was built from other sources: install peft_ops again. Until then ops run in plain PyTorch."
        warnings.warn(message, stacklevel=2)
        raise ImportError(message)
    return library


def _digest(sources: list[Path]) -> str:
    """As in setup.py."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]


def runs() -> list[str]:
    """The instruction sets that this machine runs, best first."""
    return [isa for isa in ISAS if _library.peft_ops_runs(isa.encode())]


def use(isa: str) -> None:
    """Take the functions of an instruction set from now on."""
    global ISA
    for name, arguments in _ARGUMENTS.items():
        function = getattr(_library, f"peft_ops_{name}_{isa}")
        function.argtypes, function.restype = arguments, None
        setattr(lib, name, function)
    ISA = isa


def _chosen(forced: str | None) -> str:
    """
    Raises:
        ValueError: PEFT_OPS_CPU_ISA is unknown, or this machine does not run it.
    """
    if forced and forced not in ISAS:
        raise ValueError(f"PEFT_OPS_CPU_ISA must be one of {', '.join(ISAS)}, got {forced}")
    if forced and forced not in runs():
        raise ValueError(f"PEFT_OPS_CPU_ISA={forced}, but this machine runs {', '.join(runs())}")
    return forced or runs()[0]


_library = _load()
ISA: str
lib = SimpleNamespace()  # the library's functions
use(_chosen(os.environ.get("PEFT_OPS_CPU_ISA")))

_TABLES = nf4_tables(torch.device("cpu"))
MIDPOINTS = _TABLES.map_thresholds.data_ptr()
_MAP = _TABLES.map.data_ptr()
SERIAL = 1 << 15  # elements of work below which a second thread costs more than it saves


def threads(work: int) -> int:
    """How many threads `work` elements are worth; torch's number at most."""
    return torch.get_num_threads() if work >= SERIAL else 1


def address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def weight_arguments(weight) -> tuple[tuple, list[torch.Tensor | None]]:
    """(the seven arguments of an NF4Weight, the tensors that they point into, to be held until the call is over).

    Raises:
        ValueError: fewer bytes or scales than the shape needs, or a tensor on another device.
    """
    n = weight.shape.numel()
    blocks = -(-n // weight.blocksize)
    tensors = [
        _held(weight.packed, torch.uint8, (n + 1) // 2),
        _held(weight.absmax, torch.float32, blocks),
        _held(weight.absmax_codes, torch.uint8, blocks),
        _held(weight.nested_absmax, torch.float32, -(-blocks // 256)),
        _held(weight.nested_offset, torch.float32, 1),
    ]
    return (*map(address, tensors), _MAP, weight.blocksize), tensors


def _held(t: torch.Tensor | None, dtype: torch.dtype, n: int) -> torch.Tensor | None:
    """t as memory that holds n elements of dtype."""
    if t is None:
        return None
    if t.numel() < n or not t.is_cpu:
        raise ValueError(
            f"an NF4 weight of this shape needs {n} elements on a CPU where it has {t.numel()} on {t.device}"
        )
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def rows(t: torch.Tensor) -> torch.Tensor:
    """t [M, K] with neighbours in a row side by side in memory: itself where it is so."""
    return t if t.stride(1) == 1 else t.contiguous()


def memory(t: torch.Tensor) -> torch.Tensor:
    """t where the library can read it: itself, or a copy of what is no plain tensor or has a dtype of its own."""
    if type(t) in _PLAIN and t.dtype in DTYPES:
        return t
    return torch.empty(t.shape, dtype=t.dtype if t.dtype in DTYPES else torch.float32).copy_(t)


def padded(t: torch.Tensor) -> torch.Tensor:
    """t [N] in float32 with zeros behind the last, as `operand`."""
    return operand(t[None])[0]


def operand(t: torch.Tensor) -> torch.Tensor:
    """t [R, K] in float32, rows from which 64 elements at a time can be read: zeros behind the last.

    A copy's rows are a vector longer than that, or the rows of a wide t would all lie on the same lines of a cache.
    """
    R, K = t.shape
    if t.dtype == torch.float32 and K % 64 == 0 and t.stride(1) == 1:
        return t
    wide = torch.empty(R, -(-K // 64) * 64 + 16, dtype=torch.float32)
    t = t if t.dtype in DTYPES else t.float()
    lib.widen(wide.data_ptr(), wide.stride(0), t.data_ptr(), DTYPES[t.dtype], *t.stride(), R, K)
    return wide


def seeds(seed: torch.Tensor | None) -> torch.Tensor | None:
    """A seed, or one for each group, as int64 in memory."""
    return None if seed is None else seed.to("cpu", torch.int64).contiguous()


def dropout_arguments(
    p: float, seed: torch.Tensor | None, R: int, scaling: float = 1.0
) -> tuple[int, int | None, int, float]:
    """(threshold, seeds, groups, scale) for 0 <= p < 1; no mask at p = 0. Seeds [G] mean G equal groups of R columns.

    Raises:
        ValueError: R is no multiple of G.
    """
    if p == 0.0 or seed is None:
        return -1, None, 1, scaling
    if R % seed.numel():
        raise ValueError(f"{seed.numel()} seeds need a multiple of {seed.numel()} rows of a, got {R}")
    return min(round(p * 2**16), 2**16 - 1), seed.data_ptr(), seed.numel(), scaling / (1.0 - p)
