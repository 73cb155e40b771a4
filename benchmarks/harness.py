"""The command line that every script of this folder shares; the harness is ``fastnorm/_bench.py``.

Each ``bench_*.py`` defines lists of cells: ``CELLS`` (the table), ``QUICK`` (a minute for all
scripts together), and where it has them ``SWEEP`` (shapes by the hundred), ``CUDA`` and
``CUDA_QUICK`` (a GPU's shapes); and ``measurements(device, quick)`` for what is not a cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastnorm import _bench
from fastnorm._bench import Cell


def select(module: ModuleType, device: str, quick: bool, sweep: bool) -> list[Cell]:
    """The module's cells for a device and a mode."""
    prefix = "CUDA" if device == "cuda" else ""
    if quick:
        return list(getattr(module, f"{prefix}_QUICK" if prefix else "QUICK"))
    cells = list(getattr(module, prefix or "CELLS"))
    return cells + list(getattr(module, "SWEEP", [])) if sweep and not prefix else cells


def measure_others(
    modules: Sequence[ModuleType], device: str, quick: bool, end: float
) -> list[dict[str, Any]]:
    """The modules' measurements, but those that would start after ``end``; none ends the run."""
    found: list[dict[str, Any]] = []
    with _bench.pages("fresh"):
        for module in modules:
            if not hasattr(module, "measurements") or time.monotonic() > end:
                continue
            try:
                found += module.measurements(device, quick)
            except Exception as error:
                print(f"{module.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def script(modules: Sequence[ModuleType], name: str, argv: Sequence[str] | None = None) -> int:
    """Runs the modules' cells and prints the table; returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog=name, description=modules[0].__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape an op, short measurements")
    parser.add_argument("--sweep", action="store_true", help="add the dense sweep of shapes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after that")
    _bench.add_common_arguments(parser)
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to torch: nothing measured")
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seconds = arguments.seconds or (0.15 if arguments.quick else 0.5)
    # A cell listed twice runs once, with torch.compile if either asks for it.
    cells: dict[Cell, Cell] = {}
    for module in modules:
        for cell in select(module, device, arguments.quick, arguments.sweep):
            key = dataclasses.replace(cell, compile=False)
            if key not in cells or cell.compile:
                cells[key] = cell
    end = time.monotonic() + 60 * arguments.minutes
    files: list[Path] = []

    def save(results: dict[str, Any]) -> None:
        if arguments.output:
            files[:] = _bench.save(results, arguments.output, f"{name}_{device}")

    # On the CPU first, before the heap has grown: what lies free in it would hide from the memory
    # peak. On CUDA last, with the time that the cells have left.
    measurements: list[dict[str, Any]] = []
    if device == "cpu":
        measurements = measure_others(modules, device, arguments.quick, end)
    results = _bench.run(
        list(cells.values()), device, seconds, arguments.compile, arguments.minutes, save
    )
    if device == "cuda":
        save(results)
        measurements = measure_others(modules, device, arguments.quick, end)
    results["measurements"] = measurements
    save(results)
    for file in files:
        print(f"wrote {file}")
    _bench.show(results)
    return int(any(cell["wrong"] for cell in results["cells"]))


def script_of(main_module: str) -> int:
    """:func:`script` for a file that was started itself."""
    module = sys.modules[main_module]
    stem = (module.__spec__.name if module.__spec__ else "benchmark").rpartition(".")[2]
    return script([module], stem)
