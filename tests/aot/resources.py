"""Compile a Triton kernel ahead of time and read what it costs, on a machine without a GPU."""

import collections
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
MARK = "aot: "  # of the lines that conftest.py gathers into a table
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
    """{registers, shared, spills, instructions} of one compiled kernel.

    spills: moves between registers and local memory in the machine code; instructions: counts of the telling ones.
    """
    return _amd_resources(compiled) if arch.startswith("gfx") else _nvidia_resources(compiled)


def assert_lean(kernel, signature, constexprs, arch, *, dot, divisible=True, tensor_core=None, **options):
    """It compiles, fits shared memory, spills nothing and, with a dot, uses the matrix unit. Prints its cost too.

    tensor_core: another instruction to ask for than the architecture's best (HMMA where a tile is too small for HGMMA).
    """
    compiled = compile_for(kernel, signature, constexprs, arch, divisible=divisible, **options)
    cost = resources(compiled, arch)
    types = "/".join(dict.fromkeys(kind.strip("*") for kind in signature.values() if kind.startswith("*")))
    flags = " ".join(f"{key}={value}" for key, value in {**constexprs, **options}.items() if key != "stride")
    units = ", ".join(f"{op} {n}" for op, n in cost["instructions"].items())
    print(
        f"{MARK}{arch:7} {kernel.__name__:30} {types:20} {cost['registers']:3} registers "
        f"{cost['shared'] / 1024:5.0f} KiB {cost['spills']} spills  {units}  [{flags}]"
    )
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


def _nvidia_resources(compiled):
    usage = re.search(r"REG:(\d+)", _of_cubin(compiled, "cuobjdump", "--dump-resource-usage"))
    assert usage, f"no resource usage for {compiled.name}"
    mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass(compiled), re.M)
    return dict(
        registers=int(usage.group(1)), shared=compiled.metadata.shared,
        spills=mnemonics.count("LDL") + mnemonics.count("STL"), instructions=_telling(mnemonics),
    )  # fmt: skip


def _amd_resources(compiled):
    asm = compiled.asm["amdgcn"]
    numbers = {key: int(re.search(rf"\.{key}:\s*(\d+)", asm).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
    return dict(
        registers=numbers["vgpr_count"], shared=compiled.metadata.shared, spills=numbers["vgpr_spill_count"],
        instructions=_telling(re.findall(r"^\s+(\w+)", asm, re.M)),
    )  # fmt: skip


def _telling(mnemonics):
    counts = collections.Counter(mnemonics)
    return {op: n for op, n in counts.items() if re.search(r"MMA|mfma|LDGSTS|UTMA|LDL|STL|LDSM", op)}
