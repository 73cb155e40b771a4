"""Builds the emulated CUDA kernels with g++ and calls them through ctypes.

`library("harness")` compiles tests/simt/harness.cpp with the emulator into a shared library under
the folder of the variable FASTNORM_SIMT_CACHE (default: build/simt of the repository), named by a
digest of the compiler, the flags and every source, and loads it. A kernel's entry point returns 0,
or 1 with the reason in `simt_last_error`; `Library.call` turns that into a `SimtError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
RUNTIME = ("scheduler", "memory")
FLAGS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "sanitize": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "ucontext": ("-DSIMT_UCONTEXT",),
}
# name -> (order, seed): what Settings in state.h lists.
ORDERS = {
    "forward": (0, 0),
    "reverse": (1, 0),
    "shuffled": (2, 1),
    "shuffled again": (2, 2),
    "warps out of phase": (3, 3),
}


class SimtError(RuntimeError):
    """What the emulator found wrong with a launch."""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _digest_of_shared_sources() -> str:
    digest = hashlib.sha256()
    paths = [*SIMT.glob("*.h"), *SIMT.glob("include/*.h")]
    paths += [*ROOT.glob("csrc/common/*.h"), *ROOT.glob("csrc/cuda/*.cuh")]
    paths += [*ROOT.glob("csrc/cuda/*.h")]
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cache() -> pathlib.Path:
    folder = pathlib.Path(os.environ.get("FASTNORM_SIMT_CACHE", ROOT / "build" / "simt"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def _object(source: pathlib.Path, flags: tuple[str, ...]) -> pathlib.Path:
    cxx = compiler()
    assert cxx is not None
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    key = "\0".join([version, *flags, _digest_of_shared_sources(), source.read_text()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.o"
    target = _cache() / name
    with filelock.FileLock(f"{target}.lock"):
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            include = [f"-I{SIMT / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{SIMT}"]
            _run([cxx, *flags, *include, "-c", str(source), "-o", str(part)])
            part.rename(target)
    return target


@functools.cache
def build(name: str, variant: str = "plain", defines: tuple[str, ...] = ()) -> pathlib.Path:
    """Compiles tests/simt/<name>.cpp; returns the path of the shared library."""
    flags = (*FLAGS, *VARIANTS[variant])
    objects = [_object(SIMT / f"{part}.cpp", flags) for part in RUNTIME]
    objects.append(_object(SIMT / f"{name}.cpp", (*flags, *(f"-D{d}" for d in defines))))
    key = "\0".join(o.name for o in objects)
    target = _cache() / f"{name}-{variant}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with filelock.FileLock(f"{target}.lock"):
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            cxx = compiler()
            assert cxx is not None
            _run([cxx, "-shared", *flags, *map(str, objects), "-o", str(part)])
            part.rename(target)
    return target


class Library:
    """A loaded shared library of emulated kernels."""

    def __init__(self, path: pathlib.Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.simt_last_error.restype = ctypes.c_char_p
        self.lib.simt_reports.restype = ctypes.c_char_p
        self._counting = False
        self._reports: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def order(self, name: str, seed: int | None = None) -> Iterator[None]:
        """Runs the fibers of the launches inside in one of ORDERS."""
        order, default_seed = ORDERS[name]
        self.lib.simt_set_order(order, default_seed if seed is None else seed)
        try:
            yield
        finally:
            self.lib.simt_set_order(0, 0)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts bytes and requests of the launches inside; read them with report()."""
        self.lib.simt_set_counting(1)
        self._counting = True
        try:
            yield
        finally:
            self.lib.simt_set_counting(0)
            self._counting = False

    def reports(self) -> list[dict[str, Any]]:
        """Counters of each kernel of the last counted call (memory.cpp)."""
        return self._reports

    def report(self) -> dict[str, Any]:
        """Counters of the last counted call, which started one kernel."""
        (only,) = self._reports
        return only

    @contextlib.contextmanager
    def buffers(
        self, inputs: Mapping[str, np.ndarray | None], outputs: Mapping[str, np.ndarray | None]
    ) -> Iterator[None]:
        """The only memory that launches inside may touch; inputs are not to be written."""
        for arrays, writable in ((inputs, 0), (outputs, 1)):
            for name, array in arrays.items():
                if array is not None:
                    self.lib.simt_add_buffer(
                        name.encode(),
                        ctypes.c_void_p(array.ctypes.data),
                        ctypes.c_size_t(array.nbytes),
                        writable,
                    )
        try:
            yield
        finally:
            self.lib.simt_clear_buffers()

    def call(self, entry: str, *arguments: Any) -> None:
        """Calls an entry point; arrays go as pointers, None as null, floats as double."""
        converted = [
            ctypes.c_void_p(a.ctypes.data)
            if isinstance(a, np.ndarray)
            else ctypes.c_void_p(None)
            if a is None
            else ctypes.c_double(a)
            if isinstance(a, float)
            else ctypes.c_int(a)
            if isinstance(a, (bool, int)) and -(2**31) <= a < 2**31
            else a
            for a in arguments
        ]
        self.lib.simt_clear_reports()
        if getattr(self.lib, entry)(*converted):
            raise SimtError(self.lib.simt_last_error().decode())
        if self._counting:
            self._reports = json.loads(self.lib.simt_reports())


@functools.cache
def library(name: str, variant: str = "plain", defines: tuple[str, ...] = ()) -> Library:
    return Library(build(name, variant, defines))


def sanitizer_environment() -> dict[str, str]:
    """Environment in which a Python process can load a "sanitize" library."""
    cxx = compiler()
    assert cxx is not None
    runtime = []
    for library_name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [cxx, f"-print-file-name={library_name}"], capture_output=True, text=True
        )
        runtime.append(found.stdout.strip())
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONMALLOC": "malloc",
    }
