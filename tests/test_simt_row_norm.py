"""The CUDA row kernels, run on the CPU, against the float64 reference and the CPU kernels."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simt import driver, norms  # noqa: E402

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels"),
]

SIXTEEN_BYTES = {torch.float32: 4, torch.float64: 2, torch.float16: 8, torch.bfloat16: 8}
DTYPES = tuple(SIXTEEN_BYTES)
CASES = (
    (torch.float32, True),
    (torch.float64, False),
    (torch.float16, True),
    (torch.bfloat16, False),
)
EPS = {t: torch.finfo(t).eps for t in DTYPES}


@pytest.fixture(scope="module")
def lib() -> driver.Library:
    return driver.library("row_norm")


def draw(count: int, dtype: torch.dtype, seed: int, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 1.5 + mean).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: float) -> None:
    """|ours - exact| <= half an ulp of the output type + `terms` roundings of the accumulate
    type, each relative to the absolute terms of the sum that y is."""
    acc = EPS[norms.accumulate(ours.dtype)]
    bound = EPS[ours.dtype] / 2 * exact.abs() * 1.01 + terms * acc * magnitude
    # 16-bit floats below their normal range have a fixed spacing.
    bound = bound + torch.finfo(ours.dtype).smallest_normal * EPS[ours.dtype] / 2
    error = (ours.double() - exact).abs()
    assert torch.isfinite(ours).all()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{error[worst]} > {bound[worst]} at {worst}"


def check_forward(
    lib: driver.Library,
    norm: norms.Norm,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    residual: bool = False,
    parameter_dtype: torch.dtype | None = None,
) -> norms.Forward:
    x = draw(norm.numel, dtype, 1)
    weight = draw(norm.channels, parameter_dtype or dtype, 2) if affine else None
    bias = draw(norm.channels, parameter_dtype or dtype, 3) if affine else None
    r = draw(norm.numel, dtype, 4) if residual or norm.prologue else None
    tensors = {"weight": weight, "bias": bias, "residual": r, "seed": 77}
    ours = norms.forward(lib, "row_norm_fwd", norm, x, **tensors)
    exact = norms.reference(norm, x, **tensors, rounded_sum=ours.sum)
    # The mean and the deviation carry a rounding per level of the sum and per element of a
    # thread's own part (at most 2^10 here), each of relative size 1 against |xhat| + |mean|/std.
    terms = 40.0
    condition = exact.magnitude + (weight.double().abs().max() if affine else 1.0) * 2
    close(ours.y, exact.y, condition, terms)
    close(ours.var, exact.var, exact.var + 1, terms)
    if norm.centered:
        close(ours.mean, exact.mean, exact.mean.abs() + 2, terms)
    if norm.prologue:
        total = norms.reference(norm, x, **tensors).sum
        close(ours.sum, total, total.abs() + 6, 4)
    cpu = norms.cpu_forward(norm, x, **tensors)
    if norm.prologue:
        # Where one rounds the sum up and the other down, they go on from different inputs.
        norms.assert_agree(ours.sum, cpu.sum, total.abs() + 6, 4)
        return ours
    norms.assert_agree(ours.y, cpu.y, condition, terms)
    norms.assert_agree(ours.var, cpu.var, exact.var + 1, terms)
    return ours


def thresholds(dtype: torch.dtype) -> list[int]:
    """Row lengths on both sides of every step of row_norm_fwd_of_width."""
    v = SIXTEEN_BYTES[dtype]
    sizes = {1, 2, 3, 5, 17, 31, 33, 65, 97, 127, 129, 1021, 2053}
    for packs in (1, 2, 4, 8, 16, 32, 128, 160, 512, 2048, 4096):
        sizes |= {packs * v - 1, packs * v, packs * v + 1, packs * v + v}
    return sorted(sizes - {0})


FORMS = {
    "part of a warp": "row_norm_fwd, part of a warp",
    "warp": "row_norm_fwd, warp",
    "block": "row_norm_fwd, block",
    "cluster": "row_norm_fwd, cluster",
    "streaming": "row_norm_fwd, streaming",
    "ragged": "row_norm_fwd, ragged",
}


@pytest.mark.parametrize(("dtype", "centered"), CASES)
def test_every_row_length(lib: driver.Library, dtype: torch.dtype, centered: bool) -> None:
    seen = set()
    for size in thresholds(dtype):
        rows = 3 if size < 600 else 1 + size % 2
        check_forward(lib, norms.Norm(norms.row_view(rows, size), centered), dtype)
        seen.add(norms.launched(lib))
    assert {FORMS[f] for f in ("part of a warp", "warp", "block", "cluster", "ragged")} <= seen


@pytest.mark.parametrize(
    ("dtype", "size", "form"),
    [
        (torch.bfloat16, 16384, "block"),
        (torch.bfloat16, 16392, "cluster"),
        (torch.bfloat16, 262144, "cluster"),
        (torch.float32, 262144, "cluster"),
        (torch.float32, 262143, "ragged"),
    ],
)
def test_rows_to_262144_columns_stay_on_chip(
    lib: driver.Library, dtype: torch.dtype, size: int, form: str
) -> None:
    check_forward(lib, norms.Norm(norms.row_view(1, size)), dtype)
    assert norms.launched(lib) == FORMS[form]


@pytest.mark.parametrize(("dtype", "centered"), CASES)
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("prologue", [True, False])
def test_streaming_rows(
    lib: driver.Library, dtype: torch.dtype, clusters: bool, prologue: bool, centered: bool
) -> None:
    for size in (20000, 20001):
        norm = norms.Norm(
            norms.row_view(2, size),
            centered,
            prologue=prologue,
            dropout_p=0.25 * prologue,
            clusters=clusters,
            max_shared=8 * 1024,
        )
        check_forward(lib, norm, dtype)
        if size % 8:
            assert norms.launched(lib) == FORMS["streaming"]


@pytest.mark.parametrize("size", [8, 65, 128, 520, 1032, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_epilogues(lib: driver.Library, size: int, dtype: torch.dtype, residual: bool) -> None:
    for activation in norms.ACTIVATIONS:
        for p in (0.0, 0.3):
            norm = norms.Norm(norms.row_view(3, size), activation=activation, dropout_p=p)
            check_forward(lib, norm, dtype, residual=residual)


@pytest.mark.parametrize("size", [8, 65, 128, 520, 1032, 1100, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_prologue(lib: driver.Library, size: int, dtype: torch.dtype, p: float) -> None:
    norm = norms.Norm(norms.row_view(2, size), False, prologue=True, dropout_p=p, weight_offset=1.0)
    check_forward(lib, norm, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 65, 128, 1032, 40000])
def test_float_parameters_beside_sixteen_bit_input(
    lib: driver.Library, dtype: torch.dtype, size: int
) -> None:
    check_forward(lib, norms.Norm(norms.row_view(2, size)), dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_kept", [1, 3, 4])
@pytest.mark.parametrize("inner", [1, 5, 16, 49, 400])
def test_affine_by_channel(
    lib: driver.Library, dtype: torch.dtype, per_kept: int, inner: int
) -> None:
    check_forward(lib, norms.Norm((2, 1, 3, per_kept * inner, inner, 1)), dtype)


@pytest.mark.parametrize("size", [24, 65, 1000, 1032, 9001, 17000])
def test_orders_give_the_same_bits(lib: driver.Library, size: int) -> None:
    norm = norms.Norm(norms.row_view(2, size), prologue=True, dropout_p=0.1)
    results = []
    for order in driver.ORDERS:
        with lib.order(order):
            results.append(check_forward(lib, norm, torch.bfloat16))
    for other in results[1:]:
        assert torch.equal(other.y, results[0].y) and torch.equal(other.var, results[0].var)


@pytest.mark.parametrize("size", [1, 24, 65, 100, 1032, 20000, 20001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(
    lib: driver.Library, size: int, dtype: torch.dtype
) -> None:
    rows = 7 if size < 2000 else 2
    x, weight = draw(rows * size, dtype, 1), draw(size, dtype, 2)
    run = functools.partial(norms.forward, lib, "row_norm_fwd", weight=weight)
    batch = run(norms.Norm(norms.row_view(rows, size)), x)
    for row in range(rows):
        alone = run(norms.Norm(norms.row_view(1, size)), x[row * size :][:size].clone())
        assert torch.equal(alone.y, batch.y[row * size :][:size])
        assert alone.mean[0] == batch.mean[row] and alone.var[0] == batch.var[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_pointers(lib: driver.Library, dtype: torch.dtype) -> None:
    size = 256
    norm = norms.Norm(norms.row_view(3, size))
    x, weight = draw(norm.numel + 1, dtype, 1)[1:], draw(size + 1, dtype, 2)[1:]
    ours = norms.forward(lib, "row_norm_fwd", norm, x, weight=weight)
    exact = norms.reference(norm, x, weight=weight)
    close(ours.y, exact.y, exact.magnitude + 2, 40)


@pytest.mark.parametrize("size", [256, 1024, 8192, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_moved(lib: driver.Library, size: int, dtype: torch.dtype) -> None:
    """2 E b + 8 M forward, 4 E b + 8 M with the prologue, and every segment touched once."""
    rows = 2
    element_bytes = rows * size * dtype.itemsize
    for prologue in (False, True):
        norm = norms.Norm(norms.row_view(rows, size), prologue=prologue)
        with lib.counting():
            check_forward(lib, norm, dtype)
            report = lib.report()
        buffers = report["buffers"]
        assert buffers["x"] == {"loaded": element_bytes, "stored": 0}
        assert buffers["y"] == {"loaded": 0, "stored": element_bytes}
        assert buffers["mean"] == buffers["var"] == {"loaded": 0, "stored": 4 * rows}
        assert buffers["weight"]["loaded"] == element_bytes  # from cache, but for the first row
        activations = ["x", "y"]
        if prologue:
            activations += ["residual", "sum"]
            assert buffers["residual"] == {"loaded": element_bytes, "stored": 0}
            assert buffers["sum"] == {"loaded": 0, "stored": element_bytes}
        moved = sum(buffers[name]["loaded"] + buffers[name]["stored"] for name in activations)
        assert moved == (4 if prologue else 2) * element_bytes
        assert set(report["widths"]) == {"16", "4"}
        for totals in (report["load"], report["store"]):
            # The allocator aligns to 64 bytes: a request of n segments may touch n + 1.
            assert totals["segments"] <= totals["least_segments"] + totals["requests"]
            assert totals["segments"] <= 1.3 * totals["least_segments"] + 4 * rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_rows_move_packs(lib: driver.Library, dtype: torch.dtype) -> None:
    """2 E b as aligned rows do, in 16-byte accesses but for a head and a tail."""
    for size, clusters in ((2053, True), (40003, True)):
        norm = norms.Norm(norms.row_view(3, size), clusters=clusters)
        with lib.counting():
            check_forward(lib, norm, dtype)
            report = lib.report()
        assert report["kernel"] == FORMS["ragged"]
        element_bytes = norm.numel * dtype.itemsize
        assert report["buffers"]["x"] == {"loaded": element_bytes, "stored": 0}
        assert report["buffers"]["y"] == {"loaded": 0, "stored": element_bytes}
        assert report["widths"]["16"] * 16 >= 2 * 0.98 * element_bytes


def check_backward(
    lib: driver.Library,
    norm: norms.Norm,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    residual: bool = False,
    parameter_dtype: torch.dtype | None = None,
    dy: bool = True,
    dsum: bool = True,
    wanted: tuple[bool, bool, bool, bool] | None = None,
) -> norms.Backward:
    acc = norms.accumulate(dtype)
    x = draw(norm.numel, dtype, 1)
    weight = draw(norm.channels, parameter_dtype or dtype, 2) if affine else None
    bias = draw(norm.channels, parameter_dtype or dtype, 3) if affine else None
    r = draw(norm.numel, dtype, 4) if residual else None
    grad = draw(norm.numel, dtype, 5) if dy else None
    grad_sum = draw(norm.numel, dtype, 6) if dsum and norm.prologue else None
    grid = x.double().reshape(norm.view[0], norm.view[1], norm.view[2], norm.view[3])
    m = grid.mean(dim=(1, 3)) if norm.centered else torch.zeros(())
    center = m[:, None, :, None] if norm.centered else m
    mean = m.reshape(-1).to(acc) if norm.centered else None
    var = ((grid - center) ** 2).mean(dim=(1, 3)).reshape(-1).to(acc)
    wanted = wanted or (True, affine, affine, residual or norm.prologue)
    tensors = {"dsum": grad_sum, "weight": weight, "bias": None if norm.prologue else bias}
    tensors |= {"residual": r, "seed": 77, "wanted": wanted}
    ours = norms.backward(
        lib,
        "row_norm_bwd",
        norm,
        x,
        grad,
        var,
        mean,
        **tensors,
        workspace=norms_workspace(lib, norm, dtype),
    )
    exact = exact_gradients(norm, x, grad, grad_sum, weight, bias, r, mean, var)
    scale = (weight.double().abs().max().item() if affine else 1.0) + abs(norm.weight_offset)
    # Roundings as in the forward pass; a gradient has the size of its terms, at most a few
    # standard deviations of dy each.
    terms = 60.0
    rstd = 1 / torch.sqrt(var.double() + norm.eps)
    per_element = rstd.reshape(norm.view[0], 1, norm.view[2], 1).expand_as(grid).reshape(-1)
    magnitude = 8 * scale * (1 + per_element) * 6
    if ours.dx is not None:
        close(ours.dx, exact["x"], magnitude, terms)
    if ours.dresidual is not None:
        close(ours.dresidual, exact["residual"], magnitude, terms)
    rows = norm.numel / norm.channels
    for name, value in (("weight", ours.dweight), ("bias", ours.dbias)):
        if value is not None:
            total = exact[name + " terms"]
            close(value, exact[name], total + rows**0.5, terms + rows**0.5)
    cpu = norms.cpu_backward(norm, x, grad, var, mean, **tensors)
    norms.assert_agree(ours.dx, cpu.dx, magnitude, terms)
    norms.assert_agree(ours.dresidual, cpu.dresidual, magnitude, terms)
    for name in ("weight", "bias"):
        total = exact[name + " terms"] + rows**0.5
        norms.assert_agree(
            getattr(ours, "d" + name), getattr(cpu, "d" + name), total, terms + rows**0.5
        )
    return ours


def norms_workspace(lib: driver.Library, norm: norms.Norm, dtype: torch.dtype) -> int:
    view = np.array(norm.view, dtype=np.int64)
    return lib.lib.row_norm_bwd_workspace(ctypes.c_void_p(view.ctypes.data), dtype.itemsize)


def exact_gradients(
    norm: norms.Norm,
    x: torch.Tensor,
    dy: torch.Tensor | None,
    dsum: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """float64 autograd of norms.reference; for the prologue x is the sum itself."""
    keep, scale = torch.ones(norm.numel), 1.0
    if norm.dropout_p:
        keep, scale = norms.philox_keep(norm.numel, 77, norm.dropout_p)
    leaves = {"x": x.double().requires_grad_()}
    leaves["weight"] = (torch.ones(norm.channels) if weight is None else weight).double()
    leaves["bias"] = (torch.zeros(norm.channels) if bias is None else bias).double()
    leaves["residual"] = (torch.zeros(norm.numel) if residual is None else residual).double()
    for name in ("weight", "bias", "residual"):
        leaves[name].requires_grad_()
    inner = dataclasses.replace(
        norm, prologue=False, dropout_p=0.0 if norm.prologue else norm.dropout_p
    )
    if weight is None:
        inner = dataclasses.replace(inner, weight_offset=0.0)
    y = norms.reference(
        inner,
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        leaves["residual"],
        mean=mean,
        var=var,
        seed=77,
    ).y
    upstream = torch.zeros(norm.numel).double() if dy is None else dy.double()
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))
    statistics = ((mean if mean is not None else torch.zeros_like(var)).double(), var.double())
    shape = (norm.view[0], norm.view[1], norm.view[2], norm.view[3])
    h = grads["residual"].reshape(shape)
    center, spread = (s.reshape(shape[0], 1, shape[2], 1) for s in statistics)
    xhat = (x.double().reshape(shape) - center) / torch.sqrt(spread + norm.eps)
    for name, product in (("weight", (h * xhat).abs()), ("bias", h.abs())):
        per = product.sum(dim=(0, 1)).reshape(norm.channels, -1).sum(1)
        grads[name + " terms"] = per
    if norm.prologue:
        total = grads["x"] + (0 if dsum is None else dsum.double())
        grads["residual"] = total
        grads["x"] = total * keep.double() * scale
    return grads


def backward_thresholds(dtype: torch.dtype) -> list[int]:
    v = SIXTEEN_BYTES[dtype]
    items = (4 if dtype == torch.float64 else 16) // v
    single = 4 if dtype == torch.float64 else 8
    sizes = {1, 2, 3, 31, 33, 65, 127, 1021}
    for edge in (v, items * v, 8 * items * v, 32 * items * v, 64 * items * v, 512 * items * v):
        sizes |= {edge - 1, edge, edge + 1, edge + v}
    for edge in (32 * single, 512 * single):
        sizes |= {edge - 1, edge + 1}
    return sorted(sizes - {0})


@pytest.mark.parametrize(("dtype", "centered"), CASES)
def test_backward_of_every_row_length(
    lib: driver.Library, dtype: torch.dtype, centered: bool
) -> None:
    seen = set()
    for size in backward_thresholds(dtype):
        rows = 3 if size < 600 else 1 + size % 2
        check_backward(lib, norms.Norm(norms.row_view(rows, size), centered), dtype)
        seen.add(norms.launched(lib))
    forms = ("warp", "block", "cluster", "ragged")
    assert seen == {f"row_norm_bwd, {form}; add_partial_rows" for form in forms}


@pytest.mark.parametrize(
    ("size", "rows"), [(8, 9000), (100, 2500), (512, 2200), (2304, 700), (2305, 300)]
)
def test_backward_of_many_rows(lib: driver.Library, size: int, rows: int) -> None:
    """More rows than one turn of the persistent blocks."""
    norm = norms.Norm(norms.row_view(rows, size))
    check_backward(lib, norm, torch.float32)


def test_backward_of_65536_columns_reads_them_once(lib: driver.Library) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_backward(lib, norms.Norm(norms.row_view(2, 65536)), dtype)
        assert norms.launched(lib) == "row_norm_bwd, cluster; add_partial_rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [True, False])
def test_backward_streaming(lib: driver.Library, dtype: torch.dtype, prologue: bool) -> None:
    for size in (8200, 8193):
        norm = norms.Norm(
            norms.row_view(135, size)
            if size % 2 and dtype == torch.float32
            else norms.row_view(2, size),
            prologue=prologue,
            dropout_p=0.25 * prologue,
            clusters=False,
        )
        check_backward(lib, norm, dtype)
        assert norms.launched(lib) == "row_norm_bwd, streaming; add_partial_rows"
    if dtype == torch.bfloat16:
        check_backward(lib, norms.Norm(norms.row_view(1, 70000), prologue=prologue), dtype)


@pytest.mark.parametrize("size", [8, 65, 128, 520, 521, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_backward_epilogues(
    lib: driver.Library, size: int, dtype: torch.dtype, residual: bool
) -> None:
    for activation in norms.ACTIVATIONS:
        for p in (0.0, 0.3):
            norm = norms.Norm(norms.row_view(3, size), activation=activation, dropout_p=p)
            check_backward(lib, norm, dtype, residual=residual)


@pytest.mark.parametrize("size", [8, 65, 128, 1032, 1033, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_backward_prologue(lib: driver.Library, size: int, dtype: torch.dtype, p: float) -> None:
    norm = norms.Norm(norms.row_view(2, size), False, prologue=True, dropout_p=p, weight_offset=1.0)
    for dy, dsum in ((True, True), (True, False), (False, True)):
        check_backward(lib, norm, dtype, dy=dy, dsum=dsum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 65, 1032])
def test_backward_float_parameters(lib: driver.Library, dtype: torch.dtype, size: int) -> None:
    norm = norms.Norm(norms.row_view(4, size), activation="silu")
    check_backward(lib, norm, dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_kept", [1, 3, 4])
@pytest.mark.parametrize("inner", [1, 5, 16, 400])
def test_backward_affine_by_channel(
    lib: driver.Library, dtype: torch.dtype, per_kept: int, inner: int
) -> None:
    view = (5, 1, 3, per_kept * inner, inner, 1)
    norm = norms.Norm(view, activation="silu", dropout_p=0.2)
    check_backward(lib, norm, dtype, residual=True)


def test_backward_only_what_is_wanted(lib: driver.Library) -> None:
    norm = norms.Norm(norms.row_view(3, 520), activation="gelu", dropout_p=0.1)
    for wanted in itertools.product((False, True), repeat=4):
        check_backward(lib, norm, torch.float32, residual=True, wanted=wanted)
    check_backward(lib, norm, torch.float32, affine=False)


@pytest.mark.parametrize("size", [1023, 1024])
def test_backward_with_one_stage_has_the_same_bits(lib: driver.Library, size: int) -> None:
    norm = norms.Norm(norms.row_view(5, size))
    two = check_backward(lib, norm, torch.float32)
    one = check_backward(lib, dataclasses.replace(norm, max_shared=20 * 1024), torch.float32)
    assert torch.equal(one.dx, two.dx) and torch.equal(one.dweight, two.dweight)


@pytest.mark.parametrize("size", [24, 65, 1000, 1032, 6200, 3101])
def test_backward_orders_give_the_same_bits(lib: driver.Library, size: int) -> None:
    norm = norms.Norm(norms.row_view(3, size), prologue=True, dropout_p=0.1)
    results = []
    for order in driver.ORDERS:
        with lib.order(order):
            results.append(check_backward(lib, norm, torch.bfloat16))
    for other in results[1:]:
        assert torch.equal(other.dx, results[0].dx)
        assert torch.equal(other.dweight, results[0].dweight)
        assert torch.equal(other.dbias, results[0].dbias)


@pytest.mark.parametrize("size", [512, 2048, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_bytes_moved(lib: driver.Library, size: int, dtype: torch.dtype) -> None:
    """3 E b without, 4 E b with the gradient of the sum; 2 P N 4 stored and loaded again."""
    rows = 2
    element_bytes = rows * size * dtype.itemsize
    for prologue in (False, True):
        norm = norms.Norm(norms.row_view(rows, size), prologue=prologue)
        with lib.counting():
            check_backward(lib, norm, dtype, wanted=(True, True, True, False))
            kernel, partial = lib.reports()
        groups = rows if size > 512 else -(-rows // (128 // (size // 16)))
        buffers = kernel["buffers"]
        names = ["dy", "x", "dx"] + ["dsum"] * prologue
        moved = sum(buffers[name]["loaded"] + buffers[name]["stored"] for name in names)
        assert moved == len(names) * element_bytes
        assert buffers["workspace"] == {"loaded": 0, "stored": 8 * groups * size}
        assert partial["buffers"]["workspace"] == {"loaded": 8 * groups * size, "stored": 0}
        # Every thread fetches the statistics of its rows.
        statistics = buffers["mean"]["loaded"] + buffers["var"]["loaded"]
        asynchronous = kernel["hints"]["ld.async"] - statistics
        assert asynchronous == (len(names) - 1) * element_bytes
        assert kernel["load"]["bytes"] == kernel["hints"]["ld.async"] + kernel["hints"]["ld.g"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prologue", [True, False])
def test_backward_of_ragged_rows_moves_packs(
    lib: driver.Library, dtype: torch.dtype, prologue: bool
) -> None:
    """3 E b, with the prologue 5 E b, in 16-byte accesses but for a head and a tail of each row."""
    for size in (2053, 5003):
        norm = norms.Norm(norms.row_view(3, size), prologue=prologue, dropout_p=0.5 * prologue)
        with lib.counting():
            check_backward(lib, norm, dtype)
            kernel, _ = lib.reports()
        assert kernel["kernel"] == "row_norm_bwd, ragged"
        element_bytes = norm.numel * dtype.itemsize
        read = ["x", "dy"] + ["dsum"] * prologue
        written = ["dx"] + ["dresidual"] * prologue
        for name in read:
            assert kernel["buffers"][name] == {"loaded": element_bytes, "stored": 0}
        for name in written:
            assert kernel["buffers"][name] == {"loaded": 0, "stored": element_bytes}
        in_packs = kernel["widths"]["16"] * 16
        assert in_packs >= 0.98 * len(read + written) * element_bytes


def test_sanitizers_find_nothing() -> None:
    """One type, every kernel form, odd sizes, in a process with AddressSanitizer."""
    arguments = ("row_norm", "sanitize", ("SIMT_DTYPES=8",))
    driver.build(*arguments)
    code = f"""
import test_simt_row_norm as t
from simt import driver, norms
import torch
lib = driver.library(*{arguments!r})
for size, shared in ((3, 0), (65, 0), (264, 0), (1032, 0), (1031, 0), (17000, 0), (5001, 0),
                     (7000, 6000)):
    norm = norms.Norm(norms.row_view(2, size), prologue=True, dropout_p=0.1,
                      max_shared=shared or 227 * 1024, clusters=shared == 0)
    t.check_forward(lib, norm, torch.bfloat16)
    t.check_backward(lib, norm, torch.bfloat16)
norm = norms.Norm((2, 1, 3, 35, 5, 1), activation="gelu")
t.check_forward(lib, norm, torch.bfloat16, residual=True)
t.check_backward(lib, norm, torch.bfloat16, residual=True)
print("nothing found")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=driver.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert "nothing found" in result.stdout, result.stderr[-4000:]
