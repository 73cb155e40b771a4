"""Every public function and module under `torch.compile`: one graph, eager results, no more
recompilation than torch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastnorm
from fastnorm import _build, _ops
from fastnorm.penalties import l1_penalty, l2_penalty
from fastnorm.testing import random_tensor, seeded

C = 6


ROWS = ((3, C), (5, C), (7, C))
IMAGES = ((2, C, 4, 3), (3, C, 5, 4), (4, C, 6, 5))
VOLUMES = tuple((*shape, 2) for shape in IMAGES)
W, B = torch.linspace(0.5, 2, C), torch.linspace(-1, 1, C)


def lengths(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) + 1


def statistics() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, C), torch.linspace(0.5, 2, C)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (
        lambda x: fastnorm.layer_norm(
            x, (C,), W, B, activation="gelu", residual=x.sin(), dropout_p=0.3
        ),
        ROWS,
    ),
    "layer_norm dim=1": (lambda x: fastnorm.layer_norm(x, (C,), W, B, dim=1), IMAGES),
    "rms_norm": (lambda x: fastnorm.rms_norm(x, (C,), W, weight_offset=1.0), ROWS),
    "add_layer_norm": (
        lambda x: fastnorm.add_layer_norm(x, x.sin(), (C,), W, B, dropout_p=0.2),
        ROWS,
    ),
    "add_rms_norm": (lambda x: fastnorm.add_rms_norm(x, x, (C,), W), ROWS),
    "batch_norm": (
        lambda x: fastnorm.batch_norm(
            x, *statistics(), W, B, training=True, activation="silu", residual=x
        ),
        IMAGES,
    ),
    "batch_norm eval": (lambda x: fastnorm.batch_norm(x, *statistics(), W, B), IMAGES),
    "batch_norm lengths": (
        lambda x: fastnorm.batch_norm(x.flatten(2), None, None, training=True, lengths=lengths(x)),
        IMAGES,
    ),
    "batch_norm ghost": (
        lambda x: fastnorm.batch_norm(x, None, None, training=True, virtual_batch_size=2),
        ((4, C, 3, 3), (4, C, 3, 3)),
    ),
    "group_norm": (lambda x: fastnorm.group_norm(x, 2, W, B, activation="silu"), IMAGES),
    "group_norm mask": (
        lambda x: fastnorm.group_norm(x, 2, mask=(x[:, 0] > 0).contiguous()),
        IMAGES,
    ),
    "instance_norm": (lambda x: fastnorm.instance_norm(x, weight=W, bias=B), IMAGES),
    "dropout": (
        lambda x: fastnorm.dropout(x, 0.3, activation="gelu", bias=B, residual=x),
        ROWS,
    ),
    "dropout1d": (lambda x: fastnorm.dropout1d(x.flatten(2), 0.3), IMAGES),
    "dropout2d": (lambda x: fastnorm.dropout2d(x, 0.3), IMAGES),
    "dropout3d": (lambda x: fastnorm.dropout3d(x, 0.3), VOLUMES),
    "alpha_dropout": (lambda x: fastnorm.alpha_dropout(x, 0.3, training=True), ROWS),
    "feature_alpha_dropout": (
        lambda x: fastnorm.feature_alpha_dropout(x, 0.3, training=True),
        IMAGES,
    ),
    "stochastic_depth": (lambda x: fastnorm.stochastic_depth(x, 0.3, residual=x.sin()), IMAGES),
    "cross_entropy": (
        lambda x: fastnorm.cross_entropy(x, torch.arange(x.shape[0]) % C, label_smoothing=0.1),
        ROWS,
    ),
    "smooth_labels": (
        lambda x: fastnorm.smooth_labels(torch.arange(x.shape[0]) % C, C, 0.1) * x,
        ROWS,
    ),
    "penalties": (lambda x: l1_penalty([x], 0.1) + l2_penalty([x], 0.2), ROWS),
}
# With the backend "reference" too, on one shape: one of each formula.
BOTH = ("layer_norm", "rms_norm", "batch_norm", "group_norm")

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(C, activation="relu"), ROWS[0]),
    "RMSNorm": (lambda: fastnorm.RMSNorm(C), ROWS[0]),
    "AddLayerNorm": (lambda: WithItself(fastnorm.AddLayerNorm(C)), ROWS[0]),
    "AddRMSNorm": (lambda: WithItself(fastnorm.AddRMSNorm(C)), ROWS[0]),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(C), ROWS[0]),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(C, momentum=None), IMAGES[0]),
    "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(C), VOLUMES[0]),
    "BatchNorm1d by running statistics": (lambda: by_running(), ROWS[0]),
    "RunningBatchNorm1d": (lambda: fastnorm.RunningBatchNorm1d(C), ROWS[0]),
    "RunningBatchNorm2d": (lambda: fastnorm.RunningBatchNorm2d(C), IMAGES[0]),
    "GroupNorm": (lambda: fastnorm.GroupNorm(3, C), IMAGES[0]),
    "InstanceNorm1d": (
        lambda: nn.Sequential(nn.Flatten(2), fastnorm.InstanceNorm1d(C, affine=True)),
        IMAGES[0],
    ),
    "InstanceNorm2d": (lambda: fastnorm.InstanceNorm2d(C, track_running_stats=True), IMAGES[0]),
    "InstanceNorm3d": (lambda: fastnorm.InstanceNorm3d(C), VOLUMES[0]),
    "Dropout": (lambda: fastnorm.Dropout(0.3), ROWS[0]),
    "Dropout shared": (lambda: fastnorm.Dropout(0.3, shared_dims=(2, 3)), IMAGES[0]),
    "Dropout exact": (lambda: fastnorm.Dropout(0.3, mode="exact_count"), ROWS[0]),
    "Dropout1d": (lambda: nn.Sequential(nn.Flatten(2), fastnorm.Dropout1d()), IMAGES[0]),
    "Dropout2d": (fastnorm.Dropout2d, IMAGES[0]),
    "Dropout3d": (fastnorm.Dropout3d, VOLUMES[0]),
    "AlphaDropout": (fastnorm.AlphaDropout, ROWS[0]),
    "FeatureAlphaDropout": (fastnorm.FeatureAlphaDropout, IMAGES[0]),
    "StochasticDepth": (lambda: fastnorm.StochasticDepth(0.3), ROWS[0]),
    "DropPath": (lambda: fastnorm.DropPath(0.3), ROWS[0]),
    "DropBlock2d": (lambda: fastnorm.DropBlock2d(0.3, 2), IMAGES[0]),
    "DropBlock3d": (lambda: fastnorm.DropBlock3d(0.3, 2), VOLUMES[0]),
    "GaussianNoise": (lambda: fastnorm.GaussianNoise(0.3), ROWS[0]),
    "GaussianDropout": (lambda: fastnorm.GaussianDropout(0.3), ROWS[0]),
    "weight_standardization": (
        lambda: fastnorm.weight_standardization(nn.Conv2d(C, C, 3)),
        IMAGES[0],
    ),
    "LabelSmoothingCrossEntropy": (
        lambda: WithClasses(fastnorm.LabelSmoothingCrossEntropy(0.1)),
        ROWS[0],
    ),
    "StandardScaler": (
        lambda: fastnorm.StandardScaler().fit(torch.arange(4.0 * C).view(4, C)),
        ROWS[0],
    ),
}


def by_running() -> nn.Module:
    """Normalizes with the running statistics in training mode, and updates them."""
    norm = fastnorm.BatchNorm1d(C, momentum=0.9)
    norm.use_running_stats = True
    return norm


class WithItself(nn.Module):
    """Calls a layer that takes two tensors with one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x.sin())


class WithClasses(WithItself):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x, torch.arange(x.shape[0]) % C)


def steps(run: Callable[..., Any], module: nn.Module | None, shapes: Any) -> list[Any]:
    """Outputs, gradients and buffers of one step for each shape."""
    results: list[Any] = []
    torch.manual_seed(1)
    parameters = list(module.parameters()) if module is not None else []
    inputs = [random_tensor(*shape).requires_grad_() for shape in shapes]
    for x in inputs:
        torch.manual_seed(2)
        y = run(x)
        outputs = [y] if isinstance(y, Tensor) else list(y)
        loss = sum((out.sin() * out).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)])
    if module is not None:
        results.append(list(module.state_dict().values()))
    return results


def compile_counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def check(ours: Any, shapes: Any) -> int:
    """Compiled steps are the eager ones; returns how often the compiler ran."""
    module = ours if isinstance(ours, nn.Module) else None
    twin = copy.deepcopy(ours)
    expected = steps(twin, twin if module is not None else None, shapes)
    compiled, counter = compile_counted(ours)
    torch.testing.assert_close(steps(compiled, module, shapes), expected, rtol=1e-5, atol=1e-5)
    return counter.frame_count


def test_how_often_torch_compiles():
    """What the tests below allow: one graph for a shape, and one more for all others."""
    norm = nn.BatchNorm2d(C)
    for shapes, graphs in ((IMAGES, 2), (IMAGES[:1] * 3, 1)):
        compiled, counter = compile_counted(norm)
        steps(compiled, norm, shapes)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """The shapes are static for the first and dynamic from then on."""
    _build.use_backend("kernel")
    assert check(*FUNCTIONS[name]) <= 2


@pytest.mark.parametrize("name", BOTH)
def test_functions_by_reference(name):
    _build.use_backend("reference")
    function, shapes = FUNCTIONS[name]
    assert check(function, shapes[:1]) == 1


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    """Steps of one shape: no state that they change, such as a count of batches, is a constant."""
    make, shape = MODULES[name]
    assert check(make(), [shape] * 2) == 1


def test_first_call_of_a_process_is_compiled(monkeypatch):
    """The kernels are loaded while the graph is traced."""
    _build.use_backend("auto")
    x = random_tensor(5, C)
    torch.manual_seed(2)
    expected = fastnorm.dropout(x, 0.3)
    compiled, _ = compile_counted(lambda x: fastnorm.dropout(x, 0.3))
    monkeypatch.setattr(_build, "module", None)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x), expected)


def test_first_call_of_a_process_is_compiled_once(monkeypatch):
    monkeypatch.setattr(_build, "_backend", None)
    compiled, counter = compile_counted(lambda x: fastnorm.layer_norm(x, (C,), W))
    for _ in range(2):
        compiled(random_tensor(5, C))
    assert counter.frame_count == 1


def test_generator():
    """Dynamo cannot put a Generator into a graph: one error, or one graph break, says so."""
    _build.use_backend("auto")
    torch._dynamo.reset()
    generator = seeded(0)

    def run(x: Tensor) -> Tensor:
        y = fastnorm.layer_norm(x.sin(), (C,), W, dropout_p=0.5, generator=generator)
        return fastnorm.dropout(y, 0.5, generator=generator).cos()

    x = random_tensor(5, C)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="generator: expected None"):
        torch.compile(run, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    generator.manual_seed(3)
    compiled = torch.compile(run, backend="eager")(x)
    generator.manual_seed(3)
    torch.testing.assert_close(compiled, run(x))


def test_these_are_all():
    """A new public function or module gets its line above, or a reason here."""
    whole_model = {  # work on models and training loops, outside of a forward
        *("ActivationStats", "Advice", "EarlyStopping", "Explanation", "Finding", "GapReport"),
        *("GroupLasso", "L1", "L1L2", "L2", "LRFindResult", "MaxNorm", "Regularizer"),
        *("KernelUnavailable", "ReplaceReport", "activations", "build", "init"),
    }
    whole_model.add("SyncBatchNorm")  # needs several processes
    classes = {n for n in fastnorm.__all__ if n[0].isupper()} - whole_model
    assert classes <= {name.split()[0] for name in MODULES}


class Recorder(TorchDispatchMode):
    """The calls of our operators, one for each combination of absent arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastnorm":
            absent = tuple(a is None for a in args)
            self.calls[func, absent] = func, tree_map_only(Tensor, Tensor.clone, args)
        return func(*args, **(kwargs or {}))


def test_opcheck():
    """Schemas, shapes for the compiler and functionalization of every registered operator."""
    _build.use_backend("kernel")
    _ops.register_fakes()
    recorder = Recorder()
    w, b = W.clone().requires_grad_(), B.clone().requires_grad_()
    x = random_tensor(4, C, 3, 2).requires_grad_()
    rows = random_tensor(4, C).bfloat16().requires_grad_()
    with recorder:
        outputs = [
            fastnorm.layer_norm(rows, (C,), w, b, activation="gelu", residual=rows, dropout_p=0.2),
            fastnorm.layer_norm(x, (C,), w, None, dim=1),
            fastnorm.rms_norm(rows, (C,), w),
            *fastnorm.add_layer_norm(rows, rows.sin(), (C,), w, b, dropout_p=0.2),
            *fastnorm.add_rms_norm(rows, rows.sin(), (C,), None),
            fastnorm.batch_norm(x, None, None, w, b, training=True, virtual_batch_size=3),
            fastnorm.batch_norm(x, *statistics(), None, b, activation="relu", residual=x),
            fastnorm.group_norm(x, 2, w, b),
            fastnorm.dropout(rows, 0.3, activation="gelu", bias=b.bfloat16(), residual=rows),
            fastnorm.dropout2d(x, 0.3),
            fastnorm.cross_entropy(rows, torch.arange(4), label_smoothing=0.1),
        ]
        loss = sum(y.float().sin().sum() for y in outputs)
        torch.autograd.grad(loss, [x, rows, w, b])
        # Which only the eager entries call.
        seed = torch.ops.fastnorm.draw_seed(B)
        torch.ops.fastnorm.dropout_(torch.ones(3, 4), seed, [12, 1, 1], 0.5, 0)
        torch.ops.fastnorm.add_penalty_grad_([torch.ones(4)], [torch.randn(4)], 0.1, 0.2)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {
        n
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("fastnorm::") and has_kernel(n, "CPU")
    }
    assert {func._schema.name for func, _ in recorder.calls.values()} == names
    for func, args in recorder.calls.values():
        torch.library.opcheck(func, args)


@pytest.mark.cpu("on CUDA the compiler gets the definition, which rounds elsewhere")
@pytest.mark.parametrize(
    ("momentum", "compiler"), [(0.1, "aot_eager"), (None, "aot_eager"), (None, "inductor")]
)
def test_running_statistics_are_the_eager_ones(momentum, compiler):
    """After five steps, to the last bit."""
    _build.use_backend("auto")
    torch._dynamo.reset()
    eager = fastnorm.BatchNorm2d(C, momentum=momentum, activation="relu")
    kept = copy.deepcopy(eager)
    compiled = torch.compile(kept, fullgraph=True, backend=compiler)
    for _ in range(5):
        x = random_tensor(8, C, 5, 4, mean=3.0)
        results = []
        for norm in (eager, compiled):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), leaf)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept.state_dict(), eager.state_dict(), rtol=0, atol=0)
    assert kept.num_batches_tracked == 5


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_transforms_inside_of_a_graph(backend):
    _build.use_backend(backend)
    torch._dynamo.reset()
    x, w = random_tensor(3, 4, C), W.clone()

    def loss(w: Tensor, x: Tensor) -> Tensor:
        y = fastnorm.layer_norm(x, (C,), w, activation="silu")
        return fastnorm.group_norm(y, 2).square().sum()

    def run(w: Tensor, x: Tensor) -> Any:
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        return per_sample, torch.func.jvp(lambda w: loss(w, x[0]), (w,), (w,))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, x), run(w, x))
    vmapped = torch.func.vmap(torch.compile(lambda x: loss(w, x), backend="aot_eager"))
    torch.testing.assert_close(vmapped(x), torch.stack([loss(w, one) for one in x]))
