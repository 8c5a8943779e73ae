"""The Python of every page about a method, and of the one about RLHF, runs as it stands, top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted((DOCS / "methods").glob("*.md")), DOCS / "rlhf.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks, f"{page.name} has no example"
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
