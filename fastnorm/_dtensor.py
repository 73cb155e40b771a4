"""DTensor inputs: what needs no other process runs on this one's part of the tensor.

A norm is local in every dimension that it does not normalize over, dropout in all. Gradients of
weight and bias are then sums over this part: `Partial` where the input is sharded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm import _philox


def is_dtensor(t: object) -> bool:
    if type(t) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def run(
    function: Callable[..., Any],
    whole: Iterable[int],
    input: Any,
    residual: Tensor | None = None,
    *parameters: Tensor | None,
    shared: int = 0,
    names: str = "weight, bias",
) -> Any:
    """``function(input, residual, *parameters)`` on the local tensors.

    The input may be sharded in no dimension of `whole`. Each part draws its own dropout, except
    that parts along the dimensions of the bit set `shared` draw the same.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = input.device_mesh, input.placements
    whole = {d % input.dim() for d in whole}
    for placement in placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim in whole):
            raise ValueError(
                f"input: expected a DTensor whose dimensions {sorted(whole)} are whole on every "
                f"process, got placements {placements}; redistribute it before, or take its "
                "to_local() for the statistics of each part"
            )
    for t, name in ((residual, "residual"), *zip(parameters, names.split(", "), strict=False)):
        if t is not None and not isinstance(t, DTensor):
            raise TypeError(
                f"{name}: expected a DTensor beside a DTensor input, got {type(t).__name__}; see "
                "torch.distributed.tensor.distribute_tensor, distribute_module and "
                "torch.distributed.tensor.parallel.SequenceParallel"
            )

    sharded = [p.is_shard() for p in placements]
    replicated = [Replicate()] * len(placements)
    partial = [Partial() if s else Replicate() for s in sharded]
    local = input.to_local()

    def part(t: Any, wanted: Sequence[Any], grads: Sequence[Any]) -> Tensor | None:
        if t is None:
            return None
        # Where nothing is to do, redistribute would still reduce the gradient.
        if t.device_mesh != mesh or t.placements != tuple(wanted):
            t = t.redistribute(mesh, wanted)
        return t.to_local(grad_placements=grads)

    local_residual = part(residual, placements, placements)
    local_parameters = [part(p, replicated, partial) for p in parameters]
    with _philox.part(_index(mesh, placements, shared)):
        out = function(local, local_residual, *local_parameters)

    def as_dtensor(y: Tensor) -> Tensor:
        stride = input.stride() if y.stride() == local.stride() else _contiguous(input.shape)
        return DTensor.from_local(
            y, mesh, placements, run_check=False, shape=input.shape, stride=stride
        )

    return tuple(as_dtensor(y) for y in out) if isinstance(out, tuple) else as_dtensor(out)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _index(mesh: Any, placements: Any, shared: int) -> int:
    """The number of this process's part among those that draw independently."""
    index = 0
    for dim, (at, placement) in enumerate(zip(mesh.get_coordinate(), placements, strict=True)):
        if placement.is_shard() and not shared >> placement.dim & 1:
            index = index * mesh.size(dim) + at
    return index
