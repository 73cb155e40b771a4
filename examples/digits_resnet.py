"""Trains a small ResNet on the UCI digits, with torch.nn batch norm and with fastnorm's, fused.

    python examples/digits_resnet.py             # --channels-last, --quick

A residual block ends in ``relu(norm(x) + shortcut)``. With fastnorm that is one call,
``norm(x, shortcut)`` of a ``BatchNorm2d(..., activation="relu")``: one pass over memory in place of
three, and one in place of two for the other norms. Both models start from the same weights, see the
same batches and take their steps in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnorm


class TorchNorm(nn.BatchNorm2d):
    """Batch norm, the shortcut and ReLU, as torch.nn has them: three operations."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return F.relu(y if residual is None else y + residual)


class FusedNorm(fastnorm.BatchNorm2d):
    """The same in one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, activation="relu")


NORMS = {"torch.nn": TorchNorm, "fastnorm": FusedNorm}


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.norm1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = norm(out)
        self.shortcut = (
            nn.Identity() if width == out else nn.Conv2d(width, out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(h), self.shortcut(x))


class DigitsResNet(nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10)."""

    def __init__(self, norm: type[nn.Module], width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = norm(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1, norm),
            Block(width, 2 * width, 2, norm),
            Block(2 * width, 2 * width, 1, norm),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem_norm(self.stem(images)))
        return self.head(x.mean((2, 3)))


def train(
    epochs: int, batch: int, channels_last: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Losses and seconds of every step, and the accuracies at the end."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen, held_out = order[:1437], order[1437:]
    memory = torch.channels_last if channels_last else torch.contiguous_format
    models: dict[str, nn.Module] = {}
    optimizers = {}
    for name, norm in NORMS.items():
        torch.manual_seed(0)
        models[name] = DigitsResNet(norm).to(memory_format=memory)
        optimizers[name] = torch.optim.SGD(
            models[name].parameters(), 0.05, momentum=0.9, weight_decay=5e-4
        )
    losses: dict[str, list[float]] = {name: [] for name in NORMS}
    seconds: dict[str, list[float]] = {name: [] for name in NORMS}
    shuffle = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for index in chosen[torch.randperm(len(chosen), generator=shuffle)].split(batch):
            x = images[index].contiguous(memory_format=memory)
            for name, model in models.items():
                start = time.perf_counter()
                loss = F.cross_entropy(model(x), labels[index])
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
                seconds[name].append(time.perf_counter() - start)
                losses[name].append(loss.item())
    accuracies = {}
    with torch.no_grad():
        for name, model in models.items():
            hits = model.eval()(images[held_out]).argmax(1) == labels[held_out]
            accuracies[name] = hits.float().mean().item()
    return losses, seconds, accuracies


def plot(losses: dict[str, list[float]], seconds: dict[str, list[float]], path: Path) -> None:
    """Both training curves, and the time of every step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, steps) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {"torch.nn": {"lw": 3, "alpha": 0.55}, "fastnorm": {"lw": 1.4}}
    for name, style in styles.items():
        median = 1e3 * statistics.median(seconds[name])
        curve.plot(losses[name], label=name, **style)
        steps.plot([1e3 * s for s in seconds[name]], ".", ms=3, label=f"{name}: {median:.1f} ms")
    curve.set(title="training loss", xlabel="step", yscale="log")
    steps.set(title="time per step", xlabel="step", ylabel="ms", ylim=(0, None))
    for axes in (curve, steps):
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one epoch")
    parser.add_argument("--output", type=Path, default=Path("results/digits_resnet.png"))
    arguments = parser.parse_args(argv)
    # The first call compiles the kernels, showing progress; no training step has to wait for it.
    fastnorm.group_norm(torch.zeros(1, 2, 4), 1)
    epochs = 1 if arguments.quick else arguments.epochs
    losses, seconds, accuracies = train(epochs, arguments.batch, arguments.channels_last)
    table = Table("", *NORMS, title="UCI digits, ResNet of 7 batch norms")
    table.add_row("validation accuracy", *(f"{accuracies[name]:.1%}" for name in NORMS))
    table.add_row("last training loss", *(f"{losses[name][-1]:.4f}" for name in NORMS))
    table.add_row(
        "time per step, median",
        *(f"{1e3 * statistics.median(seconds[name]):.1f} ms" for name in NORMS),
    )
    Console().print(table)
    plot(losses, seconds, arguments.output)
    return losses


if __name__ == "__main__":
    main()
