"""Cross-entropy with label smoothing, forward and backward, against torch.nn.functional's."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from benchmarks.harness import script_of
from fastnorm._bench import Cell, Timer, interleave, pages
from fastnorm._bench_ops import DTYPES

# A scalar loss starts its own backward pass, which no cell of the harness does.
CELLS: list[Cell] = []
QUICK = CELLS
CUDA = CELLS
CUDA_QUICK = CELLS

SHAPES = [(8192, 1000), (1024, 32000), (64, 10), (4, 21, 256, 256)]
SMOOTHING = 0.1


def step(loss_fn: Callable[..., Tensor], shape: tuple[int, ...], dtype: str, device: str) -> Any:
    """A call that computes the loss of logits and their gradient, as training does."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "dtype": DTYPES[dtype]}
    logits = torch.randn(shape, generator=generator, **options).requires_grad_()
    positions = shape[:1] + shape[2:]
    target = torch.randint(shape[1], positions, generator=generator, device=device)

    def call() -> Tensor:
        loss = loss_fn(logits, target, label_smoothing=SMOOTHING)
        return torch.autograd.grad(loss, logits)[0]

    return call


def contenders(
    shape: tuple[int, ...], device: str, quick: bool
) -> dict[str, Callable[..., Tensor]]:
    losses: dict[str, Callable[..., Tensor]] = {"torch": F.cross_entropy}
    # Autotuning takes longer than everything else here.
    if device == "cuda" and not quick and shape == SHAPES[1]:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs"
        losses["compile"] = torch.compile(F.cross_entropy, dynamic=False, mode=mode)
    if device == "cuda" and len(shape) == 2 and importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers.functional")
        losses["liger"] = liger.liger_cross_entropy  # its gradient overwrites the logits
    return {**losses, "fastnorm": fastnorm.cross_entropy}


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Seconds of the loss and its gradient, in memory that the process has touched before."""
    rows = []
    seconds = 0.5 if quick or device == "cuda" else 2.0
    for shape in SHAPES[:2] if quick else SHAPES:
        for dtype in ("fp32",) if quick else ("fp32", "bf16"):
            calls = {
                who: step(loss, shape, dtype, device)
                for who, loss in contenders(shape, device, quick).items()
            }
            host = math.prod(shape) * DTYPES[dtype].itemsize <= 64 << 10
            with pages("reused"):
                for call in calls.values():
                    call()
                samples, _ = interleave(Timer(device, host), calls, seconds, 5)
            name = f"cross_entropy {'x'.join(map(str, shape))} {dtype}"
            medians = {who: statistics.median(times) for who, times in samples.items()}
            rows.append({"name": name, "unit": "s", **medians})
    return rows


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
