"""The column geometry of the CPU kernels, against a float64 reference written on the view itself.

The operators see memory only, so the tensors here are flat and the view says what they mean.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from fastnorm import _build
from fastnorm.testing import seeded

EPS = 1e-5
MEAN_VAR, MEAN_SQUARE = 0, 1
ACTIVATIONS = {
    0: lambda t: t,
    1: F.relu,
    2: F.leaky_relu,
    3: F.gelu,
    4: lambda t: F.gelu(t, approximate="tanh"),
    5: F.silu,
    6: torch.sigmoid,
    7: torch.tanh,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (outer, reduce_outer, kept, reduce_inner, inner, tail)
PLANES = {
    "batch 56x56": (1, 4, 5, 3136, 3136, 4),
    "batch 9x9": (1, 9, 6, 81, 81, 9),
    "batch 4x4": (1, 2, 65, 16, 16, 2),
    "batch 313": (1, 3, 3, 313, 313, 3),
    "batch, split by planes": (1, 23, 2, 3137, 3137, 23),
    "batch, split planes": (1, 2, 3, 70001, 70001, 2),
    "ghost": (3, 4, 5, 49, 49, 2),
    "ghost, split": (2, 20, 2, 4001, 4001, 7),
    "instance": (3, 1, 7, 313, 313, 1),
    "instance, split": (2, 1, 2, 70001, 70001, 1),
    "group 7x7": (3, 1, 4, 5 * 49, 49, 1),
    "group 3": (3, 1, 4, 5 * 3, 3, 1),
    "group, split by channels": (2, 1, 2, 23 * 3137, 3137, 1),
    "group, split channels": (1, 1, 2, 3 * 40009, 40009, 1),
}
COLUMNS = {
    "batch 2x2": (1, 37, 65, 4, 4, 37),
    "batch 3x5, 2": (1, 2, 7, 15, 15, 2),
    "batch 7x7": (1, 37, 6, 49, 49, 37),
    "batch 17": (1, 9, 7, 17, 17, 9),
    "batch NC": (1, 127, 33, 1, 1, 127),
    "batch NC, columns": (1, 200, 1031, 1, 1, 200),
    "batch NC, tall": (1, 50003, 3, 1, 1, 50003),
    "batch NC, one": (1, 3001, 1, 1, 1, 3001),
    "batch NC, split": (1, 1031, 257, 1, 1, 1031),
    "batch 3, columns": (1, 260, 401, 3, 3, 260),
    "batch 3, split": (1, 600, 181, 3, 3, 600),
    "ghost NHWC": (5, 64, 48, 1, 1, 17),
    "ghost NHWC, split": (3, 1100, 65, 1, 1, 31),
    "instance NHWC": (3, 49, 19, 1, 1, 49),
    "instance NHWC, large": (9, 530, 72, 1, 1, 530),
    "group NHWC": (3, 64, 4, 8, 1, 64),
    "group NHWC, one": (5, 35, 1, 65, 1, 35),
    "group NHWC, large": (8, 70, 2, 301, 1, 70),
    "group NHWC, split": (2, 701, 5, 41, 1, 701),
    "group NHWC, wide": (1, 35, 2, 2501, 1, 35),
}
PIXELS = {
    "channels 96": (2, 96, 313, 1, 0, 96),
    "channels 3": (3, 3, 49, 1, 0, 3),
    "channels 2051": (2, 2051, 40, 1, 0, 2051),
    "channels 260": (1, 260, 1000, 1, 0, 260),
    "channels 4, 2 pixels": (5, 4, 2, 1, 0, 4),
}
VIEWS = PLANES | COLUMNS | PIXELS


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if _build.load() is None:
        pytest.skip(f"no kernels: {_build.reason()}")


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def numel(view) -> int:
    outer, rows, kept, reduce_inner, _, tail = view
    return ((outer - 1) * rows + tail) * kept * reduce_inner


def channels(view) -> int:
    _, rows, kept, reduce_inner, inner, _ = view
    return rows if inner == 0 else kept * reduce_inner // inner


def keep_mask(n: int, seed: int, p: float) -> Tensor:
    """The mask of common/philox.h, in NumPy."""
    counter = np.arange((n + 7) // 8, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [counter & low, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = (np.uint64(k) for k in key)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ k0,
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ k1,
            p0 & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = np.stack(c, 1)
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 2).reshape(-1)[:n]
    return torch.asarray(bits < round((1 - p) * 65536))


def blocks(view):
    """Per outer block: its slice of memory and its shape."""
    outer, rows, kept, reduce_inner, _, tail = view
    start = 0
    for o in range(outer):
        shape = (tail if o + 1 == outer else rows, kept, reduce_inner)
        size = shape[0] * kept * reduce_inner
        yield slice(start, start + size), shape
        start += size


def reference(x, weight, bias, residual, mean, var, view, statistic, activation, mask, scale):
    """y, mean and var in the dtype of x, differentiable."""
    _, _, kept, reduce_inner, inner, _ = view
    ys, means, variances = [], [], []
    for o, (part, shape) in enumerate(blocks(view)):
        b = x[part].view(shape)
        if var is not None:
            m, v = mean.view(-1, kept)[o].view(1, kept, 1), var.view(-1, kept)[o].view(1, kept, 1)
        elif statistic == MEAN_VAR:
            m = b.mean((0, 2), keepdim=True)
            v = (b - m).square().mean((0, 2), keepdim=True)
        else:
            m, v = torch.zeros((), dtype=x.dtype), b.square().mean((0, 2), keepdim=True)
        y = (b - m) / (v + EPS).sqrt()

        def per_channel(t):
            if inner == 0:
                return t.view(-1, 1, 1)
            return t.view(kept, -1, 1).expand(-1, -1, inner).reshape(1, kept, reduce_inner)

        if weight is not None:
            y = y * per_channel(weight)
        if bias is not None:
            y = y + per_channel(bias)
        y = y.reshape(-1)
        if residual is not None:
            y = y + residual[part]
        y = ACTIVATIONS[activation](y)
        if mask is not None:
            y = torch.where(mask[part], y * scale, 0.0)
        ys.append(y)
        means.append(m.expand(1, kept, 1).reshape(-1))
        variances.append(v.reshape(-1))
    return torch.cat(ys), torch.cat(means), torch.cat(variances)


class Case:
    """One call with random operands: `run` through the kernels, `expect` in float64."""

    def __init__(
        self,
        view,
        dtype,
        *,
        statistic=MEAN_VAR,
        activation=0,
        residual=False,
        p=0.0,
        frozen=False,
        affine=True,
        mean=0.0,
        std=1.0,
        seed=0,
    ):
        g = seeded(seed)
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(n, dtype=acc):
            return torch.randn(n, generator=g, dtype=torch.float64).to(dtype)

        n, statistics = numel(view), view[0] * view[2]
        self.view, self.statistic, self.activation, self.frozen = (
            view,
            statistic,
            activation,
            frozen,
        )
        self.x = (normal(n, torch.float64) * std + mean).to(dtype)
        self.dy = normal(n, dtype)
        self.weight = normal(channels(view)) if affine else None
        self.bias = normal(channels(view)) if affine else None
        self.residual = normal(n, dtype) if residual else None
        self.p = p
        self.seed = torch.tensor(0x123456789ABC) if p else None
        self.mean = normal(statistics) * std + mean if frozen else None
        self.var = (normal(statistics).square() + 0.5) * std**2 if frozen else None

    def forward(self):
        y, mean, var = torch.ops.fastnorm.norm_fwd(
            self.x,
            self.weight,
            self.bias,
            self.residual,
            self.mean,
            self.var,
            self.seed,
            self.view,
            self.statistic,
            EPS,
            0.0,
            self.activation,
            self.p,
        )
        if self.frozen:
            mean, var = self.mean, self.var
        return y, mean, var

    def backward(self, mean, var, mask=None):
        if mask is None:
            mask = [True, self.weight is not None, self.bias is not None, self.residual is not None]
        return torch.ops.fastnorm.norm_bwd(
            self.dy,
            self.x,
            self.weight,
            self.bias,
            self.residual,
            mean if self.statistic == MEAN_VAR else None,
            var,
            self.seed,
            self.view,
            self.statistic,
            self.frozen,
            EPS,
            0.0,
            self.activation,
            self.p,
            mask,
        )

    def run(self):
        y, mean, var = self.forward()
        dx, dw, db, dr = self.backward(mean, var)
        out = {"y": y, "dx": dx}
        if not self.frozen:
            out |= {"var": var} | ({"mean": mean} if self.statistic == MEAN_VAR else {})
        if self.weight is not None:
            out |= {"dweight": dw, "dbias": db}
        if self.residual is not None:
            out["dresidual"] = dr
        return {name: t.flatten() for name, t in out.items()}

    def expect(self):
        leaves = {
            "dx": self.x,
            "dweight": self.weight,
            "dbias": self.bias,
            "dresidual": self.residual,
        }
        leaves = {k: t.double().requires_grad_() for k, t in leaves.items() if t is not None}
        mask, scale = None, 1.0
        if self.p:
            mask = keep_mask(len(self.x), int(self.seed), self.p)
            scale = 65536 / round((1 - self.p) * 65536)
        fixed = [t.double() if t is not None else None for t in (self.mean, self.var)]
        y, mean, var = reference(
            leaves["dx"],
            leaves.get("dweight"),
            leaves.get("dbias"),
            leaves.get("dresidual"),
            *fixed,
            self.view,
            self.statistic,
            self.activation,
            mask,
            scale,
        )
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        return {"y": y.detach(), "mean": mean.detach(), "var": var.detach()} | dict(
            zip(leaves, grads, strict=True)
        )


def tolerance(case: Case, name: str, expected: Tensor) -> float:
    """What rounding can cost `name`: some errors of the accumulation type, one of the output's.

    A sum of n terms in chunks loses a few units of its absolute sum, which for random signs is
    sqrt(n) of the largest term; a result of the storage type is rounded once more.
    """
    acc = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    unit = torch.finfo(acc).eps
    size = float(expected.abs().max()) + 1.0
    if name in ("dweight", "dbias"):
        terms = numel(case.view) / channels(case.view)
        return 8 * unit * (size + 4 * terms**0.5)
    rounding = torch.finfo(case.x.dtype).eps if name in ("y", "dx", "dresidual") else 0.0
    return 16 * unit * size + rounding * size


def check(case: Case) -> None:
    got, expected = case.run(), case.expect()
    for name, value in got.items():
        assert not value.isnan().any(), name
        error = (value.double() - expected[name]).abs().max()
        assert error <= tolerance(case, name, expected[name]), (name, float(error))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_plain(name, dtype):
    check(Case(VIEWS[name], dtype))


SOME = [
    "batch 7x7",
    "batch 313",
    "ghost",
    "batch, split by planes",
    "batch 2x2",
    "batch NC, tall",
    "batch NC, columns",
    "ghost NHWC",
    "instance NHWC, large",
    "group NHWC",
    "group NHWC, split",
    "channels 96",
    "channels 2051",
]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("activation", "residual", "p"),
    [(0, True, 0.0), (0, False, 0.3), (1, True, 0.0), (5, False, 0.0), (3, True, 0.25)],
)
def test_epilogue(name, activation, residual, p):
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(VIEWS[name], dtype, activation=activation, residual=residual, p=p))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["batch 17", "group NHWC", "channels 3"])
def test_activation(name, activation):
    for dtype, residual, p in itertools.product(DTYPES, (False, True), (0.0, 0.5)):
        check(Case(VIEWS[name], dtype, activation=activation, residual=residual, p=p))


@pytest.mark.parametrize("name", SOME)
def test_frozen(name):
    for dtype, activation in itertools.product((torch.float64, torch.bfloat16), (0, 5)):
        case = Case(VIEWS[name], dtype, frozen=True, activation=activation, residual=activation > 0)
        check(case)


@pytest.mark.parametrize("name", SOME)
def test_mean_square_and_no_affine(name):
    for dtype in (torch.float64, torch.float32):
        check(Case(VIEWS[name], dtype, statistic=MEAN_SQUARE, activation=1))
        check(Case(VIEWS[name], dtype, affine=False))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("frozen", [False, True])
def test_output_mask(name, frozen):
    """Every subset of the gradients has the bits of the full set."""
    case = Case(VIEWS[name], torch.float32, activation=1, residual=True, p=0.2, frozen=frozen)
    _, mean, var = case.forward()
    full = case.backward(mean, var)
    for mask in itertools.product((False, True), repeat=4):
        part = case.backward(mean, var, list(mask))
        for wanted, a, b in zip(mask, part, full, strict=True):
            assert torch.equal(a, b) if wanted else a.numel() == 0


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_does_not_matter(name, dtype):
    case = Case(VIEWS[name], dtype, activation=5, residual=True, p=0.1)
    with threads(1):
        one = case.run()
    for n in (2, 5):
        with threads(n):
            several = case.run()
        for key, value in one.items():
            assert torch.equal(value, several[key]), key


@pytest.mark.parametrize(
    "name",
    [
        "instance",
        "group 7x7",
        "group, split by channels",
        "instance NHWC",
        "instance NHWC, large",
        "group NHWC, large",
        "group NHWC, split",
        "channels 96",
        "channels 2051",
    ],
)
def test_a_sample_does_not_depend_on_its_batch(name):
    _, rows, kept, reduce_inner, inner, _ = VIEWS[name]
    size = rows * kept * reduce_inner
    for batch in (1, 2, 7, 8, 9, 70):
        if batch * size > 4e6:
            continue
        case = Case((batch, rows, kept, reduce_inner, inner, rows), torch.float32, activation=5)
        many = case.run()
        one = Case((1, rows, kept, reduce_inner, inner, rows), torch.float32, activation=5)
        for i in {0, batch // 2, batch - 1}:
            part = slice(i * size, (i + 1) * size)
            one.x, one.dy, one.weight, one.bias = (
                case.x[part],
                case.dy[part],
                case.weight,
                case.bias,
            )
            alone = one.run()
            for key in ("y", "dx"):
                assert torch.equal(many[key][part], alone[key]), (batch, i, key)


@pytest.mark.parametrize("name", VIEWS)
def test_constant_input_gives_the_bias(name):
    for value, dtype in itertools.product((14.0, 1e6, -3.1), (torch.float32, torch.float64)):
        case = Case(VIEWS[name], dtype)
        case.x = torch.full_like(case.x, value)
        got = case.run()
        scale = torch.zeros_like(case.x, dtype=torch.float64)
        y, _, _ = reference(
            scale, None, case.bias.double(), None, None, None, case.view, 0, 0, None, 1.0
        )
        assert torch.equal(got["y"], y.to(dtype)), dtype
        assert not got["var"].any()
        assert not got["dweight"].any()


@pytest.mark.parametrize("name", VIEWS)
def test_large_mean(name):
    case = Case(VIEWS[name], torch.float32, mean=100.0, std=0.01)
    _, mean, var = case.forward()
    expected = case.expect()
    rstd = (var.flatten().double() + EPS).rsqrt()
    torch.testing.assert_close(rstd, (expected["var"] + EPS).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.flatten().double(), expected["mean"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(2, 65), (2, 17, 1, 1), (1, 17, 1, 2), (1, 17, 2, 1)])
def test_two_values_a_channel_have_no_gradient(shape):
    """xhat is 1 and -1 there, so dx is 0 but for rounding, which rstd must not blow up."""
    x = torch.randn(shape).mul(0.1).bfloat16().requires_grad_()
    residual = torch.randn(shape).bfloat16().requires_grad_()
    for layout in (torch.contiguous_format, torch.channels_last):
        a = x if len(shape) == 2 else x.contiguous(memory_format=layout)
        y = fastnorm.batch_norm(
            a, None, None, training=True, eps=1e-12, activation="gelu", residual=residual
        )
        (dx, _) = torch.autograd.grad(y, (x, residual), torch.randn(shape).bfloat16())
        dims = [d for d in range(len(shape)) if d != 1]
        rstd = x.detach().float().var(dims, unbiased=False).rsqrt().max()
        assert dx.abs().max() < 2**-14 * rstd


@pytest.mark.parametrize("name", ["batch 7x7", "batch NC, tall", "instance NHWC, large"])
def test_half_sums_do_not_overflow(name):
    case = Case(VIEWS[name], torch.float16, std=20000.0)
    case.x.clamp_(-65504, 65504)
    case.dy.mul_(10000).clamp_(-65504, 65504)
    for value in case.run().values():
        assert value.isfinite().all()


def torch_like(kind: str, case: Case, dims):
    """Torch's own y, dx, dweight, dbias for the same memory, flat in the same order."""
    n, c, length, groups, last = dims
    shape = (n, length, c) if last else (n, c, length)

    def unflatten(t):
        t = t.reshape(shape)
        if not last:
            return t.unsqueeze(2)
        return (
            t.transpose(1, 2).reshape(n, c, 1, length).contiguous(memory_format=torch.channels_last)
        )

    x = unflatten(case.x).requires_grad_()
    w, b = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    if kind == "batch":
        y = F.batch_norm(x, None, None, w, b, True, 0.0, EPS)
    elif kind == "instance":
        y = F.instance_norm(x, None, None, w, b, True, 0.0, EPS)
    elif kind == "group":
        y = F.group_norm(x, groups, w.to(x.dtype), b.to(x.dtype), EPS)
    else:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1).contiguous(), (c,), w.to(x.dtype), b.to(x.dtype), EPS
        )
        y = y.permute(0, 3, 1, 2)
    grads = torch.autograd.grad(y, (x, w, b), unflatten(case.dy))

    def flatten(t):
        t = t.squeeze(2)
        return (t.transpose(1, 2) if last else t).reshape(-1)

    return {
        "y": flatten(y.detach()),
        "dx": flatten(grads[0]),
        "dweight": grads[1],
        "dbias": grads[2],
    }


TORCH_CASES = {  # (kind, view, (N, C, L, groups, channels last))
    "batch NCHW": ("batch", (1, 32, 24, 196, 196, 32), (32, 24, 196, 1, False)),
    "batch NCHW 4": ("batch", (1, 128, 24, 4, 4, 128), (128, 24, 4, 1, False)),
    "batch NCHW large": ("batch", (1, 8, 3, 12544, 12544, 8), (8, 3, 12544, 1, False)),
    "batch NHWC": ("batch", (1, 32 * 196, 24, 1, 1, 32 * 196), (32, 24, 196, 1, True)),
    "batch tall": ("batch", (1, 131072, 8, 1, 1, 131072), (131072, 8, 1, 1, True)),
    "batch 127": ("batch", (1, 127, 65, 1, 1, 127), (127, 65, 1, 1, True)),
    "batch 3": ("batch", (1, 3, 65, 1, 1, 3), (3, 65, 1, 1, True)),
    "instance NHWC": ("instance", (8, 784, 40, 1, 1, 784), (8, 40, 784, 1, True)),
    "group NHWC": ("group", (8, 196, 8, 8, 1, 196), (8, 64, 196, 8, True)),
    "group NHWC large": ("group", (2, 3136, 4, 16, 1, 3136), (2, 64, 3136, 4, True)),
    "layer NCHW": ("layer", (4, 96, 196, 1, 0, 96), (4, 96, 196, 1, False)),
}


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TORCH_CASES)
def test_error_is_that_of_torch(name, dtype, mean):
    """At most 1.5 times, both against float64, or one unit of the largest value."""
    torch.use_deterministic_algorithms(False)
    kind, view, dims = TORCH_CASES[name]
    case = Case(view, dtype, mean=mean)
    if kind in ("group", "layer"):  # torch wants parameters of the input's dtype here
        case.weight, case.bias = (t.to(dtype).float() for t in (case.weight, case.bias))
    ours, theirs, expected = case.run(), torch_like(kind, case, dims), case.expect()
    for key, value in theirs.items():
        size = expected[key].abs().max()
        error = (ours[key].double() - expected[key]).abs().max() / size
        limit = (value.double() - expected[key]).abs().max() / size
        unit = torch.finfo(dtype if key in ("y", "dx") else torch.float32).eps
        assert error <= max(1.5 * limit, unit), (key, float(error), float(limit))


def test_empty():
    view = [1, 0, 5, 7, 7, 0]
    x = torch.empty(0)
    y, _, _ = torch.ops.fastnorm.norm_fwd(
        x, None, None, None, None, None, None, view, 0, EPS, 0.0, 0, 0.0
    )
    assert y.numel() == 0
    w = torch.ones(5)
    _, dw, db, _ = torch.ops.fastnorm.norm_bwd(
        x,
        x,
        w,
        w,
        None,
        torch.zeros(1, 5),
        torch.ones(1, 5),
        None,
        view,
        0,
        False,
        EPS,
        0.0,
        0,
        0.0,
        [True, True, True, False],
    )
    assert not dw.any() and not db.any() and len(dw) == 5
