"""Calls under modes of torch: a default device has no say in them, and any other mode sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from test_compile import MODULES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import _build
from fastnorm.testing import random_tensor

C = 6
SHAPE = (3, C, 4, C)

Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Any]

# Calls that an eager entry takes, of (input, weight, bias, running_mean, running_var, class ids).
ENTRIES: dict[str, Call] = {
    "layer_norm": lambda x, w, b, *_: fastnorm.layer_norm(x, (C,), w, b, residual=x),
    "rms_norm": lambda x, w, b, *_: fastnorm.rms_norm(x, (C,), w) + b,
    "add_layer_norm": lambda x, w, b, *_: fastnorm.add_layer_norm(x, x, (C,), w, b)[0],
    "add_rms_norm": lambda x, w, b, *_: fastnorm.add_rms_norm(x, x, (C,), w)[0] + b,
    "batch_norm": lambda x, w, b, mean, var, _: fastnorm.batch_norm(
        x, mean, var, w, b, training=True, activation="silu"
    ),
    "batch_norm eval": lambda x, w, b, mean, var, _: fastnorm.batch_norm(x, mean, var, w, b),
    "group_norm": lambda x, w, b, *_: fastnorm.group_norm(x, 2, w, b, activation="gelu"),
    "instance_norm": lambda x, w, b, *_: fastnorm.instance_norm(x, weight=w, bias=b),
    "dropout": lambda x, w, b, *_: fastnorm.dropout(x, 0.3, bias=b, activation="gelu") * w,
    "dropout2d": lambda x, w, b, *_: fastnorm.dropout2d(x, 0.3) * w + b,
    "cross_entropy": lambda x, w, b, mean, var, ids: fastnorm.cross_entropy(
        x.reshape(-1, C) * w + b, ids, weight=var, label_smoothing=0.1
    ),
}

# Calls that Python arranges.
OTHERS: dict[str, Call] = {
    "layer_norm dim=1": lambda x, w, b, *_: fastnorm.layer_norm(x, (C,), w, b, dim=1),
    "layer_norm dropout": lambda x, w, b, *_: fastnorm.layer_norm(x, (C,), w, b, dropout_p=0.3),
    "batch_norm mask": lambda x, w, b, mean, var, _: fastnorm.batch_norm(
        x, mean, var, w, b, training=True, mask=x[:, 0] > 0
    ),
    "batch_norm dropout": lambda x, w, b, mean, var, _: fastnorm.batch_norm(
        x, mean, var, w, b, training=True, dropout_p=0.3
    ),
    "batch_norm ghost": lambda x, w, b, mean, var, _: fastnorm.batch_norm(
        x, mean, var, w, b, training=True, mask=x[:, 0] > 0, virtual_batch_size=2
    ),
    "group_norm mask": lambda x, w, b, *_: fastnorm.group_norm(x, 2, w, b, mask=x[:, 0] > 0),
    "instance_norm running": lambda x, w, b, mean, var, _: fastnorm.instance_norm(
        x, mean, var, w, b
    ),
    "alpha_dropout": lambda x, w, b, *_: fastnorm.alpha_dropout(x, 0.3, training=True) * w + b,
    "cross_entropy mask": lambda x, w, b, mean, var, ids: fastnorm.cross_entropy(
        x.reshape(-1, C) * w + b, ids, prior=var, label_smoothing=0.1, mask=ids > 1
    ),
}


def arguments() -> list[Tensor]:
    torch.manual_seed(1)
    x, w, b, mean = (random_tensor(*shape) for shape in (SHAPE, (C,), (C,), (C,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    return [*leaves, mean, random_tensor(C).exp(), torch.arange(x.numel() // C) % C]


def results(call: Call, arguments: list[Tensor], twice: bool = True) -> list[Tensor]:
    """The output, the running statistics, the gradients and those of the gradients."""
    torch.manual_seed(2)
    leaves = arguments[:3]
    y = call(*arguments)
    grads = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)
    loss = y.sin().sum()
    if twice:
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        grads += torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [y, *arguments[3:5], *grads]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("name", [*ENTRIES, *OTHERS])
def test_a_default_device_changes_no_bit(name, backend):
    _build.use_backend(backend)
    call = {**ENTRIES, **OTHERS}[name]
    expected = results(call, arguments())
    given = arguments()
    with torch.device("meta"):
        found = results(call, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Masked(nn.Module):
    """A norm of samples of lengths 1 to 3 in batches of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fastnorm.BatchNorm1d(C, virtual_batch_size=2)
        self.register_buffer("lengths", torch.arange(3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2), lengths=self.lengths)


LAYERS = {**MODULES, "BatchNorm1d lengths": (Masked, SHAPE)}
del LAYERS["LabelSmoothingCrossEntropy"]  # that test makes class ids in its forward


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_default_device_changes_no_bit_of_a_module(name, backend):
    _build.use_backend(backend)
    make, shape = LAYERS[name]
    module, x = make(), random_tensor(*shape).requires_grad_()
    twin = copy.deepcopy(module)

    def run(module: nn.Module) -> list[Any]:
        torch.manual_seed(2)
        y = module(x)
        outputs = [y] if isinstance(y, Tensor) else list(y)
        loss = sum((out.sin() * out).sum() for out in outputs)
        leaves = [x, *module.parameters()]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [*outputs, *grads, *module.state_dict().values()]

    expected = run(module)
    with torch.device("meta"):
        found = run(twin)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Spy:
    """The compiled module, with a list of whether its entries took their calls."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.taken: list[bool] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = getattr(self.module, name)(*args)
            self.taken.append(result is not None)
            return result

        return call


@pytest.fixture
def spy(kernels, monkeypatch) -> Spy:
    spy = Spy(_build.module)
    monkeypatch.setattr(_build, "module", spy)
    return spy


@pytest.mark.parametrize("name", ENTRIES)
def test_the_entries_take_calls_under_a_default_device(name, spy, device):
    given = arguments()
    with torch.device("meta"):
        ENTRIES[name](*given)
        with torch.device("cpu"):
            ENTRIES[name](*given)
    try:
        torch.set_default_device("meta")
        ENTRIES[name](*given)
    finally:
        torch.set_default_device(None if device == "cpu" else device)
    ENTRIES[name](*given)
    assert spy.taken == [True] * 4


@pytest.mark.cpu("the entry updates the running statistics of a CPU alone")
def test_the_entry_updates_running_statistics_under_a_default_device(kernels):
    mean, var, new_mean, new_var = (random_tensor(C).exp() for _ in range(4))
    expected = mean.double().lerp(new_mean.double(), 0.25).float()
    with torch.device("meta"):
        assert _build.module.update_running(
            mean, var, None, None, new_mean, new_var, 0.25, 8, 8, False
        )
    torch.testing.assert_close(mean, expected)


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class OtherDevice(DeviceContext):
    """A subclass may do what it likes."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ENTRIES)
def test_other_function_modes_see_a_call(name, kernels):
    function, given = getattr(fastnorm, name.split()[0]), arguments()
    for stack in ([Recorder()], [torch.device("meta"), Recorder()], [OtherDevice("meta")]):
        with ExitStack() as modes:
            for mode in stack:
                modes.enter_context(mode)
            ENTRIES[name](*given)
        assert function in stack[-1].seen


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ENTRIES)
def test_dispatch_modes_see_the_operators(name, kernels):
    given = arguments()
    with torch.device("meta"), Operators() as operators:
        ENTRIES[name](*given)
    assert any(name.startswith("fastnorm::") for name in operators.names)


@pytest.mark.parametrize("name", ENTRIES)
def test_fake_tensors_stay_fake(name, kernels):
    given = arguments()
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in given]
        with torch.device("meta"):
            y = ENTRIES[name](*given)
    assert isinstance(y, FakeTensor)
    assert y.device == given[0].device


def test_the_profiler_sees_the_operators(kernels):
    given = arguments()
    with torch.device("meta"), torch.autograd.profiler.profile() as profile:
        ENTRIES["layer_norm"](*given)
    assert "fastnorm::norm_fwd" in {event.name for event in profile.function_events}


def test_explain_under_a_default_device(kernels):
    x = random_tensor(2, 4)
    expected = str(fastnorm.explain(fastnorm.layer_norm, x, (4,)))
    with torch.device("meta"):
        assert str(fastnorm.explain(fastnorm.layer_norm, x, (4,))) == expected


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "dropout"])
def test_compiled_under_a_default_device(name, kernels, device):
    """Compiled without one and called with one, and the other way round."""

    def call(*given: Tensor) -> Any:
        return ENTRIES[name](*given)

    torch._dynamo.reset()
    expected = results(call, arguments(), twice=False)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mode in (nullcontext(), torch.device("meta"), nullcontext()):
        given = arguments()
        with mode:
            found = results(compiled, given, twice=False)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    given = arguments()
    try:
        torch.set_default_device("meta")
        torch._dynamo.reset()
        found = results(torch.compile(call, fullgraph=True, backend="aot_eager"), given, False)
    finally:
        torch.set_default_device(None if device == "cpu" else device)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
