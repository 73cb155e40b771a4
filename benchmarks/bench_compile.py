"""Norms and dropout under `torch.compile`: what the compiler makes of torch's functions, of our
plain-PyTorch definition ("reference"), and our operator kept in the graph ("kernel").

The choice that the backend "auto" makes for each operator (`fastnorm/_ops.py`) is read off this
table. Compiling takes minutes; Inductor's cache makes a second run start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastnorm import _bench, _build
from fastnorm._bench_ops import OPS, TRAIN, Cell, Inputs, Outputs, grid, make_inputs

ROWS, IMAGES = [(4096, 1024), (128, 256)], [(16, 256, 28, 28), (2, 64, 16, 16)]
ROW_OPS = ("layer_norm", "rms_norm", "add_rms_norm", "dropout_add_layer_norm", "dropout")
ROW_OPS += ("gelu_dropout",)
IMAGE_OPS = ("batch_norm", "batch_norm_add_relu", "group_norm_silu", "instance_norm", "dropout2d")
CELLS = [
    *grid(ROW_OPS, ROWS, directions=(TRAIN,)),
    *grid(IMAGE_OPS, IMAGES, directions=(TRAIN,)),
    *grid(IMAGE_OPS[:2], IMAGES[:1], directions=(TRAIN,), layouts=("channels_last",)),
]
NAMES = ("torch", "fastnorm", "torch compiled", "reference compiled", "kernel compiled")


def between(function: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    """Between elementwise operators that a compiler would fuse with it."""

    def run(inputs: Inputs) -> Outputs:
        outputs = function(dataclasses.replace(inputs, x=inputs.x * inputs.x.sigmoid()))
        if isinstance(outputs, torch.Tensor):
            return F.gelu(outputs)
        return (F.gelu(outputs[0]), *outputs[1:])

    return run


def contenders(cell: Cell, neighbours: bool) -> dict[str, Callable[[Inputs], Outputs]]:
    op = OPS[cell.op]
    theirs, ours = (between(f) if neighbours else f for f in (op.torch, op.fastnorm))

    def compiled(function: Callable[[Inputs], Outputs], backend: str) -> Any:
        run = torch.compile(lambda t: function(t), fullgraph=True, dynamic=False)

        def call(inputs: Inputs) -> Outputs:
            _build._backend = backend  # use_backend takes longer than some of the calls
            return run(inputs)

        return call

    def eager(inputs: Inputs) -> Outputs:
        _build._backend = "auto"
        return ours(inputs)

    functions = (
        theirs,
        eager,
        compiled(theirs, "auto"),
        compiled(ours, "reference"),
        compiled(ours, "kernel"),
    )
    return dict(zip(NAMES, functions, strict=True))


def measure(cell: Cell, seconds: float, neighbours: bool = False) -> dict[str, float]:
    """Medians in microseconds."""
    torch._dynamo.reset()
    inputs = make_inputs(cell, "cpu")
    with torch.no_grad():
        outputs = _bench._tuple(OPS[cell.op].torch(inputs))
    gradients = [torch.randn_like(output) for output in outputs]
    with _bench.pages("reused", min(16 * cell.input_bytes, 2 << 30)):
        calls: dict[str, Callable[[], object]] = {}
        for name, function in contenders(cell, neighbours).items():
            calls[name] = _bench.contender_call(cell, inputs, function, gradients)
            calls[name]()
            calls[name]()
        samples, _ = _bench.interleave(_bench.Timer("cpu", True), calls, seconds, 5)
    return {name: 1e6 * statistics.median(times) for name, times in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_compile", description=__doc__)
    parser.add_argument("--ops", nargs="*", help="only these")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    parser.add_argument("--neighbours", action="store_true", help="x * sigmoid(x), op, gelu")
    arguments = parser.parse_args()
    facts = _bench.machine_facts("cpu")
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}")
    print("forward + backward in us\n")
    head = f"{'op':24}{'shape':20}{'dtype':6}" + "".join(f"{name:>20}" for name in NAMES)
    print(head + "   best compiled")
    for cell in CELLS:
        if arguments.ops and cell.op not in arguments.ops:
            continue
        times = measure(cell, arguments.seconds, arguments.neighbours)
        best = min(NAMES[3:], key=times.__getitem__).split()[0]
        shape = "x".join(map(str, cell.shape)) + (" nhwc" if cell.layout != "contiguous" else "")
        row = f"{cell.op:24}{shape:20}{cell.dtype:6}" + "".join(f"{times[n]:20.0f}" for n in NAMES)
        print(f"{row}   {best}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
