"""The benchmark harness behind ``python -m fastnorm bench`` and ``benchmarks/``.

A *cell* is one op, shape, dtype, layout and direction. Its contenders (eager torch, torch.compile
where asked, fastnorm, a plain copy of the input, and on CUDA Liger-Kernel and QuACK where they can
be imported) run in one process, interleaved round by round in rotating order, so that a change of
clock or load meets all of them.

- time: median over the rounds, with the quartiles; ratio: median of the ratios within one round.
- copies: time in units of one copy of the input into existing memory, from the same rounds.
- of copy bw: the op's minimal bytes per second over the bytes per second of that copy.
- outputs: "reused" lands results in memory the process has touched before, "fresh" in pages that
  the kernel must first map. From 32 MB on glibc maps fresh pages for each tensor, and the faults
  outweigh any norm; so malloc is told which to do, and where that can't be, it says "default".
- forward runs without gradients; forward+backward asks for the gradient of every input and
  parameter, from dense random gradients into every output, laid out as that output is.

On CUDA each call is timed by events, after the L2 cache was filled by reading: a memset, which is
what other harnesses use, leaves lines there that must be written back during the call. For inputs
up to 64 KiB the host's time per call is what a user waits for, and that is measured instead.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import gc
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastnorm
from fastnorm import _build
from fastnorm._bench_ops import (
    DTYPES,
    FORWARD,
    OPS,
    TRAIN,
    Cell,
    Inputs,
    Outputs,
    grid,
    make_inputs,
    minimal_bytes,
)
from fastnorm._bench_report import format_shape, progress, save, show
from fastnorm.status import status

SCHEMA_VERSION = 1
# Largest relative error of a result, in the 2-norm, against eager torch in float32 (float64 for
# float64). It tells a wrong formula from rounding and no more: accuracy is the tests' business.
AGREEMENT = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 5e-3, "fp64": 1e-9}
CHECKED_BYTES = 64 << 20
HOST_TIMED_BYTES = 64 << 10


# --- timing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def pages(kind: str, touched_bytes: int = 0) -> Iterator[str]:
    """Makes malloc reuse touched memory ("reused") or map new pages per large tensor ("fresh").

    For "reused", ``touched_bytes`` are touched first: an aligned request does not fit into the hole
    that an equal one left, so that a heap without spare room keeps growing into new pages.

    Yields what will be measured: ``kind``, or "default" where malloc is not glibc's.
    """
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # mallopt's parameters in <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        yield "default"
        return
    if kind == "reused":
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        torch.ones(touched_bytes, dtype=torch.uint8)
    else:
        mallopt(mmap_threshold, 128 << 10)
    try:
        yield kind
    finally:
        mallopt(mmap_max, 65536)
        mallopt(trim_threshold, 128 << 10)
        trim(0)


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and best of the samples, in the samples' unit."""
    if len(samples) == 1:
        quartiles = [samples[0]] * 3
    else:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median": quartiles[1],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "best": min(samples),
        "rounds": len(samples),
    }


def paired_ratio(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster ``ours`` is: the median of the ratios within each round."""
    return statistics.median(b / o for b, o in zip(baseline, ours, strict=True))


class Timer:
    """Seconds per call, by the wall clock (``host``) or by CUDA events after filling L2."""

    def __init__(self, device: str, host: bool) -> None:
        self.cuda = device == "cuda"
        self.host = host or not self.cuda
        if not self.host:
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.zeros(l2, device="cuda")  # four times the bytes
            self.total = torch.empty((), device="cuda")

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def wall(self, call: Callable[[], object], calls: int) -> float:
        self.sync()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.sync()
        return (time.perf_counter() - start) / calls

    def calls(self, call: Callable[[], object]) -> int:
        """Calls per round, so that a round's time is far above the clock's resolution."""
        if not self.host:
            return 10
        return max(1, min(2000, math.ceil(5e-4 / max(self.wall(call, 3), 1e-7))))

    def __call__(self, call: Callable[[], object], calls: int) -> float:
        if self.host:
            return self.wall(call, calls)
        # The device sleeps while the host queues the launches: no gap of the host's gets timed.
        torch.cuda._sleep(int(min(self.wall(call, 1) * calls, 0.02) * 2e9))
        events = []
        for _ in range(calls):
            torch.sum(self.flush, 0, out=self.total)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def interleave(
    timer: Timer, calls: dict[str, Callable[[], object]], seconds: float, min_rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Times every contender once a round, in rotating order, for about ``seconds``."""
    counts = {name: timer.calls(call) for name, call in calls.items()}
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(1000):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(timer(calls[name], counts[name]))
            if i + 1 >= min_rounds and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples, counts


# --- one cell ---------------------------------------------------------------------------------


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def contender_call(
    cell: Cell, inputs: Inputs, function: Callable[[Inputs], Outputs], gradients: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments that runs the cell and returns outputs, then gradients."""
    leaves = [getattr(inputs, name) for name in OPS[cell.op].leaves]
    if cell.direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _tuple(function(inputs))

        return forward

    def train() -> tuple[Tensor, ...]:
        outputs = _tuple(function(inputs))
        return outputs + torch.autograd.grad(outputs, leaves, gradients)

    return train


def disagreement(
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: str,
    random: bool,
    dtypes: Sequence[torch.dtype] | None = None,
) -> str | None:
    """Why results are wrong, or None; random ones need only be finite and of one shape.

    They are as exact as ``dtype`` allows, and of ``dtypes`` where that differs.
    """
    if len(got) != len(expected):
        return f"{len(got)} results instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        wanted = dtypes[i] if dtypes else DTYPES[dtype]
        if a.shape != b.shape or a.dtype != wanted:
            return f"result {i} is {a.dtype} {tuple(a.shape)}, not {wanted} {tuple(b.shape)}"
        if random:
            if not bool(a.isfinite().all()):
                return f"result {i} is not finite"
            continue
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        if not error <= AGREEMENT[dtype]:
            return f"result {i} is off by {error:.1e} in the 2-norm"
    return None


def check(cell: Cell, device: str) -> str | None:
    """Compares fastnorm with eager torch in float32, on at most ``CHECKED_BYTES`` of the input.

    Eager torch in the cell's own dtype is no reference: after 2048 rows its bfloat16 gradient of
    layer norm's weight is off by 5 %.
    """
    op = OPS[cell.op]
    rows = max(1, CHECKED_BYTES * cell.shape[0] // max(cell.input_bytes, 1))
    cell = dataclasses.replace(cell, shape=(min(cell.shape[0], rows), *cell.shape[1:]))
    inputs = make_inputs(cell, device)
    exact = make_inputs(cell, device, torch.float64 if cell.dtype == "fp64" else torch.float32)
    outputs = _tuple(op.torch(exact))
    gradients = [torch.randn_like(output).to(inputs.x.dtype) for output in outputs]
    call = contender_call(cell, exact, op.torch, [g.to(exact.x.dtype) for g in gradients])
    got = contender_call(cell, inputs, op.fastnorm, gradients)()
    dtypes = [inputs.x.dtype] * len(outputs) + [getattr(inputs, leaf).dtype for leaf in op.leaves]
    return disagreement(got, call(), cell.dtype, op.random, dtypes)


def _contenders(cell: Cell, device: str, compile: bool) -> dict[str, Callable[[Inputs], Outputs]]:
    op = OPS[cell.op]
    functions: dict[str, Callable[[Inputs], Outputs]] = {"torch": op.torch}
    if compile or cell.compile:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        functions["compile"] = torch.compile(op.torch, dynamic=False, mode=mode)
    functions["fastnorm"] = op.fastnorm
    if device == "cuda":
        package = {"liger": "liger_kernel", "quack": "quack"}
        for name, function in op.peers.items():
            if importlib.util.find_spec(package[name]):
                functions[name] = function
    return functions


def measure(
    cell: Cell,
    device: str = "cpu",
    seconds: float = 0.5,
    compile: bool = False,
    min_rounds: int = 3,
) -> dict[str, Any]:
    """Runs one cell and returns its record, the unit of the JSON file.

    Args:
        cell: what to run.
        device: "cpu" or "cuda".
        seconds: time for the rounds, beside warm-up and compilation; ``min_rounds`` always run.
        compile: adds ``torch.compile`` of the eager function; about ten seconds a cell.

    Returns:
        The cell's fields; ``minimal_bytes``; ``contenders``, name to seconds per call (median, q1,
        q3, best) with rounds and calls per round; ``ratio_torch`` and ``ratio_compile``, above 1
        where fastnorm is faster; ``copies`` and ``copy_fraction``; each None where a contender is
        missing, and ``notes`` says why it is; ``wrong``, whether fastnorm's results differ from
        eager torch's. Without fastnorm nothing is timed.
    """
    record: dict[str, Any] = asdict(cell) | {
        "shape": list(cell.shape),
        "device": device,
        "input_bytes": cell.input_bytes,
        "minimal_bytes": minimal_bytes(cell, last_level_cache(device), device == "cuda"),
        "contenders": {},
        "ratio_torch": None,
        "ratio_compile": None,
        "copies": None,
        "copy_fraction": None,
        "wrong": False,
        "notes": [],
    }
    with contextlib.ExitStack() as stack:
        record["pages"] = "reused"  # what CUDA's caching allocator does
        if device == "cpu":
            touched = min(12 * cell.input_bytes, 2 << 30)
            record["pages"] = stack.enter_context(pages(cell.pages, touched))
        samples, counts = _sample(cell, device, seconds, compile, min_rounds, record)
    for name, times in samples.items():
        record["contenders"][name] = summarize(times) | {"calls": counts[name]}
    if samples:
        ours = samples["fastnorm"]
        for name in ("torch", "compile"):
            if name in samples:
                record[f"ratio_{name}"] = paired_ratio(samples[name], ours)
        record["copies"] = 1 / paired_ratio(samples["copy"], ours)
        record["copy_fraction"] = (
            record["minimal_bytes"] / (2 * cell.input_bytes) / record["copies"]
        )
    return record


def _sample(
    cell: Cell, device: str, seconds: float, compile: bool, min_rounds: int, record: dict[str, Any]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    timer = Timer(device, host=cell.input_bytes <= HOST_TIMED_BYTES)
    record["clock"] = "host" if timer.host else "events"
    try:
        difference = check(cell, device)
        inputs = make_inputs(cell, device)
        with torch.no_grad():
            outputs = _tuple(OPS[cell.op].torch(inputs))
        gradients = [torch.randn_like(output) for output in outputs]
        del outputs
    except Exception as error:  # whatever stopped it goes into the table
        difference = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        record["wrong"] = difference is not None
    if difference is not None:
        record["notes"].append(f"fastnorm: {difference}")
        return {}, {}
    calls: dict[str, Callable[[], object]] = {}
    for name, function in _contenders(cell, device, compile).items():
        try:
            # In the layout of the contender's own outputs, as the layer behind it would send them.
            with torch.no_grad():
                layouts = [torch.empty_like(output) for output in _tuple(function(inputs))]
            own = [like.copy_(g) for like, g in zip(layouts, gradients, strict=True)]
            call = contender_call(cell, inputs, function, own)
            call()
            call()
        except Exception as error:
            record["notes"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            calls[name] = call
    if "fastnorm" not in calls:
        return {}, {}
    source = inputs.x.detach()
    target = torch.empty_like(source)
    calls["copy"] = functools.partial(target.copy_, source)
    calls["copy"]()
    return interleave(timer, calls, seconds, min_rounds)


# --- the machine ------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def cpu_caches() -> dict[str, int]:
    """Bytes of the first core's data caches by level, "L1" and so on, as Linux reports them."""
    caches = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = _read(f"{folder}/size")
        if size.endswith("K") and _read(f"{folder}/type") != "Instruction":
            caches["L" + _read(f"{folder}/level")] = int(size[:-1]) << 10
    return dict(sorted(caches.items()))


@functools.cache
def last_level_cache(device: str) -> int:
    """Bytes of the largest cache of the device; 8 MB where the machine doesn't say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(cpu_caches().values(), default=8 << 20)


def bandwidth(device: str) -> dict[str, float]:
    """Bytes per second of copy and of triad a = b + s*c, on tensors far beyond the cache."""
    size = (1 << 30) if device == "cuda" else 4 * last_level_cache(device)
    b, c = (torch.ones(size // 4, device=device) for _ in range(2))
    a = torch.zeros_like(b)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: a.copy_(b),
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
    }
    for call in calls.values():
        call()
    samples, _ = interleave(Timer(device, host=False), calls, 0.5, 5)
    return {
        name: tensors * size / min(samples[name]) for name, tensors in (("copy", 2), ("triad", 3))
    }


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers; no names of hosts or users."""
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "caches": cpu_caches(),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnorm": fastnorm.__version__,
        "runs": getattr(status(), device).runs,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "bandwidth": bandwidth(device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _query("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _query(*command: str) -> str:
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.strip().splitlines()[0] if output.strip() else ""


# --- many cells -------------------------------------------------------------------------------


def run(
    cells: Sequence[Cell],
    device: str = "cpu",
    seconds: float = 0.5,
    compile: bool = False,
    minutes: float = math.inf,
    checkpoint: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measures every cell. Those that would start after ``minutes`` are counted in ``skipped``.

    ``checkpoint`` gets what there is every half minute: a run may be ended from outside.

    Returns:
        ``version``, ``machine`` (:func:`machine_facts`), ``cells`` (:func:`measure`), ``skipped``,
        ``broken`` (the cell that ended the run, and why, or None), and an empty list of
        ``measurements`` for what is not a cell: import time, memory.
    """
    _build.load_cuda() if device == "cuda" else _build.load()
    start = time.monotonic()
    results: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "machine": machine_facts(device),
        "cells": [],
        "skipped": 0,
        "broken": None,
        "measurements": [],
    }
    # Fresh pages first: a heap that has grown serves large tensors from what is free in it. On CUDA
    # the ops take turns, and cells that wait for a compiler come last, so that a run out of time
    # has something of everything.
    turns: collections.Counter[str] = collections.Counter()
    keys = []
    for cell in cells:
        turns[cell.op] += 1
        turn = (cell.compile, turns[cell.op]) if device == "cuda" else ()
        keys.append((cell.pages != "fresh", turn))
    order = sorted(range(len(cells)), key=keys.__getitem__)
    records: dict[int, dict[str, Any]] = {}
    saved = start
    with pages("fresh"), progress(len(cells), "cells") as step:
        for i in order:
            cell = cells[i]
            shape = format_shape(cell.shape, cell.layout)
            step(f"{cell.op} {shape} {cell.dtype} {cell.direction}")
            if results["broken"] or time.monotonic() - start > 60 * minutes:
                results["skipped"] += 1
                continue
            records[i] = measure(cell, device, seconds, compile)
            results["cells"] = [records[i] for i in sorted(records)]
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:  # such an error stays with the process
                    results["broken"] = (
                        f"{cell.op} {shape} {cell.dtype}: {str(error).splitlines()[0]}"
                    )
            if time.monotonic() - saved > 30:
                saved = time.monotonic()
                checkpoint(results)
    return results


# --- command line -----------------------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, ...]:
    """ "4096x1024" or "4096,1024" to (4096, 1024)."""
    try:
        shape = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected a shape such as 4096x1024, got {text!r}")
    return shape


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the command and the scripts share."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="measuring time per cell (default 0.5)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="add torch.compile, about 10 s a cell"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="write JSON, table and plot into this folder"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m fastnorm bench``. Returns 1 if a result of fastnorm's was wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fastnorm bench",
        description="Times fastnorm beside eager torch and torch.compile on your own shapes.",
    )
    parser.add_argument(
        "--op",
        nargs="+",
        choices=list(OPS),
        default=["layer_norm"],
        metavar="OP",
        help="one or more of: " + ", ".join(OPS),
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument(
        "--shape", nargs="+", type=parse_shape, default=[(4096, 1024)], metavar="NxM"
    )
    parser.add_argument(
        "--direction", nargs="+", choices=(FORWARD, TRAIN), default=[FORWARD, TRAIN]
    )
    parser.add_argument(
        "--layout", nargs="+", choices=("contiguous", "channels_last"), default=["contiguous"]
    )
    parser.add_argument(
        "--pages",
        nargs="+",
        choices=("reused", "fresh"),
        default=["reused"],
        help="outputs in memory touched before, or in new pages",
    )
    add_common_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for op in arguments.op:
        dims = 2 if OPS[op].reduces in ("row", "channel", "none") else 3
        for shape in arguments.shape:
            if len(shape) < dims:
                parser.error(f"--shape: {op} needs at least {dims} dimensions, got {len(shape)}")
            if "channels_last" in arguments.layout and len(shape) not in (4, 5):
                parser.error(f"--layout channels_last: needs 4 or 5 dimensions, got {len(shape)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cells = grid(
        arguments.op,
        arguments.shape,
        arguments.dtype,
        arguments.direction,
        arguments.layout,
        arguments.pages,
    )
    results = run(cells, arguments.device, arguments.seconds or 0.5, arguments.compile)
    if arguments.output:
        for file in save(results, arguments.output, "bench"):
            print(f"wrote {file}")
    show(results)
    return int(any(cell["wrong"] for cell in results["cells"]))
