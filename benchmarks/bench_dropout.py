"""Dropout alone, after GELU, before residual and layer norm; channel dropout, stochastic depth."""

from benchmarks.harness import script_of
from fastnorm._bench import TRAIN, grid

ROW_OPS = ("dropout", "gelu_dropout", "dropout_add_layer_norm")
CELLS = [
    *grid(ROW_OPS, [(512, 768), (4096, 1024), (16384, 1024)], directions=(TRAIN,)),
    *grid(("dropout",), [(16384, 1024)], directions=(TRAIN,), pages=("fresh",)),
    *grid(("dropout2d",), [(16, 256, 28, 28)], directions=(TRAIN,)),
    *grid(("stochastic_depth",), [(64, 64, 768)], directions=(TRAIN,)),
    *grid(("dropout_add_layer_norm",), [(4096, 1024)], directions=(TRAIN,), compile=True),
]
QUICK = [
    *grid(ROW_OPS, [(4096, 1024)], directions=(TRAIN,)),
    *grid(("dropout2d",), [(16, 256, 28, 28)], directions=(TRAIN,)),
    *grid(("stochastic_depth",), [(64, 64, 768)], directions=(TRAIN,)),
]
SWEEP = grid(
    ROW_OPS,
    [(1, 1024), (16, 1000), (4096, 257), (100_003, 17)],
    ("fp32", "bf16", "fp16"),
    directions=(TRAIN,),
)
CUDA = [
    *grid(("dropout", "gelu_dropout"), [(8192, 1024), (32768, 4096)], ("bf16", "fp32")),
    *grid(("dropout_add_layer_norm",), [(32768, 1024), (32768, 4096)], ("bf16",), compile=True),
    *grid(("dropout2d",), [(256, 256, 28, 28)], ("bf16",)),
    *grid(("stochastic_depth",), [(256, 197, 768)], ("bf16",)),
]
CUDA_QUICK = grid(("dropout", "dropout_add_layer_norm"), [(32768, 4096)], ("bf16",))

if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
