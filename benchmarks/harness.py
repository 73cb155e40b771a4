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
from collections.abc import Sequence
from types import ModuleType

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
    with _bench.pages("fresh"):
        # First, before the heap has grown: what lies free in it would hide from the memory peak.
        measurements = [
            measurement
            for module in modules
            if hasattr(module, "measurements")
            for measurement in module.measurements(device, arguments.quick)
        ]
    results = _bench.run(
        list(cells.values()), device, seconds, arguments.compile, arguments.minutes
    )
    results["measurements"] = measurements
    if arguments.output:
        for file in _bench.save(results, arguments.output, f"{name}_{device}"):
            print(f"wrote {file}")
    _bench.show(results)
    return int(any(cell["wrong"] for cell in results["cells"]))


def script_of(main_module: str) -> int:
    """:func:`script` for a file that was started itself."""
    module = sys.modules[main_module]
    stem = (module.__spec__.name if module.__spec__ else "benchmark").rpartition(".")[2]
    return script([module], stem)
