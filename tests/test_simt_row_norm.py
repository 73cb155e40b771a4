"""The CUDA row kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

from simt import driver, norms  # noqa: E402

pytestmark = pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler")

SIXTEEN_BYTES = {torch.float32: 4, torch.float64: 2, torch.float16: 8, torch.bfloat16: 8}
DTYPES = tuple(SIXTEEN_BYTES)
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
    acc = norms.accumulate(dtype)
    mean = var = None
    if norm.frozen:
        mean, var = draw(norm.statistics, acc, 5), draw(norm.statistics, acc, 6).abs() + 0.1
    tensors = {"weight": weight, "bias": bias, "residual": r, "mean": mean, "var": var, "seed": 77}
    ours = norms.forward(lib, "row_norm_fwd", norm, x, **tensors)
    exact = norms.reference(norm, x, **tensors, rounded_sum=ours.sum)
    # The mean and the deviation carry a rounding per level of the sum and per element of a
    # thread's own part (at most 2^10 here), each of relative size 1 against |xhat| + |mean|/std.
    terms = 40.0
    condition = exact.magnitude + (weight.double().abs().max() if affine else 1.0) * 2
    close(ours.y, exact.y, condition, terms)
    if not norm.frozen:
        close(ours.var, exact.var, exact.var + 1, terms)
        if norm.centered:
            close(ours.mean, exact.mean, exact.mean.abs() + 2, terms)
    if norm.prologue:
        total = norms.reference(norm, x, **tensors).sum
        close(ours.sum, total, total.abs() + 6, 4)
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
    "staged": "row_norm_fwd, staged",
    "streaming": "row_norm_fwd, streaming",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
def test_every_row_length(lib: driver.Library, dtype: torch.dtype, centered: bool) -> None:
    seen = set()
    for size in thresholds(dtype):
        rows = 3 if size < 600 else 1 + size % 2
        check_forward(lib, norms.Norm(norms.row_view(rows, size), centered), dtype)
        seen.add(norms.launched(lib))
    assert seen == {FORMS[f] for f in ("part of a warp", "warp", "block", "cluster", "staged")}


@pytest.mark.parametrize(
    ("dtype", "size", "form"),
    [
        (torch.bfloat16, 131072, "cluster"),
        (torch.bfloat16, 131080, "staged"),
        (torch.bfloat16, 262144, "staged"),
        (torch.float32, 65536, "cluster"),
        (torch.float32, 262144, "staged"),
        (torch.float32, 262143, "staged"),
    ],
)
def test_rows_to_262144_columns_stay_on_chip(
    lib: driver.Library, dtype: torch.dtype, size: int, form: str
) -> None:
    check_forward(lib, norms.Norm(norms.row_view(1, size)), dtype)
    assert norms.launched(lib) == FORMS[form]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_streaming_rows(
    lib: driver.Library, dtype: torch.dtype, clusters: bool, prologue: bool, centered: bool
) -> None:
    for size in (20000, 16385 + 8 * 4096):
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
    for frozen in (False, True):
        norm = norms.Norm((2, 1, 3, per_kept * inner, inner, 1), frozen=frozen)
        check_forward(lib, norm, dtype)


@pytest.mark.parametrize("size", [65, 128, 1032, 40000])
@pytest.mark.parametrize("centered", [True, False])
def test_frozen_statistics(lib: driver.Library, size: int, centered: bool) -> None:
    for clusters in (True, False):
        norm = norms.Norm(norms.row_view(3, size), centered, frozen=True, clusters=clusters)
        check_forward(lib, norm, torch.float32)


@pytest.mark.parametrize("size", [24, 65, 1000, 1032, 9000, 9001, 20000])
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
