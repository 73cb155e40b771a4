"""`torch.export` and ONNX see torch's own norms; a module survives every way of being copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.testing import random_tensor

ROWS, IMAGES, VOLUMES = (4, 6), (4, 6, 5, 3), (4, 6, 3, 2, 2)

# The module, its inputs' shapes, the operator that must be in its exported graph.
NORMS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], str]] = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(6), [ROWS], "aten.layer_norm"),
    "LayerNorm epilogue": (
        lambda: fastnorm.LayerNorm(6, activation="gelu", dropout_p=0.3),
        [ROWS, ROWS],
        "aten.layer_norm",
    ),
    "LayerNorm dim=1": (lambda: fastnorm.LayerNorm(6, dim=1), [IMAGES], "aten.layer_norm"),
    "RMSNorm": (lambda: fastnorm.RMSNorm(6, weight_offset=1.0), [ROWS], "aten.rms_norm"),
    "AddLayerNorm": (
        lambda: fastnorm.AddLayerNorm(6, dropout_p=0.3),
        [ROWS, ROWS],
        "aten.layer_norm",
    ),
    "AddRMSNorm": (lambda: fastnorm.AddRMSNorm(6), [ROWS, ROWS], "aten.rms_norm"),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(6), [ROWS], "aten.batch_norm"),
    "BatchNorm2d": (
        lambda: fastnorm.BatchNorm2d(6, activation="relu"),
        [IMAGES, IMAGES],
        "aten.batch_norm",
    ),
    "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(6), [VOLUMES], "aten.batch_norm"),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 6, activation="silu"), [IMAGES], "aten.group_norm"),
    "InstanceNorm2d": (
        lambda: fastnorm.InstanceNorm2d(6, affine=True),
        [IMAGES],
        "aten.instance_norm",
    ),
    "InstanceNorm3d": (
        lambda: fastnorm.InstanceNorm3d(6, track_running_stats=True),
        [VOLUMES],
        "aten.instance_norm",
    ),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "RunningBatchNorm2d": (lambda: fastnorm.RunningBatchNorm2d(6), [IMAGES]),
    "Dropout": (lambda: fastnorm.Dropout(0.3, activation="gelu"), [ROWS]),
    "Dropout1d": (lambda: fastnorm.Dropout1d(0.3), [(4, 6, 5)]),
    "Dropout2d": (lambda: fastnorm.Dropout2d(0.3), [IMAGES]),
    "Dropout3d": (lambda: fastnorm.Dropout3d(0.3), [VOLUMES]),
    "AlphaDropout": (lambda: fastnorm.AlphaDropout(0.3), [ROWS]),
    "FeatureAlphaDropout": (lambda: fastnorm.FeatureAlphaDropout(0.3), [IMAGES]),
    "StochasticDepth": (lambda: fastnorm.StochasticDepth(0.3), [IMAGES, IMAGES]),
    "DropPath": (lambda: fastnorm.DropPath(0.3), [IMAGES, IMAGES]),
    "DropBlock2d": (lambda: fastnorm.DropBlock2d(0.3, 2), [IMAGES]),
    "GaussianNoise": (lambda: fastnorm.GaussianNoise(0.3), [ROWS]),
    "GaussianDropout": (lambda: fastnorm.GaussianDropout(0.3), [ROWS]),
}
ALL = {name: make for name, (make, *_) in (NORMS | OTHERS).items()}
SHAPES = {name: shapes for name, (_, shapes, *_) in (NORMS | OTHERS).items()}


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """With parameters and statistics that are not what a new module has."""
    module = make()
    with torch.no_grad():
        for t in module.state_dict().values():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5)
    return module


def inputs(name: str) -> tuple[Tensor, ...]:
    return tuple(random_tensor(*shape) for shape in SHAPES[name])


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_export_has_torchs_norm(name, strict, kernels):
    make, _, operator = NORMS[name]
    module = trained(make).eval()
    args = inputs(name)
    program = torch.export.export(module, args, strict=strict)
    called = operators(program)
    assert any(target.startswith(operator) for target in called), called
    assert all(t.startswith("aten.") or "getitem" in t for t in called)
    args = inputs(name)
    torch.testing.assert_close(program.module()(*args), module(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NORMS)
def test_trace(name, kernels):
    module = trained(ALL[name]).eval()
    traced = torch.jit.trace(module, inputs(name))
    args = inputs(name)
    torch.testing.assert_close(traced(*args), module(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*NORMS, *OTHERS])
def test_export_in_training(name, kernels):
    """Statistics are updated, dropout drops, and no operator of ours is in the graph."""
    module = trained(ALL[name])
    program = torch.export.export(copy.deepcopy(module), inputs(name))
    assert not any("fastnorm" in target for target in operators(program))
    args = inputs(name)
    exported = program.module()
    y = exported(*args)
    state = module.state_dict()
    expected = module(*args)
    if name in NORMS and not getattr(module, "dropout_p", 0.0):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for key, value in exported.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-5)


def test_exported_dropout_drops():
    x = torch.ones(40, 50, 2, 2)
    for module in (fastnorm.Dropout(0.25), fastnorm.Dropout2d(0.25)):
        y = torch.export.export(module, (x,)).module()(x)
        torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
        assert 0.6 < (y > 0).float().mean() < 0.9
        whole = (y.flatten(2) > 0).float().mean(-1)
        assert bool(((whole == 0) | (whole == 1)).all()) == isinstance(module, fastnorm.Dropout2d)


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype=torch.float64),
        dict(dtype=torch.bfloat16),
        dict(weight_dtype=torch.bfloat16),
        dict(weight=False),
    ],
    ids=str,
)
def test_exported_dtypes(change, kernels):
    dtype = change.get("dtype", torch.float32)
    weight = random_tensor(6, dtype=change.get("weight_dtype", dtype))
    weight = weight if change.get("weight", True) else None

    class Norms(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                fastnorm.layer_norm(x, (6,), weight),
                fastnorm.rms_norm(x, (6,), weight),
                fastnorm.group_norm(x, 3, weight),
            )

    x = random_tensor(4, 6, dtype=dtype)
    got = torch.export.export(Norms(), (x,)).module()(x)
    rtol = 1e-5 if dtype != torch.bfloat16 else 2**-7
    torch.testing.assert_close(got, Norms()(x), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "name",
    ["LayerNorm epilogue", "RMSNorm", "AddLayerNorm", "BatchNorm2d", "GroupNorm", "InstanceNorm2d"],
)
def test_onnx(name, kernels):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module = trained(ALL[name]).eval()
    args = inputs(name)
    program = torch.onnx.export(module, args, dynamo=True, verbose=False)
    model = program.model_proto
    assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    norms = {node.op_type for node in model.graph.node if "Normalization" in node.op_type}
    session = runtime.InferenceSession(model.SerializeToString())
    args = inputs(name)
    feed = {i.name: a.numpy(force=True) for i, a in zip(session.get_inputs(), args, strict=True)}
    outputs = session.run(None, feed)
    expected = module(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(force=True), rtol=1e-4, atol=1e-5)
    assert norms or name == "RMSNorm", {node.op_type for node in model.graph.node}


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: loaded(module, weights_only=False),
}


def loaded(value: object, weights_only: bool) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("name", ALL)
def test_copies(name, kernels):
    module = trained(ALL[name])
    args = inputs(name)
    copies = [make(module) for make in COPIES.values()]
    state = ALL[name]()
    state.load_state_dict(loaded(module.state_dict(), weights_only=True))
    for twin in (*copies, state):
        assert repr(twin) == repr(module)
        assert twin.state_dict().keys() == module.state_dict().keys()
        results = []
        for one in (copy.deepcopy(module), twin):
            for training in (True, False):
                torch.manual_seed(0)
                results.append(one.train(training)(*args))
            results.append(dict(one.state_dict()))
        for got, expected in zip(results[3:], results[:3], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
