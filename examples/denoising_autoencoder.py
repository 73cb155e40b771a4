"""A denoising autoencoder on handwritten digits: Gaussian noise on the input, while training only.

    python examples/denoising_autoencoder.py  # writes results/denoising_autoencoder.png

The net is asked for the clean image and given a noisy one (Vincent et al., "Extracting and
composing robust features with denoising autoencoders", 2008). The noise is a layer of the model,
so that `eval()` turns it off. The same net trained without noise is there to compare: it copies,
and what it has learned to copy includes the noise it meets later.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnorm
from fastnorm import EarlyStopping


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Images as rows of 64 pixels from 0 to 1: training, validation, test."""
    images = torch.from_numpy(load_digits().data).float() / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, val, test = order.split([1000, 300, len(images) - 1300])
    return images[train], images[val], images[test]


def make_model(noise: float, width: int) -> nn.Sequential:
    return nn.Sequential(
        fastnorm.GaussianNoise(noise),
        nn.Linear(64, 4 * width),
        fastnorm.LayerNorm(4 * width, activation="relu"),
        nn.Linear(4 * width, width),
        nn.Linear(width, 4 * width),
        fastnorm.LayerNorm(4 * width, activation="relu"),
        nn.Linear(4 * width, 64),
    )


@torch.no_grad()
def error(model: nn.Module, noisy: Tensor, clean: Tensor) -> float:
    """Root mean square error of the restored pixels."""
    return F.mse_loss(model.eval()(noisy), clean).sqrt().item()


def train(
    model: nn.Module, images: Tensor, val: tuple[Tensor, Tensor], epochs: int, progress: Progress
) -> EarlyStopping:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    stopper = EarlyStopping(patience=30, keep_best="cpu")
    task = progress.add_task(f"trained with noise {model[0].std}", total=epochs)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.mse_loss(model(images[batch]), images[batch]).backward()
            optimizer.step()
        progress.update(task, advance=1)
        if stopper.step(error(model, *val), model=model):
            break
    progress.update(task, completed=epochs)
    stopper.restore_best_(model)
    return stopper


def main(arguments: list[str] | None = None) -> dict[float, float]:
    """Returns the error on noisy test images, by the noise in training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation")
    parser.add_argument("--width", type=int, default=32, help="size of the code")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("results/denoising_autoencoder.png"))
    parser.add_argument("--quick", action="store_true", help="few epochs, for a test")
    args = parser.parse_args(arguments)
    epochs = min(args.epochs, 15) if args.quick else args.epochs
    images, val, test = load()
    generator = torch.Generator().manual_seed(1)

    def corrupt(clean: Tensor) -> Tensor:
        return clean + args.noise * torch.randn(clean.shape, generator=generator)

    noisy_val, noisy_test = corrupt(val), corrupt(test)
    console = Console()
    table = Table(title=f"restoring pixels (0 to 1) with noise of deviation {args.noise:g}")
    for column in ("", "epochs", "error on noisy", "error on clean"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("noisy images as they are", "-", f"{(noisy_test - test).std():.3f}", "0.000")
    errors, restored = {}, {}
    with Progress(console=console, transient=True) as progress:
        for noise in (0.0, args.noise):
            torch.manual_seed(0)
            model = make_model(noise, args.width)
            # Without noise in training, stopping by noisy images would be a kind of training on
            # them.
            watched = (noisy_val if noise else val, val)
            stopper = train(model, images, watched, epochs, progress)
            errors[noise] = error(model, noisy_test, test)
            clean = f"{error(model, test, test):.3f}"
            name = f"trained with noise {noise:g}"
            table.add_row(name, str(stopper.num_steps), f"{errors[noise]:.3f}", clean)
            with torch.no_grad():
                restored[name] = model.eval()(noisy_test)
    console.print(table)
    draw({"clean": test, "noisy": noisy_test, **restored}, args.output)
    console.print(f"Digits before and after: {args.output}")
    return errors


def draw(rows: dict[str, Tensor], output: Path, columns: int = 12) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), columns, figsize=(10, 4), layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_title(name, loc="left", fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
