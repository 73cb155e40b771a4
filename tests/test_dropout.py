"""Dropout against its definition, with masks from a Philox of the test's own."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm import _build, _philox
from fastnorm.epilogue import ACTIVATIONS
from fastnorm.testing import rng_state, seeded

P_VALUES = (0.1, 0.25, 0.5, 0.75, 0.9)
NAMES = [name for name in ACTIVATIONS if name is not None]


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 as Salmon et al. (SC 2011) define it: counters (n,) -> words (n, 4)."""
    c = [counter & 0xFFFFFFFF, counter >> np.uint64(32), 0 * counter, 0 * counter]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1)


def golden_keep(n: int, seed: int, p: float) -> torch.Tensor:
    words = philox(np.arange((n + 7) // 8, dtype=np.uint64), seed)
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1).reshape(-1)[:n]
    return torch.asarray(bits < round((1 - p) * 65536))


def next_seed(seed: int = 0) -> int:
    """The seed that the first call after ``manual_seed(seed)`` draws."""
    torch.manual_seed(seed)
    return int(torch.randint(2**63 - 1, (1,)))


def kept(y: torch.Tensor) -> torch.Tensor:
    return y.flatten() != 0


@pytest.fixture(params=["kernel", "reference"])
def backend(request):
    with fastnorm.use_backend(request.param):
        yield request.param


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    words = philox(np.zeros(1, np.uint64), 0)[0]
    assert [f"{w:08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    # The same bits by another road: numpy's own Philox is the 4x64 one, so torch's reference.
    ours = _philox.philox_words(torch.arange(1000), torch.tensor([0x123456789ABCDEF]))
    expected = philox(np.arange(1000, dtype=np.uint64), 0x123456789ABCDEF)
    assert np.array_equal(torch.stack(ours, -1).numpy(force=True), expected.astype(np.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 511, 513, 70001])
def test_golden_masks(backend, dtype, n):
    for p in (0.1, 0.5):
        seed = next_seed(n)
        torch.manual_seed(n)
        y = fastnorm.dropout(torch.ones(n, dtype=dtype), p)
        keep = golden_keep(n, seed, p)
        scale = torch.tensor(65536 / round((1 - p) * 65536), dtype=dtype)
        assert torch.equal(y, torch.where(keep, scale, torch.zeros((), dtype=dtype)))


def test_golden_mask_is_pinned():
    seed = torch.tensor([42])
    keep = _philox.keep_mask(32, seed, 0.5).int().tolist()
    assert keep == golden_keep(32, 42, 0.5).int().tolist()
    assert "".join(map(str, keep)) == GOLDEN_42


GOLDEN_42 = "00111101101110111010100010101011"


def test_negative_and_extreme_seeds():
    _build.load()
    x = torch.ones(200)
    for value in (-1, -(2**63), 2**63 - 1, 0):
        y = torch.ops.fastnorm.dropout_fwd(
            x, None, None, torch.tensor([value]), [200, 1, 1], 0, 0.5, 0
        )
        assert torch.equal(kept(y), golden_keep(200, value & (2**64 - 1), 0.5))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_index_is_memory_order(backend, layout):
    if layout == "channels_last":
        x = torch.ones(3, 5, 4, 7).contiguous(memory_format=torch.channels_last)
        order = (0, 2, 3, 1)
    else:
        x = torch.ones(6, 35).t()
        order = (1, 0)
    seed = next_seed(3)
    torch.manual_seed(3)
    y = fastnorm.dropout(x, 0.3)
    assert y.stride() == x.stride()
    assert torch.equal(kept(y.permute(order).contiguous()), golden_keep(x.numel(), seed, 0.3))


def test_non_dense_input_counts_its_copy(backend):
    x = torch.ones(6, 40)[:, ::2].requires_grad_()
    seed = next_seed(5)
    torch.manual_seed(5)
    y = fastnorm.dropout(x, 0.3)
    assert torch.equal(kept(y), golden_keep(120, seed, 0.3))
    y.sum().backward()
    expanded = torch.ones(1, 8).expand(4, 8)
    torch.manual_seed(5)
    assert torch.equal(kept(fastnorm.dropout(expanded, 0.3)), golden_keep(32, seed, 0.3))


def test_threads_do_not_matter():
    x = torch.randn(300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            results.append(fastnorm.dropout(x, 0.2, activation="gelu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 33, 9), (3, 600, 2), (2, 8, 70)])
@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_shared_dims(backend, shape, shared):
    m = fastnorm.Dropout(0.4, shared_dims=shared)
    x = torch.randn(shape)
    sizes = [1 if d in shared else n for d, n in enumerate(shape)]
    seed = next_seed(1)
    torch.manual_seed(1)
    y = m(x)
    keep = golden_keep(math.prod(sizes), seed, 0.4).reshape(sizes)
    expected = torch.where(keep, x * (65536 / round(0.6 * 65536)), 0.0)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_channel_masks_by_layout(backend):
    x = torch.randn(3, 40, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    a = fastnorm.dropout2d(x, 0.5)
    torch.manual_seed(0)
    b = fastnorm.dropout2d(last, 0.5)
    # Channels are the only dimensions that count, in the same order in both layouts.
    assert torch.equal(a, b)
    dropped = (a == 0).flatten(2)
    assert torch.equal(dropped.all(-1), dropped.any(-1))
    assert dropped.all(-1).any()


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_fused_forward_and_gradients(dtype, activation):
    """The kernel's values and gradients, within rounding of a float64 computation."""
    torch.manual_seed(0)
    x = (2 * torch.randn(37, 19)).to(dtype).requires_grad_()
    bias = torch.randn(19).to(dtype).requires_grad_()
    residual = torch.randn(37, 19).to(dtype).requires_grad_()
    grad = torch.randn(37, 19).to(dtype)
    seed = next_seed(7)
    torch.manual_seed(7)
    y = fastnorm.dropout(x, 0.3, activation=activation, bias=bias, residual=residual)
    y.backward(grad)

    wide = [t.detach().double().requires_grad_() for t in (x, bias, residual)]
    keep = golden_keep(x.numel(), seed, 0.3).view_as(x)
    scale = 65536 / round(0.7 * 65536)
    h = ACTIVATIONS[activation].function(wide[0] + wide[1])
    (wide[2] + torch.where(keep, h * scale, 0.0)).backward(grad.double())
    expected = wide[2] + torch.where(keep, h * scale, 0.0)

    unit = torch.finfo(dtype).eps
    room = 8 * unit  # a handful of roundings of values below 8, one to the result's type
    assert (y.double() - expected).abs().max() <= room * expected.abs().max()
    for t, w in zip((x, bias, residual), wide, strict=True):
        assert t.grad is not None
        assert (t.grad.double() - w.grad).abs().max() <= room * max(1.0, w.grad.abs().max())
    assert torch.equal(x.grad == 0, ~keep | (x.grad == 0))
    assert (x.grad[~keep] == 0).all()


def test_dropped_is_plus_zero(backend):
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0]).repeat(64)
    for function in (
        lambda t: fastnorm.dropout(t, 0.5),
        lambda t: fastnorm.dropout(t, 0.5, activation="silu"),
        lambda t: fastnorm.dropout2d(t.view(4, 16, 2, 2), 0.5).flatten(),
        lambda t: fastnorm.dropout2d(t.view(4, 2, 2, 16).permute(0, 3, 1, 2), 0.5)
        .permute(0, 2, 3, 1)
        .flatten(),
        lambda t: fastnorm.stochastic_depth(t.view(64, 4), 0.5).flatten(),
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            given = x.to(dtype).clone().requires_grad_()
            y = function(given)
            zero = y == 0
            assert 64 < int(zero.sum()) < 192
            assert not torch.signbit(y[zero]).any()
            y.backward(torch.ones_like(y))
            assert (given.grad[zero] == 0).all()
            assert torch.isfinite(y[~zero & (x == -1)]).all()


def test_C8_probability_one_and_zero(backend):
    x = torch.randn(50, 8, requires_grad=True)
    for function in (
        fastnorm.dropout,
        fastnorm.alpha_dropout,
        lambda t, p, training: fastnorm.dropout2d(t.view(5, 10, 4, 2), p, training).view(50, 8),
        lambda t, p, training: fastnorm.stochastic_depth(t, p, "batch", training),
    ):
        x.grad = None
        y = function(x, 1.0, training=True)
        assert (y == 0).all() and not torch.signbit(y).any()
        y.sum().backward()
        assert (x.grad == 0).all()
    state = rng_state()
    assert fastnorm.dropout(x, 0.0) is x
    assert fastnorm.dropout(x, 0.5, training=False) is x
    assert fastnorm.Dropout(0.5).eval()(x) is x
    y = fastnorm.dropout(x, 0.5, training=False, activation="relu", residual=x)
    torch.testing.assert_close(y, x.relu() + x)
    assert torch.equal(rng_state(), state)


def test_empty_and_scalar(backend):
    x = torch.empty(0, 5, requires_grad=True)
    fastnorm.dropout(x, 0.5).sum().backward()
    assert x.grad.shape == (0, 5)
    assert fastnorm.dropout(torch.tensor(1.0), 0.5).shape == ()


def test_alpha_keeps_moments(backend):
    torch.manual_seed(0)
    x = torch.randn(400_000)
    for p in (0.1, 0.5):
        y = fastnorm.alpha_dropout(x, p, training=True)
        assert abs(y.mean()) < 4 / math.sqrt(x.numel())
        assert abs(y.var() - 1) < 0.02
        lowest = y.mode().values
        within(y != lowest, round((1 - p) * 65536) / 65536, "keep rate")
        expected = F.alpha_dropout(x, p, training=True).mode().values
        assert abs(expected - lowest) < 1e-4
    z = fastnorm.feature_alpha_dropout(x.view(100, 40, 100), 0.5, training=True)
    flat = z.std(-1) < 1e-6
    assert 0.45 < flat.float().mean() < 0.55


def test_inplace(backend):
    leaf = torch.randn(40, 6, requires_grad=True)
    torch.manual_seed(0)
    expected = fastnorm.dropout(leaf * 2, 0.5)
    (g,) = torch.autograd.grad(expected.square().sum(), leaf)
    x = leaf * 2
    torch.manual_seed(0)
    y = fastnorm.dropout(x, 0.5, inplace=True)
    assert y is x
    assert x._version == 1
    assert torch.equal(x, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], g)

    state = rng_state()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        fastnorm.dropout(leaf, 0.5, inplace=True)
    assert torch.equal(rng_state(), state)

    x = leaf * 2
    torch.manual_seed(0)
    y = fastnorm.dropout(x, 0.5, inplace=True, activation="gelu", residual=leaf)
    assert y is x
    torch.manual_seed(0)
    other = fastnorm.dropout(leaf * 2, 0.5, activation="gelu", residual=leaf)
    torch.testing.assert_close(y, other)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), leaf)[0], torch.autograd.grad(other.sum(), leaf)[0]
    )
    saved = (leaf * 2).exp()
    fastnorm.dropout(saved, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    part = torch.ones(4, 6)
    fastnorm.dropout(part[1:3], 0.5, inplace=True)
    assert (part[0] == 1).all() and (part[1:3] != 1).all()


def test_mixed_dtypes_promote(backend):
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    y = fastnorm.dropout(x, 0.5, residual=torch.randn(4, 6), bias=torch.randn(6))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


def reseeded(function):
    def call(*args):
        torch.manual_seed(11)
        return function(*args)

    return call


@pytest.mark.parametrize("activation", [None, *NAMES])
def test_gradcheck(backend, activation):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    x = torch.where(x.abs() < 0.1, 0.3, x).requires_grad_()
    bias = (0.01 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    residual = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    @reseeded
    def function(x, bias, residual):
        return fastnorm.dropout(x, 0.4, activation=activation, bias=bias, residual=residual)

    assert torch.autograd.gradcheck(function, (x, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, bias, residual))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fastnorm.dropout2d(x, 0.4),
        lambda x: fastnorm.alpha_dropout(x, 0.4, training=True),
        lambda x: fastnorm.feature_alpha_dropout(x, 0.4, training=True),
        lambda x: fastnorm.stochastic_depth(x, 0.4, residual=x),
        lambda x: fastnorm.stochastic_depth(x, 0.4, "batch", scale_by_keep=False),
    ],
)
def test_gradcheck_variants(backend, function):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reseeded(function), (x,))
    assert torch.autograd.gradgradcheck(reseeded(function), (x,))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(reseeded(function), (last,))


def test_third_order(backend):
    x = torch.linspace(-2, 2, 20, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    y = fastnorm.dropout(x, 0.5, activation="tanh")
    keep = kept(y.detach())
    for derivative in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        z = 2 * torch.tanh(x)
        for _ in range(derivative + 1):
            (z,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        torch.testing.assert_close(y, torch.where(keep, z, 0.0), rtol=1e-6, atol=1e-9)


def test_backward_mask_whatever_the_gradients_layout(backend):
    x = torch.randn(4, 6, 5, 3, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for given in (x, last):
        y = fastnorm.dropout(given, 0.5)
        keep = y != 0
        for grad in (
            torch.ones_like(y).contiguous(),
            torch.ones_like(y).contiguous(memory_format=torch.channels_last),
            torch.ones(1).expand_as(y),
        ):
            (g,) = torch.autograd.grad(y, given, grad, retain_graph=True)
            assert torch.equal(g != 0, keep)


def test_only_the_seed_is_saved():
    _build.load()
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(64, 64, requires_grad=True)
        fastnorm.dropout(x, 0.5)
        assert [t.numel() for t in saved] == [1]
        saved.clear()
        fastnorm.dropout2d(x.view(4, 4, 16, 16), 0.5)
        fastnorm.stochastic_depth(x, 0.5, residual=x)
        assert [t.numel() for t in saved] == [1, 1]
        saved.clear()
        fastnorm.dropout(x, 0.5, activation="gelu")
        assert sorted(t.numel() for t in saved) == [1, 4096]


def test_second_backward_raises():
    y = fastnorm.dropout(torch.randn(8, requires_grad=True), 0.5).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


# ---------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fastnorm.dropout, fastnorm.dropout1d])
def test_a_failed_inplace_call_draws_nothing(backend, function):
    leaf = torch.randn(2, 3, 4, requires_grad=True)
    with torch.inference_mode():
        inference = torch.randn(2, 3, 4)
    for bad, what in (
        (torch.randn(2, 3, 1).expand(2, 3, 4), "strides"),
        (leaf, "leaf"),
        (leaf[:1], "view of a leaf"),
        (inference, "inference"),
    ):
        state, values = rng_state(), bad.detach().clone()
        with pytest.raises(RuntimeError, match=f"inplace: .*{what}"):
            function(bad, 0.5, inplace=True)
        assert torch.equal(rng_state(), state)
        assert torch.equal(bad, values)


def test_seed_is_torch_randint(backend):
    torch.manual_seed(9)
    expected = torch.randint(2**63 - 1, (1,))
    state = rng_state()
    torch.manual_seed(9)
    fastnorm.dropout(torch.ones(10), 0.5)
    assert torch.equal(rng_state(), state)
    if backend == "kernel":
        torch.manual_seed(9)
        assert torch.equal(torch.ops.fastnorm.draw_seed(torch.ones(1)), expected)


def test_generator(backend):
    x = torch.ones(1000)
    g = seeded(3)
    state, own = rng_state(), g.get_state()
    a = fastnorm.dropout(x, 0.5, generator=g)
    assert torch.equal(rng_state(), state)
    assert not torch.equal(g.get_state(), own)
    own = g.get_state()
    fastnorm.dropout(x, 0.5)
    assert torch.equal(g.get_state(), own)
    assert torch.equal(fastnorm.dropout(x, 0.5, generator=g.manual_seed(3)), a)
    assert torch.equal(fastnorm.Dropout(0.5, generator=g.manual_seed(3))(x), a)
    own = g.get_state()
    fastnorm.dropout(x, 0.5, training=False, generator=g)
    fastnorm.dropout(x, 0.0, generator=g)
    assert torch.equal(g.get_state(), own)


def test_backends_agree():
    x = torch.randn(50, 33, requires_grad=True)
    grad = torch.randn(50, 33)
    for options in ({}, {"activation": "gelu"}, {"residual": torch.randn(50, 33)}):
        results = []
        for name in ("kernel", "reference"):
            with fastnorm.use_backend(name):
                torch.manual_seed(4)
                y = fastnorm.dropout(x, 0.3, **options)
                results.append((y.detach(), torch.autograd.grad(y, x, grad)[0]))
        torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-6)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 32),
        fastnorm.Dropout(0.3, activation="gelu"),
        torch.nn.Linear(32, 32),
        fastnorm.Dropout(0.2),
        fastnorm.StochasticDepth(0.2),
        torch.nn.Linear(32, 4),
    )


def gradients(model, run, x):
    model.zero_grad()
    torch.manual_seed(5)
    run(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_is_bit_equal(backend, use_reentrant):
    model = network()
    x = torch.randn(16, 12, requires_grad=True)
    plain = gradients(model, model, x)
    again = gradients(model, lambda t: checkpoint(model, t, use_reentrant=use_reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiled_network_has_the_same_masks():
    _build.load()
    model = network()
    x = torch.randn(16, 12)
    plain = gradients(model, model, x)
    torch._dynamo.reset()
    again = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inductor_has_the_same_masks():
    _build.load()
    x = torch.randn(8, 9, requires_grad=True)

    def f(t):
        return fastnorm.dropout(t, 0.3, activation="gelu", residual=t)

    def run(g):
        torch.manual_seed(6)
        y = g(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(f, fullgraph=True)), run(f))


def test_compiled_shapes_do_not_recompile_each_time():
    _build.load()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = torch.compile(
        lambda t: fastnorm.dropout2d(fastnorm.dropout(t, 0.3), 0.5), backend=counter,
        fullgraph=True, dynamic=True,
    )  # fmt: skip
    for n in (4, 6, 9):
        x = torch.randn(n, 8, 5, 3)
        torch.manual_seed(1)
        y = f(x)
        torch.manual_seed(1)
        assert torch.equal(y, fastnorm.dropout2d(fastnorm.dropout(x, 0.3), 0.5))
    assert counter.frame_count <= 2


def test_opcheck():
    _build.load()
    x = torch.randn(4, 8)
    seed = torch.tensor([3])
    ops = torch.ops.fastnorm
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.dropout_fwd, (x, torch.randn(8), x, seed, [32, 1, 1], 3, 0.5, 0), test_utils=tests
    )
    torch.library.opcheck(
        ops.dropout_bwd, (x, x, torch.randn(8), seed, [32, 1, 1], 3, 0.5, 0), test_utils=tests
    )
    torch.library.opcheck(ops.dropout_, (x.clone(), seed, [4, 8, 1], 0.5, 0), test_utils=tests)
    assert torch.Tag.nondeterministic_seeded in ops.draw_seed.default.tags


def test_func_transforms():
    x = torch.randn(6, 10)
    torch.manual_seed(1)
    expected = fastnorm.dropout(x, 0.5, activation="gelu")

    def f(t):
        torch.manual_seed(1)
        return fastnorm.dropout(t, 0.5, activation="gelu")

    value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, expected)
    (vjp,) = torch.func.vjp(f, x)[1](torch.ones_like(x))
    torch.testing.assert_close(tangent, vjp)

    same = torch.func.vmap(lambda t: fastnorm.dropout(t, 0.5), randomness="same")(torch.ones(4, 99))
    assert torch.equal(same[0], same[3])
    each = torch.func.vmap(lambda t: fastnorm.dropout(t, 0.5), randomness="different")(
        torch.ones(4, 99)
    )
    assert not torch.equal(each[0], each[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda t: fastnorm.dropout(t, 0.5))(torch.ones(4, 99))

    def loss(w, row):
        return fastnorm.dropout(row * w, 0.5, activation="silu").sum()

    w = torch.randn(10)
    torch.manual_seed(1)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="same")(w, x)
    for row, g in zip(x, per_sample, strict=True):
        torch.manual_seed(1)
        torch.testing.assert_close(torch.func.grad(loss)(w, row), g)


def test_export_keeps_dropout_in_training():
    class M(torch.nn.Module):
        def forward(self, t):
            return fastnorm.dropout(t, 0.5)

    x = torch.ones(4, 64)
    program = torch.export.export(M(), (x,))
    assert not any("fastnorm" in str(n.target) for n in program.graph.nodes)
    y = program.module()(x)
    assert 64 < int((y == 0).sum()) < 192


def test_subclasses_and_modes():
    class Tagged(torch.Tensor):
        pass

    y = fastnorm.dropout(torch.ones(64).as_subclass(Tagged), 0.5)
    assert isinstance(y, Tagged)


@pytest.mark.parametrize("swap", [False, True])
def test_jagged_tensors(swap):
    parts = [torch.randn(n, 8, requires_grad=True) for n in (3, 2)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    x = x.transpose(1, 2) if swap else x
    torch.manual_seed(0)
    y = fastnorm.dropout(x, 0.5, activation="relu", residual=x)
    torch.manual_seed(0)
    values = fastnorm.dropout(x.values(), 0.5, activation="relu", residual=x.values())
    assert y.shape == x.shape and torch.equal(y.values(), values)
    grads = [torch.autograd.grad(v.sum(), parts, retain_graph=True) for v in (y.values(), values)]
    assert all(map(torch.equal, *grads))
    with pytest.raises(NotImplementedError, match="input: expected a jagged"):
        fastnorm.dropout(x, 0.5, inplace=True)
    with pytest.raises(NotImplementedError, match="input: expected a jagged"):
        fastnorm.stochastic_depth(x, 0.5)


def test_autocast_dtype(device):
    x = torch.randn(8, 8, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert fastnorm.dropout(x, 0.5, activation="gelu").dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------
# Statistics (D7)
# ---------------------------------------------------------------------------------------------


def within(agreement: torch.Tensor, expected: float, what: str) -> None:
    n = agreement.numel()
    sigma = math.sqrt(expected * (1 - expected) / n)
    assert abs(agreement.float().mean().item() - expected) < 4 * sigma, what


@pytest.mark.parametrize("p", P_VALUES)
def test_statistics(p):
    q = round((1 - p) * 65536) / 65536
    agree = q * q + (1 - q) * (1 - q)
    rows, row, channel = 500, 1024, 64
    x = torch.ones(rows, row)
    torch.manual_seed(20)
    first, second = (kept(fastnorm.dropout(x, p)) for _ in range(2))
    within(~first, 1 - q, "rate")
    for lag in (1, 2, 3, 4, 16, 64, channel * 4, row):
        # Disjoint pairs, so that they are independent and sigma is that of a binomial.
        pairs = first[: first.numel() // (2 * lag) * 2 * lag].view(-1, 2, lag)
        within(pairs[:, 0] == pairs[:, 1], agree, f"lag {lag}")
    within(first == second, agree, "successive calls")
    keeps = [_philox.keep_mask(x.numel(), torch.tensor([s]), p) for s in (1000, 1001)]
    within(keeps[0] == keeps[1], agree, "neighbouring seeds")
    shared = fastnorm.dropout2d(torch.ones(500, 1000, 1, 2), p)[..., 0, 0]
    within(shared == 0, 1 - q, "channel rate")


def test_expectation_is_exact_for_the_threshold():
    for p in (0.1, 1 / 3, 0.77):
        t = round((1 - p) * 65536)
        y = fastnorm.dropout(torch.ones(4096, dtype=torch.float64), p)
        assert y.max().item() * t / 65536 == pytest.approx(1.0, abs=1e-15)


# ---------------------------------------------------------------------------------------------
# Modules and the regularizer's point of view
# ---------------------------------------------------------------------------------------------


def test_C1_classical_mode(backend):
    m = fastnorm.Dropout(0.5, mode="classical")
    x = torch.tensor([2.0, 4.0, 6.0, 8.0])
    for _ in range(4):
        y = m(x)
        assert ((y == 0) | (y == x)).all()
    assert torch.equal(m.eval()(x), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.manual_seed(1)
    inverted = fastnorm.Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(m.train()(x), inverted * 0.5)


def test_C5_exact_count():
    m = fastnorm.Dropout(0.25, mode="exact_count")
    x = torch.ones(3000, 8)
    torch.manual_seed(0)
    y = m(x)
    assert ((y != 0).sum(-1) == 6).all()
    within(kept(y[:, 0]), 0.75, "first position")
    assert y.max().item() == pytest.approx(8 / 6)
    assert m.eval()(x) is x
    rows = fastnorm.Dropout(0.4, mode="exact_count")(torch.ones(4000, 5)) != 0
    subsets = (rows * 2 ** torch.arange(5)).sum(-1).bincount()
    assert (subsets > 0).sum() == math.comb(5, 3)
    # Chi-square of 10 equally likely subsets: 33 is the 1 - 1e-4 quantile at 9 degrees of freedom.
    seen = subsets[subsets > 0].double()
    assert ((seen - 400).square() / 400).sum() < 33


def test_C2_linear_activation_dropout_linear():
    torch.manual_seed(0)
    a, b, x = torch.randn(8, 5), torch.randn(3, 8), torch.randn(10, 5)
    torch.manual_seed(2)
    hidden = fastnorm.dropout(x @ a.t(), 0.5, activation="relu")
    torch.manual_seed(2)
    mask = fastnorm.dropout(torch.ones(10, 8), 0.5)
    torch.testing.assert_close(hidden @ b.t(), ((x @ a.t()).relu() * mask) @ b.t())


def test_C4_expectation_of_inverted_dropout():
    x = torch.randn(64, dtype=torch.float64)
    torch.manual_seed(0)
    y = fastnorm.dropout(x.expand(20_000, 64).contiguous(), 0.3)
    error = (y.mean(0) - x).abs()
    assert (error < 4 * y.std(0) / math.sqrt(20_000)).all()
    assert fastnorm.Dropout(0.3).eval()(x) is x


def test_C7_weight_scaling_is_the_geometric_mean_of_softmax_regression():
    """Every mask of four inputs is enumerated."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for keep in (0.5, 0.8):
        total = torch.zeros(3, dtype=torch.float64)
        for bits in range(16):
            mask = torch.tensor([(bits >> i) & 1 for i in range(4)], dtype=torch.float64)
            weight = keep ** mask.sum() * (1 - keep) ** (4 - mask.sum())
            total += weight * F.log_softmax(w @ (x * mask), -1)
        classical = fastnorm.Dropout(1 - keep, mode="classical").eval()
        quantised = round(keep * 65536) / 65536
        got = F.softmax(w @ classical(x), -1)
        room = 4 * abs(quantised - keep) * (w.abs() @ x.abs()).max() + 1e-15
        assert (F.softmax(total, -1) - got).abs().max() < room


def test_C9_dropped_unit_gets_no_weight_gradient():
    w = torch.randn(6, 4, requires_grad=True)
    torch.manual_seed(3)
    hidden = fastnorm.dropout(torch.ones(4) @ w.t(), 0.5)
    hidden.sum().backward()
    assert torch.equal((w.grad == 0).all(-1), hidden == 0)
    assert (hidden == 0).any() and (hidden != 0).any()


def test_C8_modules_switch_and_print():
    x = torch.ones(4, 8, 6, 6)
    for m, torch_module, given in (
        (fastnorm.Dropout(0.3, True), torch.nn.Dropout(0.3, True), x),
        (fastnorm.Dropout1d(0.3), torch.nn.Dropout1d(0.3), x[0]),
        (fastnorm.Dropout2d(0.3), torch.nn.Dropout2d(0.3), x),
        (fastnorm.Dropout3d(0.3), torch.nn.Dropout3d(0.3), x),
        (fastnorm.AlphaDropout(0.3), torch.nn.AlphaDropout(0.3), x),
        (fastnorm.FeatureAlphaDropout(0.3), torch.nn.FeatureAlphaDropout(0.3), x),
    ):
        assert isinstance(m, type(torch_module))
        assert repr(m) == repr(torch_module)
        assert m.state_dict() == torch_module.state_dict()
        assert not torch.equal(m(given.clone()), m(given.clone()))
        assert m.eval()(given) is given
        copy.deepcopy(m)
    assert "shared_dims=(2, 3)" in repr(fastnorm.Dropout(shared_dims=(2, 3)))
    assert "activation='gelu'" in repr(fastnorm.Dropout(activation="gelu"))
    assert "mode='classical'" in repr(fastnorm.Dropout(mode="classical"))
    assert fastnorm.Dropout.from_keep_prob(0.75).p == 0.25
    torch.manual_seed(0)
    a = fastnorm.Dropout(0.5, shared_dims=(-1, -2))(x)
    torch.manual_seed(0)
    assert torch.equal(a, fastnorm.dropout2d(x, 0.5))


def test_stochastic_depth(backend):
    x, residual = torch.randn(200, 3, 4), torch.randn(200, 3, 4)
    torch.manual_seed(0)
    y = fastnorm.stochastic_depth(x, 0.3, residual=residual)
    rows = (y != residual).flatten(1).any(-1)
    scale = 65536 / round(0.7 * 65536)
    expected = torch.where(rows[:, None, None], residual + scale * x, residual)
    torch.testing.assert_close(y, expected)
    assert 30 < int((~rows).sum()) < 90
    modes = {bool((fastnorm.stochastic_depth(x, 0.5, "batch") == 0).all()) for _ in range(30)}
    assert modes == {True, False}
    unscaled = fastnorm.StochasticDepth(0.3, scale_by_keep=False)(x)
    assert torch.equal(unscaled, torch.where((unscaled == 0), 0.0, x))
    assert fastnorm.StochasticDepth(0.3).eval()(x) is x
    path = fastnorm.DropPath(0.3)
    assert path.p == 0.3
    assert "p=0.3, mode=row" in repr(path)


def test_drop_path_rates():
    assert fastnorm.drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert fastnorm.drop_path_rates(0.2, [1, 2]) == [[0.0], [0.1, 0.2]]
    assert fastnorm.drop_path_rates(0.2, [2, 3], stagewise=True) == [[0.0] * 2, [0.2] * 3]
    assert fastnorm.drop_path_rates(0.2, 1) == [0.0]
    with pytest.raises(ValueError, match="depths"):
        fastnorm.drop_path_rates(0.2, 3, stagewise=True)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def test_errors_draw_nothing(backend):
    x = torch.randn(4, 6)
    state = rng_state()
    running = torch.zeros(6), torch.ones(6)
    bad = [
        (ValueError, "p: ", lambda: fastnorm.dropout(x, -0.1)),
        (ValueError, "p: ", lambda: fastnorm.dropout(x, 1.5)),
        (ValueError, "p: ", lambda: fastnorm.dropout(x, math.nan)),
        (TypeError, "p: ", lambda: fastnorm.dropout(x, "0.5")),
        (NotImplementedError, "input: ", lambda: fastnorm.dropout(torch.arange(5), 0.5)),
        (TypeError, "input: ", lambda: fastnorm.dropout([1.0], 0.5)),
        (ValueError, "activation: ", lambda: fastnorm.dropout(x, activation="swoosh")),
        (RuntimeError, "bias: ", lambda: fastnorm.dropout(x, bias=torch.ones(4))),
        (RuntimeError, "residual: ", lambda: fastnorm.dropout(x, residual=torch.ones(6))),
        (TypeError, "residual: ", lambda: fastnorm.dropout(x, residual=1.0)),
        (TypeError, "generator: ", lambda: fastnorm.dropout(x, generator=3)),
        (TypeError, "generator: ", lambda: fastnorm.rms_norm(x, (6,), dropout_p=0.5, generator=3)),
        (
            TypeError,
            "generator: ",
            lambda: fastnorm.batch_norm(x, *running, training=True, dropout_p=0.5, generator=3),
        ),
        (RuntimeError, "input: ", lambda: fastnorm.dropout1d(x[0])),
        (RuntimeError, "input: ", lambda: fastnorm.feature_alpha_dropout(x[0], training=True)),
        (ValueError, "mode: ", lambda: fastnorm.stochastic_depth(x, 0.5, "column")),
        (ValueError, "mode: ", lambda: fastnorm.Dropout(mode="other")),
        (ValueError, "p: ", lambda: fastnorm.Dropout(math.nan)),
        (ValueError, "p: ", lambda: fastnorm.Dropout2d(2.0)),
        (ValueError, "input: ", lambda: fastnorm.Dropout2d()(torch.ones(3, 4, 5))),
        (ValueError, "input: ", lambda: fastnorm.Dropout3d()(torch.ones(3, 4, 5))),
        (IndexError, "shared_dims: ", lambda: fastnorm.Dropout(shared_dims=2)(x)),
        (ValueError, "shared_dims: ", lambda: fastnorm.Dropout(shared_dims=1, mode="exact_count")),
    ]
    for error, match, call in bad:
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(rng_state(), state)
    assert not running[0].any() and (running[1] == 1).all()


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generator_of_another_device(device):
    x = torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="generator: "):
        fastnorm.dropout(x, generator=torch.Generator("cpu"))
    with pytest.raises(RuntimeError, match="generator: "):
        fastnorm.layer_norm(x, (4,), dropout_p=0.5, generator=torch.Generator("cpu"))


def test_rank_warnings_are_torchs():
    x = torch.ones(2, 3, 4)
    with pytest.warns(UserWarning, match="dropout2d"):
        y = fastnorm.dropout2d(x, 0.5)
    assert y.shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.dropout3d(torch.ones(2, 3, 4, 5), 0.5)
        fastnorm.dropout1d(torch.ones(3, 4), 0.5)


# ---------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
class TestCuda:
    def test_masks_equal_the_cpus(self):
        seed = torch.tensor([77], device="cpu")
        for shape, view in (((513, 33), [513 * 33, 1, 1]), ((8, 40, 9), [320, 9, 1])):
            x = torch.ones(shape, device="cpu")
            args = (view, 0, 0.3, 0)
            _build.load_cuda()
            cpu = torch.ops.fastnorm.dropout_fwd(x, None, None, seed, *args)
            gpu = torch.ops.fastnorm.dropout_fwd(x.cuda(), None, None, seed.cuda(), *args)
            assert torch.equal(cpu, gpu.cpu())

    def test_graph_capture(self):
        x = torch.ones(4096, device="cuda", requires_grad=True)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            fastnorm.dropout(x, 0.5).sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fastnorm.dropout(x, 0.5)
            y.sum().backward()
        masks = []
        for _ in range(2):
            x.grad.zero_()
            graph.replay()
            masks.append((y != 0).clone())
            assert torch.equal(masks[-1], x.grad != 0)
        assert not torch.equal(*masks)


def test_shared_dimensions_apart_in_memory_are_dropped_in_place():
    x = torch.ones(40, 5, 6)
    y = fastnorm.Dropout(0.5, inplace=True, shared_dims=(0, 2))(x)
    assert y is x
    assert (x == 0).any(), "nothing was dropped"
    assert torch.equal(x, x[:1, :, :1].expand_as(x))


def test_recorded_gradients_are_the_plain_ones():
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def loss():
        return fastnorm.dropout(x * b, 0.0, activation="gelu", bias=b).pow(3).sum()

    plain = torch.autograd.grad(loss(), (x, b))
    recorded = torch.autograd.grad(loss(), (x, b), create_graph=True)
    for p, r in zip(plain, recorded, strict=True):
        torch.testing.assert_close(r, p)
