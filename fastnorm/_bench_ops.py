"""What the benchmark runs: cells, the ops by torch and by fastnorm, and their minimal bytes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm

# Looked up by name when called: whatever fastnorm lacks or refuses becomes a note in the table.
library: Any = fastnorm

FORWARD, TRAIN = "forward", "forward+backward"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
DROPOUT_P = 0.1
CLUSTER_BYTES = 8 * 200 << 10  # of shared memory, from compute capability 9.0 on

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One measurement: an op on one shape, dtype, layout and direction."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "fp32"
    direction: str = TRAIN
    layout: str = "contiguous"
    pages: str = "reused"
    compile: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize


def grid(
    ops: Iterable[str],
    shapes: Iterable[tuple[int, ...]],
    dtypes: Iterable[str] = ("fp32", "bf16"),
    directions: Iterable[str] = (FORWARD, TRAIN),
    layouts: Iterable[str] = ("contiguous",),
    pages: Iterable[str] = ("reused",),
    compile: bool = False,
    max_bytes: float = math.inf,
) -> list[Cell]:
    """Every combination of the arguments with at most ``max_bytes`` of input."""
    cells = [
        Cell(op, tuple(shape), dtype, direction, layout, page, compile)
        for op in ops
        for shape in shapes
        for layout in layouts
        for dtype in dtypes
        for direction in directions
        for page in pages
    ]
    return [cell for cell in cells if cell.input_bytes <= max_bytes]


# --- minimal bytes: what an ideal kernel must move, forward and backward ----------------------


def row_norm_bytes(
    rows: int,
    width: int,
    itemsize: int,
    *,
    parameters: int = 2,
    add: bool = False,
    dropout: bool = False,
) -> tuple[int, int]:
    """Layer norm (two parameters and statistics) or RMS norm (one of each) over rows.

    Forward reads x and writes y; with the residual add it also reads the residual and writes the
    sum. Backward reads dy and x and writes dx; with the add it also reads the sum's gradient, and
    dx is the residual's gradient too; dropout on the branch makes these two tensors differ, and
    its mask is drawn again rather than read.
    """
    tensor = rows * width * itemsize
    statistics_ = 4 * parameters * rows
    forward = (4 if add else 2) * tensor + statistics_ + parameters * width * itemsize
    backward = (5 if dropout else 4 if add else 3) * tensor + statistics_
    return forward, backward + (parameters + 1) * width * itemsize


def channel_norm_bytes(
    elements: int, itemsize: int, *, resident: bool, residual: bool = False
) -> tuple[int, int]:
    """Batch, group and instance norm: the reduced block is read once if ``resident``, else twice.

    An activation is recomputed from x for nothing, but ReLU after a residual add keeps one bit an
    element.
    """
    tensor = elements * itemsize
    forward, backward = (2, 3) if resident else (3, 5)
    if residual:
        return (
            (forward + 1) * tensor + elements // 8,
            (backward + 1) * tensor + 2 * (elements // 8),
        )
    return forward * tensor, backward * tensor


def elementwise_bytes(
    elements: int, itemsize: int, *, activation: bool = False, residual: bool = False
) -> tuple[int, int]:
    """Dropout and its relatives: x to y, dy to dx.

    An activation's backward reads x again; the residual's gradient is dy itself.
    """
    tensor = elements * itemsize
    return (3 if residual else 2) * tensor, (3 if activation else 2) * tensor


# --- the ops ----------------------------------------------------------------------------------


@dataclass
class Inputs:
    """The tensors of a cell. What an op does not use is absent from its ``Op.leaves``."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    groups: int

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.x.shape[-1:])


@dataclass(frozen=True)
class Op:
    """One op by torch and by fastnorm.

    Attributes:
        leaves: the fields of :class:`Inputs` that it uses and that receive gradients.
        reduces: what one statistic is taken over: a "row", "channel", "group", "plane" or "pixel"
            of the input, or "none".
        random: results can't be compared between contenders.
        peers: other libraries' functions, by contender name.
    """

    torch: Callable[[Inputs], Outputs]
    fastnorm: Callable[[Inputs], Outputs]
    leaves: tuple[str, ...]
    reduces: str
    random: bool = False
    peers: dict[str, Callable[[Inputs], Outputs]] = field(default_factory=dict)


def _channels_first_layer_norm(t: Inputs) -> Tensor:
    order = (0, *range(2, t.x.dim()), 1)
    back = (0, t.x.dim() - 1, *range(1, t.x.dim() - 1))
    return F.layer_norm(t.x.permute(order), t.weight.shape, t.weight, t.bias).permute(back)


def _torch_batch_norm(t: Inputs, training: bool = True) -> Tensor:
    return F.batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, training)


def _batch_norm(t: Inputs, training: bool = True, **epilogue: Any) -> Tensor:
    return library.batch_norm(
        t.x, t.running_mean, t.running_var, t.weight, t.bias, training, **epilogue
    )


def _torch_instance_norm(t: Inputs) -> Tensor:
    return F.instance_norm(t.x, None, None, t.weight, t.bias)


def _torch_add_layer_norm(t: Inputs, p: float = 0.0) -> Outputs:
    total = t.residual + (F.dropout(t.x, p) if p else t.x)
    return F.layer_norm(total, t.width, t.weight, t.bias), total


def _torch_add_rms_norm(t: Inputs) -> Outputs:
    total = t.residual + t.x
    return F.rms_norm(total, t.width, t.weight, 1e-6), total


def _torch_stochastic_depth(t: Inputs) -> Tensor:
    keep = t.x.new_empty((t.x.shape[0],) + (1,) * (t.x.dim() - 1)).bernoulli_(1 - DROPOUT_P)
    return t.residual + t.x * keep.div_(1 - DROPOUT_P)


def _liger(name: str, t: Inputs, *args: Any, **kwargs: Any) -> Outputs:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    result: Outputs = getattr(functional, name)(*args, **kwargs)
    return result


def _quack_rms_norm(t: Inputs, residual: Tensor | None = None) -> Outputs:
    quack = importlib.import_module("quack")
    more = {} if residual is None else {"residual": residual, "prenorm": True}
    result: Outputs = quack.rmsnorm(t.x, t.weight, eps=1e-6, **more)
    return result


OPS: dict[str, Op] = {
    "layer_norm": Op(
        lambda t: F.layer_norm(t.x, t.width, t.weight, t.bias),
        lambda t: library.layer_norm(t.x, t.width, t.weight, t.bias),
        ("x", "weight", "bias"),
        "row",
        peers={"liger": lambda t: _liger("liger_layer_norm", t, t.x, t.weight, t.bias, 1e-5)},
    ),
    "rms_norm": Op(
        lambda t: F.rms_norm(t.x, t.width, t.weight, 1e-6),
        lambda t: library.rms_norm(t.x, t.width, t.weight, 1e-6),
        ("x", "weight"),
        "row",
        peers={
            "liger": lambda t: _liger(
                "liger_rms_norm", t, t.x, t.weight, 1e-6, casting_mode="gemma", in_place=False
            ),
            "quack": _quack_rms_norm,
        },
    ),
    "add_layer_norm": Op(
        _torch_add_layer_norm,
        lambda t: library.add_layer_norm(t.x, t.residual, t.width, t.weight, t.bias),
        ("x", "residual", "weight", "bias"),
        "row",
    ),
    "add_rms_norm": Op(
        _torch_add_rms_norm,
        lambda t: library.add_rms_norm(t.x, t.residual, t.width, t.weight, 1e-6),
        ("x", "residual", "weight"),
        "row",
        peers={
            "liger": lambda t: _liger(
                "liger_fused_add_rms_norm", t, t.x, t.residual, t.weight, 1e-6, in_place=False
            ),
            "quack": lambda t: _quack_rms_norm(t, t.residual),
        },
    ),
    "dropout_add_layer_norm": Op(
        lambda t: _torch_add_layer_norm(t, DROPOUT_P),
        lambda t: library.add_layer_norm(
            t.x, t.residual, t.width, t.weight, t.bias, dropout_p=DROPOUT_P
        ),
        ("x", "residual", "weight", "bias"),
        "row",
        random=True,
    ),
    "layer_norm_channels": Op(
        _channels_first_layer_norm,
        lambda t: library.layer_norm(t.x, t.weight.shape, t.weight, t.bias, dim=1),
        ("x", "weight", "bias"),
        "pixel",
    ),
    "batch_norm": Op(_torch_batch_norm, _batch_norm, ("x", "weight", "bias"), "channel"),
    "batch_norm_relu": Op(
        lambda t: F.relu(_torch_batch_norm(t)),
        lambda t: _batch_norm(t, activation="relu"),
        ("x", "weight", "bias"),
        "channel",
    ),
    "batch_norm_add_relu": Op(
        lambda t: F.relu(_torch_batch_norm(t) + t.residual),
        lambda t: _batch_norm(t, activation="relu", residual=t.residual),
        ("x", "residual", "weight", "bias"),
        "channel",
    ),
    "batch_norm_eval": Op(
        lambda t: _torch_batch_norm(t, False),
        lambda t: _batch_norm(t, False),
        ("x", "weight", "bias"),
        "pixel",
    ),
    "group_norm": Op(
        lambda t: F.group_norm(t.x, t.groups, t.weight, t.bias),
        lambda t: library.group_norm(t.x, t.groups, t.weight, t.bias),
        ("x", "weight", "bias"),
        "group",
        peers={
            "liger": lambda t: _liger(
                "liger_group_norm", t, t.x, t.weight, t.bias, t.x.shape[1], t.groups, 1e-5
            )
        },
    ),
    "group_norm_silu": Op(
        lambda t: F.silu(F.group_norm(t.x, t.groups, t.weight, t.bias)),
        lambda t: library.group_norm(t.x, t.groups, t.weight, t.bias, activation="silu"),
        ("x", "weight", "bias"),
        "group",
    ),
    "instance_norm": Op(
        _torch_instance_norm,
        lambda t: library.instance_norm(t.x, None, None, t.weight, t.bias),
        ("x", "weight", "bias"),
        "plane",
    ),
    "instance_norm_relu": Op(
        lambda t: F.relu(_torch_instance_norm(t)),
        lambda t: library.instance_norm(t.x, None, None, t.weight, t.bias, activation="relu"),
        ("x", "weight", "bias"),
        "plane",
    ),
    "dropout": Op(
        lambda t: F.dropout(t.x, DROPOUT_P),
        lambda t: library.dropout(t.x, DROPOUT_P),
        ("x",),
        "none",
        random=True,
    ),
    "gelu_dropout": Op(
        lambda t: F.dropout(F.gelu(t.x), DROPOUT_P),
        lambda t: library.dropout(t.x, DROPOUT_P, activation="gelu"),
        ("x",),
        "none",
        random=True,
    ),
    "dropout2d": Op(
        lambda t: F.dropout2d(t.x, DROPOUT_P),
        lambda t: library.dropout2d(t.x, DROPOUT_P),
        ("x",),
        "none",
        random=True,
    ),
    "stochastic_depth": Op(
        _torch_stochastic_depth,
        lambda t: library.stochastic_depth(t.x, DROPOUT_P, residual=t.residual),
        ("x", "residual"),
        "none",
        random=True,
    ),
}


def group_count(channels: int) -> int:
    """32 groups, as diffusion models use, where they divide the channels; else one."""
    return 32 if channels % 32 == 0 else 1


def minimal_bytes(cell: Cell, cache_bytes: int, on_cuda: bool = False) -> int:
    """Bytes an ideal kernel moves for the cell, on a chip whose cache holds ``cache_bytes``."""
    op, size = OPS[cell.op], DTYPES[cell.dtype].itemsize
    channels = cell.shape[1] if len(cell.shape) > 1 else 1
    if op.reduces == "row":
        width = cell.shape[-1]
        forward, backward = row_norm_bytes(
            cell.elements // width,
            width,
            size,
            parameters=2 if "bias" in op.leaves else 1,
            add="residual" in op.leaves,
            dropout=op.random,
        )
    elif op.reduces == "none":
        forward, backward = elementwise_bytes(
            cell.elements,
            size,
            activation=cell.op == "gelu_dropout",
            residual="residual" in op.leaves,
        )
    else:
        blocks = {
            "pixel": cell.elements,
            "channel": channels,
            "group": cell.shape[0] * group_count(channels),
            "plane": cell.shape[0] * channels,
        }[op.reduces]
        # Interleaved channels, or channels reduced all at once, fit only if the whole tensor does.
        if op.reduces == "channel" and (on_cuda or cell.layout == "channels_last"):
            blocks = 1
        resident = cell.input_bytes // max(blocks, 1) <= cache_bytes
        # Planes of NCHW fit if a cluster of blocks holds their channel.
        if on_cuda and op.reduces == "channel" and cell.layout == "contiguous":
            tensors = 1 if cell.direction == FORWARD else 2
            held = tensors * cell.input_bytes // channels <= CLUSTER_BYTES
            resident = resident or (held and len(cell.shape) > 2)
        forward, backward = channel_norm_bytes(
            cell.elements, size, resident=resident, residual="residual" in op.leaves
        )
    return forward if cell.direction == FORWARD else forward + backward


def parameter_dtype(cell: Cell, device: str) -> torch.dtype:
    """Of weight, bias and running statistics: the cell's, but float32 for batch norm on CUDA.

    So mixed precision has them, and torch calls cuDNN for no others.
    """
    dtype = DTYPES[cell.dtype]
    wide = device == "cuda" and cell.op.startswith("batch_norm")
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def make_inputs(cell: Cell, device: str, compute: torch.dtype | None = None) -> Inputs:
    """Random inputs, the same for the same cell; they require gradients where the cell trains.

    With ``compute`` they are the cell's own values in that dtype.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[cell.dtype]
    op = OPS[cell.op]
    of_parameters = compute or parameter_dtype(cell, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    def activation() -> Tensor:
        tensor = random(*cell.shape).to(compute or dtype)
        if cell.layout == "channels_last":
            tensor = tensor.to(
                memory_format=torch.channels_last_3d if tensor.dim() == 5 else torch.channels_last
            )
        return tensor

    features = cell.shape[-1] if op.reduces in ("row", "none") else cell.shape[1]
    x = activation()
    inputs = Inputs(
        x=x,
        residual=activation() if "residual" in op.leaves else x,
        weight=random(features).to(of_parameters),
        bias=random(features).to(of_parameters),
        running_mean=torch.zeros(features, device=device, dtype=of_parameters),
        running_var=torch.ones(features, device=device, dtype=of_parameters),
        groups=group_count(features),
    )
    if cell.direction == TRAIN:
        for name in op.leaves:
            getattr(inputs, name).requires_grad_()
    return inputs
