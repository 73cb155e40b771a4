"""The CUDA column kernels, run on the CPU, against the float64 reference and the CPU kernels."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from simt import driver, norms  # noqa: E402

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels"),
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TWO = (torch.float32, torch.bfloat16)
EPS = {t: torch.finfo(t).eps for t in DTYPES}
SEED = 77
# Roundings of a result: of the mean and the deviation a few, of a thread's own sum (up to 256
# terms) and of the merges about a level each, all relative to the sizes given to close().
TERMS = 60.0


@pytest.fixture(scope="module")
def lib() -> Iterator[driver.Library]:
    # The emulator has one thread, and waking others for small references costs more than they do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield driver.library("column_norm")
    torch.set_num_threads(threads)


def batch_nhwc(rows: int, channels: int) -> norms.View:
    return (1, rows, channels, 1, 1, rows)


def batch_nchw(samples: int, channels: int, plane: int) -> norms.View:
    return (1, samples, channels, plane, plane, samples)


def group_nhwc(samples: int, pixels: int, groups: int, size: int) -> norms.View:
    return (samples, pixels, groups, size, 1, pixels)


def pixel_nchw(samples: int, channels: int, pixels: int) -> norms.View:
    return (samples, channels, pixels, 1, 0, channels)


# name -> view, and the kernels that it takes, forward and backward.
FORMS = {
    "columns, resident": (batch_nhwc(6, 40), "column_norm_fwd, resident"),
    "columns": (batch_nhwc(1100, 16), "column_norm_fwd, moments"),
    "short planes": (batch_nchw(15, 3, 49), "column_norm_fwd, resident"),
    "tiles that split planes": (batch_nchw(9, 11, 275), "column_norm_fwd, moments"),
    "planes, resident": (batch_nchw(5, 3, 784), "plane_resident_fwd"),
    "planes, cluster": (batch_nchw(16, 1, 796), "plane_resident_fwd"),
    "groups of planes": ((2, 1, 2, 4 * 202, 202, 1), "plane_resident_fwd"),
    "planes": (batch_nchw(5, 3, 784), "plane_norm_fwd, moments"),
    "parts of planes": (batch_nchw(2, 1, 16501), "plane_norm_fwd, moments"),
    "groups of planes, chunked": ((2, 1, 2, 3 * 600, 600, 1), "plane_norm_fwd, moments"),
    "groups, resident": (group_nhwc(3, 16, 4, 6), "column_norm_fwd, resident"),
    "groups": (group_nhwc(2, 230, 8, 10), "column_norm_fwd, moments"),
    "instances": (group_nhwc(2, 730, 24, 1), "column_norm_fwd, moments"),
    "pixels": (pixel_nchw(2, 96, 64), "pixel_norm_fwd, staged"),
    "pixels, ragged": (pixel_nchw(2, 37, 49), "pixel_norm_fwd, staged"),
}
# No room for a plane: the streaming form's device.
SMALL = {"clusters": False, "max_shared": 4096}
STREAMING = ("tiles that split planes", "planes", "parts of planes", "groups of planes, chunked")


def form_norm(form: str, **options: Any) -> norms.Norm:
    return norms.Norm(FORMS[form][0], **(SMALL if form in STREAMING else {}), **options)


RAGGED = [
    *(batch_nhwc(rows, c) for rows in (2, 3, 65) for c in (1, 3, 65, 257)),
    *(batch_nhwc(rows, c) for rows, c in ((521, 1), (521, 65), (33, 1029), (17, 4099), (18, 2052))),
    *(batch_nchw(s, c, p) for s in (2, 7) for c, p in ((1, 2), (3, 5), (65, 3), (5, 511))),
    *(batch_nchw(s, c, p) for s, c, p in ((35, 7, 131), (33, 2, 512), (3, 3, 521), (17, 1, 1023))),
    *(batch_nchw(2, 1, p) for p in (8192, 16384, 16385)),
    *(group_nhwc(s, p, g, c) for s, p in ((1, 2), (5, 7)) for g, c in ((1, 1), (3, 65), (2, 1100))),
    *(group_nhwc(2, p, g, c) for p, g, c in ((331, 3, 5), (67, 1, 1031), (300, 1, 1))),
    *(pixel_nchw(s, c, p) for s, c in ((1, 1), (3, 2), (2, 65)) for p in (1, 3, 67, 264)),
    pixel_nchw(1, 1031, 24),
    pixel_nchw(1, 300, 65),
]


def draw(count: int, dtype: torch.dtype, seed: int, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 1.5 + mean).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: float) -> None:
    """|ours - exact| <= half an ulp of the output type + `terms` roundings of the accumulate
    type, relative to the magnitude of what was added."""
    acc = EPS[norms.accumulate(ours.dtype)]
    bound = EPS[ours.dtype] / 2 * exact.abs() * 1.01 + terms * acc * magnitude
    bound = bound + torch.finfo(ours.dtype).smallest_normal * EPS[ours.dtype] / 2
    error = (ours.double() - exact).abs()
    assert torch.isfinite(ours).all()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{error[worst]} > {bound[worst]} at {worst}"


def workspace(lib: driver.Library, norm: norms.Norm, dtype: torch.dtype, backward: bool) -> int:
    integers, reals = norm.arrays()
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (integers, reals))
    return lib.lib.column_norm_workspace(norms.DTYPES[dtype], *pointers, int(backward))


def entry(norm: norms.Norm, direction: str) -> str:
    return f"{'pixel' if norm.view[4] == 0 else 'column'}_norm_{direction}"


@dataclasses.dataclass
class Case:
    """Inputs of a norm, and its float64 results; the last, shorter outer block on its own."""

    norm: norms.Norm
    dtype: torch.dtype
    affine: bool = True
    residual: bool = False
    parameter_dtype: torch.dtype | None = None
    mean: float = 0.3

    def __post_init__(self) -> None:
        norm, dtype = self.norm, self.dtype
        parameter = self.parameter_dtype or dtype
        self.x = draw(norm.numel, dtype, 1, self.mean)
        self.weight = draw(norm.channels, parameter, 2) if self.affine else None
        self.bias = draw(norm.channels, parameter, 3) if self.affine else None
        self.r = draw(norm.numel, dtype, 4) if self.residual else None
        self.dy = draw(norm.numel, dtype, 5)
        acc = norms.accumulate(dtype)
        self.m = self.v = None
        if norm.frozen:
            self.v = draw(norm.statistics, acc, 6).abs() + 0.1
            if norm.centered:
                self.m = draw(norm.statistics, acc, 7)
        self.keep = torch.ones(norm.numel, dtype=torch.float64)
        if norm.dropout_p:
            keep, scale = norms.philox_keep(norm.numel, SEED, norm.dropout_p)
            self.keep = keep.double() * scale
        self.leaves = {
            "x": self.x,
            "weight": torch.ones(norm.channels) if self.weight is None else self.weight,
            "bias": torch.zeros(norm.channels) if self.bias is None else self.bias,
            "residual": torch.zeros(norm.numel) if self.r is None else self.r,
        }
        self.leaves = {k: t.double().requires_grad_() for k, t in self.leaves.items()}
        outer, rows, kept, inner, _, tail = norm.view
        plain = dataclasses.replace(norm, dropout_p=0.0)
        if not self.affine:
            plain = dataclasses.replace(plain, weight_offset=0.0)
        parts = [(plain, 0, outer)]
        if tail != rows:
            view = norm.view
            parts = [
                (dataclasses.replace(plain, view=(outer - 1, *view[1:5], rows)), 0, outer - 1),
                (dataclasses.replace(plain, view=(1, tail, *view[2:5], tail)), outer - 1, outer),
            ]
        results = []
        for part, first, last in parts:
            begin = first * rows * kept * inner
            here = slice(begin, begin + part.numel)
            frozen = slice(first * kept, last * kept)
            results.append(
                norms.reference(
                    part,
                    self.leaves["x"][here],
                    self.leaves["weight"],
                    self.leaves["bias"],
                    self.leaves["residual"][here],
                    None if self.m is None else self.m[frozen],
                    None if self.v is None else self.v[frozen],
                )
            )
        self.y = torch.cat([r.y for r in results]) * self.keep
        self.magnitude = torch.cat([r.magnitude for r in results]).detach() * self.keep
        self.exact_mean = torch.cat([r.mean.reshape(-1) for r in results]).detach()
        self.exact_var = torch.cat([r.var for r in results]).detach()

    @property
    def weight_size(self) -> float:
        largest = 1.0 if self.weight is None else self.weight.double().abs().max().item()
        return largest + abs(self.norm.weight_offset)

    def forward(self, lib: driver.Library) -> norms.Forward:
        return norms.forward(
            lib,
            entry(self.norm, "fwd"),
            self.norm,
            self.x,
            self.weight,
            self.bias,
            self.r,
            self.m,
            self.v,
            SEED,
            0 if self.norm.view[4] == 0 else workspace(lib, self.norm, self.dtype, False),
        )

    def check_forward(self, lib: driver.Library) -> norms.Forward:
        ours = self.forward(lib)
        # A mean is off by roundings of |mean| / std, and so is xhat.
        std = torch.sqrt(self.exact_var + self.norm.eps)
        shift = 1 + (self.exact_mean.abs() / std).max().item()
        size = self.magnitude + self.weight_size * 2 * shift
        close(ours.y, self.y.detach(), size, TERMS)
        cpu = norms.cpu_forward(
            self.norm, self.x, self.weight, self.bias, self.r, self.m, self.v, SEED
        )
        norms.assert_agree(ours.y, cpu.y, size, TERMS)
        if not self.norm.frozen:
            close(ours.var, self.exact_var, self.exact_var + 1, TERMS)
            if self.norm.centered:
                close(ours.mean, self.exact_mean, self.exact_mean.abs() + 2, TERMS)
        if self.norm.dropout_p:
            dropped = self.keep == 0
            assert (ours.y[dropped] == 0).all()
            assert self.norm.activation == "relu" or (ours.y[~dropped] != 0).double().mean() > 0.95
        return ours

    @functools.cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        leaves = list(self.leaves.values())
        grads = torch.autograd.grad(self.y, leaves, self.dy.double())
        return dict(zip(self.leaves, grads, strict=True))

    def per_channel(self, t: torch.Tensor) -> torch.Tensor:
        outer, rows, kept, inner, run, _ = self.norm.view
        if run == 0:
            return t.reshape(outer, rows, kept).sum(dim=(0, 2))
        return t.reshape(-1, kept * inner // run, run).sum(dim=(0, 2))

    def check_backward(
        self,
        lib: driver.Library,
        wanted: tuple[bool, bool, bool, bool] | None = None,
    ) -> norms.Backward:
        acc = norms.accumulate(self.dtype)
        norm = self.norm
        mean = self.m if norm.frozen else self.exact_mean.to(acc)
        var = self.v if norm.frozen else self.exact_var.to(acc)
        tensors = {"weight": self.weight, "bias": self.bias, "residual": self.r, "seed": SEED}
        tensors["wanted"] = wanted or (True, self.affine, self.affine, self.residual)
        ours = norms.backward(
            lib,
            entry(norm, "bwd"),
            norm,
            self.x,
            self.dy,
            var,
            mean,
            **tensors,
            workspace=workspace(lib, norm, self.dtype, True),
        )
        exact = self.gradients
        rstd = (1 / torch.sqrt(var.double() + norm.eps)).max().item()
        scale = torch.tensor(50 * self.weight_size * (1 + rstd))
        if ours.dx is not None:
            close(ours.dx, exact["x"], scale, TERMS)
        if ours.dresidual is not None:
            close(ours.dresidual, exact["residual"], scale, TERMS)
        h = exact["residual"].abs()
        total = self.per_channel(h) * 6 + 6
        for name, value in (("weight", ours.dweight), ("bias", ours.dbias)):
            if value is not None:
                close(value, exact[name], total, TERMS)
        cpu = norms.cpu_backward(norm, self.x, self.dy, var, mean, **tensors)
        if norm.view[5] > 1:  # one value has no gradient but roundings, times 1 / sqrt(eps)
            norms.assert_agree(ours.dx, cpu.dx, scale, TERMS)
        norms.assert_agree(ours.dresidual, cpu.dresidual, scale, TERMS)
        norms.assert_agree(ours.dweight, cpu.dweight, total, TERMS)
        norms.assert_agree(ours.dbias, cpu.dbias, total, TERMS)
        return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "centered"),
    [
        (torch.float32, True),
        (torch.float64, False),
        (torch.float16, True),
        (torch.bfloat16, False),
    ],
)
def test_forms(lib: driver.Library, form: str, dtype: torch.dtype, centered: bool) -> None:
    first = FORMS[form][1]
    case = Case(form_norm(form, centered=centered), dtype)
    case.check_forward(lib)
    if dtype in TWO:
        assert norms.launched(lib).startswith(first)
    case.check_backward(lib)
    if dtype in TWO and "resident" in first:
        assert norms.launched(lib) == first.replace("fwd", "bwd") + "; add_samples"


@pytest.mark.parametrize("dtype", TWO)
def test_ragged_sizes(lib: driver.Library, dtype: torch.dtype) -> None:
    for view in RAGGED[:: 2 if dtype == torch.float32 else 1]:
        for device in ({}, SMALL) if view[4] >= 512 else ({},):
            case = Case(norms.Norm(view, **device), dtype)
            case.check_forward(lib)
            case.check_backward(lib)


@pytest.mark.parametrize("form", FORMS)
def test_epilogues(lib: driver.Library, form: str) -> None:
    runs = [("relu", torch.bfloat16, True), ("silu", torch.float32, False)]
    if form in ("columns, resident", "pixels, ragged"):
        runs = list(itertools.product(norms.ACTIVATIONS, TWO, (True, False)))
    for activation, dtype, residual in runs:
        norm = form_norm(form, activation=activation, dropout_p=0.3, weight_offset=0.5 * residual)
        case = Case(norm, dtype, residual=residual)
        case.check_forward(lib)
        case.check_backward(lib)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_statistics(lib: driver.Library, form: str) -> None:
    for centered, activation in ((True, "relu"), (False, "none")):
        norm = form_norm(form, centered=centered, frozen=True, activation=activation)
        case = Case(norm, torch.bfloat16, residual=centered)
        case.check_forward(lib)
        assert ";" not in norms.launched(lib)
        case.check_backward(lib)
        assert ", map" not in norms.launched(lib)
        case.check_backward(lib, wanted=(True, False, False, False))


@pytest.mark.parametrize(
    "view",
    [
        (3, 40, 5, 1, 1, 17),
        (2, 700, 24, 1, 1, 1),
        (4, 9, 3, 49, 49, 2),
        (2, 20, 11, 275, 275, 9),
        (3, 4, 2, 700, 700, 1),
        (2, 2, 1, 16500, 16500, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TWO)
def test_shorter_last_block(lib: driver.Library, view: norms.View, dtype: torch.dtype) -> None:
    """Ghost batch norm, whose last batch may be smaller."""
    case = Case(norms.Norm(view, activation="silu", dropout_p=0.2), dtype, residual=True)
    case.check_forward(lib)
    case.check_backward(lib)


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_wanted(lib: driver.Library, form: str) -> None:
    norm = form_norm(form, activation="gelu")
    case = Case(norm, torch.float32, residual=True)
    all_wanted = list(itertools.product((False, True), repeat=4))[1:]
    some = (True, False, False, False), (False, True, True, False), (False, False, False, True)
    for wanted in all_wanted if form == "groups, resident" else some:
        case.check_backward(lib, wanted)
    kept = Case(form_norm(form, activation="relu"), torch.bfloat16, residual=True)
    for wanted in (True, True, True, True), (True, False, False, True), (False, True, True, True):
        kept.check_backward(lib, wanted)
    plain = Case(norm, torch.float32, affine=False)
    plain.check_forward(lib)
    plain.check_backward(lib)


@pytest.mark.parametrize("form", FORMS)
def test_float_parameters(lib: driver.Library, form: str) -> None:
    norm = form_norm(form, activation="silu")
    for dtype in (torch.float16, torch.bfloat16):
        case = Case(norm, dtype, parameter_dtype=torch.float32)
        case.check_forward(lib)
        case.check_backward(lib)


@pytest.mark.parametrize("form", FORMS)
def test_orders_give_the_same_bits(lib: driver.Library, form: str) -> None:
    case = Case(form_norm(form, dropout_p=0.1), torch.bfloat16)
    results = []
    for order in driver.ORDERS:
        with lib.order(order):
            results.append((case.forward(lib), case.check_backward(lib)))
    for forward, backward in results[1:]:
        assert torch.equal(forward.y, results[0][0].y)
        assert torch.equal(forward.var, results[0][0].var)
        assert torch.equal(backward.dx, results[0][1].dx)
        assert torch.equal(backward.dweight, results[0][1].dweight)
        assert torch.equal(backward.dbias, results[0][1].dbias)


@pytest.mark.parametrize(
    "view",
    [
        *(group_nhwc(3, p, g, c) for p, g, c in ((16, 4, 6), (230, 8, 10), (331, 3, 5))),
        pixel_nchw(3, 65, 49),
        pixel_nchw(3, 96, 64),
        (3, 1, 4, 3 * 794, 794, 1),
        (3, 1, 2, 4 * 602, 602, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TWO)
def test_a_sample_has_the_same_bits_in_any_batch(
    lib: driver.Library, view: norms.View, dtype: torch.dtype
) -> None:
    device = SMALL if view[4] == 602 else {}
    batch = Case(norms.Norm(view, **device), dtype)
    y, dx = batch.forward(lib).y, batch.check_backward(lib).dx
    size = batch.norm.numel // 3
    for sample in range(3):
        here = slice(sample * size, (sample + 1) * size)
        alone = Case(norms.Norm((1, *view[1:]), **device), dtype)
        alone.x, alone.dy = batch.x[here].clone(), batch.dy[here].clone()
        assert torch.equal(alone.forward(lib).y, y[here])
        statistics = slice(sample * view[2], (sample + 1) * view[2])
        acc = norms.accumulate(dtype)
        single = norms.backward(
            lib,
            entry(alone.norm, "bwd"),
            alone.norm,
            alone.x,
            alone.dy,
            batch.exact_var[statistics].to(acc),
            batch.exact_mean[statistics].to(acc),
            weight=alone.weight,
            bias=alone.bias,
            wanted=(True, True, True, False),
            workspace=workspace(lib, alone.norm, dtype, True),
        )
        assert torch.equal(single.dx, dx[here])


@pytest.mark.parametrize("form", FORMS)
def test_misaligned_pointers(lib: driver.Library, form: str) -> None:
    norm = form_norm(form, dropout_p=0.2)
    case = Case(norm, torch.bfloat16)
    aligned = case.check_forward(lib), case.check_backward(lib)
    case.x = torch.cat([case.x[:1], case.x])[1:]
    ours = case.check_forward(lib), case.check_backward(lib)
    if norm.view[4] != 0:
        assert torch.equal(ours[0].y, aligned[0].y) and torch.equal(ours[1].dx, aligned[1].dx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_means(lib: driver.Library, form: str, mean: float) -> None:
    case = Case(form_norm(form), torch.float32, mean=mean)
    ours = case.forward(lib)
    # A few roundings, and those of the mean of each chunk, 6e-8 |mean|, against its distance of
    # a small part of a standard deviation from the others. E[x^2] - E[x]^2 is off by mean^2 6e-8.
    bound = (1e-6 + 4e-9 * mean) * case.exact_var
    assert ((ours.var.double() - case.exact_var).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
def test_equal_elements_have_no_variance(lib: driver.Library, form: str) -> None:
    case = Case(form_norm(form), torch.float32)
    case.x = torch.full_like(case.x, 0.1)
    ours = case.forward(lib)
    assert (ours.mean == case.x[0]).all() and (ours.var == 0).all()


@pytest.mark.parametrize("max_shared", [20 * 1024, 48 * 1024, 227 * 1024])
def test_pixels_without_room(lib: driver.Library, max_shared: int) -> None:
    for channels in (96, 1300):
        norm = norms.Norm(pixel_nchw(1, channels, 40), max_shared=max_shared, activation="gelu")
        case = Case(norm, torch.float32, residual=True)
        case.check_forward(lib)
        case.check_backward(lib)


def test_many_samples(lib: driver.Library) -> None:
    case = Case(norms.Norm(group_nhwc(65540, 2, 1, 1)), torch.float32)
    case.check_forward(lib)
    # Several turns of the persistent blocks, each of which reads its part once.
    for channels, pixels in ((5, 8), (3, 7), (70, 8)):
        case = Case(norms.Norm(pixel_nchw(1200, channels, pixels)), torch.bfloat16)
        with lib.counting():
            case.check_backward(lib)
            check_moved(lib, ("x", "dy", "dx"), 3 * case.norm.numel * 2)


def test_empty_input(lib: driver.Library) -> None:
    for view in (batch_nhwc(0, 5), pixel_nchw(0, 5, 4)):
        norm = norms.Norm(view)
        empty = torch.empty(0)
        statistics = torch.ones(norm.statistics)
        ours = norms.backward(
            lib, entry(norm, "bwd"), norm, empty, empty, statistics, statistics,
            weight=torch.ones(5), bias=torch.ones(5),
        )  # fmt: skip
        assert (ours.dweight == 0).all() and (ours.dbias == 0).all()


def check_moved(lib: driver.Library, names: tuple[str, ...], expected: int) -> None:
    """And a little more: the first element of a part is looked at before."""
    buffers = [report["buffers"] for report in lib.reports()]
    bytes_moved = sum(b[n]["loaded"] + b[n]["stored"] for b in buffers for n in names if n in b)
    assert expected <= bytes_moved <= 1.06 * expected


# form -> reads and writes of the activation, forward and backward, in units of E b; frozen.
BYTES = {
    batch_nhwc(32, 64): (3, 5, 3),
    batch_nhwc(300, 64): (3, 5, 3),
    batch_nchw(8, 4, 784): (2, 3, 3),
    (2, 1, 4, 8 * 256, 256, 1): (2, 3, 3),
    group_nhwc(1, 300, 8, 8): (3, 5, 3),
    pixel_nchw(1, 768, 32): (2, 3, 3),
}


@pytest.mark.parametrize("view", BYTES, ids=str)
@pytest.mark.parametrize("dtype", TWO)
def test_bytes_moved(lib: driver.Library, view: norms.View, dtype: torch.dtype) -> None:
    """Reads and writes of the activations, wherever they come from: the second read of the
    column and plane forms is the one that L1 or L2 may serve."""
    forward, backward, frozen = BYTES[view]
    for fixed, expected in ((False, (forward, backward)), (True, (2, frozen))):
        norm = norms.Norm(view, frozen=fixed)
        case = Case(norm, dtype)
        unit = norm.numel * dtype.itemsize
        with lib.counting():
            case.forward(lib)
            check_moved(lib, ("x", "y"), expected[0] * unit)
            for report in lib.reports():
                stored = report["buffers"]["y"]["stored"]
                assert stored == 0 or report["widths"]["16"] * 16 >= stored
            case.check_backward(lib)
            check_moved(lib, ("x", "dy", "dx"), expected[1] * unit)


@pytest.mark.parametrize("dtype", TWO)
def test_bytes_moved_by_groups_in_chunks(lib: driver.Library, dtype: torch.dtype) -> None:
    norm = norms.Norm((2, 1, 2, 4 * 1024, 1024, 1), **SMALL)
    case = Case(norm, dtype)
    with lib.counting():
        case.forward(lib)
        check_moved(lib, ("x", "y"), 3 * norm.numel * dtype.itemsize)
        case.check_backward(lib)
        check_moved(lib, ("x", "dy", "dx"), 5 * norm.numel * dtype.itemsize)


# (groups, channels of a group, plane, bfloat16) -> whether the planes are chunked forward, with a
# residual forward, and taken backward. A cluster has 8 x 219 KB for a row.
ROW_NORMS = {
    (1, 64, 64 * 64): (False, False, True),
    (1, 128, 64 * 64): (False, True, True),
    (1, 128, 128 * 128): (True, True, True),
    (32, 4, 512 * 512): (False, False, True),
    (8, 4, 512 * 512): (True, True, True),
    (1, 8192, 15 * 15): (False, False, False),
    (1, 8192, 7 * 7): (False, False, False),
    (1, 101, 255 * 255): (False, False, False),
}


@pytest.mark.parametrize("groups", ROW_NORMS, ids=str)
def test_group_norms_that_the_planes_take(
    lib: driver.Library, groups: tuple[int, int, int]
) -> None:
    count, size, plane = groups
    taken = []
    for samples in (1, 16):
        arrays = norms.Norm((samples, 1, count, size * plane, plane, 1)).arrays()
        dtype, pointers = norms.DTYPES[torch.bfloat16], [a.ctypes.data for a in arrays]
        questions = ((False, False), (True, False), (False, True))  # residual, backward
        ask = functools.partial(
            lib.lib.column_takes_row_norm, dtype, *map(ctypes.c_void_p, pointers)
        )
        taken.append(tuple(bool(ask(*question)) for question in questions))
    assert taken == [ROW_NORMS[groups]] * 2


@pytest.mark.parametrize("dtype", TWO)
def test_bytes_moved_streaming_and_with_a_shortcut(lib: driver.Library, dtype: torch.dtype) -> None:
    """add + ReLU: the shortcut is read once, and its gradient written once; where the planes are
    read again, that gradient is too, in place of dy and the shortcut."""
    for device, expected in (({}, (3, 5)), (SMALL, (4, 7))):
        norm = norms.Norm(batch_nchw(8, 4, 784), activation="relu", **device)
        case = Case(norm, dtype, residual=True)
        unit = norm.numel * dtype.itemsize
        with lib.counting():
            case.forward(lib)
            check_moved(lib, ("x", "residual", "y"), expected[0] * unit)
            case.check_backward(lib)
            check_moved(lib, ("x", "dy", "residual", "dx", "dresidual"), expected[1] * unit)
