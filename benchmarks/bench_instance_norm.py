"""Instance norm, alone and with ReLU, on the shapes of style transfer."""

from benchmarks.harness import script_of
from fastnorm._bench import TRAIN, grid

OPS = ("instance_norm", "instance_norm_relu")
BOTH_LAYOUTS = ("contiguous", "channels_last")
SHAPES = [(1, 32, 256, 256), (4, 128, 64, 64), (4, 64, 128, 128)]
CELLS = grid(OPS, SHAPES, directions=(TRAIN,), layouts=BOTH_LAYOUTS)
QUICK = grid(OPS, SHAPES[1:2], directions=(TRAIN,), layouts=BOTH_LAYOUTS)
CUDA_SHAPES = [(32, 256, 56, 56), (8, 32, 512, 512)]
CUDA = grid(OPS, CUDA_SHAPES, ("bf16",), layouts=BOTH_LAYOUTS)
CUDA_QUICK = grid(OPS, CUDA_SHAPES[:1], ("bf16",), directions=(TRAIN,), layouts=BOTH_LAYOUTS)

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
