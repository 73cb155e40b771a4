"""A deep network that dies under naive initialization and lives under each right one.

    python examples/initialization.py                # writes results/initialization.png

Thirty layers without norms or skips on the handwritten digits that ship with scikit-learn. Standard
normal weights overflow, small ones put out nothing, and PyTorch's default (variance 1 / (3 fan_in))
fades; variance 2 / fan_in for ReLU, 1 / fan_in for SELU and tanh, and LSUV, which measures instead
of calculating, carry signal and gradient through.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastnorm import StandardScaler
from fastnorm.init import init_, lsuv_


def naive(std: float) -> Callable[[nn.Module, Tensor], object]:
    def fill(model: nn.Module, batch: Tensor) -> None:
        for param in model.parameters():
            nn.init.normal_(param, std=std)

    return fill


# Name: activation, and what initializes the model.
INITS: dict[str, tuple[type[nn.Module], Callable[[nn.Module, Tensor], object]]] = {
    "normal(0, 1)": (nn.ReLU, naive(1.0)),
    "normal(0, 0.01)": (nn.ReLU, naive(0.01)),
    "PyTorch's default": (nn.ReLU, lambda model, batch: None),
    "init_ for relu": (nn.ReLU, lambda model, batch: init_(model, "relu")),
    "init_ for selu": (nn.SELU, lambda model, batch: init_(model, "selu")),
    "init_ for tanh": (nn.Tanh, lambda model, batch: init_(model, "tanh")),
    "lsuv_ (gelu)": (nn.GELU, lambda model, batch: lsuv_(model, batch)),
}
ALIVE = [name for name in INITS if "_" in name]


def build(activation: type[nn.Module], depth: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@torch.no_grad()
def signal(model: nn.Sequential, x: Tensor) -> list[float]:
    """The standard deviation of every linear layer's output."""
    stds = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            stds.append(x.std().item())
    return stds


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, advance: Callable[[], None]
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
        advance()
    return losses


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns the test accuracy under each initialization."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("results/initialization.png"))
    parser.add_argument("--quick", action="store_true", help="few epochs, for a test")
    args = parser.parse_args(arguments)
    epochs = 2 if args.quick else args.epochs
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_rows, test_rows = order[:1400], order[1400:]
    scaler = StandardScaler(x.shape[1])
    scaler.fit(x[train_rows])
    x = scaler(x)

    table = Table(
        title=f"{args.depth} layers on {len(train_rows)} digits, {epochs} epochs",
        caption="std of the first and the last layer's output, gradient of the first layer",
    )
    for column in ("init", "std, first", "std, last", "gradient", "loss", "accuracy"):
        table.add_column(column, justify="left" if column == "init" else "right")
    signals, curves, accuracies = {}, {}, {}
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Training", total=len(INITS) * epochs)
        for name, (activation, initialize) in INITS.items():
            torch.manual_seed(0)
            model = build(activation, args.depth)
            initialize(model, x[train_rows])
            signals[name] = signal(model, x[train_rows])
            F.cross_entropy(model(x[train_rows]), y[train_rows]).backward()
            gradient = model[0].weight.grad.norm().item()
            curves[name] = train(
                model, x[train_rows], y[train_rows], epochs, lambda: progress.advance(task)
            )
            with torch.no_grad():
                right = model(x[test_rows]).argmax(1) == y[test_rows]
            accuracies[name] = right.double().mean().item()
            table.add_row(
                name,
                *(f"{signals[name][layer]:.1e}" for layer in (0, -1)),
                f"{gradient:.1e}",
                f"{curves[name][-1]:.3g}",
                f"{accuracies[name]:.1%}",
            )
    console.print(table)
    draw(signals, curves, args.output)
    console.print(f"Signal and loss: {args.output}")
    return accuracies


def draw(signals: dict[str, list[float]], curves: dict[str, list[float]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, stds in signals.items():
        style = "-" if name in ALIVE else "--"
        left.semilogy(range(1, len(stds) + 1), stds, style, label=name)
        shown = [min(loss, 4.0) if math.isfinite(loss) else 4.0 for loss in curves[name]]
        right.plot(range(1, len(shown) + 1), shown, style, label=name)
    left.set(xlabel="layer", ylabel="standard deviation of the output", title="Before training")
    right.set(xlabel="epoch", ylabel="training loss, cut off at 4", title="Training")
    left.legend(fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
