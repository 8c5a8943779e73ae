"""Only what pyproject.toml cannot say: the native CPU library, which a machine without a compiler does without."""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ISAS = ("avx512bf16", "avx512", "avx2", "portable")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-g0", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # fmt: skip


class BuildOptional(build_ext):
    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"peft-ops: no native CPU library ({type(error).__name__}, see above), plain PyTorch instead", file=sys.stderr)


native = Extension(
    "peft_ops.kernels.cpu._native",
    [f"kernels/cpu/native_{isa}.cpp" for isa in ISAS],
    depends=["kernels/cpu/library.inc", *sorted(glob("kernels/cpu/*.h"))],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildOptional})
