"""Group norm against torch's, in both memory layouts, with what follows it and with masks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from channel_norm_checks import (
    LAYOUTS,
    channels_last,
    check,
    check_derivatives,
    composed,
    parameters,
    strides,
    with_gradients,
)
from torch import nn

import fastnorm
from fastnorm import _build
from fastnorm.epilogue import ACTIVATIONS
from fastnorm.testing import seeded

SHAPES = [(3, 6), (2, 6, 7), (2, 6, 3, 5), (1, 6, 2, 3, 2)]


def ours(groups, activation=None, **kwargs):
    return lambda x, w, b, r=None: fastnorm.group_norm(
        x, groups, w, b, activation=activation, residual=r, **kwargs
    )


def theirs(groups, activation=None):
    return composed(lambda x, w, b: F.group_norm(x, groups, w, b), activation)


def affine_apart(x, w, b):
    """Torch 2.13's backward fails where only one of weight and bias is given."""
    y = F.group_norm(x, 2)
    spread = (-1,) + (1,) * (x.dim() - 2)
    y = y if w is None else y * w.view(spread)
    return y if b is None else y + b.view(spread)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_derivatives(memory, activation, residual):
    for weight, bias in itertools.product([False, True], repeat=2):
        x, r = (LAYOUTS[memory](t) for t in torch.randn(2, 2, 4, 2, 3, dtype=torch.float64))
        tensors = [x, *parameters(4, x.dtype, weight, bias), r if residual else None]
        check_derivatives(ours(2, activation), composed(affine_apart, activation), tensors)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(shape, dtype, groups):
    if groups == 6 and len(shape) == 2:
        groups = 2  # of two values, the difference is all there is
    w, b = parameters(6, dtype)
    for layout, of_grad in itertools.product(LAYOUTS, LAYOUTS):
        if len(shape) < 3 and "channels_last" in layout + of_grad:
            continue
        x = LAYOUTS[layout](torch.randn(shape).to(dtype))
        if layout == "expanded" and groups == 6:
            continue  # the variance is 0
        r = LAYOUTS[of_grad](torch.randn(shape).to(dtype))
        check(
            ours(groups, "silu"), theirs(groups, "silu"), [x, w, b, r], r, f"{layout} {of_grad}", 16
        )


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_memory_format_is_kept(backend):
    with fastnorm.use_backend(backend):
        for shape in SHAPES[1:]:
            x = channels_last(torch.randn(shape)).requires_grad_()
            y = fastnorm.group_norm(x, 3, activation="relu")
            assert strides(y) == strides(x)
            y.backward(torch.randn(shape))
            assert strides(x.grad) == strides(x)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(memory):
    x = LAYOUTS[memory](torch.randn(5, 12, 9, 7))
    whole = fastnorm.group_norm(x, 4, activation="silu")
    for i in range(5):
        alone = fastnorm.group_norm(LAYOUTS[memory](x[i : i + 1]), 4, activation="silu")
        assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("length", [5, 150])
def test_a_group_does_not_depend_on_the_others_parameters(activation, length):
    x, w = torch.randn(3, 6, length), torch.randn(6)
    w[2:4] = torch.nan
    y, dx, *_ = with_gradients(ours(3, activation), [x, w, None], torch.randn_like(x))
    groups = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(y.isnan().any(-1).all(0), groups)
    assert torch.equal(dx.isnan().any(-1).all(0), groups)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(weight_dtype):
    x = torch.randn(2, 8, 5).bfloat16()
    w, b = parameters(8, weight_dtype)
    y, dx, dw, db = with_gradients(ours(2), [x, w, b], torch.ones(2, 8, 5))
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == db.dtype == weight_dtype


def test_dropout_is_the_same_on_both_paths_and_layouts():
    x = channels_last(torch.randn(2, 8, 5, 5))
    results = []
    for backend in ("kernel", "reference"):
        with fastnorm.use_backend(backend):
            g = seeded(3)
            results.append(fastnorm.group_norm(x, 2, dropout_p=0.4, generator=g))
    assert torch.equal(results[0] == 0, results[1] == 0)
    torch.testing.assert_close(*results)
    assert 0.2 < (results[0] == 0).float().mean() < 0.6


# ---- masks ----


def test_masked_positions_do_not_count():
    """Each sample as if its padding had been cut off; in the padding 0 and no gradient."""
    lengths = torch.tensor([7, 3, 1, 0])
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    for i, n in enumerate(lengths):
        x[i, :, n:] = float("nan")
    w, b = parameters(6, x.dtype)
    r, grad = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    f = ours(3, "silu", lengths=lengths)
    y, dx, dw, db, dr = with_gradients(f, [x, w, b, r], grad)
    total_dw = torch.zeros_like(w)
    for i, n in enumerate(lengths):
        assert (y[i, :, n:] == 0).all() and (dx[i, :, n:] == 0).all() and (dr[i, :, n:] == 0).all()
        if n == 0:
            continue
        cut = [x[i : i + 1, :, :n], w, b, r[i : i + 1, :, :n]]
        ey, edx, edw, _, edr = with_gradients(theirs(3, "silu"), cut, grad[i : i + 1, :, :n])
        for a, e in ((y, ey), (dx, edx), (dr, edr)):
            torch.testing.assert_close(a[i : i + 1, :, :n], e)
        total_dw += edw
    torch.testing.assert_close(dw, total_dw)
    assert db.isfinite().all()


def test_mask_of_ones_changes_no_bit():
    x = torch.randn(3, 6, 4, 5)
    plain = fastnorm.group_norm(x, 2)
    assert torch.equal(plain, fastnorm.group_norm(x, 2, mask=torch.ones(3, 4, 5)))
    module = fastnorm.GroupNorm(2, 6)
    assert torch.equal(module(x[:, :, 0]), module(x[:, :, 0], lengths=[5, 5, 5]))


def test_mask_is_checked():
    x = torch.randn(3, 6, 5)
    for bad in (torch.ones(3, 4), torch.ones(3, 6, 5), torch.ones(5)):
        with pytest.raises(ValueError, match=r"mask: expected shape \[3, 5\]"):
            fastnorm.group_norm(x, 2, mask=bad)
    with pytest.raises(ValueError, match="lengths: expected 3 integers"):
        fastnorm.group_norm(x, 2, lengths=[1, 2])
    with pytest.raises(ValueError, match="lengths"):
        fastnorm.group_norm(torch.randn(3, 6, 5, 5), 2, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="only one of"):
        fastnorm.group_norm(x, 2, lengths=[1, 2, 3], mask=torch.ones(3, 5))


# ---- modules and errors ----


def test_module_is_torchs():
    ref, mine = nn.GroupNorm(2, 6), fastnorm.GroupNorm(2, 6, activation="silu", dropout_p=0.1)
    assert isinstance(mine, nn.GroupNorm)
    mine.load_state_dict(ref.state_dict(), strict=True)
    ref.load_state_dict(mine.state_dict(), strict=True)
    assert "activation='silu', dropout_p=0.1" in repr(mine)
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(mine.eval()(x), F.silu(ref(x)))
    no_bias = fastnorm.GroupNorm(2, 6, bias=False)
    assert no_bias.bias is None
    assert fastnorm.GroupNorm(2, 6, affine=False).weight is None


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(torch.randn(2, 6, 4), 4),
        lambda f: f(torch.randn(6), 2),
        lambda f: f(torch.randn(1, 2, 1, 1), 2),
        lambda f: f(torch.randn(2, 6, 4), 2, torch.ones(5)),
        lambda f: f(torch.randn(2, 6, 4), 2, None, torch.ones(6, 1)),
        lambda f: f(torch.ones(2, 6, 4, dtype=torch.int64), 2),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises(Exception) as theirs_:
        call(F.group_norm)
    with pytest.raises(theirs_.type):
        call(fastnorm.group_norm)
    with pytest.raises(ValueError, match="divisible"):
        fastnorm.GroupNorm(4, 6)


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (0, 6)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    w, b = (p.requires_grad_() for p in parameters(6, x.dtype))
    y = fastnorm.group_norm(x, 2, w, b, activation="relu")
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert torch.equal(w.grad, torch.zeros(6)) and torch.equal(b.grad, torch.zeros(6))


def test_vmap_of_grad():
    w, b = parameters(6, torch.float64)
    x = torch.randn(3, 2, 6, 4, dtype=torch.float64)

    def loss(w, x):
        return fastnorm.group_norm(x, 2, w, b, activation="silu").pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
    want = torch.stack([torch.func.grad(loss)(w, one) for one in x])
    torch.testing.assert_close(got, want)


class TorchBlock(nn.Module):
    """The residual block of a diffusion U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, 8), nn.GroupNorm(4, 16)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)


class FusedBlock(TorchBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = fastnorm.GroupNorm(4, 8, activation="silu")
        self.norm2 = fastnorm.GroupNorm(4, 16, activation="silu")

    def forward(self, x):
        h = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(h)) + self.shortcut(x)


# Contiguous only: torch 2.13's own convolutional blocks crash in channels-last on some CPUs.
def test_diffusion_block_trains_alike():
    x, target = torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8)
    start = TorchBlock().double().state_dict()
    losses = {}
    for name, cls, dtype in (
        ("exact", TorchBlock, torch.float64),
        ("torch", TorchBlock, torch.float32),
        ("ours", FusedBlock, torch.float32),
    ):
        model = cls().to(dtype)
        model.load_state_dict(copy.deepcopy(start))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[name] = []
        for _ in range(8):
            loss = F.mse_loss(model(x.to(dtype)), target.to(dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    exact = torch.tensor(losses["exact"])
    peer = (torch.tensor(losses["torch"]) - exact).abs().max()
    own = (torch.tensor(losses["ours"]) - exact).abs().max()
    assert own <= 4 * peer + 8 * 2.0**-24 * exact.max()


def test_kernels_run():
    assert _build.load() is not None
    y = fastnorm.group_norm(torch.randn(2, 4, 3, requires_grad=True), 2)
    assert y.grad_fn.name() == "FastnormNormBackward"
