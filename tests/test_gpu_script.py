"""benchmarks/gpu.py as far as a machine without a GPU can tell."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import test_simt_cross_entropy as entropy
import torch
from simt import driver, norms
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu

pytestmark = pytest.mark.cpu("a script for a whole machine")

ROOT = Path(gpu.__file__).parents[1]


def run(name: str, code: str, folder: Path, limit: float, error: str | None = None) -> gpu.Step:
    return asyncio.run(gpu.run_step(name, [sys.executable, "-c", code], folder, limit, error))


def test_a_step_ends_in_time_with_what_it_started(tmp_path):
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    waited = run("waited", f"{code}.wait()", tmp_path, 20.0)
    assert not waited.failed and not waited.cut and marker.exists()
    marker.unlink()
    ended = run("ended", code, tmp_path, 30.0)
    assert not ended.failed and ended.seconds < 2
    time.sleep(2.5)
    assert not marker.exists()
    broken = run("broken", "raise SystemExit(3)", tmp_path, 30.0)
    assert broken.failed and broken.result.startswith("exit 3")
    late = run("late", "", tmp_path, 1.0, "x")
    assert late.cut and not late.failed and late.result == "not run: the time was over"
    assert run("late", "", tmp_path, 1.0).failed
    assert gpu.finish([ended, broken, late], tmp_path) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "failed: broken\n" in summary and "cut off by the time limit: late\n" in summary
    assert gpu.finish([ended, late], tmp_path) == 0


TESTS = """
import pathlib, pytest, time

@pytest.mark.parametrize("turn", range(600))
def test_slow(turn):
    time.sleep(0.1)
    if turn == 4:
        pathlib.Path({marker!r}).touch()
    assert turn != {bad}
"""
SANITIZED = """
import pathlib, time
print("========= COMPUTE-SANITIZER\\nbatch_norm (2, 3) bf16", flush=True)
pathlib.Path({marker!r}).touch()
time.sleep(60)
"""


def test_what_a_step_has_found_when_it_is_cut_off(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        monkeypatch.delenv(name)
    code = SANITIZED.format(marker=str(tmp_path / "sanitizer.marker"))
    command = [sys.executable, "-c", code]
    steps = [gpu.run_step("sanitizer", command, tmp_path, 60.0, gpu.SANITIZER_FOUND)]
    for name, bad, workers in (("fails", 0, 2), ("passes", -1, 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "pytest.ini").write_text("[pytest]\n")
        marker = str(tmp_path / f"{name}.marker")
        (folder / "test_x.py").write_text(TESTS.format(bad=bad, marker=marker))
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
        command += ["-n", str(workers), "--dist", "load" if workers else "no", str(folder)]
        steps.append(gpu.run_step(name, command, tmp_path, 60.0, gpu.TEST_FAILED))
    wait_for = asyncio.wait_for

    async def wait_for_markers(process, limit):
        """The limit of a step comes when all of them are under way."""
        while limit == 60.0 and len(list(tmp_path.glob("*.marker"))) < len(steps):
            await asyncio.sleep(0.1)
        return await wait_for(process, 0.5 if limit == 60.0 else limit)

    async def together() -> list[gpu.Step]:
        return await asyncio.gather(*steps)

    monkeypatch.setattr(asyncio, "wait_for", wait_for_markers)
    sanitizer, fails, passes = asyncio.run(wait_for(together(), 120.0))
    assert sanitizer.cut and fails.cut and passes.cut
    assert fails.failed and not passes.failed and not sanitizer.failed
    assert "1 failed, " in fails.result and " passed in " in passes.result
    assert sanitizer.result.startswith("cut off after 60 s, at 'batch_norm (2, 3) bf16'; ")
    assert "/test_x.py::test_slow[0]" in (tmp_path / "fails.log").read_text()


def test_what_sanitizers_say_of_an_error():
    for error in (
        "========= Invalid __global__ write of size 16 bytes",
        "========= Error: Race reported between Write access at 0x80 and Read access at 0x90",
        "========= ERROR SUMMARY: 3 errors",
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
    ):
        assert re.search(gpu.SANITIZER_FOUND, error)
    assert not re.search(gpu.SANITIZER_FOUND, "========= ERROR SUMMARY: 0 errors")


def test_the_kernels_tests_come_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = gpu.pytest_command(quick=False)
    files = [word for word in command if word.startswith("tests/")]
    assert files[:3] == ["tests/test_gpu.py", "tests/test_layer_norm.py", "tests/test_rms_norm.py"]
    assert sorted(files) == sorted(map(str, Path("tests").glob("test_*.py")))
    quick = [word for word in gpu.pytest_command(quick=True) if word.startswith("tests/")]
    assert quick == files[: len(quick)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main() == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "no CUDA GPU is visible" in output
    assert "is built without CUDA" in output
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, finds none: " in (gpu.why_no_gpu() or "")


def test_cuda_is_lost_to_a_process(monkeypatch):
    """Only on CUDA, and only by an error that stays: then xdist's worker ends, else the session."""
    node = SimpleNamespace(
        config=SimpleNamespace(getoption=lambda name: device), session=SimpleNamespace()
    )
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    device = "cpu"
    conftest.pytest_exception_interact(node)
    device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_exception_interact(node)
    assert not hasattr(node.session, "shouldstop")

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    conftest.pytest_exception_interact(node)
    assert "an illegal memory access" in node.session.shouldstop and not ended
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_exception_interact(node)
    assert ended == [1]


# --- which kernels the sanitizers see ---------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Hands every call of this library's operators to the method of that name, and runs it."""

    def __init__(self, methods: object) -> None:
        super().__init__()
        self.methods = methods

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnorm":
            getattr(self.methods, func._opname)(*args)
        return func(*args, **(kwargs or {}))


def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The elements in the order of memory."""
    if tensor is None or tensor.numel() == 0:
        return None
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Launches:
    """Names of the kernels that the operators would start on CUDA: the emulator's dispatch."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.row, self.column, self.entropy = map(
            driver.library, ("row_norm", "column_norm", "cross_entropy")
        )

    def note(self, lib: driver.Library) -> None:
        self.names |= set(norms.launched(lib).split("; "))

    def ask_column(self, question: str, norm: norms.Norm, dtype: torch.dtype, *more: bool) -> int:
        arrays = norm.arrays()
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        return getattr(self.column.lib, question)(norms.DTYPES[dtype], *pointers, *more)

    def takes_rows(self, norm: norms.Norm, dtype: torch.dtype, *more: bool) -> bool:
        view = norm.view
        row = view[1] == view[5] == 1 and view[4] != 0 and not norm.frozen
        return row and not self.ask_column("column_takes_row_norm", norm, dtype, *more)

    def forward(self, norm: norms.Norm, x, weight, bias, residual, mean, var) -> None:
        row = self.takes_rows(norm, x.dtype, residual is not None, False)
        lib, entry = (self.row, "row_norm_fwd") if row else (self.column, "column_norm_fwd")
        bytes_ = 0 if row else self.ask_column("column_norm_workspace", norm, x.dtype, False)
        tensors = map(flat, (x, weight, bias, residual, mean, var))
        norms.forward(lib, entry, norm, *tensors, workspace=bytes_)
        self.note(lib)

    def backward(self, norm: norms.Norm, x, dy, var, mean, mask, **more) -> None:
        tensors = [flat(t) for t in (x, dy, var, mean)]
        more = {name: flat(t) for name, t in more.items()} | {"wanted": tuple(mask)}
        assert mask[0] or norm.prologue  # else the row kernels take every row norm
        if not self.takes_rows(norm, x.dtype, False, True):
            bytes_ = self.ask_column("column_norm_workspace", norm, x.dtype, True)
            norms.backward(self.column, "column_norm_bwd", norm, *tensors, **more, workspace=bytes_)
            return self.note(self.column)
        array = np.array(norm.view, dtype=np.int64)
        pointer = ctypes.c_void_p(array.ctypes.data)
        bytes_ = self.row.lib.row_norm_bwd_workspace(pointer, x.element_size())
        norms.backward(self.row, "row_norm_bwd", norm, *tensors, **more, workspace=bytes_)
        self.note(self.row)

    def norm_fwd(self, x, weight, bias, residual, mean, var, seed, view, statistic, *rest) -> None:
        norm = norms.Norm(tuple(view), statistic == 0, var is not None, dropout_p=rest[-1])
        self.forward(norm, x, weight, bias, residual, mean, var)

    def norm_bwd(self, dy, x, weight, bias, residual, mean, var, seed, view, *rest) -> None:
        statistic, frozen, _, _, activation, p, mask = rest
        activation = norms.ACTIVATIONS[activation]
        norm = norms.Norm(tuple(view), statistic == 0, frozen, False, activation, dropout_p=p)
        more = {"weight": weight, "bias": bias, "residual": residual}
        self.backward(norm, x, dy, var, mean, mask, **more)

    def add_norm_fwd(self, x, residual, weight, bias, seed, view, statistic, *rest) -> None:
        norm = norms.Norm(tuple(view), statistic == 0, prologue=True, dropout_p=rest[-1])
        self.forward(norm, x, weight, bias, residual, None, None)

    def add_norm_bwd(self, dy, dsum, total, weight, mean, var, seed, view, *rest) -> None:
        statistic, _, _, p, mask = rest
        norm = norms.Norm(tuple(view), statistic == 0, prologue=True, dropout_p=p)
        self.backward(norm, total, dy, var, mean, mask, dsum=dsum, weight=weight)

    def dropout_fwd(self, x, bias, residual, *rest) -> None:
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, residual))
        self.names.add("dropout" if aligned else "dropout unaligned")

    def dropout_bwd(self, *args) -> None:
        pass

    def cross_entropy(self, x, target, weight, prior, smoothing, *rest) -> None:
        entropy.Call(x.detach(), target, weight, prior, smoothing).on_cuda(self.entropy)
        self.note(self.entropy)


@pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels")
def test_the_sanitizers_see_every_kernel():
    torch.set_num_threads(1)
    launches = Launches()
    libraries = (launches.row, launches.column, launches.entropy)
    try:
        for library in libraries:
            library.lib.simt_names_only(1)
        with Recorded(launches):
            gpu.touch_every_kernel("cpu")
    finally:
        for library in libraries:
            library.lib.simt_names_only(0)
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    names = set(re.findall(r'"([a-z][a-z_, ]*)"', sources)) - {"memory"}  # a clobber of assembly
    # The cross-entropy's backward pass calls it on CUDA, and on the CPU takes a shorter way.
    assert len(names) > 30 and launches.names == names - {"scale_gradient"}
