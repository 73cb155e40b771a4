"""Calls the emulated norm kernels with torch tensors, and their float64 reference."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from simt import driver

from fastnorm import _build

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
View = tuple[int, int, int, int, int, int]
Optional = torch.Tensor | None


def row_view(rows: int, size: int) -> View:
    return (rows, 1, 1, size, 1, 1)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Norm:
    """NormConfig of common/norm.h, with the device that the dispatch sees."""

    view: View
    centered: bool = True
    frozen: bool = False
    prologue: bool = False
    activation: str = "none"
    eps: float = 1e-5
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    clusters: bool = True
    max_shared: int = 227 * 1024

    @property
    def statistics(self) -> int:
        return self.view[0] * self.view[2]

    @property
    def numel(self) -> int:
        outer, reduce_outer, kept, reduce_inner, _, tail = self.view
        return ((outer - 1) * reduce_outer + tail) * kept * reduce_inner

    @property
    def channels(self) -> int:
        _, reduce_outer, kept, reduce_inner, inner, _ = self.view
        return reduce_outer if inner == 0 else kept * (reduce_inner // inner)

    def arrays(self, wide: tuple[bool, bool] = (False, False)) -> tuple[np.ndarray, np.ndarray]:
        """The integers and reals of EntryArguments; `wide` is for weight and bias."""
        integers = [*self.view, not self.centered, self.frozen, self.prologue]
        integers += [ACTIVATIONS.index(self.activation), *wide, self.clusters, self.max_shared]
        reals = [self.eps, self.weight_offset, self.dropout_p]
        return np.array(integers, dtype=np.int64), np.array(reals)


def _bytes(tensor: Optional) -> np.ndarray | None:
    if tensor is None:
        return None
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _enter(
    lib: driver.Library,
    entry: str,
    norm: Norm,
    dtype: torch.dtype,
    wide: tuple[bool, bool],
    inputs: Mapping[str, Optional],
    outputs: Mapping[str, Optional],
    order: tuple[str, ...],
) -> None:
    arrays = {name: _bytes(t) for name, t in {**inputs, **outputs}.items()}
    integers, reals = norm.arrays(wide)
    pointers = (ctypes.c_void_p * len(order))(
        *(None if arrays[name] is None else arrays[name].ctypes.data for name in order)
    )
    with lib.buffers(
        {name: arrays[name] for name in inputs}, {name: arrays[name] for name in outputs}
    ):
        lib.call(entry, DTYPES[dtype], integers, reals, pointers)


def _poisoned(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((count,), float("nan"), dtype=dtype)


def _wide(parameter: Optional, dtype: torch.dtype) -> bool:
    return parameter is not None and parameter.dtype == accumulate(dtype)


def launched(lib: driver.Library) -> str:
    """Names of the kernels that the last call started."""
    lib.lib.simt_launched.restype = ctypes.c_char_p
    return lib.lib.simt_launched().decode()


@dataclasses.dataclass
class Forward:
    y: torch.Tensor
    sum: Optional
    mean: Optional
    var: torch.Tensor


def forward(
    lib: driver.Library,
    entry: str,
    norm: Norm,
    x: torch.Tensor,
    weight: Optional = None,
    bias: Optional = None,
    residual: Optional = None,
    mean: Optional = None,
    var: Optional = None,
    seed: int = 0,
    workspace: int = 0,
) -> Forward:
    """Runs a forward entry point of tests/simt/*.cpp on x, flat in memory order."""
    acc = accumulate(x.dtype)
    y = _poisoned(norm.numel, x.dtype)
    total = _poisoned(norm.numel, x.dtype) if norm.prologue else None
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    inputs["seed"] = torch.tensor([seed]) if norm.dropout_p else None
    outputs = {"y": y, "sum": total}
    statistics = {"mean": mean if norm.centered else None, "var": var}
    if not norm.frozen:
        statistics = {
            "mean": _poisoned(norm.statistics, acc) if norm.centered else None,
            "var": _poisoned(norm.statistics, acc),
        }
    (inputs if norm.frozen else outputs).update(statistics)
    outputs["workspace"] = _poisoned(workspace // 4, torch.float32) if workspace else None
    order = ("x", "residual", "weight", "bias", "y", "sum", "mean", "var", "seed", "workspace")
    wide = (_wide(weight, x.dtype), _wide(bias, x.dtype))
    _enter(lib, entry, norm, x.dtype, wide, inputs, outputs, order)
    assert statistics["var"] is not None
    return Forward(y, total, statistics["mean"], statistics["var"])


@dataclasses.dataclass
class Backward:
    dx: torch.Tensor
    dresidual: Optional
    dweight: Optional
    dbias: Optional


def backward(
    lib: driver.Library,
    entry: str,
    norm: Norm,
    x: torch.Tensor,
    dy: Optional,
    var: torch.Tensor,
    mean: Optional = None,
    dsum: Optional = None,
    weight: Optional = None,
    bias: Optional = None,
    residual: Optional = None,
    seed: int = 0,
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True),
    workspace: int = 0,
) -> Backward:
    """Runs a backward entry point; `wanted` is for dx, dweight, dbias, dresidual."""
    acc = accumulate(x.dtype)
    dx = _poisoned(norm.numel, x.dtype) if wanted[0] else None
    dweight = _poisoned(norm.channels, acc if weight is None else weight.dtype)
    dbias = _poisoned(norm.channels, acc if bias is None else bias.dtype)
    dresidual = _poisoned(norm.numel, x.dtype) if wanted[3] else None
    inputs = {"dy": dy, "dsum": dsum, "x": x, "residual": residual, "weight": weight}
    inputs |= {"bias": bias, "mean": mean if norm.centered else None, "var": var}
    inputs["seed"] = torch.tensor([seed]) if norm.dropout_p else None
    outputs = {
        "dx": dx,
        "dresidual": dresidual,
        "dweight": dweight if wanted[1] else None,
        "dbias": dbias if wanted[2] else None,
        "workspace": _poisoned(workspace // 4, torch.float32) if workspace else None,
    }
    order = ("dy", "dsum", "x", "residual", "weight", "bias", "mean", "var", "dx", "dresidual")
    order += ("dweight", "dbias", "seed", "workspace")
    wide = (dweight.dtype == acc, dbias.dtype == acc)
    _enter(lib, entry, norm, x.dtype, wide, inputs, outputs, order)
    return Backward(dx, dresidual, outputs["dweight"], outputs["dbias"])


def philox_keep(count: int, seed: int, p: float) -> tuple[torch.Tensor, float]:
    """Mask of common/philox.h for elements 0 .. count-1, and the scale of the kept ones."""
    calls = -(-count // 8)
    c0 = np.arange(calls, dtype=np.uint64)
    c1 = c2 = c3 = np.zeros(calls, dtype=np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], axis=1)
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2).reshape(-1)
    threshold = round((1 - p) * 65536)
    keep = torch.from_numpy(bits[:count] < threshold)
    return keep, 65536 / threshold if threshold else 0.0


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    f = torch.nn.functional
    if activation == "none":
        return x
    if activation == "gelu_tanh":
        return f.gelu(x, approximate="tanh")
    return getattr(f, activation)(x)


def _grid(norm: Norm, t: torch.Tensor) -> torch.Tensor:
    outer, reduce_outer, kept, reduce_inner, _, tail = norm.view
    assert tail == reduce_outer
    return t.reshape(outer, reduce_outer, kept, reduce_inner)


def _per_element(norm: Norm, parameter: torch.Tensor) -> torch.Tensor:
    _, reduce_outer, kept, reduce_inner, inner, _ = norm.view
    if inner == 0:
        return parameter.reshape(1, reduce_outer, 1, 1)
    return parameter.repeat_interleave(inner).reshape(1, 1, kept, reduce_inner)


@dataclasses.dataclass
class Reference:
    y: torch.Tensor
    sum: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    magnitude: torch.Tensor  # sum of the absolute terms of each y, before the activation


def reference(
    norm: Norm,
    x: torch.Tensor,
    weight: Optional = None,
    bias: Optional = None,
    residual: Optional = None,
    mean: Optional = None,
    var: Optional = None,
    seed: int = 0,
    rounded_sum: Optional = None,
) -> Reference:
    """The norm in float64, differentiable. With the prologue, `rounded_sum` is what gets
    normalized where it is given: the kernels normalize the sum as they stored it."""
    shape = x.shape
    mask = torch.ones(norm.numel, dtype=torch.float64)
    if norm.dropout_p:
        keep, scale = philox_keep(norm.numel, seed, norm.dropout_p)
        mask = keep.double() * scale
    s = x.double()
    if norm.prologue:
        assert residual is not None
        s = residual.double() + s * mask
        if rounded_sum is not None:
            s = s + (rounded_sum.double() - s).detach()
    total = s
    grid = _grid(norm, s)
    if norm.frozen:
        m = mean.double().reshape(norm.view[0], 1, norm.view[2], 1) if norm.centered else 0.0
        v = var.double().reshape(norm.view[0], 1, norm.view[2], 1)
    else:
        m = grid.mean(dim=(1, 3), keepdim=True) if norm.centered else torch.zeros(())
        v = ((grid - m) ** 2).mean(dim=(1, 3), keepdim=True)
    xhat = (grid - m) / torch.sqrt(v + norm.eps)
    w = torch.ones(()) if weight is None else _per_element(norm, weight.double())
    w = w if weight is None else w + norm.weight_offset
    b = torch.zeros(()) if bias is None else _per_element(norm, bias.double())
    pre = (xhat * w + b).reshape(shape)
    magnitude = ((xhat * w).abs() + b.abs()).reshape(shape)
    if not norm.prologue:
        if residual is not None:
            pre = pre + residual.double()
            magnitude = magnitude + residual.double().abs()
        y = activate(pre, norm.activation) * mask
        magnitude = magnitude * mask
    else:
        y = pre
    mean_out = m.reshape(-1) if isinstance(m, torch.Tensor) else torch.zeros(())
    return Reference(y, total, mean_out, v.reshape(-1), magnitude)


def cpu_operators() -> Any:
    assert _build.load() is not None
    return torch.ops.fastnorm


def _seed(norm: Norm, seed: int) -> Optional:
    return torch.tensor([seed]) if norm.dropout_p else None


def cpu_forward(
    norm: Norm,
    x: torch.Tensor,
    weight: Optional = None,
    bias: Optional = None,
    residual: Optional = None,
    mean: Optional = None,
    var: Optional = None,
    seed: int = 0,
) -> Forward:
    """The same by the CPU kernels."""
    statistic, drawn = 0 if norm.centered else 1, _seed(norm, seed)
    if norm.prologue:
        y, total, mean_out, var_out = cpu_operators().add_norm_fwd(
            x, residual, weight, bias, drawn, norm.view, statistic, norm.eps, norm.weight_offset,
            norm.dropout_p,
        )  # fmt: skip
        return Forward(y, total, mean_out, var_out)
    y, mean_out, var_out = cpu_operators().norm_fwd(
        x, weight, bias, residual, mean, var, drawn, norm.view, statistic, norm.eps,
        norm.weight_offset, ACTIVATIONS.index(norm.activation), norm.dropout_p,
    )  # fmt: skip
    return Forward(y, None, mean_out, var_out)


def cpu_backward(
    norm: Norm,
    x: torch.Tensor,
    dy: Optional,
    var: torch.Tensor,
    mean: Optional = None,
    dsum: Optional = None,
    weight: Optional = None,
    bias: Optional = None,
    residual: Optional = None,
    seed: int = 0,
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> Backward:
    """The same by the CPU kernels."""
    statistic, drawn = 0 if norm.centered else 1, _seed(norm, seed)
    mean = mean if norm.centered else None
    if norm.prologue:
        grads = cpu_operators().add_norm_bwd(
            torch.zeros_like(x) if dy is None else dy, dsum, x, weight, mean, var, drawn,
            norm.view, statistic, norm.eps, norm.weight_offset, norm.dropout_p, wanted,
        )  # fmt: skip
    else:
        grads = cpu_operators().norm_bwd(
            dy, x, weight, bias, residual, mean, var, drawn, norm.view, statistic, norm.frozen,
            norm.eps, norm.weight_offset, ACTIVATIONS.index(norm.activation), norm.dropout_p,
            wanted,
        )  # fmt: skip
    dx, dweight, dbias, dresidual = (
        g if want else None for g, want in zip(grads, wanted, strict=True)
    )
    return Backward(dx, dresidual, dweight, dbias)


def assert_agree(
    ours: Optional, cpu: Optional, magnitude: torch.Tensor | float, terms: float
) -> None:
    """Two kernels that may each be `terms` roundings of the accumulate type from the exact result,
    relative to `magnitude`, and one unit in the last place of the output type."""
    if ours is None:
        return
    assert cpu is not None and ours.dtype == cpu.dtype
    ours, cpu, limits = ours.reshape(-1), cpu.reshape(-1), torch.finfo(ours.dtype)
    acc = torch.finfo(accumulate(ours.dtype)).eps
    bound = 2 * limits.eps * (1.01 * cpu.double().abs() + limits.smallest_normal)
    bound = bound + 2 * terms * acc * magnitude
    error = (ours.double() - cpu.double()).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{error[worst]} > {bound[worst]} from the CPU kernel at {worst}"
