"""The initializations of :mod:`fastnorm.init` that run the model on a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastnorm._parameters import (
    LAYERS,
    TRANSPOSED,
    change_,
    is_norm,
    orthogonal_,
    positive,
    raw_parameter,
    table,
    unwrap,
)


@dataclass(frozen=True)
class LayerInit:
    """What a data-dependent init did to one layer."""

    name: str
    std_before: float
    std: float
    mean: float
    iterations: int
    status: str  # "ok", "not converged", "constant output", "non-finite output" or "not reached"


class InitReport(list[LayerInit]):
    """One :class:`LayerInit` per layer in order of execution; prints as a table."""

    @property
    def ok(self) -> bool:
        """Whether every layer reached its target."""
        return all(layer.status == "ok" for layer in self)

    def __str__(self) -> str:
        rows = [
            (x.name, f"{x.std_before:.4g}", f"{x.std:.4g}", f"{x.mean:.3g}", x.iterations, x.status)
            for x in self
        ]
        return table(("layer", "std before", "std", "mean", "iterations", "status"), rows)


@dataclass
class _Group:
    """The modules that share one weight, and how often a forward pass calls them."""

    name: str
    modules: list[nn.Module]
    calls: int = 0


def lsuv_(
    model: nn.Module,
    batch: Any,
    *,
    target_std: float = 1.0,
    center: bool = True,
    tol: float = 0.05,
    max_iter: int = 10,
    orthogonal: bool = True,
) -> InitReport:
    """Layer-sequential unit-variance init (Mishkin and Matas 2016): unit outputs on ``batch``.

    In order of execution, each ``Linear``, ``Bilinear``, ``Conv*d`` and ``ConvTranspose*d`` has its
    weight multiplied by ``target_std / std`` of its output until that is within ``tol``, and then,
    with ``center``, its bias lowered by the output's mean. Calls of a shared module, and modules
    that share a weight, are one layer: their outputs are taken together.

    The forward passes run in eval mode, so without dropout, except that batch norms use the
    statistics of ``batch``. Training flags, buffers (running statistics), gradients and random
    states are afterwards what they were before; on any error the parameters are too.

    Args:
        model: with trainable layers; frozen ones are left alone.
        batch: a tensor, a tuple of positional arguments or a dict of keyword arguments for
            ``model``: a real batch, large enough to measure standard deviations to ``tol``.
        target_std: finite and > 0.
        center: also make the outputs' mean 0 where there is a trainable bias.
        tol: relative tolerance on the standard deviation, finite and > 0.
        max_iter: most corrections of each layer, >= 1.
        orthogonal: begin with ``torch.nn.init.orthogonal_`` weights, drawn from torch's default
            generator.

    Returns:
        An :class:`InitReport`. A layer with constant or non-finite output is not scaled, but
        reported.

    Raises:
        TypeError, ValueError: a bad option, a lazy layer, no layer to initialize, or a model inside
            DistributedDataParallel, whose ranks would part. Nothing is changed then.

    Example::

        print(lsuv_(model, next(iter(loader))[0]))
    """
    target_std, tol = positive("target_std", target_std), positive("tol", tol)
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter: expected an integer >= 1, got {max_iter!r}")
    model = _single(model)
    names = _targets(model, lambda module: isinstance(module, LAYERS))
    report = InitReport()
    with _undisturbed(model), torch.no_grad():
        groups = _execution_order(model, batch, names)
        if orthogonal:
            for group in groups:
                change_(group.modules[0], "weight", orthogonal_)
        for group in groups:
            report.append(_adjust(model, batch, group, target_std, center, tol, max_iter))
    reached = {module for group in groups for module in group.modules}
    return _with_unreached(report, names, reached)


def _execution_order(model: nn.Module, batch: Any, names: Mapping[nn.Module, str]) -> list[_Group]:
    groups: dict[int, _Group] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        weight = id(raw_parameter(module, "weight"))
        group = groups.setdefault(weight, _Group(names[module], []))
        group.calls += 1
        if module not in group.modules:
            group.modules.append(module)

    with _hooks(names, hook):
        _call(model, batch)
    return list(groups.values())


def _adjust(
    model: nn.Module,
    batch: Any,
    group: _Group,
    target: float,
    center: bool,
    tol: float,
    max_iter: int,
) -> LayerInit:
    """Scale the weight until std is right, then shift the bias; the shift may move a shared layer's
    std again, so go on until both are right."""
    first = group.modules[0]
    bias = raw_parameter(first, "bias")
    shared = len({id(raw_parameter(module, "bias")) for module in group.modules}) > 1
    centered = not center or shared or bias is None or not bias.requires_grad
    to_center = not centered
    std, mean, varies = _measure(model, batch, group)
    before, iteration = std, 0
    while True:
        scaled = abs(std / target - 1) <= tol
        if not math.isfinite(std):
            status = "non-finite output"
        elif not varies:
            status = "constant output"
        elif scaled and centered:
            status = "ok"
        elif iteration == max_iter:
            status = "not converged"
        else:
            if scaled:
                _shift(first, -mean)
            else:
                _scale(first, target / std)
            std, mean, varies = _measure(model, batch, group)
            iteration += 1
            centered = not to_center or (scaled and abs(mean) <= tol * target)
            continue
        return LayerInit(group.name, before, std, mean, iteration, status)


def _scale(module: nn.Module, factor: float) -> None:
    change_(module, "weight", lambda weight: weight.mul_(factor))


def _shift(module: nn.Module, amount: float) -> None:
    change_(module, "bias", lambda bias: bias.add_(amount))


class _Stop(BaseException):
    """Ends a forward pass once what it was run for is known; no ``except Exception`` catches it."""


def _measure(model: nn.Module, batch: Any, group: _Group) -> tuple[float, float, bool]:
    """(std, mean, whether any unit varies) of all outputs of a group in one forward pass."""
    outputs: list[Tensor] = []
    varies = False

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal varies
        values = _wide(output)
        spread = torch.std(values, _not_unit(module, values), correction=0)
        varies = varies or bool((spread > 0).any())
        outputs.append(values.flatten())
        if len(outputs) == group.calls:
            raise _Stop

    with _hooks(group.modules, hook), suppress(_Stop):
        _call(model, batch)
    std, mean = torch.std_mean(torch.cat(outputs), correction=0)
    return std.item(), mean.item(), varies


def _not_unit(module: Any, output: Tensor) -> list[int]:
    """The dimensions of a layer's output other than the one that numbers its units."""
    spatial = 0 if isinstance(module, nn.Linear | nn.Bilinear) else len(module.kernel_size)
    return [axis for axis in range(output.dim()) if axis != output.dim() - 1 - spatial]


def weight_norm_init_(model: nn.Module, batch: Any) -> InitReport:
    """Data-dependent init of weight-normed layers (Salimans and Kingma 2016, section 3).

    For every layer with ``torch.nn.utils.parametrizations.weight_norm``, in order of execution and
    in one forward pass: with t = v·x / ‖v‖, its gain becomes ``g = 1 / σ[t]`` and its bias
    ``b = −μ[t] / σ[t]`` per output unit, so that each unit's output has mean 0 and variance 1 on
    ``batch``. A layer without a trainable bias keeps its mean. Modes, buffers and random states are
    handled as in :func:`lsuv_`.

    Args:
        model: with at least one trainable weight-normed ``Linear``, ``Bilinear`` or convolution
            whose norm is over output units: ``dim=0``, or 1 for transposed convolutions without
            groups.
        batch: as in :func:`lsuv_`; at least two values per unit.

    Returns:
        An :class:`InitReport`; a layer with a constant unit is left as it was and reported.

    Raises:
        ValueError: there is no such layer, or a norm is over another dimension. Nothing is changed
            then.

    Example::

        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU())
        weight_norm_init_(model, x)
    """
    model = _single(model)
    names = _targets(model, _is_weight_normed)
    for module, name in names.items():
        axis = 1 if isinstance(module, TRANSPOSED) else 0
        chains: Any = module.parametrizations
        grouped = axis == 1 and getattr(module, "groups", 1) > 1
        if chains["weight"][0].dim != axis or grouped or not isinstance(module, LAYERS):
            raise ValueError(f"model: the weight norm of {name!r} is not over its output units")
    report = InitReport()
    done: set[nn.Module] = set()

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if module in done:
            return None
        done.add(module)
        values = _wide(output)
        others = _not_unit(module, values)
        std, mean = torch.std_mean(values, others, correction=0, keepdim=True)
        before, overall = (x.item() for x in torch.std_mean(values, correction=0))
        if not torch.isfinite(std).all() or (std == 0).any():
            status = "constant output" if torch.isfinite(std).all() else "non-finite output"
            report.append(LayerInit(names[module], before, before, overall, 0, status))
            return None
        gain, bias = module.parametrizations["weight"].original0, raw_parameter(module, "bias")
        shift = torch.zeros_like(mean) if bias is None else _wide(bias).view_as(mean)
        gain.div_(std.view_as(gain))
        values = (values - shift) / std
        if bias is not None and bias.requires_grad:
            change_(module, "bias", lambda b: b.copy_(((shift - mean) / std).view_as(b)))
            values += (shift - mean) / std
        else:
            values += shift
        after, overall = (x.item() for x in torch.std_mean(values, correction=0))
        report.append(LayerInit(names[module], before, after, overall, 1, "ok"))
        return values.to(output)

    with _undisturbed(model), torch.no_grad(), _hooks(names, hook):
        _call(model, batch)
    return _with_unreached(report, names, done)


def _is_weight_normed(module: nn.Module) -> bool:
    chains: Any = getattr(module, "parametrizations", {})
    return "weight" in chains and type(chains["weight"][0]).__name__ == "_WeightNorm"


# ---- Running a model without leaving traces


def _single(model: nn.Module) -> nn.Module:
    """The module to run: inside torch.compile, whose hooks may not run, and not yet distributed."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: initialize it before DistributedDataParallel wraps it")
    return unwrap(model)


def _targets(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, str]:
    """Layers of ``model`` with a trainable weight, and their names."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"model: {name!r} is lazy; run a forward pass first")
        raw = raw_parameter(module, "weight") if wanted(module) else None
        if raw is not None and raw.requires_grad:
            names[module] = name
    if not names:
        raise ValueError("model: it has no trainable layer to initialize")
    return names


def _with_unreached(
    report: InitReport, names: Mapping[nn.Module, str], reached: set[nn.Module]
) -> InitReport:
    for module, name in names.items():
        if module not in reached:
            report.append(LayerInit(name, math.nan, math.nan, math.nan, 0, "not reached"))
    return report


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode with batch norms on batch statistics, then everything but parameters put back.

    That is modes, buffers and random states; after an error the parameters too.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    params = [(param, param.detach().clone()) for param in model.parameters()]
    norms = [m for m, _ in modes if is_norm(m) and getattr(m, "running_mean", None) is not None]
    # A batch norm in training mode would also run the dropout that is fused into it.
    dropouts: list[tuple[Any, float]] = [
        (norm, norm.__dict__["dropout_p"])
        for norm in norms
        if isinstance(norm.__dict__.get("dropout_p"), Real)
    ]
    devices = {param.device.index for param, _ in params if param.device.type == "cuda"}
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        for norm, _ in dropouts:
            norm.dropout_p = 0.0
        with torch.random.fork_rng(sorted(devices)):
            yield
    except BaseException:
        with torch.no_grad():
            for param, saved in params:
                param.copy_(saved)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for norm, p in dropouts:
            norm.dropout_p = p
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                buffer.copy_(saved)


def _wide(output: Tensor) -> Tensor:
    """A copy in at least float32; an activation may overwrite the output in place."""
    return output.detach().to(torch.promote_types(output.dtype, torch.float32), copy=True)
