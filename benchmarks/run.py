"""Every benchmark in one table: ``python -m benchmarks.run``, which is ``make bench``."""

from benchmarks import (
    bench_batch_norm,
    bench_diagnostics,
    bench_dropout,
    bench_group_norm,
    bench_instance_norm,
    bench_layer_norm,
    bench_losses,
    bench_memory,
    bench_models,
    bench_overhead,
    bench_rms_norm,
)
from benchmarks.harness import script

MODULES = [
    bench_memory,  # first: what lies free in a grown heap would hide from its peaks
    bench_layer_norm,
    bench_rms_norm,
    bench_batch_norm,
    bench_group_norm,
    bench_instance_norm,
    bench_diagnostics,
    bench_dropout,
    bench_overhead,
    bench_losses,
    bench_models,
]

if __name__ == "__main__":
    raise SystemExit(script(MODULES, "bench"))
