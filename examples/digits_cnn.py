"""A convolutional net on handwritten digits, plain and with the usual regularization.

    python examples/digits_cnn.py             # writes results/digits_cnn.png

The regularized net has batch norm, dropout after the last one, label smoothing, an L2 penalty on
the weights and early stopping with the best weights restored. Both see the same 300 images, few
enough to overfit; the rest of the 1797 that ship with scikit-learn validate and test.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnorm
from fastnorm import EarlyStopping, Regularizer, check_model, cross_entropy, overfitting_gap


@dataclass
class Data:
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Run:
    """A trained model and its history, one entry per epoch."""

    model: nn.Module
    stopper: EarlyStopping
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)


def load(train: int = 300, val: int = 600) -> Data:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    # The pixels' mean and deviation come from the training images alone.
    scaler = fastnorm.StandardScaler(1, dim=1).fit(images[order[:train]])
    parts = order.split([train, val, len(order) - train - val])
    return Data(*((scaler(images[part]), labels[part]) for part in parts))


def make_model(regularized: bool) -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        if regularized:
            # The norm's mean would cancel a bias; its activation is fused into it.
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [conv, fastnorm.BatchNorm2d(outputs, activation="relu")]
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]

    dropout = [fastnorm.Dropout(0.5)] if regularized else []
    return nn.Sequential(
        *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2),
        nn.Flatten(), *dropout, nn.Linear(256, 10),
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss (never smoothed, to be comparable) and accuracy."""
    logits = model.eval()(part[0])
    right = (logits.argmax(1) == part[1]).float().mean()
    return cross_entropy(logits, part[1]).item(), right.item()


def train(data: Data, regularized: bool, epochs: int, progress: Progress) -> Run:
    torch.manual_seed(0)
    model = make_model(regularized)
    for finding in check_model(model, data.train[0][:64]):
        progress.console.print(finding)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if regularized:
        Regularizer(model, fastnorm.L2(1e-2, half=True)).attach(optimizer, "decoupled")
    # The plain net trains to the end: patience is one more than there are epochs.
    stopper = EarlyStopping(15 if regularized else epochs + 1, keep_best="cpu")
    run = Run(model, stopper)
    task = progress.add_task("regularized" if regularized else "plain", total=epochs)
    smoothing = 0.1 if regularized else 0.0
    x, y = data.train
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch], label_smoothing=smoothing).backward()
            optimizer.step()
        run.train_loss.append(evaluate(model, data.train)[0])
        run.val_loss.append(evaluate(model, data.val)[0])
        progress.update(task, advance=1)
        if stopper.step(run.val_loss[-1], model=model):
            break
    progress.update(task, completed=epochs)
    if regularized:
        stopper.restore_best_(model)
    return run


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns the test accuracy of each net."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--output", type=Path, default=Path("results/digits_cnn.png"))
    parser.add_argument("--quick", action="store_true", help="few epochs, for a test")
    args = parser.parse_args(arguments)
    epochs = min(args.epochs, 8) if args.quick else args.epochs
    data = load()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        runs = {
            name: train(data, name == "regularized", epochs, progress)
            for name in ("plain", "regularized")
        }

    table = Table(
        title=f"{len(data.train[0])} training digits, {len(data.test[0])} test digits",
        caption="train, test: cross-entropy",
    )
    columns = ("net", "epochs", "stopped by", "weights", "train", "test", "accuracy")
    for column in columns:
        table.add_column(column, justify="left" if column == "net" else "right")
    accuracies = {}
    for name, run in runs.items():
        loss, accuracies[name] = evaluate(run.model, data.test)
        table.add_row(
            name,
            str(len(run.val_loss)),
            run.stopper.reason or "last epoch",
            f"epoch {run.stopper.best_step if name == 'regularized' else len(run.val_loss)}",
            f"{evaluate(run.model, data.train)[0]:.4f}",
            f"{loss:.4f}",
            f"{accuracies[name]:.1%}",
        )
    console.print(table)
    for name, run in runs.items():
        gap = overfitting_gap(run.train_loss, run.val_loss, window=5)
        verdict = f"overfits since epoch {gap.best_step}" if gap.overfitting else "does not overfit"
        console.print(f"{name}: {verdict}; validation loss {gap.gap:.3f} above training loss")
    draw(runs, args.output)
    console.print(f"Losses by epoch: {args.output}")
    return accuracies


def draw(runs: dict[str, Run], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        epochs = range(1, len(run.val_loss) + 1)
        axis.semilogy(epochs, run.train_loss, label="training")
        axis.semilogy(epochs, run.val_loss, label="validation")
        axis.axvline(
            run.stopper.best_step, linestyle="--", color="grey", label="lowest validation loss"
        )
        axis.set_title(name)
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("cross-entropy")
    axes[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
