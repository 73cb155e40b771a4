"""Group norm, alone and with SiLU, on the shapes of diffusion models (32 groups)."""

from benchmarks.harness import script_of
from fastnorm._bench import TRAIN, grid

OPS = ("group_norm", "group_norm_silu")
BOTH_LAYOUTS = ("contiguous", "channels_last")
SHAPES = [(2, 320, 64, 64), (4, 640, 32, 32), (8, 1280, 16, 16), (16, 256, 28, 28)]
CELLS = [
    *grid(OPS, SHAPES, directions=(TRAIN,), layouts=BOTH_LAYOUTS),
    *grid(("group_norm_silu",), SHAPES[:1], directions=(TRAIN,), compile=True),
]
QUICK = grid(OPS, SHAPES[1:2], directions=(TRAIN,), layouts=BOTH_LAYOUTS)
SWEEP = grid(
    OPS,
    [(4, 32, 128, 128), (64, 64, 8, 8), (1024, 512, 1, 1), (1, 32, 512, 512)],
    directions=(TRAIN,),
    layouts=BOTH_LAYOUTS,
)
CUDA_SHAPES = [(32, 320, 64, 64), (32, 640, 32, 32), (32, 256, 56, 56), (1, 128, 1024, 1024)]
CUDA = [
    *grid(OPS, CUDA_SHAPES, ("bf16",), layouts=BOTH_LAYOUTS),
    *grid(("group_norm_silu",), CUDA_SHAPES[:1], ("bf16",), compile=True),
]
CUDA_QUICK = grid(OPS, CUDA_SHAPES[:1], ("bf16",), directions=(TRAIN,), layouts=BOTH_LAYOUTS)

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
