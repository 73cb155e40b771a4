"""Layer and RMS norm over the channels of images, in both memory formats (ConvNeXt's norm)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from channel_norm_checks import LAYOUTS, channels_last, check, check_derivatives, parameters

import fastnorm
from fastnorm.epilogue import ACTIVATIONS

SHAPES = [(3, 6), (2, 6, 7), (2, 6, 3, 5), (1, 6, 2, 3, 2), (2, 130, 9, 9)]


def ours(kind, activation=None):
    def run(x, w, b, r=None):
        n = x.shape[1]
        if kind == "layer":
            return fastnorm.layer_norm(x, n, w, b, dim=1, activation=activation, residual=r)
        return fastnorm.rms_norm(x, n, w, 1e-5, dim=1, activation=activation, residual=r)

    return run


def permuted(kind, activation=None):
    def run(x, w, b, r=None):
        n = x.shape[1:2]
        w, b = (None if p is None else p.to(x.dtype) for p in (w, b))
        last = x.movedim(1, -1)
        y = F.layer_norm(last, n, w, b) if kind == "layer" else F.rms_norm(last, n, w, 1e-5)
        y = y.movedim(-1, 1)
        return ACTIVATIONS[activation].function(y if r is None else y + r)

    return run


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_derivatives(activation, memory, kind):
    for residual, weight in itertools.product([False, True], repeat=2):
        x, r = (LAYOUTS[memory](t) for t in torch.randn(2, 2, 4, 2, 3, dtype=torch.float64))
        w, b = parameters(4, x.dtype, weight, kind == "layer")
        check_derivatives(
            ours(kind, activation), permuted(kind, activation), [x, w, b, r if residual else None]
        )


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(shape, dtype, kind):
    w, b = parameters(shape[1], dtype, bias=kind == "layer")
    for layout, of_grad in itertools.product(LAYOUTS, ("contiguous", "channels_last", "expanded")):
        if len(shape) < 3 and "channels_last" in layout + of_grad:
            continue
        if layout == "expanded" and len(shape) == 2:
            continue  # the variance is 0
        x = LAYOUTS[layout](torch.randn(shape).to(dtype))
        r = LAYOUTS[of_grad](torch.randn(shape).to(dtype))
        check(
            ours(kind, "silu"), permuted(kind, "silu"), [x, w, b, r], r, f"{layout} {of_grad}", 16
        )


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_layout_is_kept(kind):
    for memory in (lambda x: x, channels_last):
        x = memory(torch.randn(2, 6, 5, 4)).requires_grad_()
        y = ours(kind)(x, *parameters(6, x.dtype, bias=kind == "layer"))
        assert y.stride() == x.stride()
        y.backward(torch.randn(2, 6, 5, 4))
        assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_makes_no_copy_of_the_input(memory):
    x = LAYOUTS[memory](torch.randn(4, 64, 64, 64))
    w, b = parameters(64, x.dtype)
    ours("layer")(x, w, b)
    with torch.profiler.profile(profile_memory=True) as profile:
        ours("layer")(x, w, b)
    allocated = sum(max(e.cpu_memory_usage, 0) for e in profile.events() if e.cpu_parent is None)
    allocated += sum(max(e.cpu_memory_usage, 0) for e in profile.events() if e.name == "[memory]")
    names = {e.name for e in profile.events()}
    assert not names & {"aten::copy_", "aten::contiguous", "aten::clone"}
    assert allocated < 1.3 * x.nbytes
