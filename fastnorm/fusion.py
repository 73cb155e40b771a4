"""Whole models: the activation, dropout and residual add around a norm become part of its call.

`fuse` traces the forward of every module with its children as opaque calls (`torch.fx`), rewrites
the chains it finds there, and gives the module a subclass of its class with that forward, in place.
Nothing is traced through: hooks, names and structure of the model stay, and a module whose forward
can't be traced only keeps its own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from fastnorm import convert
from fastnorm._rewind import rewind_rng, rng_states
from fastnorm.convert import FOLDED, Change, Fold, Report, class_name, places, table, unfold
from fastnorm.dropout import Dropout, dropout
from fastnorm.epilogue import ACTIVATIONS
from fastnorm.layer_norm import AddLayerNorm, LayerNorm
from fastnorm.rms_norm import AddRMSNorm, RMSNorm
from fastnorm.testing import assert_within_budget

__all__ = ["FuseReport", "fuse"]

_ADDING: dict[type[nn.Module], type[nn.Module]] = {LayerNorm: AddLayerNorm, RMSNorm: AddRMSNorm}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", F.relu_: "relu", torch.relu_: "relu",
    F.leaky_relu: "leaky_relu", F.gelu: "gelu", F.silu: "silu",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh",
}  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.GELU: "gelu", nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}


@dataclass
class FuseReport:
    """What `fuse` did; `print` shows it as a table.

    Attributes:
        fused: the norms that do more now; `after` says what.
        skipped: the norms that nothing was folded into, and why.
        replaced: the report of the `replace` that came first.
        failure: why the model was put back as it was; None where the results agreed.
    """

    fused: list[Change] = field(default_factory=list)
    skipped: list[Change] = field(default_factory=list)
    replaced: Report = field(default_factory=Report)
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure:
            return f"nothing changed: {self.failure}"
        head = f"{len(self.fused)} fused, {len(self.skipped)} not; replaced: "
        return table(head + str(self.replaced).splitlines()[0], self.fused + self.skipped)


class _Call(NamedTuple):
    """How the example called a module, and the structure of what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    times: int = 0
    returned: Any = None


class _Recipe(NamedTuple):
    """What makes the fused forward of a module again, in another process too."""

    base: type[nn.Module]
    source: str
    objects: dict[str, Any]
    modules: dict[str, str]
    form: tuple[tuple[Any, ...], ...]
    keywords: tuple[str, ...]
    norms: tuple[str, ...]


class _NotFusable(Exception):
    pass


# What fused forwards call: the norm's own call, and the separate operations for operands that only
# broadcasting or type promotion brings together.


@contextlib.contextmanager
def _plain(norms: Sequence[nn.Module]) -> Iterator[None]:
    """The norms as they were before anything was folded into them."""
    folds: list[Fold] = [vars(norm)[FOLDED] for norm in norms]
    for norm in norms:
        unfold(norm)
    try:
        yield
    finally:
        for norm, fold in zip(norms, folds, strict=True):
            fold.apply(norm)


def norm_add(norm: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
    """``dropout(activation(norm(input) + residual))``."""
    if input.shape == residual.shape and input.dtype == residual.dtype:
        return norm(input, residual)
    fold: Fold = vars(norm)[FOLDED]
    with _plain([norm]):
        y = ACTIVATIONS[fold.activation].function(norm(input) + residual)
    return dropout(y, fold.dropout_p, norm.training)


def add_norm(norm: nn.Module, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(s)`` and ``s = residual + dropout(input)``."""
    if input.shape == residual.shape and input.dtype == residual.dtype:
        return norm(input, residual)
    fold: Fold = vars(norm)[FOLDED]
    total = residual + dropout(input, fold.dropout_p, norm.training)
    with _plain([norm]):
        return norm(total), total


# The forward of one module.


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is: torch.fx's own makes a new tensor of it."""


def _recorded(function: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is written to a buffer is recorded, not done

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _kind(value: object) -> object:
    """What a traced forward may depend on: a constant's value, anything else's type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    return Tensor if isinstance(value, Tensor) else type(value)


def _traced(owner: nn.Module, call: _Call, training: bool | None) -> fx.Graph:
    """The owner's forward, called as in the example, with one placeholder for each non-constant.

    With `training` None the flag is read where the forward reads it, as by F.dropout's argument.
    """
    names, passed = [], []
    values = [(None, a) for a in call.args] + list(call.kwargs.items())
    for i, (keyword, value) in enumerate(values):
        name = f"arg{i}"
        if isinstance(_kind(value), tuple):
            name = f"constants[{i}]"
        else:
            names.append(name)
        passed.append(name if keyword is None else f"{keyword}={name}")
    known: dict[str, Any] = {"base": type(owner), "constants": [v for _, v in values]}
    source = f"def forward({', '.join(['self', *names])}):\n"
    exec(f"{source}    return base.forward({', '.join(['self', *passed])})\n", known)
    cls = type(owner)
    tracer = _Tracer()
    members = {"forward": known["forward"]}
    if training is None:
        members["training"] = property(
            lambda _: tracer.create_proxy("get_attr", "training", (), {})
        )
    shadow_class: Any = type(cls.__name__, (cls,), members)
    shadow = shadow_class.__new__(shadow_class)
    held = {**vars(owner), "training": training}
    vars(shadow).update(held)
    before, undo = rng_states(), rewind_rng()
    try:
        graph = tracer.trace(shadow)
    finally:
        after = rng_states()
        undo()
    if after != before:
        raise _NotFusable("the forward that calls it draws random numbers of its own")
    if vars(shadow).keys() != held.keys() or any(vars(shadow)[k] is not held[k] for k in held):
        raise _NotFusable("the forward that calls it writes to its module")
    return graph


def _trace(owner: nn.Module, call: _Call) -> fx.Graph:
    with contextlib.suppress(Exception):  # it decides by the flag
        return _traced(owner, call, None)
    try:
        graphs = [_traced(owner, call, training) for training in (False, True)]
    except _NotFusable:
        raise
    except Exception as error:  # whatever a forward does with what is no tensor
        text = f"torch.fx can't trace the forward that calls it: {_first_line(error)}"
        raise _NotFusable(text) from None
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        raise _NotFusable("the forward that calls it does something else in training mode")
    return graphs[0]


def _activation(owner: nn.Module, node: fx.Node) -> str | None:
    """The name of the activation that a node is, if it is one of the fused ones."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        name = _MODULES.get(type(module))
        if name is None or _has_hooks(module) or len(node.args) != 1 or node.kwargs:
            return None
        slope = getattr(module, "negative_slope", 0.01)
        approximate = getattr(module, "approximate", "none")
    else:
        options = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        slope = options.pop("negative_slope", 0.01)
        approximate = options.pop("approximate", "none")
        if node.op == "call_function":
            name = _FUNCTIONS.get(node.target)
        else:
            name = str(node.target).rstrip("_") if node.target in _METHODS else None
        # A second positional argument is a slope, or whether to work in place.
        if name is None or options or any(not isinstance(a, bool) for a in node.args[1:]):
            return None
    if slope != 0.01 or approximate not in ("none", "tanh"):
        return None
    return "gelu_tanh" if approximate == "tanh" else name


def _dropout(owner: nn.Module, node: object) -> float:
    """The probability of a node that is a plain dropout layer; 0 for any other."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return 0.0
    m: Any = owner.get_submodule(str(node.target))
    plain = (
        type(m) is Dropout and m.mode == "inverted" and not m.shared_dims
        and m.activation is None and m.generator is None and not _has_hooks(m)
    )  # fmt: skip
    return float(m.p) if plain else 0.0


def _is_add(node: fx.Node) -> bool:
    functions = (operator.add, operator.iadd, torch.add)
    if node.op == "call_function":
        adds = node.target in functions
    else:
        adds = node.op == "call_method" and node.target in ("add", "add_")
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return adds and two and not node.kwargs


def _in_place(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write to a tensor that others hold."""
    if node.op == "call_module":
        parts = owner.get_submodule(str(node.target)).modules()
        return any(getattr(part, "inplace", False) for part in parts)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        (name.endswith("_") and not name.endswith("__"))
        or (getattr(node.target, "__module__", "") == "_operator" and name.startswith("i"))
        or name in ("setitem", "__setitem__")
        or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
        or True in node.args[1:]
    )  # fmt: skip


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module)[kind] for kind in kinds)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _same(a: object, b: object) -> bool:
    """Whether two nodes held tensors of one shape and dtype in the example."""
    kinds = [n.meta.get("tensor") if isinstance(n, fx.Node) else None for n in (a, b)]
    return kinds[0] is not None and kinds[0] == kinds[1]


def _fold_before(owner: nn.Module, graph: fx.Graph, node: fx.Node, norm: nn.Module) -> str | None:
    """``norm(residual + dropout(x))``, where the sum may be used elsewhere too."""
    total = node.args[0]
    adding = _ADDING.get(type(norm))
    if adding is None or getattr(norm, "dim", None) is not None:
        return None
    if not isinstance(total, fx.Node) or not _is_add(total) or not _same(*total.args):
        return None
    if total.target in (operator.iadd, "add_") and (
        len(total.args[0].users) > 1 or total.args[0].op == "placeholder"  # type: ignore[union-attr]
    ):
        return None
    residual, x = total.args
    p = 0.0
    for a, b in ((residual, x), (x, residual)):
        assert isinstance(b, fx.Node)
        # Only the operation right before the sum: the order of the draws stays.
        if b is total.prev and len(b.users) == 1 and _dropout(owner, b):
            residual, x, p = a, b, _dropout(owner, b)
            break
    if any(_in_place(owner, n) for n in _between(total, node)):
        return None
    with graph.inserting_before(total):
        layer = graph.create_node("get_attr", str(node.target))
        source = x.args[0] if p else x  # type: ignore[union-attr]
        both = graph.call_function(add_norm, (layer, source, residual))
        y = graph.call_function(operator.getitem, (both, 0))
        s = graph.call_function(operator.getitem, (both, 1))
    y.meta, s.meta = node.meta, total.meta
    node.replace_all_uses_with(y)
    total.replace_all_uses_with(s)
    for old in (node, total, x) if p else (node, total):
        graph.erase_node(old)  # type: ignore[arg-type]
    name = class_name(type(norm))
    Fold(type(norm), adding, None, p).apply(norm)
    return f"{'dropout + ' if p else ''}add + {name}"


def _fold_after(owner: nn.Module, graph: fx.Graph, node: fx.Node, norm: nn.Module) -> str | None:
    """``dropout(activation(norm(x) + residual))``, each part optional."""
    last, chain = node, [node]
    parts: list[str] = []
    residual: Any = None
    activation, p = None, 0.0
    while len(last.users) == 1:
        (user,) = last.users
        if not parts and _is_add(user) and user.args[0] is not user.args[1]:
            other = user.args[1] if user.args[0] is last else user.args[0]
            if not _same(last, other) or (
                user.target in (operator.iadd, "add_") and user.args[0] is not last
            ):
                break
            residual = other
            parts.append("add")
        elif activation is None and not p and _activation(owner, user):
            activation = _activation(owner, user)
            parts.append(str(activation))
        elif not p and _dropout(owner, user):
            p = _dropout(owner, user)
            parts.append("dropout")
        else:
            break
        last = user
        chain.append(user)
    if not parts:
        return None
    if any(_in_place(owner, n) for n in _between(node, last) if n not in chain):
        return None
    with graph.inserting_before(last):
        if residual is None:
            y = graph.call_module(str(node.target), node.args)
        else:
            layer = graph.create_node("get_attr", str(node.target))
            y = graph.call_function(norm_add, (layer, node.args[0], residual))
    y.meta = last.meta
    last.replace_all_uses_with(y)
    for old in reversed(chain):
        graph.erase_node(old)
    Fold(type(norm), type(norm), activation, p).apply(norm)
    return f"{class_name(type(norm))} + {' + '.join(parts)}"


class _Measuring(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["tensor"] = result.shape, result.dtype
        return result


def _measure(owner: nn.Module, graph: fx.Graph, call: _Call, values: list[Any]) -> None:
    """Shapes and dtypes of the graph's tensors, from a run of it on what the example gave."""
    try:
        with _untouched(owner):
            owner.eval()
            result = _Measuring(owner, graph=graph).run(*values)
    except Exception as error:  # what a trace can't hold shows when it runs
        raise _NotFusable(f"its traced forward fails: {_first_line(error)}") from None
    if tree_structure(result) != call.returned:
        raise _NotFusable("the forward that calls it returns what torch.fx can't build")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_norm(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("fastnorm.")
    kinds = (LayerNorm, RMSNorm, nn.GroupNorm, _NormBase)
    return ours and isinstance(module, kinds) and hasattr(module, "activation")


def _fuse_owner(
    owner: nn.Module, calls: dict[nn.Module, _Call], names: dict[nn.Module, str], report: FuseReport
) -> None:
    """Rewrites the forward of one module, if there is anything to fold in it."""
    call = calls[owner]
    values = [*call.args, *call.kwargs.values()]
    try:
        graph = _trace(owner, call)
        sites: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module" and is_norm(owner.get_submodule(node.target)):
                sites.setdefault(node.target, []).append(node)
        if not sites:
            return
        _measure(owner, graph, call, [v for v in values if not isinstance(_kind(v), tuple)])
    except _NotFusable as error:
        report.skipped += [
            Change(names[m], class_name(type(m)), reason=str(error))
            for m in owner.children()
            if is_norm(m)
        ]
        return
    folded = []
    for target, nodes in sites.items():
        norm: Any = owner.get_submodule(target)
        name = names[norm]
        if norm.activation is not None or norm.dropout_p:
            reason = "it has an activation or dropout of its own"
        elif len(nodes) > 1 or calls[norm].times != call.times or " = " in name:
            reason = "it is called in several places"
        elif _has_hooks(norm):
            reason = "it has hooks, which would see another result"
        elif len(nodes[0].args) != 1 or nodes[0].kwargs:
            reason = "it is called with more than the input"
        else:
            before = class_name(type(norm))
            done = _fold_before(owner, graph, nodes[0], norm) or _fold_after(
                owner, graph, nodes[0], norm
            )
            if done:
                folded.append(target)
                report.fused.append(Change(name, before, done))
                continue
            reason = "no activation, dropout or residual add of its kind and shape around it"
        report.skipped.append(Change(name, class_name(type(norm)), reason=reason))
    if not folded:
        return
    code = graph.python_code("self")
    modules = {k: v.__name__ for k, v in code.globals.items() if isinstance(v, types.ModuleType)}
    owner.__class__ = _fused_class(
        _Recipe(
            type(owner),
            code.src,
            {k: v for k, v in code.globals.items() if k not in modules},
            modules,
            tuple(map(_kind, values)),  # type: ignore[arg-type]
            tuple(call.kwargs),
            tuple(folded),
        )
    )


def _fused_class(recipe: _Recipe) -> type[nn.Module]:
    """A subclass of the module's class whose forward is the rewritten one."""
    base, form, keywords = recipe.base, recipe.form, recipe.keywords
    known = {**recipe.objects}
    known.update({k: importlib.import_module(name) for k, name in recipe.modules.items()})
    exec(compile(recipe.source, f"<fastnorm.fuse {base.__qualname__}>", "exec"), known)
    code = known["forward"]
    dynamic = [i for i, kind in enumerate(form) if not isinstance(kind, tuple)]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if tuple(kwargs) == keywords and tuple(map(_kind, values)) == form:
            return code(self, *[values[i] for i in dynamic])
        # Called in another way than in the example, whose trace may not hold.
        with _plain([self.get_submodule(name) for name in recipe.norms]):
            return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced = super(cls, self).__reduce_ex__(protocol)
        return (_rebuild, (recipe,), *reduced[2:])

    cls: Any = type(
        f"Fused{base.__name__}",
        (base,),
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "forward": forward,
            convert.BASE: base,
            convert.NORMS: recipe.norms,
        },
    )
    return cls


def _rebuild(recipe: _Recipe) -> nn.Module:
    cls = _fused_class(recipe)
    return cls.__new__(cls)


# The proof.


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    """The example again: forwards may write to it."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf

    return tree_map(one, value)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Buffers, modes and random numbers as they were, whatever happens inside."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    saved = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
        for module, held in buffers:
            module._buffers.update(held)
        for module, mode in modes:
            module.training = mode


def _results(model: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs in evaluation and in training mode, and the buffers after it."""
    found: list[Any] = []
    for training in (False, True):
        with _untouched(model):
            model.train(training)
            found += tree_leaves(model(*_copied(args, dtype), **_copied(kwargs, dtype)))
            found += [b.clone() for b in model.buffers()]
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]


def _prove(model: nn.Module, unfused: nn.Module, args: Any, kwargs: Any) -> None:
    """The model is as near to a float64 run as it was before.

    Raises:
        AssertionError: it is not.
    """
    ours = _results(model, args, kwargs, None)
    if not ours:
        raise AssertionError("the model returns no tensor to compare")
    wide = any(t.dtype == torch.float64 for t in ours)
    peer = torch.float32 if wide else None
    theirs = _results(unfused.float() if wide else unfused, args, kwargs, peer)
    # A model may cast to float32 somewhere, whatever its parameters are.
    exact = [t.double() for t in _results(unfused.double(), args, kwargs, torch.float64)]
    assert_within_budget(ours, theirs, exact, what="result ")


def _record(model: nn.Module, args: Any, kwargs: Any) -> dict[nn.Module, _Call]:
    calls: dict[nn.Module, _Call] = {}

    def hook(module: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
        first = calls.get(module, _Call(a, k))
        calls[module] = first._replace(times=first.times + 1)

    def returned(module: nn.Module, _: Any, result: Any) -> None:
        calls[module] = calls[module]._replace(returned=tree_structure(result))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(returned) for m in model.modules()]
    try:
        with _untouched(model):
            model.eval()(*_copied(args, None), **_copied(kwargs, None))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def fuse(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> FuseReport:
    """Fold what surrounds the norms of a model into them, in place.

    After `replace`, the forward of every module is searched (with `torch.fx`, its children opaque)
    for ::

        dropout(activation(norm(x) + residual))           # each part optional
        s = residual + dropout(x); norm(s)                # layer and RMS norm; dropout optional

    with ReLU, LeakyReLU(0.01), GELU, SiLU, Sigmoid or Tanh as module, function or method (one
    module may serve many places), and becomes the norm's one call. State_dict, hooks, names and the
    model's class stay; a module that was rewritten has a subclass of its class
    (``FusedBasicBlock``), can be copied, pickled and compiled, and `restore` undoes it.

    Then the results on the example, in evaluation and in training mode with the same dropout, must
    be as near to a float64 run as before; running statistics included. If not, all is undone and
    the report says why. Running statistics and random numbers are as before.

    A fused forward holds for calls of the example's form: the same arguments, tensors where tensors
    were, equal constants. Another call runs the module's own forward. What that forward reads from
    the module's attributes, and dropout's probabilities, are those of the moment of `fuse`; dropout
    in a norm follows the norm's training flag.

    Args:
        model: any module, on any device with memory for a copy in float64.
        example_inputs, example_kwargs: what to call it with; they are not modified.

    Returns:
        A `FuseReport`.

    Raises:
        TypeError: `model` is no module, or there is no example.
        Whatever the model raises on the example.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(fastnorm.fuse(model, torch.randn(2, 3, 8, 8)))
        1 fused, 0 not; replaced: 1 swapped, 0 skipped
            1  fastnorm.BatchNorm2d -> fastnorm.BatchNorm2d + relu  [1]
    """
    convert.check_model(model)
    if not example_inputs and not example_kwargs:
        raise TypeError("example_inputs: expected what to call the model with, got nothing")
    example = example_inputs, example_kwargs
    calls = _record(model, *example)  # raises what the model raises, before anything changes
    report = FuseReport(replaced=convert.replace(model))
    swapped = {change.name for change in report.replaced.swapped}
    names = {module: name for name, module in places(model)}
    try:
        unfused = copy.deepcopy(model)
        for owner in calls:
            if not is_norm(owner) and owner._modules and not hasattr(owner, convert.BASE):
                _fuse_owner(owner, calls, names, report)
        if report.fused:
            _prove(model, unfused, *example)
    except Exception as error:  # the proof may raise what any model raises
        for module, name in names.items():
            unfold(module)
            if name in swapped:
                convert.unswap(module)
        return FuseReport(failure=f"the fused model could not be proven: {_first_line(error)}")
    return report
