"""The CUDA dropout kernel, run on the CPU: masks bit for bit, values, byte counts."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simt import driver, norms  # noqa: E402

from fastnorm import _philox  # noqa: E402
from fastnorm._dropout import ALPHA, MASK_ONLY, SCALED, coefficients  # noqa: E402
from fastnorm.epilogue import ACTIVATIONS  # noqa: E402

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels"),
]

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPES = tuple(CODES)
SEED = -(2**62) - 12345


@pytest.fixture(scope="module")
def lib() -> driver.Library:
    return driver.library("dropout")


def as_array(t: torch.Tensor | None) -> np.ndarray | None:
    return None if t is None else t.view(torch.int16 if t.element_size() == 2 else t.dtype).numpy()


def run(
    lib: driver.Library,
    view: tuple[int, int, int],
    given: torch.Tensor,
    p: float,
    *,
    kind: int = SCALED,
    activation: int = 0,
    x: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    seed: int | None = SEED,
    backward: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full_like(given, float("nan")) if out is None else out
    seeds = None if seed is None else torch.tensor([seed])
    inputs = {"x": x, "bias": bias, "residual": residual, "seed": seeds, "in": given}
    if out is given:
        del inputs["in"]
    tensors = (given, x, bias, residual, out, seeds)
    pointers = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in tensors))
    columns = 1 if bias is None else bias.numel()
    integers = np.array([*view, activation, kind, columns, backward], dtype=np.int64)
    with lib.buffers({name: as_array(t) for name, t in inputs.items()}, {"out": as_array(out)}):
        lib.call("dropout", CODES[given.dtype], integers, float(p), pointers)
    return out


def expected_mask(view: tuple[int, int, int], p: float) -> torch.Tensor:
    outer, shared, inner = view
    keep = _philox.keep_mask(outer * inner, torch.tensor([SEED]), p)
    return keep.view(outer, 1, inner).expand(outer, shared, inner).reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        (1, 1, 1), (7, 1, 1), (2047, 1, 1), (2048, 1, 1), (2049, 1, 1), (4096, 1, 1),
        (40, 9, 1), (12, 64, 1), (5, 3, 16), (3, 7, 5), (1, 600, 1), (2, 5, 24),
        (41, 3, 1), (5, 6, 9), (3, 5, 27), (7, 5, 3),
    ],
)  # fmt: skip
def test_masks(lib: driver.Library, dtype: torch.dtype, view: tuple[int, int, int]) -> None:
    n = view[0] * view[1] * view[2]
    for p in (0.1, 0.5):
        y = run(lib, view, torch.ones(n, dtype=dtype), p)
        keep = expected_mask(view, p)
        scale = torch.tensor(coefficients(p, SCALED)[0], dtype=torch.float64).to(dtype)
        assert torch.equal(y, torch.where(keep, scale, torch.zeros((), dtype=dtype)))
        x = torch.randn(n).to(dtype)
        cpu = norms.cpu_operators().dropout_fwd(
            x, None, None, torch.tensor([SEED]), view, 0, p, SCALED
        )
        assert torch.equal(run(lib, view, x, p), cpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers(lib: driver.Library, dtype: torch.dtype) -> None:
    base = torch.ones(701, dtype=dtype)
    y = run(lib, (700, 1, 1), base[1:], 0.4)
    assert torch.equal(y != 0, expected_mask((700, 1, 1), 0.4))


@pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=lambda a: str(a.code))
@pytest.mark.parametrize("columns", [8, 13])
def test_fused(lib: driver.Library, activation, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 33

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, residual, grad = draw(rows, columns), draw(rows, columns), draw(rows, columns)
    bias = draw(columns)
    view = (rows * columns, 1, 1)
    wide = [t.double().requires_grad_() for t in (x, bias)]
    keep = expected_mask(view, 0.3).view_as(x)
    h = activation.function(wide[0] + wide[1])
    expected = torch.where(keep, h * coefficients(0.3, SCALED)[0], 0.0) + residual
    expected.backward(grad.double())

    y = run(lib, view, x, 0.3, activation=activation.code, bias=bias, residual=residual)
    dx = run(
        lib, view, grad, 0.3, activation=activation.code, bias=bias,
        x=x if activation.code else None, backward=True,
    ) if activation.code else run(lib, view, grad, 0.3, backward=True)  # fmt: skip
    room = 8 * torch.finfo(torch.float32).eps
    assert (y - expected).abs().max() < room * expected.abs().max()
    assert (dx - wide[0].grad).abs().max() < room * wide[0].grad.abs().max()
    assert (dx[~keep] == 0).all()


def test_no_seed_keeps_all(lib: driver.Library) -> None:
    x = torch.randn(100)
    assert torch.equal(run(lib, (100, 1, 1), x, 0.0, activation=1, seed=None), x.relu())


def test_dropped_is_plus_zero_and_in_place(lib: driver.Library) -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), -1.0]).repeat(100)
    keep = expected_mask((400, 1, 1), 0.5)
    y = run(lib, (400, 1, 1), x, 0.5, out=x)
    assert y is x
    assert (y[~keep] == 0).all() and not torch.signbit(y[~keep]).any()
    assert not (y[keep] == 0).any()
    dx = run(lib, (400, 1, 1), torch.ones(400), 0.5, x=x.nan_to_num(1e38) * 10, activation=5,
             backward=True)  # fmt: skip
    assert (dx[~keep] == 0).all()


def test_kinds_and_extremes(lib: driver.Library) -> None:
    x = torch.randn(500)
    keep = expected_mask((500, 1, 1), 0.25)
    y = run(lib, (500, 1, 1), x, 0.25, kind=MASK_ONLY)
    assert torch.equal(y, torch.where(keep, x, 0.0))
    scale, shift, dropped = coefficients(0.25, ALPHA)
    y = run(lib, (500, 1, 1), x, 0.25, kind=ALPHA)
    torch.testing.assert_close(y, torch.where(keep, x * scale + shift, dropped))
    y = run(lib, (500, 1, 1), x, 0.25, kind=ALPHA, backward=True)
    torch.testing.assert_close(y, torch.where(keep, x * scale, 0.0))
    assert (run(lib, (500, 1, 1), x, 1.0) == 0).all()
    assert (run(lib, (500, 1, 1), x, 1.0, kind=ALPHA) == 0).all()


@pytest.mark.parametrize("order", driver.ORDERS)
def test_order_of_threads_does_not_matter(lib: driver.Library, order: str) -> None:
    x = torch.randn(3000)
    expected = run(lib, (3000, 1, 1), x, 0.3)
    with lib.order(order):
        assert torch.equal(run(lib, (3000, 1, 1), x, 0.3), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(lib: driver.Library, dtype: torch.dtype) -> None:
    """One read and one write of each element, each way, and nothing else but the seed."""
    n = 8192
    for backward in (False, True):
        with lib.counting():
            run(lib, (n, 1, 1), torch.ones(n, dtype=dtype), 0.1, backward=backward)
        buffers = lib.report()["buffers"]
        assert buffers["in"] == {"loaded": n * dtype.itemsize, "stored": 0}
        assert buffers["out"] == {"loaded": 0, "stored": n * dtype.itemsize}
