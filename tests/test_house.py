"""The shape of the house: imports point one way, kernels mirror the reference, importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "cli",
    "rlhf",
    "checkpoint",
    "tuning",
    "nn",
    "ops",
    "nf4",
    "_backend",
    "reference",
)  # each may import what follows it
ALLOWED = {
    "cli": set(ORDER),
    "rlhf": {"tuning", "nn", "ops", "nf4"},
    "tuning": {"nn", "ops", "nf4"},
    "checkpoint": {"tuning", "nn", "ops", "nf4"},
    "nn": {"ops", "nf4"},
    "ops": {"nf4", "_backend", "reference"},
    "nf4": {"_backend"},
    "_backend": {"reference"},
    "reference": set(),
}


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imported(path, package):
    """Absolute names of the modules that a file imports; `package` is the one that the file lies in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources("peft_ops"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT / "peft_ops").with_suffix("").parts
    layer, package = parts[0], ".".join(("peft_ops", *parts[:-1]))
    if layer == "__init__":
        return
    for name in imported(path, package):
        top = name.split(".")
        if top[0] == "peft_ops" and len(top) > 1 and top[1] in ALLOWED and top[1] != layer:
            assert top[1] in ALLOWED[layer], f"{path.name} of {layer} imports {name}"
        if layer == "reference":
            assert top[0] in ("torch", "peft_ops", "collections", "math"), f"reference imports {name}"


def kernel_id(path):
    return str(path.relative_to(ROOT / "kernels"))


# Tables are files (json, os, pathlib), what is wrong with one is said (logging), and measuring takes clocks and a lock;
# native code is found as a file and called through ctypes.
ANY = {"torch", "collections", "contextlib", "functools", "itertools", "math", "types", "typing"}
MAY_IMPORT = {
    "kernels": ANY | {"triton", "json", "os", "pathlib", "logging", "time", "datetime", "statistics", "threading"},
    "cpu": ANY | {"ctypes", "hashlib", "importlib", "os", "pathlib", "threading", "warnings"},
}


@pytest.mark.parametrize("path", sources("kernels"), ids=kernel_id)
def test_kernels_import_torch_triton_and_siblings(path):
    """Code for a CPU works without triton, so it imports none."""
    package = ".".join(("peft_ops", *path.parent.relative_to(ROOT).parts))
    for name in imported(path, package):
        assert name.split(".")[0] in MAY_IMPORT[path.parent.name] or name.startswith("peft_ops.kernels"), name


def public_functions(path):
    """{name: argument names and annotations} of a file's plain functions: no kernel, nothing private."""
    functions = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list:
            functions[node.name] = ast.unparse(node.args)
    return functions


SHARED = {
    "__init__.py",
    "arches.py",
    "autotune.py",
    "candidates.py",
    "configs.py",
    "heads.py",
    "launch.py",
    "launchers.py",
    "linear_few_rows.py",
    "linear_tma.py",
    "logits.py",
    "low_rank_output.py",
    "measured.py",
    "native.py",
    "nf4_tables.py",
    "prefix_configs.py",
    "problems.py",
    "stopwatch.py",
    "table_files.py",
    "tiles.py",
    "trials.py",
}  # no op asks for these


@pytest.mark.parametrize("path", [p for p in sources("kernels") if p.name not in SHARED], ids=kernel_id)
def test_kernels_mirror_the_reference(path):
    reference = public_functions(ROOT / "peft_ops" / "reference" / path.name)
    for name, arguments in public_functions(path).items():
        assert name in reference, f"reference/{path.name} has no {name}"
        assert arguments == reference[name], f"{path.name}: {name}"


def test_importing_is_light_and_silent():
    """No triton, transformers or bitsandbytes, no output, no device touched."""
    code = (
        "import sys, torch; before = set(sys.modules); import peft_ops; added = set(sys.modules) - before;"
        "heavy = {'triton', 'transformers', 'bitsandbytes', 'matplotlib', 'rich', 'peft'} & added;"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_reference_runs_without_triton():
    """Where triton cannot be imported, everything works on the reference."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, peft_ops\n"
        "w = peft_ops.nf4.quantize(torch.randn(8, 64))\n"
        "a, b = torch.randn(2, 64, requires_grad=True), torch.randn(8, 2)\n"
        "peft_ops.ops.lora_linear(torch.randn(3, 64), w, None, a, b, 1.0, 0.1).sum().backward()\n"
        "assert a.grad.abs().sum() > 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bare_name_kernels_holds_nothing():
    """A second copy of a kernel module cannot be loaded under the folder's own name."""
    code = "import kernels, importlib.util as u; assert u.find_spec('kernels.configs') is None"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
