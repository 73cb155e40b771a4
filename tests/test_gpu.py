"""On a GPU: the channel norms' gradients, graphs, streams, tensors of more than 2^31 elements.

The row norms' tests take the device as a parameter (row_norm_checks.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import channel_norm_checks as checks
import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import _bench
from fastnorm._bench import OPS, TRAIN, Cell

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


@pytest.fixture(autouse=True)
def _no_default_device() -> Iterator[None]:
    """As users have it: a default device is a mode, under which calls may take another path."""
    before = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(before)


NORMS = {
    "batch": (
        lambda x, w, b, **e: fastnorm.batch_norm(x, None, None, w, b, True, **e),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
    ),
    "group": (
        lambda x, w, b, **e: fastnorm.group_norm(x, 4, w, b, **e),
        lambda x, w, b: F.group_norm(x, 4, w, b),
    ),
    "instance": (
        lambda x, w, b, **e: fastnorm.instance_norm(x, None, None, w, b, **e),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
    ),
    "channels": (
        lambda x, w, b, **e: fastnorm.layer_norm(x, w.shape, w, b, dim=1, **e),
        lambda x, w, b: F.layer_norm(x.movedim(1, -1), w.shape, w, b).movedim(-1, 1),
    ),
}
# In NCHW: short planes, ragged ones, planes that a block or a cluster holds, and longer ones.
IMAGE_SHAPES = [
    (2, 12, 3, 5),
    (64, 8, 7, 7),
    (16, 32, 14, 14),
    (8, 64, 28, 28),
    (3, 20, 57, 59),
    (2, 64, 128, 128),
    (4, 4, 512, 512),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_norms(norm: str, shape, layout: str, dtype: torch.dtype) -> None:
    check_channel_norm(norm, shape, layout, dtype, "cuda")


def check_channel_norm(norm: str, shape, layout: str, dtype: torch.dtype, device: str) -> None:
    ours, theirs = NORMS[norm]
    draw = torch.randn(3, *shape, device=device).to(dtype)
    x, r, grad = (checks.LAYOUTS[layout](t) for t in draw)
    tensors = [x, *(p.to(device) for p in checks.parameters(shape[1], dtype))]
    for activation in (None, "relu", "silu"):
        for residual in (False, True) if activation == "relu" else (False,):

            def run(x, w, b, r=None, activation=activation):
                return ours(x, w, b, activation=activation, residual=r)

            more = [r] if residual else []
            what = f"{norm} {activation} {residual}"
            peer = checks.composed(theirs, activation)
            checks.check(run, peer, tensors + more, grad, what)


# The layouts and forms of every norm; random ops have their test in test_dropout.py.
CELLS = [
    Cell(name, shape, dtype, TRAIN, layout)
    for name, op in OPS.items()
    if not op.random
    for dtype in ("fp32", "bf16")
    for shape, layout in (
        [((5, 1000), "contiguous"), ((300, 4096), "contiguous"), ((3, 40001), "contiguous")]
        if op.reduces in ("row", "none")
        else [((8, 64, 28, 28), "contiguous"), ((8, 64, 28, 28), "channels_last")]
    )
]


def prepare(cell: Cell):
    """Inputs and a call that runs forward and backward, and returns outputs and gradients."""
    inputs = _bench.make_inputs(cell, "cuda")
    with torch.no_grad():
        outputs = OPS[cell.op].fastnorm(inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    gradients = [torch.randn_like(output) for output in outputs]
    return inputs, gradients, _bench.contender_call(cell, inputs, OPS[cell.op].fastnorm, gradients)


def equal(ours: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_graph_replays_what_a_call_does(cell: Cell) -> None:
    inputs, _, call = prepare(cell)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        inputs.x.copy_(torch.randn_like(inputs.x))
    for _ in range(2):
        graph.replay()
    assert equal(captured, call())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_many_streams_give_the_bits_of_one(cell: Cell) -> None:
    _, _, call = prepare(cell)
    alone = call()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            results.append(call())
    torch.cuda.synchronize()
    assert all(equal(result, alone) for result in results)


@pytest.fixture
def large() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GB of free device memory")
    yield
    gc.collect()
    torch.cuda.empty_cache()


ROWS = ("layer_norm", "rms_norm", "add_layer_norm")
IMAGES = ("layer_norm_channels", "group_norm", "instance_norm", "batch_norm_eval")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "contiguous") for name in ROWS + IMAGES] + [(name, "channels_last") for name in IMAGES],
)
def test_more_than_2_31_elements(name: str, layout: str) -> None:
    """The last samples have the bits that they have in a batch of their own."""
    sample = (8192,) if name in ROWS else (128, 64, 64)
    cell = Cell(name, (2**31 // torch.Size(sample).numel() + 2, *sample), "bf16", TRAIN, layout)
    inputs, gradients, call = prepare(cell)
    y, dx = (results[-2:].clone() for results in call_results(cell, call))
    assert inputs.x.numel() > 2**31
    small = Cell(name, (2, *sample), "bf16", TRAIN, layout)
    last = _bench.make_inputs(small, "cuda")
    with torch.no_grad():
        last.x.copy_(inputs.x[-2:])
        if "residual" in OPS[name].leaves:
            last.residual.copy_(inputs.residual[-2:])
        last.weight.copy_(inputs.weight)
        last.bias.copy_(inputs.bias)
    own = [gradient[-2:].clone(memory_format=torch.preserve_format) for gradient in gradients]
    again = _bench.contender_call(small, last, OPS[name].fastnorm, own)
    assert equal((y, dx), call_results(small, again))


def call_results(cell: Cell, call) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of x."""
    results = call()
    return results[0], results[len(results) - len(OPS[cell.op].leaves)]


@pytest.mark.usefixtures("large")
def test_dropout_of_more_than_2_31_elements() -> None:
    x = torch.ones(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    y = fastnorm.dropout(x, 0.25)
    for part in (y[:4096], y[-4096:]):
        kept = (part != 0).float().mean().item()
        assert 0.7 < kept < 0.8 and set(part.unique().tolist()) == {0.0, 1.3359375}
