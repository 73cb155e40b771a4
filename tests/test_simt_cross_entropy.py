"""The CUDA cross-entropy kernels, run on the CPU, against float64 and the CPU kernel."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simt import driver, norms  # noqa: E402

from fastnorm.losses import cross_entropy_reference  # noqa: E402
from fastnorm.testing import assert_within_budget  # noqa: E402

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels"),
]

DTYPES = tuple(norms.DTYPES)
TWO = (torch.float32, torch.bfloat16)
REDUCTIONS = ("none", "mean", "sum")
IGNORED = -100
INF = math.inf


@pytest.fixture(scope="module")
def lib() -> Iterator[driver.Library]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield driver.library("cross_entropy")
    torch.set_num_threads(threads)


class Result(NamedTuple):
    loss: torch.Tensor
    grad: torch.Tensor | None
    scale: torch.Tensor


class Call(NamedTuple):
    """Logits with class ids, and the options of the operator."""

    x: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    smoothing: float = 0.0
    reduction: str = "mean"
    torch_mean: bool = False
    need_grad: bool = True

    def on_cuda(self, lib: driver.Library, clusters: bool = True) -> Result:
        rows, classes = self.x.shape
        wide = norms.accumulate(self.x.dtype)
        options = (None if t is None else t.to(wide) for t in (self.weight, self.prior))
        nan = float("nan")
        inputs = {"x": self.x, "target": self.target}
        inputs |= dict(zip(("weight", "prior"), options, strict=True))
        outputs = {
            "totals": torch.full((3,), nan, dtype=torch.float64),
            "losses": torch.full((rows,), nan, dtype=wide),
            "mass": torch.full((rows,), nan, dtype=wide),
            "grad": torch.full_like(self.x, nan) if self.need_grad else None,
            "loss": None if self.reduction == "none" else torch.full((1,), nan, dtype=wide),
            "scale": torch.ones(1, dtype=wide),
        }
        arrays = [{name: norms._bytes(t) for name, t in part.items()} for part in (inputs, outputs)]
        pointers = (ctypes.c_void_p * 10)(
            *(None if a is None else a.ctypes.data for part in arrays for a in part.values())
        )
        mean = self.reduction == "mean"
        integers = np.array([rows, classes, IGNORED, mean, self.torch_mean, clusters])
        with lib.buffers(*arrays):
            dtype = norms.DTYPES[self.x.dtype]
            lib.call("cross_entropy", dtype, integers, float(self.smoothing), pointers)
        loss = outputs["losses"] if outputs["loss"] is None else outputs["loss"][0]
        return Result(loss, outputs["grad"], outputs["scale"][0])

    def on_cpu(self) -> Result:
        return Result(
            *norms.cpu_operators().cross_entropy(
                self.x, self.target, self.weight, self.prior, self.smoothing, IGNORED,
                REDUCTIONS.index(self.reduction), self.torch_mean, True,
            )
        )  # fmt: skip

    def by_definition(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Loss and gradient in plain PyTorch, computed in `dtype`, the gradient as x stores it."""
        x = self.x.to(dtype).requires_grad_()
        loss = cross_entropy_reference(
            x, self.target, self.weight, self.smoothing, self.prior, self.target != IGNORED,
            self.reduction, self.torch_mean,
        )  # fmt: skip
        grad = torch.autograd.grad(loss.sum(), x)[0]
        return [loss.detach(), grad]


def draw(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    ignored: float = 0.0,
    masked: float = 0.0,
    **options: object,
) -> Call:
    generator = torch.Generator().manual_seed(classes)
    x = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    hidden = torch.rand(rows, classes, generator=generator) < masked
    hidden[torch.arange(rows), target] = False
    x[hidden] = -INF
    target[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return Call(x, target, **options)  # type: ignore[arg-type]


def class_values(classes: int, seed: int, zeros: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(classes, generator=generator) * 2 + 0.1
    if zeros:
        values[::3] = 0
    return values


def check(lib: driver.Library, call: Call, clusters: bool = True) -> Result:
    ours, cpu = call.on_cuda(lib, clusters), call.on_cpu()
    dtype = call.x.dtype
    exact = call.by_definition(torch.float64)
    plain = call.by_definition(torch.float32)
    # The gradient's remaining factor is a matter between forward and backward pass.
    grad = (ours.grad * ours.scale).to(dtype)
    if dtype not in (torch.float32, torch.float64):
        plain[1] = plain[1].to(dtype)
    # Against the CPU kernel, whose sums are doubles: a few roundings of the sums of this one, and
    # the rounding of the gradient itself.
    room = 32 * torch.finfo(norms.accumulate(dtype)).eps
    if call.x.shape[1] > 1:  # one class has no gradient but roundings
        assert_within_budget([ours.loss, grad], plain, exact)
    close = {"rtol": room, "atol": room, "equal_nan": True}
    torch.testing.assert_close(ours.loss, cpu.loss, **close)
    torch.testing.assert_close(ours.scale, cpu.scale, **close)
    close["rtol"] += torch.finfo(dtype).eps
    torch.testing.assert_close(ours.grad, cpu.grad, **close)
    return ours


def thresholds(dtype: torch.dtype) -> set[int]:
    """Numbers of classes on both sides of every step of cross_entropy_of_width."""
    v = 16 // dtype.itemsize
    sizes = {1, 2, 3, 10, 21, 31, 33, 100, 127, 129}
    for packs in (1, 2, 16, 32, 256):
        sizes |= {packs * v - 1, packs * v, packs * v + 1, packs * v + v}
    sizes |= {255, 257, 64 * 1024 // dtype.itemsize}
    return sizes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_classes(lib: driver.Library, dtype: torch.dtype) -> None:
    seen = set()
    for classes in sorted(thresholds(dtype)):
        rows = 5 if classes < 600 else 2
        smoothing = 0.1 * (classes % 3 != 0)
        check(lib, draw(rows, classes, dtype, smoothing=smoothing, ignored=0.2))
        seen |= set(norms.launched(lib).split("; "))
    for classes in (64 * 1024 // dtype.itemsize + 1, 64 * 1024 // dtype.itemsize + 8):
        check(lib, draw(1, classes, dtype, smoothing=0.1))
        seen |= set(norms.launched(lib).split("; "))
    assert seen == {
        "cross_entropy_totals", "cross_entropy, warp", "cross_entropy, block",
        "cross_entropy, cluster", "cross_entropy_reduce",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "classes", "clusters", "form"),
    [
        (torch.bfloat16, 128256, True, "cluster"),
        (torch.float32, 50257, True, "cluster"),
        (torch.float32, 50257, False, "block"),
        (torch.float32, 60000, False, "two reads"),
        (torch.bfloat16, 120001, False, "two reads"),
    ],
)
def test_large_vocabularies(
    lib: driver.Library, dtype: torch.dtype, classes: int, clusters: bool, form: str
) -> None:
    check(lib, draw(1, classes, dtype, smoothing=0.1), clusters)
    assert f"cross_entropy, {form};" in norms.launched(lib)


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("classes", [5, 40, 1000, 2085])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(lib: driver.Library, dtype: torch.dtype, classes: int, reduction: str) -> None:
    weight = class_values(classes, 1).to(dtype)
    for smoothing, prior, masked, torch_mean in itertools.product(
        (0.0, 0.1, 1.0), (False, True), (0.0, 0.3), (False, True)
    ):
        options = {"smoothing": smoothing, "torch_mean": torch_mean, "reduction": reduction}
        options["prior"] = class_values(classes, 2, zeros=True).to(dtype) if prior else None
        for w in (None, weight):
            call = draw(4, classes, dtype, ignored=0.3, masked=masked, weight=w, **options)
            check(lib, call)


def test_rows_that_are_not_numbers(lib: driver.Library) -> None:
    call = draw(8, 40, smoothing=0.1, reduction="none")
    call.x[0] = -INF
    call.x[1, 3] = INF
    call.x[2, 4] = float("nan")
    call.target[3] = IGNORED
    call.x[3] = float("nan")  # not read
    call.x[4, int(call.target[4])] = -INF
    ours = check(lib, call)
    assert ours.loss[[0, 1, 2]].isnan().all() and ours.grad[[0, 1, 2]].isnan().all()
    assert ours.loss[3] == 0 and (ours.grad[3] == 0).all()
    assert ours.loss[4] == INF and ours.grad[4].isfinite().all()
    assert ours.loss[5:].isfinite().all() and ours.grad[5:].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 40, 2**40, -(2**40)])
def test_a_class_id_out_of_range_makes_its_row_nan(lib: driver.Library, wrong: int) -> None:
    weight = class_values(40, 1)
    for reduction in REDUCTIONS:
        call = draw(3, 40, smoothing=0.1, reduction=reduction, weight=weight)
        call.target[1] = wrong
        ours = call.on_cuda(lib)
        assert ours.grad[1].isnan().all() and ours.grad[[0, 2]].isfinite().all()
        assert ours.loss.isnan().sum() == 1


@pytest.mark.parametrize("torch_mean", [False, True])
def test_nothing_counts(lib: driver.Library, torch_mean: bool) -> None:
    for weight in (None, class_values(10, 1)):
        call = draw(3, 10, ignored=1.1, smoothing=0.1, torch_mean=torch_mean, weight=weight)
        ours = call.on_cuda(lib)
        assert (ours.loss.isnan() if torch_mean else ours.loss == 0) and (ours.grad == 0).all()


@pytest.mark.parametrize("clusters", [True, False])
def test_more_rows_than_one_block_adds_up(lib: driver.Library, clusters: bool) -> None:
    for weight in (None, class_values(3, 1)):
        check(lib, draw(4099, 3, ignored=0.3, smoothing=0.1, weight=weight), clusters)
    assert "cross_entropy_totals" in norms.launched(lib)


def test_loss_alone(lib: driver.Library) -> None:
    call = draw(4, 1000, smoothing=0.1)
    ours = call._replace(need_grad=False).on_cuda(lib)
    assert ours.grad is None and torch.equal(ours.loss, call.on_cuda(lib).loss)


@pytest.mark.parametrize("classes", [10, 1000, 4096, 18001])
def test_orders_give_the_same_bits(lib: driver.Library, classes: int) -> None:
    weight = class_values(classes, 1)
    call = draw(2, classes, smoothing=0.1, weight=weight)
    first = call.on_cuda(lib)
    for order in driver.ORDERS:
        with lib.order(order):
            other = call.on_cuda(lib)
        assert torch.equal(other.loss, first.loss) and torch.equal(other.grad, first.grad)


@pytest.mark.parametrize("classes", [10, 21, 1000, 2085])
def test_a_row_has_the_same_bits_in_any_batch(lib: driver.Library, classes: int) -> None:
    batch = draw(7, classes, torch.bfloat16, smoothing=0.1, reduction="none")
    whole = batch.on_cuda(lib)
    for row in range(7):
        rows = slice(row, row + 1)
        alone = batch._replace(x=batch.x[rows].clone(), target=batch.target[rows].clone())
        ours = alone.on_cuda(lib)
        assert torch.equal(ours.loss[0], whole.loss[row])
        assert torch.equal(ours.grad[0], whole.grad[row])


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize(
    ("classes", "clusters", "reads"),
    [(1024, True, 1), (49152, True, 1), (50257, True, 1), (122880, False, 2)],
)
def test_bytes_moved(
    lib: driver.Library, dtype: torch.dtype, classes: int, clusters: bool, reads: int
) -> None:
    """One read and one write of the logits; a mean reads the targets and the losses again."""
    call = draw(2, classes, dtype, smoothing=0.1)
    size = call.x.numel() * dtype.itemsize
    for need_grad in (True, False):
        with lib.counting():
            call._replace(need_grad=need_grad).on_cuda(lib, clusters)
            kernel = lib.reports()[1]
        moved = {name: b["loaded"] + b["stored"] for name, b in kernel["buffers"].items()}
        # And the target's own logit once more.
        assert moved["x"] == (reads if need_grad else 1) * size + 2 * dtype.itemsize
        assert moved.get("grad", 0) == size * need_grad
        assert kernel["store"]["bytes"] == size * need_grad + 2 * 2 * 4
        assert kernel["widths"]["16"] * 16 >= 0.99 * size * ((reads + 1) if need_grad else 1)


def scale(lib: driver.Library, grad: torch.Tensor, factor: torch.Tensor) -> None:
    arrays = {"factor": norms._bytes(factor)}, {"grad": norms._bytes(grad)}
    with lib.buffers(*arrays):
        lib.call(
            "scale_gradient", norms.DTYPES[grad.dtype], np.array([grad.numel()]),
            arrays[1]["grad"], arrays[0]["factor"],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 64, 20001])
def test_scale_gradient(lib: driver.Library, dtype: torch.dtype, count: int) -> None:
    grad = torch.randn(count, dtype=torch.float64).to(dtype)
    for factor in (1.0, 0.3):
        ours, by = grad.clone(), torch.tensor([factor], dtype=norms.accumulate(dtype))
        with lib.counting():
            scale(lib, ours, by)
        assert torch.equal(ours, (grad.to(by.dtype) * by).to(dtype))
        moved = 0 if factor == 1 else count * dtype.itemsize
        assert lib.report()["buffers"]["grad"] == {"loaded": moved, "stored": moved}
