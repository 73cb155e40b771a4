"""Penalties on what the layers of a model put out.

An activity penalty adds Ω(a) of a layer's output a to the loss: small (L2) or sparse (L1)
representations instead of small or sparse weights. Three ways to reach the outputs, each
differentiable and counting every call of a reused layer: :func:`activations` for a ``Sequential``,
:func:`capture` for any layers of any model, and the layer :class:`ActivityRegularization` with
:func:`collect_activity`.

=================  ===============================================  =============================
``reduction``      the penalty of an output a of batch size n       as in
=================  ===============================================  =============================
``"sum"``          Ω(a)                                             Flux's manual
``"batchmean"``    Ω(a) / n                                         Keras' activity regularizers
``"mean"``         Ω(a) / number of elements of a
=================  ===============================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnorm._parameters import unwrap
from fastnorm._rules import CONSTRAINTS, L1L2, Rule, total

__all__ = ["ActivityRegularization", "Captured", "activations", "capture", "collect_activity"]

Reduction = Literal["sum", "batchmean", "mean"]


def activations(
    seq: nn.Sequential | Iterable[Callable[[Any], Any]], x: Tensor
) -> tuple[Tensor, ...]:
    """The output of every layer of ``seq`` applied one after the other to ``x``, the last one
    included.

    This is Flux's ``activations(chain, x)``: all outputs carry their graph, so a penalty on any of
    them reaches the input and the weights.

    Args:
        seq: an ``nn.Sequential``, or any iterable of callables. A layer with ``inplace=True`` gets
            a copy of its input, so that
            the output before it is kept.
        x: the first layer's input.

    Returns:
        As many outputs as there are layers.

    Raises:
        TypeError: ``seq`` is not iterable, as a module with a ``forward`` of its own is not.
        RuntimeError: a layer changed the output before it in place.

    Example::

        loss = criterion(model(x), y) + 1e-3 * sum(a.square().sum() for a in activations(model, x))
    """
    if not isinstance(seq, Iterable):
        raise TypeError(
            f"seq: expected a Sequential or an iterable of layers, got {type(seq).__name__}; "
            "use capture(model) for other modules"
        )
    outputs: list[Tensor] = []
    for layer in seq:
        before = _version(x)
        taken = x.clone() if outputs and getattr(layer, "inplace", False) else x
        result = layer(taken)
        if outputs and _version(x) != before:
            raise RuntimeError(f"seq: layer {len(outputs)} changes the output before it in place")
        x = result
        outputs.append(x)
    return tuple(outputs)


class Captured(Mapping[str, list[Tensor]]):
    """The outputs of :func:`capture`: a mapping from layer names to the outputs of each call, in
    order.

    A module that returns a tuple (``LSTM``, ``MultiheadAttention``) is represented by its first
    tensor.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._outputs: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> list[Tensor]:
        outputs = []
        for call, (output, version) in enumerate(self._outputs[name]):
            if _version(output) != version:
                raise RuntimeError(
                    f"layer {name!r}: the output of call {call} was changed in place after it was "
                    "captured; use capture(..., copy=True)"
                )
            outputs.append(output)
        return outputs

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def clear(self) -> None:
        """Forget all outputs, and with them their graphs; the layers stay."""
        for outputs in self._outputs.values():
            outputs.clear()

    def penalty(
        self, rule: Rule, reduction: Reduction = "batchmean", *, batch_dim: int = 0
    ) -> Tensor:
        """Σ of ``rule`` over all captured outputs, differentiable, as a scalar.

        Args:
            rule: ``L1``, ``L2``, ``L1L2`` or ``GroupLasso`` (whose ``dim`` is one of the outputs'),
                without ``toward``.
            reduction: see the table in :mod:`fastnorm.activations`; each output is divided by its
                own size.
            batch_dim: the dimension that ``"batchmean"`` counts.

        Raises:
            TypeError: ``rule`` is not a rule.
            ValueError: ``rule`` has a ``toward`` or is a constraint, ``reduction`` is unknown, or
                an output has no ``batch_dim``.
            RuntimeError: an output was changed in place after it was captured.
        """
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a rule such as L2(1e-4), got {rule!r}")
        if rule.toward is not None or isinstance(rule, CONSTRAINTS):
            raise ValueError(f"rule: expected a penalty without toward, got {rule!r}")
        _check_reduction(reduction)
        outputs = [output for name in self for output in self[name]]
        if not outputs or not rule.active:
            return torch.zeros((), device=outputs[0].device if outputs else None)
        for output in outputs:
            rule.check("captured output", output)
        return total(
            [
                rule.penalty([output]) / _divisor(output.shape, reduction, batch_dim)
                for output in outputs
            ]
        )


@contextmanager
def capture(
    model: nn.Module,
    layers: Iterable[str | type[nn.Module] | nn.Module] | None = None,
    *,
    copy: bool = False,
) -> Iterator[Captured]:
    """Record what layers of ``model`` put out while the ``with`` block runs.

    Every call of a layer is recorded once: a module used twice counts twice, and the second run of
        a layer inside an activation checkpoint is not counted again (use ``use_reentrant=False``:
        the other form computes its first run without a graph).

    Args:
        model: any module; DDP is looked through, so names are the inner model's.
        layers: glob patterns on module names, module types, modules, or a mix; None for every
            module without children.
        copy: keep copies, for layers whose output another layer changes in place.

    Yields:
        A :class:`Captured`, which keeps its outputs after the block ends.

    Raises:
        TypeError: ``layers`` holds something else, or a compiled module is inside ``model`` (its
            hooks do not run). ValueError: an entry of ``layers`` matches no module.

    Example::

        with capture(model, ["encoder.*", nn.ReLU]) as outputs:
            prediction = model(x)
        loss = criterion(prediction, y) + outputs.penalty(L1(1e-4))
    """
    if isinstance(layers, str | type | nn.Module):
        raise TypeError(f"layers: expected a list of patterns, types or modules, got {layers!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise TypeError(f"model: {name or 'it'} is compiled; capture it before torch.compile")
    named = dict(unwrap(model).named_modules())
    chosen = _choose(named, layers)
    captured = Captured(list(chosen))

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is None or _in_backward():
                return
            if copy or tensor.is_inference():  # inference tensors count no versions
                tensor = tensor.clone()
            captured._outputs[name].append((tensor, _version(tensor)))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in chosen.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _choose(
    named: dict[str, nn.Module], layers: Iterable[str | type[nn.Module] | nn.Module] | None
) -> dict[str, nn.Module]:
    # A parametrized layer is still a layer without children, and what makes its weight is none.
    named = {name: m for name, m in named.items() if "parametrizations" not in name.split(".")}
    if layers is None:
        return {
            name: m
            for name, m in named.items()
            if all(child == "parametrizations" for child, _ in m.named_children())
        }
    chosen: dict[str, nn.Module] = {}
    for key in layers:
        if isinstance(key, str):
            found = {name: m for name, m in named.items() if fnmatchcase(name, key)}
        elif isinstance(key, nn.Module):
            found = {name: m for name, m in named.items() if m is key}
        elif isinstance(key, type) and issubclass(key, nn.Module):
            found = {name: m for name, m in named.items() if isinstance(m, key)}
        else:
            raise TypeError(f"layers: expected patterns, module types or modules, got {key!r}")
        if not found:
            raise ValueError(f"layers: {key!r} matches no module of the model")
        chosen |= found
    return {name: m for name, m in named.items() if name in chosen}


class ActivityRegularization(nn.Module):
    """A layer that returns its input unchanged and adds ``l1 * Σ|a| + l2 * Σa²`` of it to the loss.

    The penalty waits in the layer until :func:`collect_activity` takes it: call that once for every
    training step, since what waits keeps its graph alive. Nothing is recorded in eval mode or with
    gradients disabled, and each call in training counts.

    Args:
        l1, l2: strengths, finite and >= 0. With both 0 the layer costs nothing.

    Shape:
        input and output ``(N, *)``, any floating-point dtype; the sum is in float32 or wider.

    Example::

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), ActivityRegularization(l1=1e-4))
        loss = criterion(model(x), y) + collect_activity(model)
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        super().__init__()
        self.rule = L1L2(l1, l2)
        self._waiting: list[tuple[Tensor, int]] = []

    def forward(self, input: Tensor) -> Tensor:
        recording = self.training and torch.is_grad_enabled() and not _in_backward()
        if recording and self.rule.active:
            self._waiting.append((input, _version(input)))
        return input

    def extra_repr(self) -> str:
        return f"l1={self.rule.l1:g}, l2={self.rule.l2:g}"

    def __getstate__(self) -> dict[str, Any]:
        # Graphs can be neither copied nor pickled, and belong to this module's step.
        return self.__dict__ | {"_waiting": []}


def collect_activity(
    model: nn.Module, reduction: Reduction = "batchmean", *, batch_dim: int = 0
) -> Tensor:
    """Take the penalties that the :class:`ActivityRegularization` layers of ``model`` recorded, as
    one scalar with graph.

    Args:
        model: a module that contains such layers.
        reduction, batch_dim: as in :meth:`Captured.penalty`.

    Raises:
        ValueError: there is no such layer, or ``reduction`` is unknown.
        RuntimeError: what a layer recorded was changed in place since.

    Example::

        loss = criterion(model(x), y) + collect_activity(model)
    """
    _check_reduction(reduction)
    layers = [m for m in unwrap(model).modules() if isinstance(m, ActivityRegularization)]
    if not layers:
        raise ValueError("model: it has no ActivityRegularization layer")
    terms = []
    for layer in layers:
        # Summed here and not in forward: a sum inside an activation checkpoint would be run again.
        for output, version in layer._waiting:
            if _version(output) != version:
                raise RuntimeError("the input of an ActivityRegularization was changed in place")
            value = layer.rule.penalty([output])
            terms.append(value / _divisor(output.shape, reduction, batch_dim))
    for layer in layers:
        layer._waiting = []
    return total(terms) if terms else torch.zeros(())


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "batchmean", "mean"):
        raise ValueError(f'reduction: expected "sum", "batchmean" or "mean", got {reduction!r}')


def _divisor(shape: torch.Size, reduction: Reduction, batch_dim: int) -> int:
    if reduction == "sum":
        return 1
    if reduction == "mean":
        return max(shape.numel(), 1)
    if not -len(shape) <= batch_dim < len(shape):
        raise ValueError(
            f"batch_dim: an output of shape {tuple(shape)} has no dimension {batch_dim}"
        )
    return max(shape[batch_dim], 1)


def _version(tensor: Any) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def _in_backward() -> bool:
    """True while backward runs, where activation checkpoints call layers again."""
    return torch._C._current_graph_task_id() != -1


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, tuple | list):
        return None
    return next((t for t in map(_first_tensor, output) if t is not None), None)
