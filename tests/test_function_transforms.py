"""`torch.func` and forward mode over every norm and dropout: torch's values, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fastnorm
from fastnorm.testing import random_tensor

C = 4  # channels, and the width of a row
SHAPE = (3, C, 4)
MEAN, VAR = torch.linspace(-1, 1, C).double(), torch.linspace(0.5, 2, C).double()


def over_channels(function: Callable[..., Tensor], *args: Any) -> Tensor:
    x, *rest = args
    return function(x.movedim(1, -1), (C,), *rest).movedim(-1, 1)


def added(norm: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> Tensor:
    y, total = norm(*args)
    return y * total


def add_then(norm: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    total = x + x.sin()
    return norm(total, *args) * total


# Ours and torch's function of (input, weight, bias).
NORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "layer_norm": (
        lambda x, w, b: fastnorm.layer_norm(x, (C,), w, b),
        lambda x, w, b: F.layer_norm(x, (C,), w, b),
    ),
    "layer_norm silu": (
        lambda x, w, b: fastnorm.layer_norm(x, (C,), w, b, activation="silu", residual=x),
        lambda x, w, b: F.silu(F.layer_norm(x, (C,), w, b) + x),
    ),
    "layer_norm dim=1": (
        lambda x, w, b: fastnorm.layer_norm(x, (C,), w, b, dim=1),
        lambda x, w, b: over_channels(F.layer_norm, x, w, b),
    ),
    "rms_norm": (
        lambda x, w, b: fastnorm.rms_norm(x, (C,), w) + b,
        lambda x, w, b: F.rms_norm(x, (C,), w) + b,
    ),
    "rms_norm dim=1": (
        lambda x, w, b: fastnorm.rms_norm(x, (C,), w, dim=1),
        lambda x, w, b: over_channels(F.rms_norm, x, w),
    ),
    "add_layer_norm": (
        lambda x, w, b: added(fastnorm.add_layer_norm, x, x.sin(), (C,), w, b),
        lambda x, w, b: add_then(F.layer_norm, x, (C,), w, b),
    ),
    "add_rms_norm": (
        lambda x, w, b: added(fastnorm.add_rms_norm, x, x.sin(), (C,), w),
        lambda x, w, b: add_then(F.rms_norm, x, (C,), w),
    ),
    "batch_norm": (
        lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    ),
    "batch_norm eval": (
        lambda x, w, b: fastnorm.batch_norm(x, MEAN, VAR, w, b),
        lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b),
    ),
    "group_norm": (
        lambda x, w, b: fastnorm.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
    ),
    "instance_norm": (
        lambda x, w, b: fastnorm.instance_norm(x, weight=w, bias=b),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    ),
}


def formula(x: Tensor, w: Tensor, b: Tensor, dims: tuple[int, ...], centered: bool) -> Tensor:
    """A norm of primitive operators, for the derivatives that torch's own norms get wrong."""
    mean = x.mean(dims, keepdim=True) if centered else 0.0
    var = (x - mean).square().mean(dims, keepdim=True)
    eps = 1e-5 if centered else torch.finfo(x.dtype).eps
    return (x - mean) / (var + eps).sqrt() * w + b


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    x = random_tensor(*SHAPE, dtype=torch.float64)
    weight, bias = random_tensor(2, C, dtype=torch.float64)
    return x, weight, bias


def loss_of(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    coefficients = torch.linspace(-1, 1, 3 * C * 4).double()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = norm(x, w, b)
        return (y.sin() * coefficients[: y.numel()].view(y.shape)).sum()

    return loss


def dual(f: Callable, args: tuple, tangents: tuple) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level():
        primals = [forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(f(*primals)))


ALL = (0, 1, 2)
# What is computed from a norm and its tensors.
TRANSFORMS: dict[str, Callable[[Callable, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, args: torch.func.grad(loss_of(f), ALL)(*args),
    "vjp": lambda f, args: torch.func.vjp(f, *args)[1](torch.cos(args[0])),
    "jvp": lambda f, args: torch.func.jvp(f, args, tuple(t.cos() for t in args)),
    "jacrev": lambda f, args: torch.func.jacrev(f, ALL)(*args),
    "jacfwd": lambda f, args: torch.func.jacfwd(f, ALL)(*args),
    "hessian": lambda f, args: torch.func.hessian(loss_of(f), ALL)(*args),
    "jacrev of jacrev": lambda f, args: torch.func.jacrev(torch.func.jacrev(loss_of(f), ALL), ALL)(
        *args
    ),
    "grad of grad": lambda f, args: torch.func.grad(
        lambda *a: sum(g.square().sum() for g in torch.func.grad(loss_of(f), ALL)(*a)), ALL
    )(*args),
    "forward mode": lambda f, args: dual(f, args, tuple(t.cos() for t in args)),
    "vmap": lambda f, args: torch.func.vmap(f, (1, 0, None))(
        torch.stack([args[0], args[0].sin()], 1), torch.stack([args[1], args[1].cos()]), args[2]
    ),
    "vmap of grad": lambda f, args: torch.func.vmap(
        torch.func.grad(loss_of(lambda x, w, b: f(x[None], w, b)), (1, 2)), (0, None, None)
    )(*args),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, transform, kernels):
    ours, theirs = NORMS[norm]
    args = tensors()
    result = TRANSFORMS[transform](ours, args)
    if transform in ("hessian", "jacrev of jacrev"):
        # Row by row: torch's vmap of its norms' double backward gives wrong values between input
        # and weight, up to 2.13 at least.
        expected = torch.autograd.functional.hessian(loss_of(theirs), args)
    else:
        expected = TRANSFORMS[transform](theirs, args)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm", "instance_norm"])
def test_third_order_and_nested_jvp(norm, kernels):
    """Of which torch's own norms make silently wrong values."""
    ours = NORMS[norm][0]
    dims, spread = {"batch_norm": ((0, 2), (C, 1)), "instance_norm": ((2,), (C, 1))}.get(
        norm, ((-1,), (C,))
    )
    args = tensors()

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return formula(x, w.view(spread), b.view(spread), dims, norm != "rms_norm")

    def third(f: Callable) -> Any:
        def squares(g: Callable) -> Callable:
            return lambda *a: sum(t.square().sum() for t in torch.func.grad(g, ALL)(*a))

        return torch.func.grad(squares(squares(loss_of(f))), ALL)(*args)

    def nested(f: Callable) -> Any:
        tangents = tuple(t.cos() for t in args)

        def inner(*a: Tensor) -> Tensor:
            return torch.func.jvp(f, a, tangents)[1]

        return torch.func.jvp(inner, args, tangents)[1]

    torch.testing.assert_close(third(ours), third(theirs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nested(ours), nested(theirs), rtol=1e-8, atol=1e-8)


def test_running_statistics_under_vmap():
    """An update that samples share is refused with the way out; one for each sample is torch's."""
    x = random_tensor(2, *SHAPE)
    for norm in (fastnorm.BatchNorm1d(C), fastnorm.InstanceNorm1d(C, track_running_stats=True)):
        with pytest.raises(RuntimeError, match=r"track_running_stats=False.*freeze\(\)"):
            torch.func.vmap(norm)(x)
        norm.freeze()
        torch.testing.assert_close(torch.func.vmap(norm)(x), torch.stack([norm(s) for s in x]))
    results = []
    for batch_norm in (fastnorm.batch_norm, F.batch_norm):
        mean, var = torch.zeros(2, C), torch.ones(2, C)
        y = torch.func.vmap(lambda x, m, v, f=batch_norm: f(x, m, v, training=True))(x, mean, var)
        results.append((y, mean, var))
    torch.testing.assert_close(*results)


DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: fastnorm.dropout(x, 0.5),
    "dropout gelu residual": lambda x: fastnorm.dropout(x, 0.5, activation="gelu", residual=x),
    "dropout1d": lambda x: fastnorm.dropout1d(x, 0.5),
    "dropout2d": lambda x: fastnorm.dropout2d(x[..., None], 0.5),
    "dropout3d": lambda x: fastnorm.dropout3d(x[..., None, None], 0.5),
    "alpha_dropout": lambda x: fastnorm.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: fastnorm.feature_alpha_dropout(x, 0.5, training=True),
    "stochastic_depth": lambda x: fastnorm.stochastic_depth(x, 0.5),
    "layer_norm": lambda x: fastnorm.layer_norm(x, x.shape[-1:], dropout_p=0.5),
    "add_rms_norm": lambda x: fastnorm.add_rms_norm(x, x.sin(), x.shape[-1:], dropout_p=0.5)[1],
    "group_norm": lambda x: fastnorm.group_norm(x, 2, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_under_vmap(name, kernels):
    """The modes of vmap's `randomness` mean what they mean for torch's dropout."""
    drop = DROPOUTS[name]
    x = random_tensor(8, C, 30).expand(6, -1, -1, -1) + 1
    same = torch.func.vmap(drop, randomness="same")(x)
    assert all(torch.equal(same[0], each) for each in same)
    different = torch.func.vmap(drop, randomness="different")(x)
    assert len({tuple(each.flatten().tolist()) for each in different}) > 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(drop)(x)


@pytest.mark.parametrize("name", DROPOUTS)
def test_derivatives_of_dropout(name, kernels):
    """For one seed, every transform sees one function: that of plain PyTorch."""

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return DROPOUTS[name](x)

    x = random_tensor(2, C, 3, dtype=torch.float64)
    t = x.cos()
    jacobian = torch.autograd.functional.jacobian(seeded, x)
    along = torch.tensordot(jacobian, t, 3)
    for found in (torch.func.jvp(seeded, (x,), (t,))[1], dual(seeded, (x,), (t,))[1]):
        torch.testing.assert_close(found, along)
    weights = random_tensor(*along.shape, dtype=torch.float64)
    (pulled,) = torch.func.vjp(seeded, x)[1](weights)
    torch.testing.assert_close(pulled, torch.tensordot(weights, jacobian, weights.dim()))
    torch.testing.assert_close(torch.func.jacrev(seeded)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(seeded, randomness="same")(x), jacobian)

    def loss(x: Tensor) -> Tensor:
        return seeded(x).sin().sum()

    curvature = torch.func.jacrev(torch.func.grad(loss))(x)
    torch.testing.assert_close(curvature, torch.autograd.functional.hessian(loss, x))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_of_each_sample_through_dropout(randomness, kernels):
    model = torch.nn.Sequential(
        fastnorm.LayerNorm(8, dropout_p=0.5), torch.nn.Linear(8, 8), fastnorm.Dropout(0.5)
    )
    state = dict(model.named_parameters())
    x = random_tensor(5, 8)

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x,)).square().sum()

    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        grad = torch.func.grad(loss)
        return torch.func.vmap(grad, (None, 0), randomness=randomness)(state, x)

    per_sample = run()
    assert {k: v.shape[1:] for k, v in per_sample.items()} == {k: v.shape for k, v in state.items()}
    assert all(v.isfinite().all() and v.any() for v in per_sample.values())
    torch.testing.assert_close(per_sample, run())
    if randomness == "same":
        torch.manual_seed(0)
        one = torch.func.grad(loss)(state, x[2])
        torch.testing.assert_close({k: v[2] for k, v in per_sample.items()}, one)
