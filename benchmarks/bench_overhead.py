"""What a call costs when there is nothing to compute, and what ``import fastnorm`` costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import script_of
from fastnorm._bench import grid

ROW_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "dropout")
IMAGE_OPS = ("batch_norm", "batch_norm_eval", "group_norm", "instance_norm")
CELLS = [*grid(ROW_OPS, [(1, 64)], ("fp32",)), *grid(IMAGE_OPS, [(2, 8, 4, 4)], ("fp32",))]
QUICK = CELLS
CUDA = CELLS
CUDA_QUICK = CELLS


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Time from the start of a process to the end of its imports, medians of interleaved runs."""
    seconds: dict[str, list[float]] = {"import torch": [], "import torch, fastnorm": []}
    for _ in range(3 if quick else 7):
        for code, times in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - start)
    torch_alone, with_fastnorm = (statistics.median(times) for times in seconds.values())
    return [{"name": "import", "unit": "s", "torch": torch_alone, "fastnorm": with_fastnorm}]


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
