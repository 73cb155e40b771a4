"""The one script for a machine with a CUDA GPU: ``python -m benchmarks.gpu``, or ``make gpu``.

Builds the kernels for the GPU that is there; runs the tests on it and, at the same time,
compute-sanitizer (memcheck and racecheck, where they are installed) over every CUDA kernel on small
shapes; then the benchmark, with the machine to itself. Writes machine facts, logs, JSON, table and
plots into one folder ($FASTNORM_RESULTS, else ``results``) and prints a summary last, which names
what failed and what the time limit cut off.

It uses this machine's own torch (2.11 or later) and nvcc, and no network; pytest, rich and
matplotlib only where they are there. Under nine minutes; under three with ``--quick``, which leaves
out the sanitizer and runs the kernels' tests alone, as many as there is time for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import fastnorm
from fastnorm import _bench, _build, _toolchain
from fastnorm._bench import OPS, TRAIN, Cell

ROWS = [(3, 17), (5, 1000), (3, 1001), (2, 20000), (2, 20001)]
IMAGES = [(2, 64, 5, 5), (2, 64, 17, 17)]
LOGITS = [(64, 1000), (5000, 8), (3, 8000), (3, 8001), (2, 40000), (2, 40001), (1, 480000)]
# What a log says of an error where its command was cut off.
TEST_FAILED = r"^(FAILED|ERROR) |^[.sxX]*[FE][.sxXFE]*( |$)"
SANITIZER_FOUND = r"^=+ (Invalid |(Error|Warning): (Race|Potential)|\w+ SUMMARY: [1-9])"
# The tests of the kernels themselves come first: a time limit should not cut them off.
FIRST = ("gpu", "layer_norm", "rms_norm", "batch_norm", "group_norm", "dropout")
GRACE = 15.0  # seconds that an interrupted step has for its report: pytest waits ten for workers


@dataclass
class Step:
    """One command and how it ended."""

    name: str
    result: str
    seconds: float = 0.0
    failed: bool = False
    cut: bool = False  # by its time limit


def small_cells() -> list[Cell]:
    """Ops and shapes that launch every kernel of ``csrc/cuda`` but the cross-entropy's."""

    def cells(ops: str, shapes: list[tuple[int, ...]], *layouts: str) -> list[Cell]:
        both = ("fp32", "bf16")
        return _bench.grid(ops.split(), shapes, both, (TRAIN,), layouts or ("contiguous",))

    layouts = ("contiguous", "channels_last")
    return [
        *cells("layer_norm dropout_add_layer_norm", ROWS),
        *cells("rms_norm add_layer_norm add_rms_norm", ROWS[1:3]),
        *cells("add_layer_norm", [(1, 480000)]),  # no cluster holds such a row
        *cells("dropout gelu_dropout stochastic_depth", ROWS[:2]),
        *cells("batch_norm_add_relu batch_norm_eval group_norm_silu", IMAGES, *layouts),
        *cells("instance_norm_relu layer_norm_channels", IMAGES, *layouts),
        *cells("batch_norm batch_norm_relu group_norm", IMAGES[1:], *layouts),
        *cells("instance_norm dropout2d", IMAGES[1:], *layouts),
        *cells("batch_norm_add_relu", [(64, 4, 14, 14)], *layouts),
        *cells("batch_norm", [(2, 1, 500, 500)]),  # nor such a channel
        *cells("layer_norm_channels", [(1, 4096, 2, 4)]),
    ]


def touch_every_kernel(device: str = "cuda") -> None:
    """Forward and backward on small shapes: what runs under compute-sanitizer."""
    _build.use_backend("kernel")
    for cell in small_cells():
        print(cell.op, cell.shape, cell.dtype, cell.layout, flush=True)
        inputs = _bench.make_inputs(cell, device)
        outputs = OPS[cell.op].fastnorm(inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        leaves = [getattr(inputs, name) for name in OPS[cell.op].leaves]
        torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs])
        if device == "cuda":
            torch.cuda.synchronize()
    for shape, dtype in itertools.product(LOGITS, (torch.float32, torch.bfloat16)):
        print("cross_entropy", shape, dtype, flush=True)
        logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
        target = torch.randint(shape[1], shape[:1], device=device)
        weight = torch.rand(shape[1], device=device)
        loss = fastnorm.cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
        loss.backward(torch.full_like(loss, 0.5))
    unaligned = torch.randn(5001, device=device)[1:].view(5, 1000)
    fastnorm.layer_norm(unaligned, (1000,))
    fastnorm.dropout(unaligned, 0.1)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def _lines(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()] or [""]


async def run_step(
    name: str,
    command: list[str],
    folder: Path,
    limit: float,
    error: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Step:
    """Runs a command with a time limit; its output goes to NAME.log in the folder.

    At the limit it is interrupted, so that it reports what it has found until then. To be cut off
    is to fail, except where ``error`` is given and matches no line of that report.
    """
    if limit < 5:
        return Step(name, "not run: the time was over", failed=error is None, cut=True)
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    log = folder / f"{name}.log"
    reached = None
    with log.open("w") as output:
        # A session of its own: compilers and workers that it starts end with it.
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            await asyncio.wait_for(process.wait(), limit)
        except asyncio.TimeoutError:
            reached = _lines(log)[-1].strip()[-80:]
            with contextlib.suppress(ProcessLookupError, asyncio.TimeoutError):
                os.killpg(process.pid, signal.SIGINT)
                await asyncio.wait_for(process.wait(), GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = await process.wait()
    step = Step(
        name, _lines(log)[-1].strip(), time.monotonic() - start, code != 0, reached is not None
    )
    if reached is not None:
        step.result = f"cut off after {limit:.0f} s, at {reached!r}; {step.result}"
        step.failed = error is None or any(re.search(error, line) for line in _lines(log))
    elif step.failed:
        step.result = f"exit {code}: {step.result}"
    if step.failed or step.cut:
        print("\n".join([f"-- the end of {log.name}:", *_lines(log)[-30:]]), flush=True)
    return step


def pytest_command(quick: bool) -> list[str]:
    """The whole suite or the kernels' tests, on eight workers where xdist is installed."""
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "-q", "-rfE", "--tb=short"]
    command += ["--maxfail=20", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8", "--dist", "load"]
    first = [f"tests/test_{name}.py" for name in FIRST]
    if quick:
        return [*command, *first, "-k", "not 2_31"]
    return [*command, *first, *sorted({*map(str, Path("tests").glob("test_*.py"))} - {*first})]


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside the nvcc that builds the kernels."""
    beside = Path(_toolchain.find_nvcc()[0]).resolve().parent / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    """Checks this library's kernels alone, with torch's it would take minutes; and no API calls,
    of which torch makes some that fail as they may."""
    described = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    option = "--kernel-name" if "--kernel-name" in described else "--kernel-regex"
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"),
        *((option, "kernel_substring=fastnorm") if option in described else ()),
        *(sys.executable, "-m", "benchmarks.gpu", "--touch"),
    ]


def finish(steps: list[Step], folder: Path) -> int:
    """Prints the summary, writes it as well, and returns the exit status."""
    lines = [f"{step.name:<10} {step.seconds:5.0f} s  {step.result}" for step in steps]
    failed = [step.name for step in steps if step.failed]
    cut = [step.name for step in steps if step.cut]
    lines.append(f"cut off by the time limit: {', '.join(cut) or 'nothing'}")
    lines.append(f"failed: {', '.join(failed) or 'nothing'}")
    lines.append(f"results: {folder}")
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(bool(failed))


async def run_steps(folder: Path, quick: bool) -> int:
    """Build; tests and sanitizers; benchmark. What is left of the time goes to the last."""
    python = sys.executable
    end = time.monotonic() + (150 if quick else 500)

    def limit(seconds: float, reserve: float) -> float:
        """At most ``seconds``, and what is left beyond the ``reserve`` of the steps to come."""
        return min(seconds, end - time.monotonic() - reserve)

    build = [python, "-m", "fastnorm", "build", "--cuda"]
    steps = [await run_step("build", build, folder, limit(300, 45))]
    if steps[0].failed:
        return finish(steps, folder)
    checks = []
    seconds = limit(40, 50) if quick else limit(210, 150)
    if importlib.util.find_spec("pytest"):
        error = TEST_FAILED if quick else None
        checks.append(run_step("tests", pytest_command(quick), folder, seconds, error))
    else:
        steps.append(Step("tests", "not run: this Python has no pytest"))
    sanitizer = None if quick else find_sanitizer()
    if sanitizer:
        # One cudaMalloc for each tensor, since an overrun within the allocator's block is none.
        exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck"):
            command = sanitizer_command(sanitizer, tool)
            checks.append(run_step(tool, command, folder, seconds, SANITIZER_FOUND, exact))
    elif not quick:
        steps.append(Step("sanitizer", "not run: compute-sanitizer is not installed"))
    steps += await asyncio.gather(*checks)
    left = end - time.monotonic()
    bench = [python, "-m", "benchmarks.run", "--device", "cuda", "--output", str(folder)]
    bench += ["--seconds", "0.1" if quick else "0.2"]
    bench += ["--minutes", f"{(left - (30 if quick else 60)) / 60:.2f}"]
    steps.append(await run_step("benchmark", bench + ["--quick"] * quick, folder, left))
    table = folder / "bench_cuda.txt"
    if table.exists():
        print(table.read_text())
    return finish(steps, folder)


def why_no_gpu() -> str | None:
    """Why torch sees no GPU, or None if it does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    cause = " ".join(str(said[0].message).split()) if said else "is there one, and its driver?"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds none: {cause}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under three minutes")
    parser.add_argument("--touch", action="store_true", help="only run every kernel once")
    arguments = parser.parse_args()
    reason = why_no_gpu()
    if reason:
        print(f"no CUDA GPU is visible to torch, nothing to build, test or measure here: {reason}")
        return 0
    if arguments.touch:
        touch_every_kernel()
        return 0
    # Containers name the architectures of many GPUs, and to compile for them all takes too long.
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    # A shell's background jobs ignore it, and so would the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(os.environ.get("FASTNORM_RESULTS") or "results").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return asyncio.run(run_steps(folder, arguments.quick))


if __name__ == "__main__":
    raise SystemExit(main())
