"""The Python blocks of README.md and docs/ run, top to bottom, each page in one namespace.

A comment ``<!-- setup ... -->`` holds code that a reader can do without; ``<!-- not run: why -->``
stands before a block that needs what the tests don't have.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnorm

pytestmark = pytest.mark.cpu("pages that choose their devices")

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PART = re.compile(r"^<!-- (setup|not run)(.*?)-->$|^```python\n(.*?)^```$", re.M | re.S)


def code_of(page: Path) -> list[tuple[int, str]]:
    """The parts that run, each with the line it starts in."""
    text, parts, skip = page.read_text(), [], False
    for match in PART.finditer(text):
        kind, comment, block = match.groups()
        if kind == "not run":
            skip = True
        elif kind or not skip:
            parts.append((text.count("\n", 0, match.start()) + 1, comment or block))
        else:
            skip = False
    return parts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Inductor alone would take most of a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    known = {"torch": torch, "nn": nn, "fastnorm": fastnorm, "__name__": "page"}
    for line, code in code_of(page):
        exec(compile("\n" * line + code, str(page), "exec"), known)


def test_every_page_has_code():
    assert {page.stem for page in PAGES} >= {"README", "dropout", "models", "training"}
    assert all(code_of(page) for page in PAGES)
