"""Our functions and modules under the inputs that PyTorch tests its own with.

`torch.testing._internal`, which ships in the wheel, has for every operator and module of torch
sample inputs, dtypes and inputs that must fail. Ours must give what torch's give, within the budget
of `fastnorm.testing`, and fail where they fail.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import fastnorm
from fastnorm._reference import accumulate_dtype
from fastnorm.testing import assert_within_budget, random_tensor, run_with_gradients

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")
common_nn = pytest.importorskip("torch.testing._internal.common_nn")

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def functional(name: str) -> tuple[Callable, Callable]:
    return getattr(fastnorm, name), getattr(F, name)


# The name in the database: our function and torch's, of the database's arguments.
NORMS: dict[str, tuple[Callable, Callable]] = {
    f"nn.functional.{name}": functional(name)
    for name in ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
} | {
    "native_layer_norm": (fastnorm.layer_norm, lambda *args: torch.native_layer_norm(*args)[0]),
    "native_batch_norm": (
        lambda x, w, b, mean, var, *rest: fastnorm.batch_norm(x, mean, var, w, b, *rest),
        lambda *args: torch.native_batch_norm(*args)[0],
    ),
    "native_group_norm": (
        lambda x, w, b, n, c, spatial, groups, eps: fastnorm.group_norm(x, groups, w, b, eps),
        lambda *args: torch.native_group_norm(*args)[0],
    ),
}
DROPOUTS = {
    f"nn.functional.{name}": functional(name)
    for name in ("dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}

op_infos = {
    (info.name, info.variant_test_name): info
    for info in invocations.op_db
    if info.name in NORMS or info.name in DROPOUTS
}


def infos(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(info, id=f"{name.rpartition('.')[2]}{variant and '-'}{variant}")
        for (name, variant), info in op_infos.items()
        if name in table and info.dtypes
    ]


def test_the_database_has_them_all():
    missing = {*NORMS, *DROPOUTS} ^ {name for name, _ in op_infos}
    assert missing <= {"native_group_norm"}  # torch 2.11 lacks it


def arguments(sample: Any) -> tuple[list[Tensor], Callable[[Callable], Callable[..., Tensor]]]:
    """The tensors of a sample, and what makes a function of them from one of its arguments."""
    leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    wanted = [leaves[i].requires_grad for i in at]

    def bind(function: Callable) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            filled = list(leaves)
            for i, t, want in zip(at, tensors, wanted, strict=True):
                # Running statistics: written to, and without a gradient.
                filled[i] = t if want else t.detach().clone()
            args, kwargs = tree_unflatten(filled, spec)
            return function(*args, **kwargs)

        return run

    return [leaves[i].detach() for i in at], bind


def running_statistics(function: Callable, sample: Any, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a sample without gradients after a call, in float64."""
    leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    copies = [t.detach().to(dtype).clone() if isinstance(t, Tensor) else t for t in leaves]
    args, kwargs = tree_unflatten(copies, spec)
    function(*args, **kwargs)
    return [
        copied
        for copied, t in zip(copies, leaves, strict=True)
        if isinstance(t, Tensor) and not t.requires_grad
    ]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("info", infos(NORMS))
def test_norms(info, dtype, kernels, device):
    ours, theirs = NORMS[info.name]
    assert dtype in info.dtypes
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        tensors, bind = arguments(sample)
        # Torch's own float32 result stands in for what float64 is measured by.
        peer = torch.float32 if dtype == torch.float64 else dtype
        with torch.no_grad():
            grads = [random_tensor(*bind(theirs)(*tensors).shape, dtype=dtype)]
        results = [
            run_with_gradients(bind(ours), tensors, grads),
            run_with_gradients(bind(theirs), tensors, grads, peer),
            run_with_gradients(bind(theirs), tensors, grads, torch.float64),
        ]
        for function, as_dtype, result in zip(
            (ours, theirs, theirs), (dtype, peer, torch.float64), results, strict=True
        ):
            result += running_statistics(function, sample, as_dtype)
        assert results[0][0].dtype == dtype
        ours_dx, _, dx = (result[1] for result in results)
        if dx.numel() and dx.abs().max() < 1e-3:
            # Of one or two values, where the terms of the gradient cancel: 316 is 1 / sqrt(eps).
            terms = 316 * grads[0].abs().max() * max(t.abs().max() for t in tensors)
            unit = torch.finfo(accumulate_dtype(dtype)).eps
            assert (ours_dx.double() - dx).abs().max() <= 4 * unit * terms
            results = [[y, *rest] for y, _, *rest in results]
        assert_within_budget(*results, what=str(sample.summary()))


def outcomes(function: Callable[..., Tensor], x: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Results and gradients of many calls, [run, element]."""
    pairs = [run_with_gradients(function, [x], [torch.ones_like(x)]) for _ in range(runs)]
    values, gradients = (torch.stack(side).view(runs, -1) for side in zip(*pairs, strict=True))
    return values, gradients


def first_alike(kept: Tensor) -> Tensor:
    """For each element the first one that was kept in the same runs."""
    labels = torch.unique(kept, dim=1, return_inverse=True)[1]
    at = torch.arange(len(labels))
    return torch.zeros_like(at).scatter_reduce(0, labels, at, "amin", include_self=False)[labels]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("info", infos(DROPOUTS))
def test_dropouts(info, dtype, kernels, device):
    """Each element takes torch's two values, and shares its choice with those that do in torch."""
    ours, theirs = DROPOUTS[info.name]
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 2.0**-15)
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        (x,), bind = arguments(sample)
        x = x.masked_fill(x == 0, 1)
        call = inspect.signature(theirs).bind(x, **sample.kwargs)
        call.apply_defaults()
        random = call.arguments["training"] and 0 < call.arguments["p"] < 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mine, peer = (outcomes(bind(f), x, 100 if random else 1) for f in (ours, theirs))
        for a, b in zip(mine, peer, strict=True):
            for side in (Tensor.amin, Tensor.amax):
                torch.testing.assert_close(side(a, 0), side(b, 0), rtol=tolerance, atol=tolerance)
        if random:
            for _, gradient in (mine, peer):
                assert len(gradient.unique()) == 2
            assert torch.equal(*(first_alike(gradient > 0) for _, gradient in (mine, peer)))


@pytest.mark.filterwarnings("ignore:dropout2d:UserWarning")
@pytest.mark.parametrize("info", infos(NORMS | DROPOUTS))
def test_other_dtypes_fail(info, device):
    """Integers and complex numbers, except where dropout has nothing to drop."""
    ours, _ = (NORMS | DROPOUTS)[info.name]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        sample = next(iter(info.sample_inputs(device, torch.float32)))
        args, kwargs = tree_map_only(
            Tensor, partial(Tensor.to, dtype=dtype), ((sample.input, *sample.args), sample.kwargs)
        )
        if info.name in DROPOUTS:
            assert ours(args[0], training=False) is args[0]
            assert ours(args[0], p=0.0) is args[0]
            args, kwargs = args[:1], {"p": 0.5, "training": True}
        with pytest.raises(NotImplementedError, match=r"^input: expected float32, .* got"):
            ours(*args, **kwargs)


@pytest.mark.parametrize(
    "info", [p for p in infos(NORMS | DROPOUTS) if p.values[0].error_inputs_func is not None]
)
def test_error_inputs(info, device):
    ours, _ = (NORMS | DROPOUTS)[info.name]
    for error in info.error_inputs(device):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            ours(sample.input, *sample.args, **sample.kwargs)


module_infos = [
    pytest.param(info, id=info.module_cls.__name__)
    for info in common_modules.module_db
    if hasattr(fastnorm, info.module_cls.__name__)
]


def test_the_database_has_our_modules():
    names = {p.id for p in module_infos}
    dims = ("1d", "2d", "3d")
    assert names >= {"LayerNorm", "RMSNorm", "GroupNorm"}
    assert names >= {f"{norm}Norm{d}" for norm in ("Batch", "Instance") for d in dims}


def twins(cls: type, args: Any, kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and torch's with the same random parameters and statistics."""
    theirs = cls(*args, **kwargs)
    for t in theirs.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) + 0.5)
    ours = getattr(fastnorm, cls.__name__)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def module_results(
    module: torch.nn.Module, args: tuple, kwargs: dict, grad: Tensor
) -> list[Tensor | None]:
    """Output, gradients of input and parameters, buffers."""
    module.zero_grad()
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(grad.dtype), (args, kwargs))
    inputs = [t for t in args if isinstance(t, Tensor)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = module(*inputs, **kwargs)
    y.backward(grad)
    gradients = [t.grad for t in (*inputs, *module.parameters())]
    return [y.detach(), *gradients, *(b.detach() for b in module.buffers())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", module_infos)
def test_modules(info, training, kernels, device):
    for dtype in info.dtypes:
        for sample in info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=True, training=training
        ):
            make, call = sample.constructor_input, sample.forward_input
            ours, theirs = twins(info.module_cls, make.args, make.kwargs)
            assert repr(ours) == repr(theirs)
            peer = torch.float32 if dtype == torch.float64 else dtype
            shape = copy.deepcopy(theirs).to(dtype)(*call.args, **call.kwargs).shape
            grad = random_tensor(*shape, dtype=dtype)
            results = []
            for module, as_dtype in ((ours, dtype), (theirs, peer), (theirs, torch.float64)):
                module = copy.deepcopy(module).to(as_dtype).train(training)
                results.append(module_results(module, call.args, call.kwargs, grad.to(as_dtype)))
            counters = [[t for t in r if t is not None and t.dtype == torch.int64] for r in results]
            # Ours leaves num_batches_tracked alone when there was nothing to track.
            assert counters[0] == counters[1] or grad.numel() == 0
            results = [[t for t in r if t is None or t.is_floating_point()] for r in results]
            assert_within_budget(*results, what=f"{info.module_cls.__name__}{make.args} {dtype}")


@pytest.mark.parametrize(
    "info", [p for p in module_infos if p.values[0].module_error_inputs_func is not None]
)
def test_module_error_inputs(info, device):
    ours = getattr(fastnorm, info.module_cls.__name__)
    for error in info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    ):
        make, call = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type):
                ours(*make.args, **make.kwargs)
        else:
            module = ours(*make.args, **make.kwargs)
            with pytest.raises(error.error_type):
                module(*call.args, **call.kwargs)


def test_new_module_tests(kernels):
    """The older table of `torch.testing._internal.common_nn`."""
    tests = [t for t in common_nn.get_new_module_tests() if "Norm" in t.get("module_name", "")]
    assert tests
    for test in tests:
        ours, theirs = twins(getattr(torch.nn, test["module_name"]), test["constructor_args"], {})
        x = random_tensor(*test["input_size"])
        grad = random_tensor(*x.shape)
        assert_within_budget(
            module_results(ours, (x,), {}, grad),
            module_results(theirs, (x,), {}, grad),
            module_results(theirs.double(), (x.double(),), {}, grad.double()),
            what=test["module_name"],
        )
