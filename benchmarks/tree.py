"""`python -m benchmarks.tree MODULE[:FUNCTION] ARGS`: run a module of the bare working tree, nothing installed.

pyproject.toml maps kernels/ to peft_ops.kernels, which only an installation knows; here an import hook does.
"""

import runpy
import sys
from importlib import import_module, util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class _Kernels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "peft_ops.kernels":
            return None
        folder = ROOT / "kernels"
        return util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def map_kernels() -> None:
    """Make peft_ops.kernels importable in this process."""
    sys.meta_path.insert(0, _Kernels)


def main() -> None:
    map_kernels()
    sys.path.insert(0, str(ROOT))
    module, _, function = sys.argv[1].partition(":")
    sys.argv = [module, *sys.argv[2:]]
    if function:
        sys.exit(getattr(import_module(module), function)())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
