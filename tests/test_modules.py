"""Every norm and dropout module inside PyTorch's other machinery: same bits, same dtypes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.testing import random_tensor

IMAGE, ROWS, SIGNAL = (3, 8, 4, 5), (4, 6, 8), (3, 8, 10)


class Adding(nn.Module):
    """`AddLayerNorm` or `AddRMSNorm`, with both of its results in use."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y, total = self.norm(x, x * 0.5)
        return y + total


FUSED = dict(activation="gelu", dropout_p=0.3)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(8, **FUSED), ROWS),
    "LayerNorm, channels": (lambda: fastnorm.LayerNorm(8, dim=1), IMAGE),
    "RMSNorm": (lambda: fastnorm.RMSNorm(8, **FUSED), ROWS),
    "AddLayerNorm": (lambda: Adding(fastnorm.AddLayerNorm(8, dropout_p=0.3)), ROWS),
    "AddRMSNorm": (lambda: Adding(fastnorm.AddRMSNorm(8, dropout_p=0.3)), ROWS),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(8, **FUSED), SIGNAL),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8, activation="relu"), IMAGE),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(8, activation="relu"), IMAGE),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 8, **FUSED), IMAGE),
    "InstanceNorm2d": (lambda: fastnorm.InstanceNorm2d(8, affine=True, **FUSED), IMAGE),
    "InstanceNorm1d, tracking": (
        lambda: fastnorm.InstanceNorm1d(8, affine=True, track_running_stats=True),
        SIGNAL,
    ),
    "Dropout": (lambda: fastnorm.Dropout(0.3, activation="silu"), ROWS),
    "Dropout2d": (lambda: fastnorm.Dropout2d(0.3), IMAGE),
    "AlphaDropout": (lambda: fastnorm.AlphaDropout(0.3), ROWS),
    "StochasticDepth": (lambda: fastnorm.StochasticDepth(0.3, "row"), ROWS),
}
modules = pytest.mark.parametrize("name", list(MODULES))


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODULES[name]
    module = make()
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return module, random_tensor(*shape, mean=0.5)


def step(module: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Result, gradients and buffers of one step from a copy of the module."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = (call or (lambda m, x: m(x)))(module, x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y.dtype))
    gradients = [p.grad for p in (x, *module.parameters()) if p.grad is not None]
    return [y.detach(), *gradients, *[b.clone() for b in module.buffers()]]


def on_cpu(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return module(x)


def with_anomaly_mode(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return module(x)


def functional(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(module, dict(module.named_parameters()), (x,))


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "save_on_cpu": on_cpu,
    "functional_call": functional,
    "anomaly mode": with_anomaly_mode,
}


@modules
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_step_has_the_same_bits(name, way, kernels):
    module, x = build(name)
    for plain, other in zip(step(module, x), step(module, x, WAYS[way]), strict=True):
        assert torch.equal(plain, other)


ONES = torch.ones(2, 6)
NUMBERS = {
    "eps": lambda f, i: fastnorm.layer_norm(ONES, [i(6)], eps=f(0.5)),
    "p": lambda f, i: fastnorm.dropout(ONES, f(0.25)),
    "dropout_p": lambda f, i: fastnorm.layer_norm(ONES, [i(6)], dropout_p=f(0.25)),
    "num_groups": lambda f, i: fastnorm.group_norm(ONES, i(2), eps=f(0.5)),
    "modules": lambda f, i: fastnorm.Dropout(f(0.25))(fastnorm.GroupNorm(i(2), i(6))(ONES)),
}


@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers_of_numpy_are_numbers(argument, kernels):
    found = []
    for kinds in ((float, int), (np.float32, np.int64)):
        torch.manual_seed(0)
        found.append(NUMBERS[argument](*kinds))
    assert torch.equal(*found)


@modules
def test_inference_mode_is_no_grad(name, kernels):
    module, x = build(name)
    for mode in (True, False):
        found = []
        for context in (torch.inference_mode, torch.no_grad):
            twin = copy.deepcopy(module).train(mode)
            torch.manual_seed(1)
            with context():
                found.append((twin(x), *[b.clone() for b in twin.buffers()]))
        assert all(map(torch.equal, *found))


@modules
def test_any_part_may_require_gradients(name, kernels):
    module, x = build(name)
    parts = ["input", *[n for n, _ in module.named_parameters()]]
    # Which one of them is asked for does not change another's gradient.
    every = dict(zip(parts, step(module, x)[1:], strict=False))
    for wanted in itertools.product([True, False], repeat=len(parts)):
        if not any(wanted) or all(wanted):
            continue
        twin, leaf = copy.deepcopy(module), x.clone().requires_grad_(wanted[0])
        for p, asked in zip(twin.parameters(), wanted[1:], strict=True):
            p.requires_grad_(asked)
        torch.manual_seed(1)
        y = twin(leaf)
        torch.manual_seed(2)
        y.backward(torch.randn(y.shape))
        for part, p, asked in zip(parts, (leaf, *twin.parameters()), wanted, strict=True):
            assert (p.grad is not None) == asked
            if asked:
                assert torch.equal(p.grad, every[part]), part


@modules
def test_meta_then_filled(name, kernels, device):
    module, x = build(name)
    with torch.device("meta"):
        empty = MODULES[name][0]()
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert empty(x.to("meta")).shape == module(x).shape
    empty.to_empty(device=device).load_state_dict(module.state_dict())
    torch.manual_seed(3)
    expected = module.eval()(x)
    assert torch.equal(empty.eval()(x), expected)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_and_the_memory(name, dtype, kernels, device):
    def saved_bytes(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        saved: dict[tuple[int, int], int] = {}

        def pack(t: Tensor) -> Tensor:
            if not isinstance(t, nn.Parameter):
                saved[t.data_ptr(), t.numel()] = t.numel() * t.element_size()
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(x)
        return y, sum(saved.values())

    module, x = build(name)
    x = x.to(dtype).requires_grad_()
    with torch.autocast(device, dtype):
        y, under_autocast = saved_bytes(copy.deepcopy(module), x)
    cast, cast_bytes = saved_bytes(copy.deepcopy(module).to(dtype), x)
    assert y.dtype == dtype and under_autocast <= cast_bytes
    torch.testing.assert_close(y, cast, rtol=0.05, atol=0.05)
    y.backward(torch.randn_like(y))
    assert x.grad is not None and x.grad.dtype == dtype


def test_a_gradient_scaler_skips_and_recovers(kernels, device):
    model = nn.Sequential(nn.Linear(8, 8), fastnorm.LayerNorm(8, activation="gelu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**120)
    x = random_tensor(16, 8) * 1e3
    before = model[1].weight.detach().clone()
    for expected_step in (False, True):
        if expected_step:
            scaler.update(2.0)
        with torch.autocast(device, torch.float16):
            loss = model(x).float().square().sum() * 1e3
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[1].weight, before) != expected_step


@modules
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(name, kernels):
    module, x = build(name)
    module.eval()
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


@modules
def test_meta_tensors_have_shapes(name, kernels):
    module, x = build(name)
    y = module.to("meta")(x.detach().to("meta"))
    assert y.device.type == "meta" and y.shape == x.shape


@modules
@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_a_converted_module_computes_in_its_dtype(name, cast, kernels):
    module, x = build(name)
    converted = getattr(copy.deepcopy(module), cast)()
    y, *gradients = step(converted, getattr(x, cast)())
    expected, *_ = step(module, x)
    dtype = getattr(x, cast)().dtype
    assert {p.dtype for p in converted.parameters()} <= {dtype}
    assert {t.dtype for t in (y, *gradients[: 1 + len(list(module.parameters()))])} == {dtype}
    # Running statistics don't fit into 16 bits.
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {b.dtype for b in converted.buffers() if b.is_floating_point()} <= {kept}
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    back = converted.to(torch.float32)
    assert {t.dtype for t in back.state_dict().values() if t.is_floating_point()} <= {torch.float32}
    assert back.state_dict().keys() == module.state_dict().keys()


@modules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_in_the_definition(name, dtype, device):
    """Which is what runs on CUDA without kernels, and compiled there."""
    fastnorm.use_backend("reference")
    module, x = build(name)

    def under_autocast(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return m(x)

    x = x.to(dtype)
    for plain, cast in zip(step(module, x), step(module, x, under_autocast), strict=True):
        assert cast.dtype == plain.dtype and torch.equal(cast, plain)


def test_no_operator_has_a_rule_for_autocast(kernels):
    """Kernels get every dtype as it comes, on a GPU too."""
    for name in ("norm_fwd", "add_norm_fwd", "dropout_fwd", "cross_entropy"):
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnorm::{name}", key)


@pytest.mark.parametrize(
    ("cls", "args"),
    [
        (fastnorm.LayerNorm, (8,)),
        (fastnorm.RMSNorm, (8,)),
        (fastnorm.AddLayerNorm, (8,)),
        (fastnorm.AddRMSNorm, (8,)),
        (fastnorm.GroupNorm, (2, 8)),
        (fastnorm.BatchNorm1d, (8,)),
        (fastnorm.BatchNorm2d, (8,)),
        (fastnorm.BatchNorm3d, (8,)),
        (fastnorm.SyncBatchNorm, (8,)),
        (fastnorm.InstanceNorm1d, (8, 1e-5, 0.1, True, True)),
        (fastnorm.InstanceNorm2d, (8, 1e-5, 0.1, True, True)),
        (fastnorm.InstanceNorm3d, (8, 1e-5, 0.1, True, True)),
    ],
)
def test_skip_init(cls, args, device):
    module = nn.utils.skip_init(cls, *args, device=device)
    like = cls(*args)
    assert type(module) is cls
    for key, value in like.state_dict().items():
        skipped = module.state_dict()[key]
        assert skipped.device.type == device and skipped.shape == value.shape
        assert skipped.dtype == value.dtype
    module.reset_parameters()
    for key, value in like.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key
