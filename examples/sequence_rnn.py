"""Recurrent nets that read handwritten digits row by row: LSTM, and LSTM with layer norm.

    python examples/sequence_rnn.py           # writes results/sequence_rnn.png

Each image is a sequence of 8 rows of 8 pixels, the class comes after the last one. Layer norm can
stand after the LSTM, on the one step that is used (normalizing all of them would be wasted), or
inside its cell (Ba et al., "Layer normalization", 2016), where every step's gates get inputs of one
scale. Each net trains with the learning rate that a range test suggests for it, and stops early.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastnorm
from fastnorm import EarlyStopping, LRFindResult, cross_entropy, lr_find

Part = tuple[Tensor, Tensor]
WIDTH = 64


class LayerNormLSTM(nn.Module):
    """An LSTM layer whose gates and cell are layer-normalized: (N, L, inputs) -> (N, L, width)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.from_input = nn.Linear(inputs, 4 * width, bias=False)
        self.from_hidden = nn.Linear(width, 4 * width, bias=False)
        self.norm_input = fastnorm.LayerNorm(4 * width)
        self.norm_hidden = fastnorm.LayerNorm(4 * width)
        self.norm_cell = fastnorm.LayerNorm(width, activation="tanh")
        nn.init.orthogonal_(self.from_hidden.weight)

    def forward(self, x: Tensor) -> Tensor:
        # What depends on the input alone is computed for all steps at once.
        driven = self.norm_input(self.from_input(x)).unbind(1)
        hidden = cell = x.new_zeros(x.shape[0], self.width)
        outputs = []
        for step in driven:
            gates = self.norm_hidden(self.from_hidden(hidden), step)
            enter, forget, leave, candidate = gates.chunk(4, dim=1)
            # 1 is added so that the cell remembers until it learns to forget.
            cell = (forget + 1).sigmoid() * cell + enter.sigmoid() * candidate.tanh()
            hidden = leave.sigmoid() * self.norm_cell(cell)
            outputs.append(hidden)
        return torch.stack(outputs, 1)


class RowReader(nn.Module):
    """Class of an image from its rows, (N, 8, 8) -> (N, 10)."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        inside = norm == "inside the cell"
        self.rnn = LayerNormLSTM(8, WIDTH) if inside else nn.LSTM(8, WIDTH, batch_first=True)
        self.norm = fastnorm.LayerNorm(WIDTH) if norm == "last step" else nn.Identity()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, rows: Tensor) -> Tensor:
        outputs = self.rnn(rows)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.head(self.norm(outputs[:, -1]))


@dataclass
class Run:
    model: nn.Module
    rates: LRFindResult
    stopper: EarlyStopping
    seconds: float = 0.0
    val_accuracy: list[float] = field(default_factory=list)


def load() -> tuple[Part, Part, Part]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = (
        fastnorm.StandardScaler()
        .fit(images[order[:900]].reshape(-1, 1))(images.unsqueeze(-1))
        .squeeze(-1)
    )
    train, val, test = ((images[part], labels[part]) for part in order.split([900, 400, 497]))
    return train, val, test


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    return (model.eval()(part[0]).argmax(1) == part[1]).float().mean().item()


def train(norm: str, data: Part, val: Part, epochs: int, progress: Progress) -> Run:
    torch.manual_seed(0)
    model = RowReader(norm)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = data

    def step(batch: Tensor) -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch], label_smoothing=0.05)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    batches = itertools.cycle(torch.arange(len(x)).split(100))
    rates = lr_find(
        lambda: step(next(batches)), optimizer, start_lr=1e-5, num_iter=80, beta=0.9, restore=model
    )
    for group in optimizer.param_groups:
        group["lr"] = rates.suggestion or 3e-3
    run = Run(model, rates, EarlyStopping(patience=8, mode="max", keep_best="cpu"))
    task = progress.add_task(f"layer norm {norm}", total=epochs)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            step(batch)
        run.val_accuracy.append(accuracy(model, val))
        progress.update(task, advance=1)
        if run.stopper.step(run.val_accuracy[-1], model=model):
            break
    run.seconds = (time.perf_counter() - start) / len(run.val_accuracy)
    progress.update(task, completed=epochs)
    run.stopper.restore_best_(model)
    return run


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns the test accuracy of each net."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("results/sequence_rnn.png"))
    parser.add_argument("--quick", action="store_true", help="few epochs, for a test")
    args = parser.parse_args(arguments)
    epochs = min(args.epochs, 4) if args.quick else args.epochs
    train_part, val, test = load()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        runs = {
            norm: train(norm, train_part, val, epochs, progress)
            for norm in ("nowhere", "last step", "inside the cell")
        }

    table = Table(title=f"{len(train_part[0])} digits, row by row")
    columns = ("layer norm", "rate", "epochs", "best", "s/epoch", "validation", "test")
    for column in columns:
        table.add_column(column, justify="left" if column == "layer norm" else "right")
    accuracies = {}
    for norm, run in runs.items():
        accuracies[norm] = accuracy(run.model, test)
        table.add_row(
            norm,
            f"{run.rates.suggestion or 3e-3:.1e}",
            str(len(run.val_accuracy)),
            f"epoch {run.stopper.best_step}",
            f"{run.seconds:.2f}",
            f"{run.stopper.best or 0:.1%}",
            f"{accuracies[norm]:.1%}",
        )
    console.print(table)
    draw(runs, args.output)
    console.print(f"Range test and training: {args.output}")
    return accuracies


def draw(runs: dict[str, Run], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for norm, run in runs.items():
        (line,) = left.semilogx(run.rates.lrs, run.rates.smoothed, label=norm)
        if run.rates.suggestion:
            left.axvline(run.rates.suggestion, linestyle="--", color=line.get_color())
        right.plot(range(1, len(run.val_accuracy) + 1), run.val_accuracy, label=norm)
    left.set(xlabel="learning rate", ylabel="loss", title="range test, dashed: suggestion")
    right.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0.5, 1), title="training")
    right.legend(title="layer norm")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
