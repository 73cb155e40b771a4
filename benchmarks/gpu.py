"""The one script for a machine with a CUDA GPU: ``python -m benchmarks.gpu``, or ``make gpu``.

Builds the kernels, runs the tests on the GPU, compute-sanitizer over every op on small shapes where
that is installed, and the benchmark; writes machine facts, logs, JSON, table and plots into one
folder ($FASTNORM_RESULTS, else ``results``) and prints a summary last. It uses this machine's own
torch (2.11 or later) and nvcc, and no network. Under nine minutes; under three with ``--quick``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastnorm import _bench

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
            outputs = op.torch(inputs)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            gradients = [torch.randn_like(output) for output in outputs]
            try:
                _bench.contender_call(cell, inputs, op.fastnorm, gradients)()
            except AttributeError as error:
                print(f"{name}: {error}")
                break
    torch.cuda.synchronize()
    print("every op ran")


def run_step(name: str, command: list[str], folder: Path, limit: float) -> Step:
    """Runs a command with a time limit; its output goes to NAME.log in the folder."""
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    log = folder / f"{name.replace(' ', '_')}.log"
    try:
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=max(limit, 5)
            ).returncode
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if code is None:
        return Step(name, f"stopped after {limit:.0f} s; {last}", seconds, failed=True)
    if code:
        print("\n".join(lines[-15:]), flush=True)
    return Step(name, last if code == 0 else f"exit {code}: {last}", seconds, failed=code != 0)


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
    folder = Path(os.environ.get("FASTNORM_RESULTS", "results"))
    folder.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    end = time.monotonic() + (165 if arguments.quick else 520)
    share = 0.35 if arguments.quick else 1.0

    def limit(seconds: float, reserve: float) -> float:
        """At most ``seconds``, and what is left beyond the ``reserve`` of the steps to come."""
        return min(seconds * share, end - time.monotonic() - reserve * share)

    steps = [
        run_step(
            "build",
            [python, "-m", "fastnorm", "build", "--cuda"],
            folder,
            end - time.monotonic() - 60,
        )
    ]
    if importlib.util.find_spec("pytest"):
        tests = [python, "-m", "pytest", "tests", "-q", "-k", "gpu or cuda", "--maxfail=20"]
        tests += ["--ignore=tests/test_build.py", "-p", "no:cacheprovider"]
        steps.append(run_step("tests", tests, folder, limit(160, 150)))
    else:
        steps.append(Step("tests", "not run: this Python has no pytest", 0.0))
    sanitizer = shutil.which("compute-sanitizer")
    tools = ["memcheck"] if arguments.quick else ["memcheck", "racecheck"]
    for tool in tools:
        if sanitizer:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            command += [python, "-m", "benchmarks.gpu", "--touch"]
            steps.append(run_step(tool, command, folder, limit(60, 130)))
        else:
            steps.append(Step(tool, "not run: compute-sanitizer is not installed", 0.0))
    left = end - time.monotonic()
    bench = [python, "-m", "benchmarks.run", "--device", "cuda", "--output", str(folder)]
    bench += [
        "--seconds",
        "0.1" if arguments.quick else "0.2",
        "--minutes",
        f"{(left - 40) / 60:.2f}",
    ]
    bench += ["--quick"] if arguments.quick else []
    steps.append(run_step("benchmark", bench, folder, left))
    table = folder / "bench_cuda.txt"
    if table.exists():
        print(table.read_text())
    lines = [f"{step.name:<10} {step.seconds:5.0f} s  {step.result}" for step in steps]
    failures = [step.name for step in steps if step.failed]
    lines.append(f"failed: {', '.join(failures)}" if failures else "every step passed")
    lines.append(f"results: {folder}")
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
