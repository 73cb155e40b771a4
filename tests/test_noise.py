"""Gaussian noise, Gaussian dropout and calibrated DropBlock: moments, borders, generators."""

from __future__ import annotations

import math

import pytest
import torch

import fastnorm
from fastnorm.testing import rng_state, seeded


def test_C10_gaussian_noise_moments():
    m = fastnorm.GaussianNoise(0.5)
    x = torch.randn(100_000, dtype=torch.float64)
    noise = m(x) - x
    n = x.numel()
    assert abs(noise.mean()) < 4 * 0.5 / math.sqrt(n)
    # The variance of a sample variance of normals is 2 sigma^4 / n.
    assert abs(noise.var() - 0.25) < 4 * 0.25 * math.sqrt(2 / n)
    assert m.eval()(x) is x
    assert fastnorm.GaussianNoise(0.0)(x) is x
    assert "std=0.5" in repr(m)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_C10_gaussian_dropout_moments(p):
    m = fastnorm.GaussianDropout(p)
    n = 100_000
    y = m(torch.full((n,), 3.0, dtype=torch.float64)) / 3
    variance = p / (1 - p)
    assert abs(y.mean() - 1) < 4 * math.sqrt(variance / n)
    assert abs(y.var() - variance) < 4 * variance * math.sqrt(2 / n)
    x = torch.ones(4)
    assert m.eval()(x) is x
    x.requires_grad_()
    y = m.train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    ("size", "block", "p"),
    [(14, 7, 0.1), (14, 7, 0.5), (5, 7, 0.3), (14, 4, 0.3), (28, 7, 0.1)],
)
def test_dropblock_rate_is_p_everywhere(size, block, p):
    n = 4000
    y = fastnorm.DropBlock2d(p, block)(torch.ones(n, 1, size, size))
    rate = (y == 0).float().mean(0)[0]
    # Samples are independent; 5 sigma, because up to 784 positions are looked at.
    assert (rate - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))


def test_dropblock_drops_blocks():
    y = fastnorm.DropBlock2d(0.2, 3)(torch.ones(50, 2, 20, 20))
    inner = (y == 0)[..., 1:-1, 1:-1]
    horizontal = inner[..., 1:] & inner[..., :-1]
    assert horizontal.float().mean() > 2 * 0.2**2


def test_dropblock_options():
    x = torch.randn(3, 4, 9, 8)
    coupled = fastnorm.DropBlock2d(0.4, 3, couple_channels=True)(x) == 0
    assert torch.equal(coupled.all(1), coupled.any(1))
    paper = fastnorm.DropBlock2d(0.5, 7, calibrated=False)(torch.ones(400, 1, 14, 14))
    assert 0.25 < (paper == 0).float().mean() < 0.45
    assert "calibrated=False" in repr(fastnorm.DropBlock2d(0.5, 7, calibrated=False))
    m = fastnorm.DropBlock2d(1.0, 2)
    assert (m(x) == 0).all()
    assert m.eval()(x) is x
    assert fastnorm.DropBlock2d(0.0, 2)(x) is x
    inf = torch.full((2, 2, 6, 6), math.inf)
    y = fastnorm.DropBlock2d(0.5, 2)(inf)
    assert ((y == 0) | (y == math.inf)).all() and (y == 0).any()


def test_dropblock3d_rate():
    n, p = 1500, 0.3
    y = fastnorm.DropBlock3d(p, 2)(torch.ones(n, 1, 5, 4, 3))
    rate = (y == 0).float().mean(0)
    assert (rate - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: fastnorm.GaussianNoise(0.5, generator=g),
        lambda g: fastnorm.GaussianDropout(0.5, generator=g),
        lambda g: fastnorm.DropBlock2d(0.5, 2, generator=g),
    ],
)
def test_generators(make):
    x = torch.ones(2, 3, 8, 8)
    g = seeded(1)
    state = rng_state()
    a = make(g)(x)
    assert torch.equal(rng_state(), state)
    assert torch.equal(make(g.manual_seed(1))(x), a)
    assert not torch.equal(make(g)(x), a)


def test_errors():
    for error, match, call in [
        (ValueError, "std: ", lambda: fastnorm.GaussianNoise(-1.0)),
        (ValueError, "std: ", lambda: fastnorm.GaussianNoise(math.nan)),
        (ValueError, "p: ", lambda: fastnorm.GaussianDropout(1.0)),
        (ValueError, "p: ", lambda: fastnorm.DropBlock2d(1.5, 3)),
        (ValueError, "block_size: ", lambda: fastnorm.DropBlock2d(0.5, 0)),
        (ValueError, "input: ", lambda: fastnorm.DropBlock2d(0.5, 3)(torch.ones(3, 4, 5))),
        (TypeError, "input: ", lambda: fastnorm.GaussianNoise(0.5)(torch.arange(3))),
    ]:
        with pytest.raises(error, match=match):
            call()
