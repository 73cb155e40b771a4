"""Gradients of everything that one pass may hold, in every combination; masks and gradients of a
network in every way of running it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.epilogue import ACTIVATIONS

# Each as norm(input, weight, bias, **epilogue), with the input's shape and that of its parameters.
NORMS = {
    "layer": (fastnorm.layer_norm, (3, 4), (4,)),
    "rms": (fastnorm.rms_norm, (3, 4), (4,)),
    "batch": (fastnorm.batch_norm, (3, 2, 2), (2,)),
    "group": (fastnorm.group_norm, (2, 4, 2), (4,)),
    "instance": (fastnorm.instance_norm, (2, 2, 3), (2,)),
}


def call(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, **epilogue: object) -> Tensor:
    function = NORMS[name][0]
    if name == "layer":
        return function(x, weight.shape, weight, bias, **epilogue)
    if name == "rms":
        return function(x, weight.shape, weight, **epilogue)
    if name == "group":
        return function(x, 2, weight, bias, **epilogue)
    if name == "batch":
        return function(x, None, None, weight, bias, training=True, **epilogue)
    return function(x, None, None, weight, bias, **epilogue)


def leaves(*shapes: tuple[int, ...] | None) -> list[Tensor | None]:
    return [
        None if s is None else torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in shapes
    ]


def check_all(function, *tensors: Tensor | None) -> None:
    """First and second derivatives by all tensors; gradients of all outputs are random."""
    given = [t for t in tensors if t is not None]

    def run(*args: Tensor):
        rest = iter(args)
        torch.manual_seed(11)
        return function(*(None if t is None else next(rest) for t in tensors))

    assert gradcheck(run, given)
    assert gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NORMS)
def test_every_epilogue(kernels, name, activation, bias):
    _, shape, parameters = NORMS[name]
    more = {"weight_offset": 0.5} if bias and name == "rms" else {}  # RMS norm has no bias
    for residual, p in itertools.product((None, shape), (0.0, 0.4)):
        check_all(
            lambda x, w, b, r, p=p: call(
                name, x, w, b, residual=r, activation=activation, dropout_p=p, **more
            ),
            *leaves(shape, parameters, parameters if bias and name != "rms" else None, residual),
        )


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_every_prologue(kernels, name, bias, p):
    def run(x, r, w, b):
        if name == "rms":
            return fastnorm.add_rms_norm(x, r, w.shape, w, weight_offset=0.5 * bias, dropout_p=p)
        return fastnorm.add_layer_norm(x, r, w.shape, w, b, dropout_p=p)

    check_all(run, *leaves((3, 4), (3, 4), (4,), (4,) if bias and name == "layer" else None))


# ---------------------------------------------------------------------------------------------
# One network, every way of running it
# ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Dropout in each of its places. Returns what was dropped, too: zeros that show the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.batch = fastnorm.BatchNorm2d(8, activation="relu", dropout_p=0.2)
        self.group = fastnorm.GroupNorm(2, 8, activation="silu", dropout_p=0.3)
        self.channels = fastnorm.Dropout2d(0.3)
        self.linear = nn.Linear(8, 12)
        self.gelu = fastnorm.Dropout(0.3, activation="gelu")
        self.join = fastnorm.AddLayerNorm(12, dropout_p=0.3)
        self.depth = fastnorm.StochasticDepth(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.group(self.batch(self.conv(x)))
        b = self.channels(a)
        h = self.linear(b.flatten(2).transpose(1, 2))
        c = self.gelu(h)
        y, s = self.join(c, h)
        d = self.depth(y, s)
        return d, a, b, c, s - h


def run(model: nn.Module, function, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    outputs = function(x)
    sum(F.mse_loss(y, torch.ones_like(y)) for y in outputs).backward()
    masks = [y.detach().abs() < 1e-7 for y in outputs[1:]]
    return masks, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_same_masks_and_gradients_however_it_runs(backend):
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with fastnorm.use_backend("kernel"):
        masks, gradients = run(model, model, x)
    assert all(0 < m.float().mean() < 1 for m in masks)

    def again(t: Tensor):
        return checkpoint(model, t, use_reentrant=False)

    ways = {
        "eager": model,
        "checkpointed": again,
        "checkpointed, reentrant": lambda t: checkpoint(model, t, use_reentrant=True),
        "compiled": torch.compile(model, backend="aot_eager", fullgraph=True),
        "compiled around a checkpoint": torch.compile(again, backend="aot_eager", fullgraph=True),
    }
    with fastnorm.use_backend(backend):
        for way, function in ways.items():
            torch._dynamo.reset()
            own_masks, own_gradients = run(model, function, x)
            for mine, theirs in zip(own_masks, masks, strict=True):
                assert torch.equal(mine, theirs), way
            for mine, theirs in zip(own_gradients, gradients, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=way)
