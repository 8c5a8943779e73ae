"""Only what pyproject.toml cannot say: the native CPU library, which a machine without a compiler does without."""

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-g0", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # fmt: skip
SOURCES = sorted(str(p) for p in Path("kernels/cpu").iterdir() if p.suffix in (".cpp", ".h", ".inc"))


class BuildOptional(build_ext):
    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            reason = f"{type(error).__name__}, see above"
            print(f"peft-ops: no native CPU library ({reason}), so ops run in plain PyTorch on a CPU", file=sys.stderr)


def digest():
    """By which kernels/cpu/native.py knows a library of other sources."""
    return hashlib.sha256(b"".join(Path(p).read_bytes() for p in SOURCES)).hexdigest()[:16]


native = Extension(
    "peft_ops.kernels.cpu._native",
    [p for p in SOURCES if p.endswith(".cpp")],
    depends=SOURCES,
    define_macros=[("SOURCES", f'"{digest()}"')],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildOptional})
