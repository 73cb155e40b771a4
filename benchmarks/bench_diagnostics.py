"""What watching a training step costs: ActivationStats over a small residual net."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from benchmarks.harness import script_of
from fastnorm._bench import Cell, Timer, interleave

CELLS: list[Cell] = []
QUICK = CELLS
CUDA = CELLS
CUDA_QUICK = CELLS


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(x + self.norm2(self.conv2(y)))


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a training step, without and with ActivationStats on every layer."""
    torch.manual_seed(0)
    body = [Block(64) for _ in range(2 if quick else 6)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *body, *head).to(device)
    x = torch.randn(32, 3, 32, 32, device=device)
    target = torch.randint(10, (32,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    def watched() -> None:
        with fastnorm.ActivationStats(model):
            step()

    step()
    seconds = 0.5 if quick else 2.0 if device == "cuda" else 10.0
    calls = {"torch": step, "fastnorm": watched}
    samples, _ = interleave(Timer(device, host=False), calls, seconds, 5)
    medians = {who: statistics.median(times) for who, times in samples.items()}
    return [{"name": "training step, ActivationStats", "unit": "s", **medians}]


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
