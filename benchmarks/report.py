"""`python -m benchmarks.report results.json [--out DIR] [--revision ID]`: a results file as tables and pictures.

Writes benchmark.json (without samples, host name and paths), report.md, speed.png, roofline.png and memory.png; without
--out into benchmarks/results/<device>/. --revision: of a tree that carries no git.
"""

import argparse
import json
from pathlib import Path

from benchmarks.results import RESULTS, load, slug, trimmed
from benchmarks.tables import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--revision")
    args = parser.parse_args()
    results = trimmed(load(args.results), args.revision)
    out = args.out or RESULTS / slug(results["machine_info"]["device"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text(markdown(results, draw(results, out)))
    print(out / "report.md")


def draw(results: dict, out: Path) -> list[str]:
    """Names of the pictures; none where matplotlib is missing."""
    try:
        from benchmarks import plots
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    return plots.draw(results, out)


if __name__ == "__main__":
    main()
