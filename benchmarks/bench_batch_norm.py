"""Batch norm with its ReLU and shortcut on ResNet's shapes, in eval mode, and on tall matrices."""

from benchmarks.harness import script_of
from fastnorm._bench import FORWARD, TRAIN, grid

OPS = ("batch_norm", "batch_norm_relu", "batch_norm_add_relu")
BOTH_LAYOUTS = ("contiguous", "channels_last")
SHAPES = [(16, 64, 56, 56), (16, 256, 28, 28), (32, 512, 14, 14), (32, 2048, 7, 7)]
TALL = [(100_000, 32), (1_048_576, 8)]
CELLS = [
    *grid(OPS, SHAPES, directions=(TRAIN,), layouts=BOTH_LAYOUTS),
    *grid(("batch_norm",), TALL, directions=(TRAIN,)),
    *grid(("batch_norm_eval",), [(16, 256, 28, 28), (2, 8, 4, 4)]),
    *grid(("batch_norm_add_relu",), SHAPES[1:2], directions=(TRAIN,), compile=True),
]
QUICK = grid(OPS, SHAPES[1:2], directions=(TRAIN,), layouts=BOTH_LAYOUTS)
# Neighbouring batch sizes of a tall matrix: a cliff between two of them is a wrong switch.
SWEEP = grid(
    ("batch_norm",),
    [(2**k + d, 32) for k in range(10, 21) for d in (0, 1)] + [(160_000, 256)],
    directions=(TRAIN,),
)
CUDA = [
    *grid(
        OPS,
        [(256, 64, 56, 56), (256, 256, 28, 28), (256, 2048, 7, 7)],
        ("bf16", "fp32"),
        directions=(TRAIN,),
        layouts=BOTH_LAYOUTS,
    ),
    *grid(("batch_norm",), [(256, 256, 28, 28)], ("bf16",), compile=True),
    *grid(("batch_norm",), TALL, ("bf16",), directions=(FORWARD, TRAIN)),
]
CUDA_QUICK = grid(OPS, [(256, 256, 28, 28)], ("bf16",), directions=(TRAIN,), layouts=BOTH_LAYOUTS)

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
