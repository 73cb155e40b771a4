"""Peak memory of a training step through ``y, s = norm(residual + dropout(x))``, alone and stacked:
each block's ``y, s`` is the next one's ``x, residual``.

On the CPU the peak is the kernel's own high-water mark of resident memory, with every tensor in
pages of its own (``harness.script`` sees to that); on CUDA it is the allocator's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import script_of
from fastnorm._bench import OPS, Cell, contender_call, make_inputs
from fastnorm._bench_ops import Inputs, Outputs

CELLS: list[Cell] = []
QUICK = CUDA = CUDA_QUICK = CELLS
SHAPE = (8192, 1024)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def peak(call: Any, device: str) -> int:
    """Bytes above what was held before, at the call's highest point."""
    call()  # the first call also starts threads, loads libraries and fills caches
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def stacked(function: Callable[[Inputs], Outputs], blocks: int) -> Callable[[Inputs], Outputs]:
    def call(t: Inputs) -> Outputs:
        for _ in range(blocks - 1):
            x, residual = function(t)
            t = dataclasses.replace(t, x=x, residual=residual)
            del x, residual
        return function(t)

    return call


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Peak bytes by torch and by fastnorm, per op and dtype; nothing where Linux doesn't tell."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return []
    found = []
    add, drop = "add_layer_norm", "dropout_add_layer_norm"
    for name, blocks in ((add, 1), (drop, 1), (drop, 4)):
        for dtype in ("fp32", "bf16"):
            cell = Cell(name, SHAPE, dtype)
            inputs = make_inputs(cell, device)
            outputs = OPS[name].torch(inputs)
            gradients = [torch.ones_like(output) for output in outputs]
            del outputs
            record: dict[str, Any] = {
                "name": f"peak memory of a step, {name} {dtype} {SHAPE[0]}x{SHAPE[1]}"
                + (f", {blocks} blocks" if blocks > 1 else ""),
                "unit": "B",
                "activation_bytes": cell.input_bytes,
            }
            try:
                for library in ("torch", "fastnorm"):
                    function = stacked(getattr(OPS[name], library), blocks)
                    call = contender_call(cell, inputs, function, gradients)
                    record[library] = peak(call, device)
            except (AttributeError, NotImplementedError, TypeError):
                continue  # the table of cells says what fastnorm lacks
            found.append(record)
    return found


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
