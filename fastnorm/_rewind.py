"""Remember the state of models, optimizers, schedules and random generators, and put it back in
place.

Objects keep their identity: a tensor gets its old bits back, a dictionary its old entries. What the
training loop holds references to is therefore still the same object afterwards.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Undo = Callable[[], Any]

# Their whole state is their attributes.
_TRANSPARENT = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)


def rewind(*values: Any) -> Undo:
    """A function that puts everything reachable from `values` back to what it is now.

    Reached are tensors (contents, gradient, ``requires_grad``), containers, torch generators, the
    attributes of modules, optimizers, schedulers and gradient scalers, and, at the top level, any
    object with ``state_dict`` and ``load_state_dict``.

    Raises:
        TypeError: a top-level value that none of these describes.
    """
    undos: list[Undo] = []
    seen: dict[int, Any] = {}

    def remember(value: Any) -> None:
        if id(value) in seen:
            return
        seen[id(value)] = value  # holds it, so that the id stays its own
        if isinstance(value, Tensor):
            undos.append(_rewind_tensor(value))
            if value.is_leaf and value.grad is not None:
                remember(value.grad)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            undos.append(lambda: value.set_state(state))
        elif isinstance(value, dict):
            entries = dict(value)
            undos.append(lambda: _rewind_dict(value, entries))
            for entry in entries.values():
                remember(entry)
        elif isinstance(value, (list, deque)):
            items = list(value)
            undos.append(lambda: _rewind_list(value, items))
            for item in items:
                remember(item)
        elif isinstance(value, set):
            members = set(value)
            undos.append(lambda: _rewind_set(value, members))
        elif isinstance(value, tuple):
            for item in value:
                remember(item)
        elif isinstance(value, _TRANSPARENT):
            remember(value.__dict__)

    for value in values:
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, (*_TRANSPARENT, Tensor, torch.Generator, dict, list, tuple)):
                remember(part)
            elif hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
                undos.append(_rewind_stateful(part))
            else:
                raise TypeError(
                    "expected a module, optimizer, scheduler, generator or an object with "
                    f"state_dict and load_state_dict to restore, got {type(part).__name__}"
                )

    def undo() -> None:
        for one in undos:
            one()

    return undo


def rng_states() -> tuple[Any, ...]:
    """Values that differ where Python's or torch's generators, on any device, were used between."""
    states = [torch.get_rng_state()]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            states += device.get_rng_state_all()
    return random.getstate(), *(state.tolist() for state in states)


def rewind_rng() -> Undo:
    """A function that puts the generators of torch, its devices, Python and numpy back."""
    undos: list[Undo] = []
    cpu = torch.get_rng_state()
    undos.append(lambda: torch.set_rng_state(cpu))
    for name in ("cuda", "xpu"):
        device = getattr(torch, name)
        # An uninitialized device has drawn nothing; asking it for its state would start it.
        if device.is_initialized():
            states = device.get_rng_state_all()
            undos.append(partial(device.set_rng_state_all, states))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        undos.append(lambda: torch.mps.set_rng_state(mps))
    python = random.getstate()
    undos.append(lambda: random.setstate(python))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        legacy = numpy.random.get_state()
        undos.append(lambda: numpy.random.set_state(legacy))

    def undo() -> None:
        for one in undos:
            one()

    return undo


@torch.no_grad()
def _rewind_tensor(tensor: Tensor) -> Undo:
    grad = tensor.grad if tensor.is_leaf else None
    requires_grad = tensor.requires_grad
    whole = data = tensor.detach()
    plain = data.layout is torch.strided and type(data) is Tensor
    if plain:
        # An expanded dimension is one element in memory and can't be written as several.
        once = [slice(0, 1) if stride == 0 else slice(None) for stride in data.stride()]
        data = data[tuple(once)]
    saved = data.clone()

    @torch.no_grad()
    def undo() -> None:
        if plain and tensor.data_ptr() != whole.data_ptr():
            tensor.data = whole
        data.copy_(saved)
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return undo


def _rewind_dict(value: dict, entries: dict) -> None:
    for key in [key for key in value if key not in entries]:
        del value[key]
    value.update(entries)


def _rewind_list(value: Any, items: list) -> None:
    value.clear()
    value.extend(items)


def _rewind_set(value: set, members: set) -> None:
    value.clear()
    value.update(members)


def _rewind_stateful(value: Any) -> Undo:
    state = copy.deepcopy(value.state_dict())
    return lambda: value.load_state_dict(state)
