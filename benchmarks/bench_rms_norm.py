"""RMS norm, alone and after a residual add, on the shapes of layer norm."""

from benchmarks.bench_layer_norm import ALL_DTYPES, CUDA_SHAPES, MB, ROWS, SHAPES, WIDTHS
from benchmarks.harness import script_of
from fastnorm._bench import TRAIN, grid

OPS = ("rms_norm", "add_rms_norm")
CELLS = [
    *grid(OPS, SHAPES),
    *grid(("rms_norm",), [(16384, 1024)], pages=("fresh",)),
    *grid(("rms_norm",), [(4096, 1024)], directions=(TRAIN,), compile=True),
]
QUICK = grid(OPS, [(4096, 1024)], directions=(TRAIN,))
SWEEP = grid(OPS, [(m, n) for m in ROWS for n in WIDTHS], ALL_DTYPES, max_bytes=64 * MB)
CUDA = [
    *grid(("rms_norm",), CUDA_SHAPES, ("bf16",)),
    *grid(("rms_norm",), CUDA_SHAPES[2::3], ("bf16",), compile=True),
    *grid(("rms_norm",), CUDA_SHAPES[2:7], ("fp32",)),
    *grid(("add_rms_norm",), [(8192, 1024), (2048, 16384)], ("bf16",)),
    *grid(("rms_norm",), [(4096, 1024), (32768, 1023), (32768, 4097)], ("bf16",)),
]
CUDA_QUICK = [
    *grid(("rms_norm",), [(32768, 1024), (32768, 8192), (32768, 65536)], ("bf16",)),
    *grid(("add_rms_norm",), [(32768, 4096)], ("bf16",)),
]

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
