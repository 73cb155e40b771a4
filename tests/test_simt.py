"""The emulator itself: right kernels give right results, wrong ones are caught."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from simt import driver

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module", params=["plain", "ucontext"])
def lib(request: pytest.FixtureRequest) -> driver.Library:
    return driver.library("harness", request.param)


@pytest.mark.parametrize("order", driver.ORDERS)
def test_barrier_makes_every_order_equal(lib: driver.Library, order: str) -> None:
    x = np.arange(3 * 96, dtype=np.float32)
    y = np.full_like(x, np.nan)
    with lib.order(order), lib.buffers({"x": x}, {"y": y}):
        lib.call("reverse", x, y, 3, 96, 1)
    np.testing.assert_array_equal(y, x.reshape(3, 96)[:, ::-1].ravel())


def test_missing_barrier_shows_as_a_difference_between_orders(lib: driver.Library) -> None:
    x = np.arange(1, 65, dtype=np.float32)
    results = []
    for order in driver.ORDERS:
        y = np.full_like(x, -1)
        with lib.order(order):
            lib.call("reverse", x, y, 1, 64, 0)
        results.append(y.tobytes())
        assert np.isnan(y).any()  # unwritten shared memory is NaN
    assert len(set(results)) > 1


def test_shared_overrun(lib: driver.Library) -> None:
    y = np.zeros(32, np.float32)
    with pytest.raises(driver.SimtError, match="outside its 128 bytes of dynamic shared memory"):
        lib.call("shared_overrun", y, 32)


def test_out_of_bounds_store(lib: driver.Library) -> None:
    y = np.zeros(40, np.float32)
    with (
        lib.buffers({}, {"y": y[:32]}),
        pytest.raises(
            driver.SimtError, match=r"thread \(32,0,0\) stores 4 bytes out of bounds: byte 128 of"
        ),
    ):
        lib.call("past_end", y, 33)


def test_store_into_an_input(lib: driver.Library) -> None:
    y = np.zeros(32, np.float32)
    with lib.buffers({"x": y}, {}), pytest.raises(driver.SimtError, match="'x', which is an input"):
        lib.call("past_end", y, 32)


@pytest.mark.parametrize("store_first", [True, False])
def test_read_only_cache_and_stores_of_one_launch(lib: driver.Library, store_first: bool) -> None:
    y = np.ones(32, np.float32)
    with lib.buffers({}, {"y": y}):
        lib.call("update", y, store_first, False)
        assert (y == 2).all()
        done = "loads byte 0 of 'y', which" if store_first else "stores byte 0 of 'y', which"
        with pytest.raises(driver.SimtError, match=done):
            lib.call("update", y, store_first, True)


def test_misaligned_vector_load(lib: driver.Library) -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(driver.SimtError, match="loads 16 bytes at an address that is only 4-byte"):
        lib.call("misaligned", x[-x.ctypes.data // 4 % 4 :], np.zeros(1, np.float32))


def _line_of(text: str) -> int:
    lines = (driver.SIMT / "harness.cpp").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_divergent_barrier_names_both_lines(lib: driver.Library) -> None:
    line = _line_of("if (threadIdx.x < 32) {") + 1
    for order in driver.ORDERS:
        with lib.order(order), pytest.raises(driver.SimtError, match="divergent barrier") as caught:
            lib.call("divergent_barrier", np.zeros(64, np.float32))
        assert f"harness.cpp:{line}" in str(caught.value)
        assert f"harness.cpp:{line + 2}" in str(caught.value)


def test_barrier_after_a_thread_has_returned(lib: driver.Library) -> None:
    line = _line_of("if (threadIdx.x == 3) return;") + 1
    for order in driver.ORDERS:
        with lib.order(order), pytest.raises(driver.SimtError) as caught:
            lib.call("early_return", np.zeros(64, np.float32))
        assert f"harness.cpp:{line}" in str(caught.value)


def test_deadlock_report_names_every_group(lib: driver.Library) -> None:
    with pytest.raises(driver.SimtError, match="deadlock") as caught:
        lib.call("lost_lane", np.zeros(64, np.float32))
    report = str(caught.value)
    shuffle, barrier = _line_of("xor_sync(0xffffffffu"), _line_of("__syncwarp(0x80u)") + 1
    assert f"62 threads wait in __shfl_xor_sync at harness.cpp:{shuffle}" in report
    assert f"2 threads wait in __syncthreads at harness.cpp:{barrier}" in report


@pytest.mark.parametrize("width", [2, 8, 32])
def test_shuffles_and_votes(lib: driver.Library, width: int) -> None:
    x = np.random.default_rng(0).integers(0, 50, 64).astype(np.int32)
    x[5] = -3
    groups = x.reshape(-1, width)
    prefix = groups.cumsum(axis=1)
    following = np.concatenate([groups[:, 1:], groups[:, -1:]], axis=1)
    result = (prefix + 1000 * prefix[:, -1:] + 100000 * following).ravel()
    result = result[np.arange(64) ^ 8]
    odd = np.packbits(x.reshape(2, 32) & 1, axis=1, bitorder="little").view(np.uint32).astype(int)
    votes = [int(odd[0, 0]) ^ (1 << 30) ^ (1 << 29), int(odd[1, 0]) ^ (1 << 29)]
    expected = np.stack([result, np.repeat(votes, 32)], axis=1)
    for order in driver.ORDERS:
        y = np.zeros((64, 2), np.int32)
        with lib.order(order), lib.buffers({"x": x}, {"y": y}):
            lib.call("shuffles", x, y, width)
        np.testing.assert_array_equal(y.view(np.uint32), expected.astype(np.uint32))


@pytest.mark.parametrize("threads", [32, 64, 224, 1024])
def test_block_sum(lib: driver.Library, threads: int) -> None:
    x = np.random.default_rng(1).standard_normal((2, threads)).astype(np.float32)
    results = []
    for order in driver.ORDERS:
        y = np.full_like(x, np.nan)
        with lib.order(order), lib.buffers({"x": x}, {"y": y}):
            lib.call("block_sums", x, y, 2, threads)
        results.append(y)
        np.testing.assert_array_equal(y, results[0])
    mean = x.mean(axis=1, dtype=np.float64)
    assert np.abs(results[0] - mean[:, None]).max() < 1e-6


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_cluster_sum(lib: driver.Library, cluster: int) -> None:
    x = np.random.default_rng(2).standard_normal((16 // cluster, cluster * 64)).astype(np.float32)
    results = []
    for order in driver.ORDERS:
        y = np.full_like(x, np.nan)
        with lib.order(order), lib.buffers({"x": x}, {"y": y}):
            lib.call("cluster_sums", x, y, 16, 64, cluster, 1)
        results.append(y)
        np.testing.assert_array_equal(y, results[0])
    sums = x.sum(axis=1, dtype=np.float64)
    assert np.abs(results[0] - sums[:, None]).max() < 1e-4


def test_cluster_memory_before_the_first_barrier(lib: driver.Library) -> None:
    x = np.zeros(128, np.float32)
    with pytest.raises(driver.SimtError, match="may not run yet"):
        lib.call("cluster_sums", x, x.copy(), 2, 64, 2, 0)


def test_grid_barrier(lib: driver.Library) -> None:
    x = np.arange(6, dtype=np.float32)
    for order in driver.ORDERS:
        partial, y = np.full(6, np.nan, np.float32), np.full(6 * 32, np.nan, np.float32)
        with lib.order(order):
            lib.call("grid_sum", x, partial, y, 6, 1)
        np.testing.assert_array_equal(y, np.full_like(y, 15))
    with pytest.raises(driver.SimtError, match="needs a cooperative launch"):
        lib.call("grid_sum", x, partial, y, 6, 0)


def test_async_copy_is_visible_at_its_wait(lib: driver.Library) -> None:
    memory = np.zeros(4 * 64 + 4, np.float32)
    x = memory[-memory.ctypes.data // 4 % 4 :][: 4 * 64]
    x[:] = np.arange(4 * 64)
    for order in driver.ORDERS:
        y = np.zeros(64, np.float32)
        with lib.order(order):
            lib.call("async_copy", x, y, 64, 1)
        np.testing.assert_array_equal(y, x[(4 * np.arange(64) + 5) % 256])
        with lib.order(order):
            lib.call("async_copy", x, y, 64, 0)
        assert np.isnan(y).any()


@pytest.mark.parametrize("stride", [1, 2, 32])
def test_counters(lib: driver.Library, stride: int) -> None:
    memory = np.zeros(32 * stride + 160 + 64, np.float32)
    memory = memory[-memory.ctypes.data // 4 % 32 :]
    x, y = memory[: 32 * stride], memory[32 * stride :][:128]
    with lib.counting(), lib.buffers({"x": x}, {"y": y}):
        lib.call("strided", x, y, stride)
        report = lib.report()
    assert report["load"] == {
        "bytes": 128,
        "accesses": 32,
        "requests": 1,
        "segments": stride,
        "least_segments": 1,
    }
    assert report["store"]["bytes"] == 512 and report["store"]["segments"] == 4
    assert report["hints"] == {"ld.g": 128, "st.cs": 512}
    assert report["widths"] == {"4": 32, "16": 32}
    assert report["buffers"]["x"] == {"loaded": 128, "stored": 0}
    assert report["buffers"]["y"] == {"loaded": 0, "stored": 512}
    assert report["shared"] == {"requests": 1, "wavefronts": stride, "least_wavefronts": 1}
    assert report["launch"] == {"grid": 1, "threads": 32, "shared": 128 * stride, "cluster": 1}


def test_sixteen_bit_conversions(lib: driver.Library) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 8192, dtype=np.uint32)
    small = (rng.standard_normal(4096) * 10.0 ** rng.uniform(-9, 6, 4096)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2**-24])
    ties = np.arange(2048, 4096, dtype=np.float32) + np.float32(0.5)
    x = np.concatenate([bits.view(np.float32), small, special.astype(np.float32), ties, -small])
    x = np.ascontiguousarray(np.resize(x, -(-x.size // 32) * 32))
    half, bfloat = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16)
    back = np.zeros((x.size, 2), np.float32)
    lib.call("convert", x, half, bfloat, back, x.size // 32)
    for i, (ours, dtype) in enumerate([(half, torch.float16), (bfloat, torch.bfloat16)]):
        theirs = torch.from_numpy(x).to(dtype)
        same = ours == theirs.view(torch.int16).numpy().view(np.uint16)
        assert (same | np.isnan(x)).all()
        np.testing.assert_array_equal(back[:, i], theirs.float().numpy())


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ((1056, 0, 1, 1), "1 to 1024 threads, got 1056"),
        ((32, 227 * 1024 + 1, 1, 1), "at most 227 KB"),
        ((32, 0, 16, 16), "cluster must have"),
        ((32, 0, 4, 6), "no multiple of the cluster"),
        ((32, 0, 1, 0), "the grid is empty"),
    ],
)
def test_launch_limits(lib: driver.Library, launch: tuple[int, ...], message: str) -> None:
    with pytest.raises(driver.SimtError, match=message):
        lib.call("limits", *launch)


def _sanitized(code: str) -> subprocess.CompletedProcess[str]:
    driver.build("harness", "sanitize")
    prelude = (
        "import numpy as np\nfrom simt import driver\nlib = driver.library('harness', 'sanitize')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=driver.sanitizer_environment(),
        capture_output=True,
        text=True,
    )


def test_sanitizers_accept_a_right_kernel_and_catch_a_raw_overrun() -> None:
    good = _sanitized(
        "x = np.arange(192, dtype=np.float32); y = np.zeros_like(x)\n"
        "lib.call('reverse', x, y, 2, 96, 1)\n"
        "lib.call('block_sums', x, y, 2, 96)\n"
        "assert np.allclose(y[:96], x[:96].mean()); print('fine')"
    )
    assert good.returncode == 0 and "fine" in good.stdout, good.stderr
    bad = _sanitized("lib.call('raw_past_end', np.zeros(300, np.float32), 320)")
    assert bad.returncode != 0
    assert "heap-buffer-overflow" in bad.stderr and "raw_past_end_kernel" in bad.stderr
