"""Trains a small vision transformer on the UCI digits, with torch.nn norms and with fastnorm.

    python examples/digits.py            # or: make demo

The model is a pre-norm transformer with RMS norm before each branch, and on queries and keys, as in
today's language models. It is written once; the norm classes are its argument. Both copies start
from the same weights and see the same batches, and their steps alternate, so that whatever else the
machine does slows down both. The images are real, 1797 handwritten digits of 8 x 8 pixels, and ship
with scikit-learn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnorm


class TorchAddRMSNorm(nn.RMSNorm):
    """What fastnorm.AddRMSNorm does in one pass, by torch: the sum, and the sum normalized."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


class TorchAddLayerNorm(nn.LayerNorm):
    """What fastnorm.AddLayerNorm does in one pass, by torch."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return super().forward(total), total


# For each kind of norm and each library: the plain norm, and the norm after a residual add.
NORMS = {
    "rms": {
        "torch.nn": (nn.RMSNorm, TorchAddRMSNorm),
        "fastnorm": (fastnorm.RMSNorm, fastnorm.AddRMSNorm),
    },
    "layer": {
        "torch.nn": (nn.LayerNorm, TorchAddLayerNorm),
        "fastnorm": (fastnorm.LayerNorm, fastnorm.AddLayerNorm),
    },
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = norm(width // heads)
        self.key_norm = norm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).contiguous()
        y = F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Takes the stream normalized and plain, and returns it so, both branches added."""

    def __init__(
        self, width: int, heads: int, norm: type[nn.Module], add_norm: type[nn.Module]
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, norm)
        self.attention_norm = add_norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.mlp_norm = add_norm(width)

    def forward(self, normed: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        normed, stream = self.attention_norm(self.attention(normed), stream)
        return self.mlp_norm(self.mlp(normed), stream)


class DigitsTransformer(nn.Module):
    """Images (batch, 8, 8) to logits (batch, 10); every patch of 2 x 2 pixels is a token."""

    def __init__(
        self,
        norm: type[nn.Module],
        add_norm: type[nn.Module],
        width: int = 64,
        heads: int = 4,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.norm = norm(width)
        self.blocks = nn.ModuleList(Block(width, heads, norm, add_norm) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.position
        normed = self.norm(stream)
        for block in self.blocks:
            normed, stream = block(normed, stream)
        return self.head(normed.mean(dim=1))


class Run:
    """One model in training, and what was measured of it."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 3e-3, steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracies: list[float] = []
        self.validation_loss = float("nan")

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def validate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        logits = self.model(images)
        self.model.train()
        self.accuracies.append((logits.argmax(1) == labels).float().mean().item())
        self.validation_loss = F.cross_entropy(logits, labels).item()


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels (1437), then validation images and labels (360)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = order[:1437], order[1437:]
    return images[train], labels[train], images[valid], labels[valid]


def train(kind: str, epochs: int, batch: int, console: Console) -> dict[str, Run]:
    """Trains both copies, step by step in turn."""
    images, labels, valid_images, valid_labels = load()
    steps = len(labels) // batch  # of an epoch; the last, smaller batch is left out
    runs: dict[str, Run] = {}
    for name, classes in NORMS[kind].items():
        torch.manual_seed(0)
        runs[name] = Run(DigitsTransformer(*classes), steps * epochs)
    columns = (
        TextColumn("{task.fields[epoch]:>2}"),
        BarColumn(bar_width=12),
        TextColumn("{task.description}"),
    )
    shuffle = torch.Generator().manual_seed(1)
    console.print("epoch by epoch, " + " / ".join(runs))
    with Progress(*columns, console=console) as progress:
        for epoch in range(epochs):
            task = progress.add_task("", total=steps, epoch=epoch + 1)
            order = torch.randperm(len(labels), generator=shuffle)
            for i in range(steps):
                chosen = order[i * batch : (i + 1) * batch]
                turn = list(runs.values())
                for run in turn if i % 2 else reversed(turn):
                    run.step(images[chosen], labels[chosen])
                progress.advance(task)
            for run in runs.values():
                run.validate(valid_images, valid_labels)
            progress.update(
                task,
                description=(
                    "loss "
                    + " / ".join(f"{statistics.fmean(r.losses[-steps:]):.3f}" for r in turn)
                    + "  accuracy "
                    + " / ".join(f"{r.accuracies[-1]:.1%}" for r in turn)
                    + "  step "
                    + " / ".join(f"{1e3 * r.seconds[-1]:.0f}" for r in turn)
                    + " ms"
                ),
            )
    return runs


def table(runs: dict[str, Run], kind: str) -> Table:
    """Quality and speed of both, and fastnorm's against torch's."""
    torch_run, fast_run = runs.values()
    # Where the time of a step is unusual it is the machine's doing; medians leave that out.
    before, after = (statistics.median(run.seconds) for run in runs.values())
    result = Table(title=f"UCI digits, {kind} norm, {len(torch_run.seconds)} steps each")
    for heading in ("", *runs, "ratio"):
        result.add_column(heading, justify="right" if heading else "left")
    for label, field, form in (
        ("validation accuracy", lambda run: run.accuracies[-1], "{:.2%}"),
        ("validation loss", lambda run: run.validation_loss, "{:.4f}"),
        ("last training loss", lambda run: run.losses[-1], "{:.4f}"),
    ):
        result.add_row(label, *(form.format(field(run)) for run in (torch_run, fast_run)), "")
    style = "bold green" if before > after else "bold red"
    result.add_row(
        "time per step, median",
        f"{1e3 * before:.2f} ms",
        f"{1e3 * after:.2f} ms",
        f"[{style}]{before / after:.2f}x[/]",
    )
    return result


def plot(runs: dict[str, Run], kind: str, path: Path) -> None:
    """Both training curves, both accuracies, and the time of every step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    styles = {
        "torch.nn": {"color": "#b2182b", "lw": 3, "alpha": 0.55},
        "fastnorm": {"color": "#2166ac", "lw": 1.4},
    }
    figure, (loss, accuracy, steps) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    medians = [1e3 * statistics.median(run.seconds) for run in runs.values()]
    for (name, run), median in zip(runs.items(), medians, strict=True):
        loss.plot(run.losses, label=name, **styles[name])
        epochs = range(1, len(run.accuracies) + 1)
        accuracy.plot(epochs, [100 * a for a in run.accuracies], label=name, **styles[name])
        milliseconds = [1e3 * s for s in run.seconds]
        steps.plot(milliseconds, ".", ms=3, alpha=0.4, color=styles[name]["color"])
        label = f"{name}: {median:.1f} ms"
        steps.axhline(median, color=styles[name]["color"], lw=2, label=label)
    loss.set(title="training loss", xlabel="step", yscale="log")
    accuracy.set(title="validation accuracy", xlabel="epoch", ylabel="%")
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set_ylim(bottom=max(0, 100 * min(r.accuracies[0] for r in runs.values()) - 5), top=101)
    title = f"time per step: torch.nn / fastnorm = {medians[0] / medians[1]:.2f}"
    steps.set(title=title, xlabel="step", ylabel="ms", ylim=(0, 1.8 * max(medians)))
    for axes in (loss, accuracy, steps):
        axes.legend(frameon=False)
        axes.grid(color="#e5e5e5", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"UCI digits, transformer with {kind} norm, same weights and batches for both libraries "
        f"({torch.get_num_threads()} CPU threads, torch {torch.__version__})",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=list(NORMS), default="rms")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    parser.add_argument("--output", type=Path, default=Path("results/digits.png"))
    arguments = parser.parse_args(argv)
    console = Console()
    # The first call compiles the kernels, showing progress; no training step has to wait for it.
    fastnorm.rms_norm(torch.zeros(1, 8), (8,))
    epochs = 2 if arguments.quick else arguments.epochs
    runs = train(arguments.norm, epochs, arguments.batch, console)
    console.print(table(runs, arguments.norm))
    plot(runs, arguments.norm, arguments.output)
    print(f"training curves and time per step: {arguments.output}")
    return runs


if __name__ == "__main__":
    main()
