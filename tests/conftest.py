"""What every test starts from: a seed, the thread count and the backend as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tiny_sources import write_sources

from fastnorm import _build, _toolchain

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker: two workers with all threads each only wait for one another. Tests
    # about threads set their number themselves.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where tests put their tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")
        # Now, not in a fixture: tensors in the arguments of parametrize are there as well.
        torch.set_default_device("cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_cuda = config.getoption("--device") == "cuda"
    for item in items:
        if not on_cuda and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))
        of_cpu = item.get_closest_marker("cpu")
        if on_cuda and of_cpu:
            item.add_marker(pytest.mark.skip(reason=f"of the CPU: {of_cpu.args[0]}"))


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """An illegal access takes CUDA from its process for good: the tests to come would all fail."""
    if node.config.getoption("--device") != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist reports the test as the one it crashed in, and replaces the worker
        node.session.shouldstop = f"CUDA is lost to this process: {error}"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    backend = _build._backend
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if _build._backend != backend:
        _build._set_backend(backend)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has loaded nothing, with tiny sources and an empty cache folder."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("FASTNORM_BACKEND", "FASTNORM_BUILD_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    # A ccache that stands in for g++ would want to write to the home folder, and hide compiles.
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_toolchain, "SOURCES", write_sources(tmp_path / "csrc"))
    monkeypatch.setattr(_build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(_build, "_states", {name: _build._State() for name in _build.DEVICES})
    monkeypatch.setattr(_build, "_backend", None)
    monkeypatch.setattr(_build, "module", None)
    monkeypatch.setattr(_build, "cuda_loaded", False)
    monkeypatch.setattr(_build, "_noticed", set())
    return tmp_path


@pytest.fixture
def cuda_torch(fresh, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    return fresh


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors are made by default: ``--device``."""
    return request.config.getoption("--device")


@pytest.fixture
def kernels() -> None:
    """The compiled kernels or an error: a test of the kernels must not pass on the reference."""
    _build.use_backend("kernel")
