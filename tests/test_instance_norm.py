"""Instance norm against torch's, in both memory layouts, with running statistics and masks."""

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
from fastnorm.epilogue import ACTIVATIONS

SHAPES = [(3, 4, 7), (2, 5, 3, 6), (1, 3, 4, 5), (2, 3, 2, 3, 2)]
BACKENDS = pytest.mark.parametrize("backend", ["kernel", "reference"])


def ours(activation=None, **kwargs):
    return lambda x, w, b, r=None: fastnorm.instance_norm(
        x, None, None, w, b, activation=activation, residual=r, **kwargs
    )


def theirs(activation=None):
    return composed(lambda x, w, b: F.instance_norm(x, None, None, w, b), activation)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_derivatives(memory, activation, residual):
    for weight, bias in itertools.product([False, True], repeat=2):
        x, r = (LAYOUTS[memory](t) for t in torch.randn(2, 2, 2, 2, 3, dtype=torch.float64))
        tensors = [x, *parameters(2, x.dtype, weight, bias), r if residual else None]
        check_derivatives(ours(activation), theirs(activation), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(shape, dtype):
    w, b = parameters(shape[1], dtype)
    for layout, of_grad in itertools.product(LAYOUTS, LAYOUTS):
        if layout == "expanded" and len(shape) == 3:
            continue  # the variance is 0
        x = LAYOUTS[layout](torch.randn(shape).to(dtype))
        r = LAYOUTS[of_grad](torch.randn(shape).to(dtype))
        check(ours("relu"), theirs("relu"), [x, w, b, r], r, f"{layout} {of_grad}", 16)


@BACKENDS
def test_memory_format_is_kept(backend):
    with fastnorm.use_backend(backend):
        for shape in SHAPES:
            x = channels_last(torch.randn(shape)).requires_grad_()
            y = fastnorm.instance_norm(x, activation="relu")
            assert strides(y) == strides(x)
            y.backward(torch.randn(shape))
            assert strides(x.grad) == strides(x)


@BACKENDS
@pytest.mark.parametrize("momentum", [0, 0.1, 1, None])
@pytest.mark.parametrize("cls", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_five_steps_leave_torchs_buffers(cls, momentum, backend):
    shape = {
        "InstanceNorm1d": (6, 5, 4),
        "InstanceNorm2d": (2, 5, 3, 3),
        "InstanceNorm3d": (2, 5, 1, 2, 2),
    }[cls]
    options = {"momentum": momentum, "affine": True, "track_running_stats": True}
    mine, ref = (getattr(m, cls)(5, **options) for m in (fastnorm, nn))
    with fastnorm.use_backend(backend):
        for _ in range(5):
            x = torch.randn(shape) * 3 + 2
            torch.testing.assert_close(mine(x), ref(x))
        for key, value in ref.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.eval()(x), ref.eval()(x), rtol=1e-5, atol=1e-5)
    ref.load_state_dict(mine.state_dict(), strict=True)
    mine.load_state_dict(ref.state_dict(), strict=True)


@BACKENDS
def test_the_two_flags_are_separate(backend):
    with fastnorm.use_backend(backend):
        x = torch.randn(4, 3, 7) + 2
        norm, ref = (
            m(3, track_running_stats=True) for m in (fastnorm.InstanceNorm1d, nn.InstanceNorm1d)
        )
        norm.use_running_stats = True  # but go on updating
        torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
        ref(x)
        torch.testing.assert_close(norm.running_mean, ref.running_mean)
        torch.testing.assert_close(norm.running_var, ref.running_var)
        norm.update_running_stats = False
        before = norm.running_mean.clone()
        norm(x)
        norm.use_running_stats = None  # but use the input's
        torch.testing.assert_close(norm(x), nn.InstanceNorm1d(3)(x))
        assert torch.equal(norm.running_mean, before)


def test_evaluation_gives_the_bits_of_training():
    for memory in ("contiguous", "channels_last"):
        norm = fastnorm.InstanceNorm2d(3)
        assert not norm.state_dict()
        x = LAYOUTS[memory](torch.randn(2, 3, 5, 5))
        assert torch.equal(norm(x), norm.eval()(x))


def test_unbatched():
    for cls, shape in (("InstanceNorm1d", (3, 7)), ("InstanceNorm2d", (3, 4, 5))):
        mine, ref = (getattr(m, cls)(3, affine=True) for m in (fastnorm, nn))
        x, r = torch.randn(2, *shape)
        torch.testing.assert_close(mine(x, r), ref(x) + r)
    mask = torch.arange(7) < 4
    y = fastnorm.InstanceNorm1d(3)(torch.randn(3, 7), mask=mask)
    assert (y[:, 4:] == 0).all() and (y[:, :4] != 0).all()


def test_module_options():
    norm = fastnorm.InstanceNorm2d(3, affine=True, activation="relu", dropout_p=0.5)
    assert isinstance(norm, nn.InstanceNorm2d) and "activation='relu'" in repr(norm)
    x, r = torch.randn(2, 2, 3, 6, 6)
    torch.testing.assert_close(norm.eval()(x, r), F.relu(F.instance_norm(x) + r))
    assert (norm.train()(x, r) == 0).float().mean() > 0.6
    half = fastnorm.InstanceNorm2d(3, affine=True, track_running_stats=True).half()
    assert half.weight.dtype == torch.float16 and half.running_var.dtype == torch.float32
    frozen = fastnorm.InstanceNorm2d(3, track_running_stats=True).freeze()
    torch.testing.assert_close(frozen(x), x / (1 + 1e-5) ** 0.5)
    assert (frozen.running_mean == 0).all()


@BACKENDS
def test_masked_positions_do_not_count(backend):
    lengths = torch.tensor([7, 3, 2, 0])
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    for i, n in enumerate(lengths):
        x[i, :, n:] = float("inf")
    w, b = parameters(6, x.dtype)
    r, grad = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    with fastnorm.use_backend(backend):
        y, dx, dw, _, dr = with_gradients(ours("silu", lengths=lengths), [x, w, b, r], grad)
    total = torch.zeros_like(w)
    for i, n in enumerate(lengths):
        for t in (y, dx, dr):
            assert (t[i, :, n:] == 0).all()
        if n == 0:
            continue
        cut = [x[i : i + 1, :, :n], w, b, r[i : i + 1, :, :n]]
        ey, edx, edw, _, edr = with_gradients(theirs("silu"), cut, grad[i : i + 1, :, :n])
        for a, e in ((y, ey), (dx, edx), (dr, edr)):
            torch.testing.assert_close(a[i : i + 1, :, :n], e)
        total += edw
    torch.testing.assert_close(dw, total)


def test_masked_running_statistics():
    options = {"track_running_stats": True, "momentum": 0.3}
    mine, ref = fastnorm.InstanceNorm1d(3, **options), nn.InstanceNorm1d(3, **options)
    x = torch.randn(2, 3, 6)
    mine(torch.cat([x, torch.full((2, 3, 4), 1e9)], -1), lengths=[6, 6])
    ref(x)
    for key, value in ref.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value)
    before = copy.deepcopy(mine.state_dict())
    mine(x, lengths=[0, 0])
    for key, value in before.items():
        assert torch.equal(mine.state_dict()[key], value)
    assert torch.equal(mine(x, lengths=[6, 6]), mine(x))


@pytest.mark.parametrize(
    ("shape", "cls", "options"),
    [
        ((2, 3, 1), "InstanceNorm1d", {}),
        ((1, 3, 1, 1), "InstanceNorm2d", {}),
        ((2, 4, 5, 5), "InstanceNorm2d", {"affine": True}),
        ((2, 3), "InstanceNorm2d", {}),
        ((2, 3, 4, 5, 6, 7), "InstanceNorm3d", {}),
    ],
)
def test_errors_are_torchs(shape, cls, options):
    x = torch.randn(shape)
    with pytest.raises(Exception) as expected:
        getattr(nn, cls)(3, **options)(x)
    with pytest.raises(expected.type):
        getattr(fastnorm, cls)(3, **options)(x)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 3, 4), None, None, None, None, False),
        (torch.randn(2, 3, 4), None, None, torch.ones(4)),
        (torch.randn(2, 3, 1), None, None),
    ],
)
def test_function_errors_are_torchs(arguments):
    with pytest.raises(Exception) as expected:
        F.instance_norm(*arguments)
    with pytest.raises(expected.type):
        fastnorm.instance_norm(*arguments)


def test_warns_as_torch_of_an_unused_number_of_channels():
    with pytest.warns(UserWarning, match="does not match num_features"):
        fastnorm.InstanceNorm1d(3)(torch.randn(2, 4, 5))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty(shape):
    norm = fastnorm.InstanceNorm1d(3, affine=True, track_running_stats=True)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(norm.weight.grad, torch.zeros(3))
    for key, value in before.items():
        assert torch.equal(norm.state_dict()[key], value)
