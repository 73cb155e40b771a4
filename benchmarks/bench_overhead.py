"""What a call costs when there is nothing to compute, and what ``import fastnorm`` costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from benchmarks.harness import script_of
from fastnorm._bench import Timer, grid, interleave, paired_ratio

ROW_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "dropout")
IMAGE_OPS = ("batch_norm", "batch_norm_eval", "group_norm", "instance_norm")
OTHER_OPS = ("dropout2d", "stochastic_depth")
CELLS = [
    *grid(ROW_OPS, [(1, 64)], ("fp32",)),
    *grid((*IMAGE_OPS, *OTHER_OPS), [(2, 8, 4, 4)], ("fp32",)),
]
QUICK = CELLS
CUDA = CELLS
CUDA_QUICK = CELLS

Call = Callable[[Tensor], Tensor]

IMPORT = """
import sys, time
start = time.perf_counter()
import torch
after_torch = time.perf_counter()
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
import fastnorm
print(after_torch - start, time.perf_counter() - start)
"""


def functions(device: str) -> Iterator[tuple[str, Call, Call, tuple[int, ...]]]:
    """Name, torch's, ours and the shape of what is no cell of the harness."""
    target = torch.tensor([3], device=device)
    for name, options in (
        ("cross_entropy", {}),
        ("cross_entropy, smoothed", {"label_smoothing": 0.1}),
    ):
        theirs, ours = (partial(m.cross_entropy, target=target, **options) for m in (F, fastnorm))
        yield name, theirs, ours, (1, 64)
    for name, shape in (
        ("dropout1d", (2, 8, 16)),
        ("dropout3d", (2, 8, 4, 4, 4)),
        ("alpha_dropout", (1, 64)),
        ("feature_alpha_dropout", (2, 8, 4, 4)),
    ):
        theirs, ours = (partial(getattr(m, name), p=0.1, training=True) for m in (F, fastnorm))
        yield name, theirs, ours, shape


def modules(device: str) -> Iterator[tuple[str, Call, Call, tuple[int, ...]]]:
    """The same of modules: what attribute access and counting batches add to a call."""
    image = (2, 8, 4, 4)
    for name, arguments, shape in (
        ("LayerNorm", (64,), (1, 64)),
        ("RMSNorm", (64,), (1, 64)),
        ("BatchNorm2d", (8,), image),
        ("GroupNorm", (2, 8), image),
        ("InstanceNorm2d", (8,), image),
        ("Dropout", (0.1,), (1, 64)),
        ("Dropout2d", (0.1,), image),
    ):
        theirs, ours = (getattr(m, name)(*arguments).to(device) for m in (nn, fastnorm))
        yield name, theirs, ours, shape
    theirs, ours = nn.BatchNorm2d(8), fastnorm.BatchNorm2d(8)
    yield "BatchNorm2d, eval", theirs.to(device).eval(), ours.to(device).eval(), image


def step(call: Call, x: Tensor) -> Callable[[], object]:
    """The call and the gradients of its input and parameters, or the call alone."""
    if not x.requires_grad:
        return partial(torch.no_grad()(call), x)
    leaves = [x, *(call.parameters() if isinstance(call, nn.Module) else [])]
    y = call(x)
    gradient = torch.randn_like(y) if y.dim() else None  # a loss starts its own backward pass

    def train() -> object:
        return torch.autograd.grad(call(x), leaves, gradient)

    return train


def call_times(device: str, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for make in (functions, modules):
        for name, theirs, ours, shape in make(device):
            for direction in ("forward", "forward+backward"):
                x = torch.randn(shape, device=device, requires_grad="+" in direction)
                calls = {"torch": step(theirs, x), "fastnorm": step(ours, x)}
                for call in calls.values():
                    call()
                samples, _ = interleave(Timer(device, True), calls, 0.15 if quick else 0.5, 5)
                rows.append(
                    {
                        "name": f"{name} {'x'.join(map(str, shape))} {direction}",
                        "unit": "s",
                        "ratio": paired_ratio(samples["torch"], samples["fastnorm"]),
                        **{who: statistics.median(times) for who, times in samples.items()},
                    }
                )
    return rows


def import_times(quick: bool) -> dict[str, Any]:
    """Seconds of the imports in new processes, medians; the first one compiles our bytecode."""
    times = []
    with tempfile.TemporaryDirectory() as bytecode:
        command = [sys.executable, "-c", IMPORT, bytecode]
        for _ in range(4 if quick else 11):
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            times.append([float(number) for number in printed.split()])
    alone, both = (statistics.median(column) for column in zip(*times[1:], strict=True))
    added = statistics.median(total - torch_alone for torch_alone, total in times[1:])
    name = f"import; fastnorm adds {added * 1e3:.0f} ms"
    return {"name": name, "unit": "s", "torch": alone, "fastnorm": both}


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Imports, which no device changes, and the calls that are no cells."""
    imports = [import_times(quick)] if device == "cpu" else []
    return [*imports, *call_times(device, quick)]


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
