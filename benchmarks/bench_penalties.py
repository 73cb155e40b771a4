"""Time of penalties on the 161 parameter tensors of ResNet-50.

    python benchmarks/bench_penalties.py [--repeats 15]

The yardstick is what training code writes by hand, ``lam * sum(p.pow(2).sum() for p in ...)`` with
its backward pass. All contenders run in turn in one process on the same tensors; the table gives
medians, the middle half of the times, and the ratio to the yardstick of the same norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from fastnorm.penalties import L1, L1L2, L2, Regularizer


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convs.append((4 * width, channels, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


class Parameters(nn.Module):
    """Tensors of given shapes with gradients in place, as after a backward pass."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList(
            nn.Parameter(0.05 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes
        )
        for param in self.all:
            param.grad = torch.zeros_like(param)


def contenders(model: Parameters, lam: float) -> dict[str, dict[str, Callable[[], object]]]:
    params = list(model.all)

    def regularizer(rule: L1 | L2 | L1L2) -> Regularizer:
        return Regularizer(model, rule, bias=True, norm=True)

    l1, l2, net = (regularizer(rule) for rule in (L1(lam), L2(lam), L1L2(lam, lam)))
    off = regularizer(L1L2(0.0, 0.0))
    by_hand = {
        "L1": lambda: lam * sum(p.abs().sum() for p in params),
        "L2": lambda: lam * sum(p.pow(2).sum() for p in params),
    }
    by_hand["L1L2"] = lambda: by_hand["L1"]() + by_hand["L2"]()
    cells: dict[str, dict[str, Callable[[], object]]] = {}
    for name, reg in (("L1", l1), ("L2", l2), ("L1L2", net)):
        cells[name] = {
            "by hand + backward": lambda term=by_hand[name]: term().backward(),
            "reg() + backward": lambda reg=reg: reg().backward(),
            "reg.add_grads_()": reg.add_grads_,
            "reg.decay_(lr)": lambda reg=reg: reg.decay_(1e-9),
            "reg.prox_(lr)": lambda reg=reg: reg.prox_(1e-9),
        }
    cells["L2"]["disabled: add_grads_()"] = off.add_grads_
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Parameters(resnet50_shapes(), args.device, getattr(torch, args.dtype))
    cells = contenders(model, 1e-6)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in track(range(args.repeats + 2), "Timing", transient=True):
        for norm, ways in cells.items():
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                times.setdefault((norm, way), []).append(1e3 * (time.perf_counter() - start))
    count = sum(p.numel() for p in model.parameters())
    table = Table(
        title=f"{len(model.all)} tensors, {count / 1e6:.1f} M {args.dtype}, {args.device}"
    )
    for column in ("penalty", "way", "ms", "middle half", "times by hand"):
        table.add_column(column, justify="left" if column in ("penalty", "way") else "right")
    for norm, ways in cells.items():
        reference = statistics.median(times[norm, "by hand + backward"][2:])
        for way in ways:
            low, middle, high = statistics.quantiles(times[norm, way][2:], n=4)
            table.add_row(
                norm, way, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", f"{reference / middle:.1f}x"
            )
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
