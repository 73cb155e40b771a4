"""The one script for a machine with a CUDA GPU: ``python -m benchmarks.gpu``, or ``make gpu``.

Builds the kernels, runs the tests on the GPU, compute-sanitizer over every op on small shapes where
that is installed, and the benchmark; writes machine facts, logs, JSON, table and plots into one
folder ($FASTNORM_RESULTS, else ``results``) and prints a summary last. It uses this machine's own
torch (2.11 or later) and nvcc, and no network; pytest, rich and matplotlib only where they are
there. Under nine minutes; under three with ``--quick``, which leaves out the sanitizer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import fastnorm
from fastnorm import _bench, _toolchain

# One shape per kind of layout and per side of the row kernels' thresholds, small for a sanitizer.
SMALL_SHAPES = {
    "row": [(3, 17), (5, 1024), (2, 20000)],
    "none": [(3, 17), (5, 1024)],
    "images": [(2, 32, 5, 5), (1, 64, 17, 3)],
}


@dataclass
class Step:
    """One command and how it ended."""

    name: str
    result: str
    seconds: float
    failed: bool = False


def touch_every_op() -> None:
    """Forward and backward of every op on small shapes: what runs under compute-sanitizer."""
    for name, op in _bench.OPS.items():
        images = op.reduces not in ("row", "none") or name == "dropout2d"
        shapes = SMALL_SHAPES["images" if images else op.reduces]
        layouts = ("contiguous", "channels_last") if images else ("contiguous",)
        for cell in _bench.grid([name], shapes, ("fp32", "bf16"), (_bench.TRAIN,), layouts):
            inputs = _bench.make_inputs(cell, "cuda")
            with torch.no_grad():
                outputs = op.fastnorm(inputs)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            gradients = [torch.randn_like(output) for output in outputs]
            _bench.contender_call(cell, inputs, op.fastnorm, gradients)()
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    target = torch.randint(1000, (64,), device="cuda")
    fastnorm.cross_entropy(logits, target, label_smoothing=0.1).backward()
    torch.cuda.synchronize()
    print("every op ran")


def run_step(name: str, command: list[str], folder: Path, limit: float) -> Step:
    """Runs a command with a time limit; its output goes to NAME.log in the folder."""
    if limit < 5:
        return Step(name, "not run: the time was over", 0.0, failed=True)
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    log = folder / f"{name.replace(' ', '_')}.log"
    # A session of its own: compilers and workers that it starts end with it.
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if code != 0:
        print("\n".join(lines[-30:]), flush=True)
    if code is None:
        return Step(name, f"stopped after {limit:.0f} s; {last}", seconds, failed=True)
    return Step(name, last if code == 0 else f"exit {code}: {last}", seconds, failed=code != 0)


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside the nvcc that builds the kernels."""
    beside = Path(_toolchain.find_nvcc()[0]).resolve().parent / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    """Checks this library's kernels alone: with torch's it would take minutes."""
    described = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    option = "--kernel-name" if "--kernel-name" in described else "--kernel-regex"
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", "9"),
        *((option, "kernel_substring=fastnorm") if option in described else ()),
        *(sys.executable, "-m", "benchmarks.gpu", "--touch"),
    ]


def finish(steps: list[Step], folder: Path) -> int:
    """Prints the summary, writes it as well, and returns the exit status."""
    lines = [f"{step.name:<10} {step.seconds:5.0f} s  {step.result}" for step in steps]
    failures = [step.name for step in steps if step.failed]
    lines.append(f"failed: {', '.join(failures)}" if failures else "no step failed")
    lines.append(f"results: {folder}")
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(bool(failures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under three minutes")
    parser.add_argument("--touch", action="store_true", help="only run every op once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU is visible to torch: nothing to build, test or measure here")
        return 0
    if arguments.touch:
        touch_every_op()
        return 0
    folder = Path(os.environ.get("FASTNORM_RESULTS") or "results").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    python, quick = sys.executable, arguments.quick
    end = time.monotonic() + (165 if quick else 520)

    def limit(seconds: float, reserve: float) -> float:
        """At most ``seconds``, and what is left beyond the ``reserve`` of the steps to come."""
        return min(seconds, end - time.monotonic() - reserve)

    steps = [
        run_step("build", [python, "-m", "fastnorm", "build", "--cuda"], folder, limit(300, 45))
    ]
    if steps[0].failed:
        return finish(steps, folder)
    if importlib.util.find_spec("pytest"):
        tests = [python, "-m", "pytest", "--device", "cuda", "-q", "--maxfail=20"]
        tests += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            tests += ["-n", "8", "--dist", "loadfile"]
        # What the limit cuts off should not be the kernels themselves. (xdist takes the files with
        # the most tests first, which are theirs as well.)
        tests += [f"tests/test_{name}.py" for name in ("gpu", "layer_norm", "rms_norm")]
        tests += ["-k", "not 2_31"] if quick else ["tests"]
        steps.append(run_step("tests", tests, folder, limit(45 if quick else 180, 45)))
    else:
        steps.append(Step("tests", "not run: this Python has no pytest", 0.0))
    sanitizer = find_sanitizer()
    for tool in () if quick else ("memcheck", "racecheck"):
        if sanitizer:
            command = sanitizer_command(sanitizer, tool)
            steps.append(run_step(tool, command, folder, limit(50, 150)))
        else:
            steps.append(Step(tool, "not run: compute-sanitizer is not installed", 0.0))
    left = end - time.monotonic()
    bench = [python, "-m", "benchmarks.run", "--device", "cuda", "--output", str(folder)]
    bench += ["--seconds", "0.1" if quick else "0.2", "--minutes", f"{(left - 25) / 60:.2f}"]
    steps.append(run_step("benchmark", bench + ["--quick"] * quick, folder, left))
    table = folder / "bench_cuda.txt"
    if table.exists():
        print(table.read_text())
    return finish(steps, folder)


if __name__ == "__main__":
    raise SystemExit(main())
