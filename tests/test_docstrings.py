"""The example in every docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import fastnorm

pytestmark = pytest.mark.cpu("examples that print")

MODULES = sorted(m.name for m in pkgutil.iter_modules(fastnorm.__path__) if m.name != "__main__")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"fastnorm.{name}")
    known = {**vars(fastnorm), **vars(module), "torch": torch, "nn": nn, "fastnorm": fastnorm}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, globs=known):
        runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
