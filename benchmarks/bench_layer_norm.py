"""Layer norm, alone, after a residual add, and over the channels of images."""

from benchmarks.harness import script_of
from fastnorm._bench import FORWARD, TRAIN, grid

MB = 1 << 20
OPS = ("layer_norm", "add_layer_norm")
IMAGES = [(8, 96, 56, 56), (16, 192, 28, 28), (16, 384, 14, 14)]
BOTH_LAYOUTS = ("contiguous", "channels_last")

# In the cache (1.5 and 0.75 MB), around it, and beyond it.
SHAPES = [(512, 768), (4096, 1024), (2048, 4096), (16384, 1024)]
CELLS = [
    *grid(OPS, SHAPES),
    *grid(("layer_norm",), [(16384, 1024)], pages=("fresh",)),
    *grid(("layer_norm",), [(4096, 1024)], directions=(TRAIN,), compile=True),
    *grid(("layer_norm_channels",), IMAGES, directions=(TRAIN,), layouts=BOTH_LAYOUTS),
]
QUICK = [
    *grid(OPS, [(4096, 1024)], directions=(TRAIN,)),
    *grid(("layer_norm_channels",), IMAGES[1:2], directions=(TRAIN,)),
]

ROWS = (1, 16, 256, 4096, 32768, 131072)
WIDTHS = (17, 64, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 16383, 16384, 16385)
ALL_DTYPES = ("fp32", "bf16", "fp16", "fp64")
SWEEP = grid(OPS, [(m, n) for m in ROWS for n in WIDTHS], ALL_DTYPES, max_bytes=64 * MB)

# The grid of QuACK's published plots, 32768 rows and fewer where a row is very long.
CUDA_SHAPES = [(32768, 1 << k) for k in range(8, 17)] + [(16384, 1 << 17), (8192, 1 << 18)]
CUDA = [
    *grid(("layer_norm",), CUDA_SHAPES, ("bf16",)),
    *grid(("layer_norm",), CUDA_SHAPES[2::3], ("bf16",), compile=True),
    *grid(("layer_norm",), CUDA_SHAPES[2:7], ("fp32",)),
    *grid(("add_layer_norm",), [(8192, 1024), (2048, 16384)], ("bf16",)),
    *grid(("layer_norm",), [(4096, 1024), (32768, 1023), (32768, 4097)], ("bf16",)),
    *grid(("layer_norm_channels",), [(32, 192, 56, 56)], ("bf16",), layouts=BOTH_LAYOUTS),
]
CUDA_QUICK = [
    *grid(("layer_norm",), [(32768, 1024), (32768, 8192), (32768, 65536)], ("bf16",)),
    *grid(("add_layer_norm",), [(32768, 4096)], ("bf16",), directions=(FORWARD, TRAIN)),
]

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
