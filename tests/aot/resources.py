"""Compile a Triton kernel ahead of time and read what it costs, on a machine without a GPU."""

import collections
import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_MEMORY = 512  # columns, sm_100
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
MARK = "aot: "  # of the lines, a JSON object each, that conftest.py gathers
_BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def target(arch):
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_for(kernel, signature, constexprs, arch, *, divisible=True, **options):
    """Compiled with every run-time argument divisible by 16, as PyTorch's usually are (unless divisible=False).

    signature: {argument: type} of run-time arguments, such as "*bf16", "i32", "fp32"; constexprs: {argument: value}.
    """
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    assert not missing, f"{kernel.__name__}: no type and no value for {sorted(missing)}"
    attrs = {}
    if divisible:
        names = [n for n, kind in signature.items() if kind.startswith("*") or kind in ("i32", "i64")]
        attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in names}
    signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target(arch), options=options)


def resources(compiled, arch):
    """{registers, shared, spills, instructions, length, loop} of one compiled kernel.

    spills: moves between registers and local memory in the machine code; instructions: counts of the telling ones;
    length: of the machine code in instructions; loop: those of its longest innermost loop by kind (NVIDIA), {} without
    one; both only where `disassemble`.
    """
    return _amd_resources(compiled) if arch.startswith("gfx") else _nvidia_resources(compiled)


def assert_lean(kernel, signature, constexprs, arch, *, dot, divisible=True, tensor_core=None, **options):
    """It compiles, fits shared memory, spills nothing and, with a dot, uses the matrix unit. Prints its cost too.

    tensor_core: another instruction to ask for than the architecture's best (HMMA where a tile is too small for HGMMA).
    """
    compiled = compile_for(kernel, signature, constexprs, arch, divisible=divisible, **options)
    cost = resources(compiled, arch)
    types = "/".join(dict.fromkeys(kind.strip("*") for kind in signature.values() if kind.startswith("*")))
    flags = {key: value for key, value in {**constexprs, **options}.items() if not key.startswith("stride")}
    line = dict(arch=arch, kernel=kernel.__name__, types=types, aligned=divisible, **cost, flags=flags)
    print(f"{MARK}{json.dumps(line)}")
    assert cost["shared"] <= SHARED_LIMIT[arch], cost
    assert cost["spills"] == 0, cost
    assert getattr(compiled.metadata, "tmem_size", 0) <= TENSOR_MEMORY, compiled.metadata
    wanted = tensor_core or TENSOR_CORE[arch]
    assert not dot or any(op.startswith(wanted) for op in cost["instructions"]), f"no {wanted}: {cost['instructions']}"
    return cost


def _run(tool, *arguments):
    done = subprocess.run([os.path.join(_BIN, tool), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def sass(compiled):
    """The machine code of a kernel for NVIDIA, as text."""
    return _of_cubin(compiled, "nvdisasm", "-c")


def _of_cubin(compiled, tool, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "k.cubin")
        with open(cubin, "wb") as f:
            f.write(compiled.asm["cubin"])
        return _run(tool, *arguments, cubin)


disassemble = False  # every kernel, for the table of `python -m benchmarks.aot`: half of the time of a test
_IN_PTX = {
    "HMMA": r"\bmma\.sync", "HGMMA": r"\bwgmma\.mma_async", "UTCHMMA": r"\btcgen05\.mma",
    "LDGSTS": r"\bcp\.async\.c[ag]\.", "UTMALDG": r"\bcp\.async\.bulk\.tensor\S*\.shared::\w+\.global",
    "UTMASTG": r"\bcp\.async\.bulk\.tensor\S*\.global\.shared",
}  # fmt: skip


def _nvidia_resources(compiled):
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _of_cubin(compiled, "cuobjdump", "--dump-resource-usage"))
    assert usage, f"no resource usage for {compiled.name}"
    if not disassemble and usage.group(2) == "0":  # without a stack frame nothing is moved to local memory
        counts = {op: len(re.findall(pattern, compiled.asm["ptx"])) for op, pattern in _IN_PTX.items()}
        return dict(
            registers=int(usage.group(1)), shared=compiled.metadata.shared, spills=0,
            instructions={op: n for op, n in counts.items() if n}, length=0, loop={},
        )  # fmt: skip
    code = _NVIDIA_LINE.findall(sass(compiled))
    mnemonics = [mnemonic for _, mnemonic, _ in code if mnemonic]
    return dict(
        registers=int(usage.group(1)), shared=compiled.metadata.shared,
        spills=mnemonics.count("LDL") + mnemonics.count("STL"), instructions=_telling(mnemonics),
        length=len(mnemonics), loop=_longest_loop(code),
    )  # fmt: skip


_NVIDIA_LINE = re.compile(
    r"^(?:(\.L\w+):|\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[^`\n]*(?:`\((\.L\w+)\))?.*)$", re.M
)  # a label, or a mnemonic and the label it names
_KINDS = {
    "matrix": r"\w*MMA$",
    "global": r"LDG|STG|LDGSTS|UTMA|ATOM|RED",
    "shared": r"LDS|STS|LDSM|STSM|SHFL",
    "float": r"F[A-Z]|MUFU|HADD|HMUL|HFMA|H[A-Z]+2|D[A-Z]+",
    "control": r"BRA|BAR|SYNC|DEPBAR|LDGDEPBAR|WARP|NOP|BSSY|BSYNC|ELECT|SYNCS|FENCE|R2UR|EXIT",
}


def _longest_loop(code):
    """{kind: instructions} of the longest stretch from a label to a branch back to it that holds no other such stretch;
    what is of no kind is "integer"."""
    labels, loops, mnemonics = {}, [], []
    for label, mnemonic, target in code:
        if label:
            labels[label] = len(mnemonics)
            continue
        mnemonics.append(mnemonic)
        if mnemonic == "BRA" and len(mnemonics) - labels.get(target, len(mnemonics)) > 1:
            loops.append((labels[target], len(mnemonics)))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    body = slice(*max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0)))
    kinds = (next((k for k, names in _KINDS.items() if re.match(names, m)), "integer") for m in mnemonics[body])
    return dict(collections.Counter(kinds))


def _amd_resources(compiled):
    asm = compiled.asm["amdgcn"]
    numbers = {key: int(re.search(rf"\.{key}:\s*(\d+)", asm).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
    mnemonics = re.findall(r"^\s+([a-z]\w+)", asm, re.M)
    return dict(
        registers=numbers["vgpr_count"], shared=compiled.metadata.shared, spills=numbers["vgpr_spill_count"],
        instructions=_telling(mnemonics), length=len(mnemonics), loop={},
    )  # fmt: skip


def _telling(mnemonics):
    counts = collections.Counter(mnemonics)
    return {op: n for op, n in counts.items() if re.search(r"MMA|mfma|LDGSTS|UTMA|LDL|STL|LDSM", op)}
