r"""Look into a model: activation statistics, a linter for regularization, advice on norms.

`check_model` turns the literature's advice into findings. Two formulas serve to compare early
stopping with an L2 penalty on a quadratic (Goodfellow et al., "Deep learning", 2016, section 7.8):
along an eigenvector of the Hessian with eigenvalue :math:`l`, a penalty
:math:`\tfrac\lambda2\|w\|^2` keeps the share :math:`l / (l + \lambda)` of the optimum, and
:math:`\tau` steps of gradient descent from 0 reach :math:`1 - (1 - \alpha l)^\tau` of it. They
agree (:math:`\lambda \approx 1/(\tau\alpha)`) for small :math:`l` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardshrink
from torch.nn.utils.parametrize import is_parametrized

from fastnorm._rewind import rewind, rewind_rng

if TYPE_CHECKING:
    from torch.fx import GraphModule
    from torch.optim import Optimizer

__all__ = [
    "ActivationStats",
    "Advice",
    "Finding",
    "LayerStats",
    "check_model",
    "early_stopping_factors",
    "gradient_norms",
    "outliers",
    "remove_redundant_bias_",
    "shrinkage_factors",
    "suggest_norm",
    "update_ratios",
]

# --- Activation statistics


@dataclass(frozen=True)
class LayerStats:
    """What `ActivationStats.summary` reports of a layer: plain numbers."""

    name: str
    mean: float
    std: float
    near_zero: float
    dead: float
    calls: int


class _Accumulator:
    """Moments of one layer's outputs, on their device."""

    def __init__(self, bins: int | None, low: float, high: float) -> None:
        self.calls = 0
        self.count = 0
        self.mean: Any = None  # tensors, from the first call on
        self.squares: Any = None
        self.small: Any = None
        self.alive: Any = None
        self.hist: Any = None
        self.bins, self.low, self.high = bins, low, high

    def add(self, x: Tensor, threshold: float) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        n = x.numel()
        mean = x.mean()
        squares = torch.linalg.vector_norm(x - mean).square()
        small = n - hardshrink(x, threshold).count_nonzero()
        units = 1 if x.dim() in (2, 4, 5) else -1
        others = [d for d in range(x.dim()) if d != units % x.dim()]
        alive = (torch.linalg.vector_norm(x, dim=others) if others else x) != 0
        hist = torch.histc(x, self.bins, self.low, self.high) if self.bins else None
        self.calls += 1
        if self.mean is None:
            self.mean, self.squares, self.small = mean, squares, small
            self.alive, self.hist = alive, hist
        else:
            share = n / (self.count + n)
            delta = mean - self.mean
            self.squares = self.squares + squares + delta.square() * (self.count * share)
            self.mean = self.mean + delta * share
            self.small = self.small + small
            # Units that change their number (a sequence's positions) have no identity.
            same = alive.shape == self.alive.shape
            self.alive = self.alive | alive if same else alive.new_ones(1)
            self.hist = None if hist is None else self.hist + hist
        self.count += n


class ActivationStats:
    """Mean, spread, share near zero and dead units of every layer's output, in a with-block.

    Nothing is copied to the host until a number is asked for, outputs are not kept, and the
    model's results do not change. A layer used several times counts every use.

    Args:
        model: the model to watch.
        layers: names of submodules, or module types. Default: every submodule without children.
        hist: bins of a histogram per layer, over `hist_range`; ``None`` for no histogram.
        hist_range: lower and upper end; values outside are not counted.
        threshold: an activation with ``|a| <= threshold`` is near zero.
        sample: look at evenly spaced rows (entries of dimension 0) of an output, of about this
            many elements together, so that watching stays cheap; ``None``: at everything.

    Attributes:
        mean, std, near_zero, dead: dict from layer name to a 0-d tensor on the layer's device.
            ``std`` is the population's; ``dead`` the share of units whose every activation was 0.
            Units are dimension 1 of 2-D, 4-D and 5-D outputs, the last one of others.
        histogram: dict from layer name to a tensor of `hist` counts.

    Raises:
        ValueError: a name in `layers` that the model does not have.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> with ActivationStats(model) as stats:
        ...     _ = model(torch.randn(16, 4))
        >>> list(stats.mean), stats.calls["1"]
        (['0', '1'], 1)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str | type[nn.Module]] | None = None,
        *,
        hist: int | None = None,
        hist_range: tuple[float, float] = (-10.0, 10.0),
        threshold: float = 0.05,
        sample: int | None = 2**16,
    ) -> None:
        modules = dict(model.named_modules())
        if layers is None:
            chosen = {name: m for name, m in modules.items() if not any(True for _ in m.children())}
        else:
            wanted = [layers] if isinstance(layers, (str, type)) else list(layers)
            names = {entry for entry in wanted if isinstance(entry, str)}
            types = tuple(entry for entry in wanted if isinstance(entry, type))
            missing = sorted(names - modules.keys())
            if missing:
                raise ValueError(f"layers must be submodules of the model, got {missing}")
            chosen = {n: m for n, m in modules.items() if n in names or isinstance(m, types)}
        if hist is not None and hist < 1:
            raise ValueError(f"hist must be at least 1, got {hist}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self._modules = chosen
        self._threshold = threshold
        self._sample = sample
        self._accumulators = {name: _Accumulator(hist, *hist_range) for name in chosen}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationStats:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str) -> Callable[..., None]:
        accumulator = self._accumulators[name]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while isinstance(output, (tuple, list)) and output:
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                with torch.no_grad():
                    accumulator.add(self._rows(output.detach()), self._threshold)

        return hook

    def _rows(self, x: Tensor) -> Tensor:
        if self._sample is None or x.numel() <= self._sample or x.dim() < 2:
            return x
        rows = max(1, self._sample * x.shape[0] // x.numel())
        return x[:: math.ceil(x.shape[0] / rows)]

    def _each(self, read: Callable[[_Accumulator], Any]) -> dict[str, Any]:
        return {name: read(a) for name, a in self._accumulators.items() if a.calls}

    @property
    def calls(self) -> dict[str, int]:
        return self._each(lambda a: a.calls)

    @property
    def mean(self) -> dict[str, Tensor]:
        return self._each(lambda a: a.mean)

    @property
    def std(self) -> dict[str, Tensor]:
        return self._each(lambda a: (a.squares / a.count).sqrt())

    @property
    def near_zero(self) -> dict[str, Tensor]:
        return self._each(lambda a: a.small / a.count)

    @property
    def dead(self) -> dict[str, Tensor]:
        return self._each(lambda a: 1 - a.alive.float().mean())

    @property
    def histogram(self) -> dict[str, Tensor]:
        return self._each(lambda a: a.hist)

    def summary(self) -> list[LayerStats]:
        """The numbers, on the host."""
        std, near_zero, dead, calls = self.std, self.near_zero, self.dead, self.calls
        return [
            LayerStats(
                name,
                mean.item(),
                std[name].item(),
                near_zero[name].item(),
                dead[name].item(),
                calls[name],
            )
            for name, mean in self.mean.items()
        ]


# --- Gradients and updates


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of each parameter's gradient, by name, on its device; those without one are left out."""
    return {
        name: torch.linalg.vector_norm(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@contextmanager
def update_ratios(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    r"""How far an optimizer step moves each parameter: :math:`\|\Delta w\| / \|w\|`, by name.

    The dictionary is filled when the block ends. About 1e-3 is usual; `outliers` finds the others.

    Example::

        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> with update_ratios(model) as ratios:
        ...     optimizer.step()
        >>> sorted(ratios)
        ['bias', 'weight']
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ratios: dict[str, Tensor] = {}
    yield ratios
    for name, p in model.named_parameters():
        if name in before:
            moved = torch.linalg.vector_norm(p.detach() - before[name])
            ratios[name] = moved / torch.linalg.vector_norm(before[name])


def outliers(values: Mapping[str, Any], factor: float = 10.0) -> dict[str, float]:
    """Entries more than `factor` times above or below the median, as name -> value / median.

    For `update_ratios`, `gradient_norms` and the like; entries that are 0 or not finite (a
    parameter that is all zero, or does not move) take no part in the median. Not finite ones are
    outliers.
    """
    if not factor > 1:
        raise ValueError(f"factor must be greater than 1, got {factor}")
    numbers = {name: float(value) for name, value in values.items()}
    ordered = sorted(v for v in numbers.values() if v > 0 and math.isfinite(v))
    if not ordered:
        return {name: v for name, v in numbers.items() if not math.isfinite(v)}
    median = ordered[len(ordered) // 2]
    found = {}
    for name, value in numbers.items():
        ratio = value / median
        if not math.isfinite(ratio) or ratio > factor or 0 < ratio < 1 / factor:
            found[name] = ratio
    return found


# --- Which module feeds which


def _is(module: nn.Module | None, *names: str) -> bool:
    """Whether a class of `module` is one of the families of layers (torch's, ours, anyone's)."""
    classes = [c.__name__ for c in type(module).__mro__]
    return any(c.startswith(names) for c in classes)


_BATCH_NORM = ("BatchNorm", "SyncBatchNorm", "LazyBatchNorm", "RunningBatchNorm")
_NORM = (*_BATCH_NORM, "InstanceNorm", "LayerNorm", "GroupNorm", "RMSNorm", "LazyInstanceNorm")
_DROPOUT = ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "GaussianDropout", "DropBlock")
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def _removes_mean_per_channel(module: nn.Module) -> bool:
    if _is(module, "GroupNorm"):
        return module.num_groups == module.num_channels
    return _is(module, *_BATCH_NORM, "InstanceNorm", "LazyInstanceNorm")


def _trace(model: nn.Module) -> GraphModule | None:
    """The model's graph, every layer a node, or ``None`` where its Python can't be traced."""
    from torch import fx

    class Layers(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            plain = type(module) is nn.Sequential
            return not plain and (
                super().is_leaf_module(module, name) or not list(module.children())
            )

    undo = rewind(model)
    try:
        return fx.GraphModule(model, Layers().trace(model))
    except Exception:  # whatever the model's own code raises when it meets a proxy
        return None
    finally:
        undo()  # forward may have kept a proxy


class _Flow:
    """Which module's output goes where: by graph, or by the order inside each ``Sequential``."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.after: dict[Any, list[Any]] = {}
        self.module_of: dict[Any, str] = {}
        traced = _trace(model)
        if traced is not None:
            for node in traced.graph.nodes:
                self.after[node] = list(node.users)
                if node.op == "call_module":
                    self.module_of[node] = node.target
            return
        for name, module in self.modules.items():
            if type(module) is nn.Sequential:
                prefix = name + "." if name else ""
                children = [prefix + child for child, _ in module.named_children()]
                self.module_of.update(zip(children, children, strict=True))
                self.after.update({first: [then] for first, then in pairwise(children)})

    def pairs(self) -> list[tuple[str, str]]:
        """(producer, consumer): the producer's only output goes into the consumer alone."""
        uses = list(self.module_of.values())
        return [
            (name, self.module_of[users[0]])
            for node, name in self.module_of.items()
            if len(users := self.after.get(node, [])) == 1
            and users[0] in self.module_of
            and uses.count(name) == uses.count(self.module_of[users[0]]) == 1
        ]

    def next_norms(self, node: Any) -> list[str]:
        """The first norm on every path that leaves `node`."""
        found, seen, waiting = [], {node}, list(self.after.get(node, []))
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self.module_of.get(node)
            if name is not None and _is(self.modules[name], *_NORM):
                found.append(name)
            else:
                waiting += self.after.get(node, [])
        return found


def _redundant_biases(flow: _Flow) -> list[tuple[str, str]]:
    """(layer, norm): the layer's bias is a constant per channel, which the norm's mean removes."""
    return [
        (layer, norm)
        for layer, norm in flow.pairs()
        if isinstance(flow.modules[layer], _WEIGHTED)
        and flow.modules[layer].bias is not None
        and not is_parametrized(flow.modules[layer], "bias")
        and _removes_mean_per_channel(flow.modules[norm])
        # A linear layer on (N, L, C) has its features last, where the norm has no channels.
        and _channels(flow.modules[norm]) == flow.modules[layer].bias.numel()
    ]


def _channels(norm: nn.Module) -> int:
    channels: Any = getattr(norm, "num_features", None) or getattr(norm, "num_channels", 0)
    return int(channels)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    if isinstance(values, (tuple, list)) or isinstance(output, dict):
        return next((t for t in map(_first_tensor, values) if t is not None), None)
    return None


@torch.no_grad()
def remove_redundant_bias_(model: nn.Module, example: Any = None) -> int:
    r"""Remove biases that a norm's mean cancels, and keep every output as it is.

    For a linear or convolution layer whose output goes into a batch or instance norm alone,
    :math:`Wa + b - \operatorname{mean}(Wa + b) = Wa - \operatorname{mean}(Wa)`. A running mean has
    learned the bias, so it is lowered by it: outputs in training and evaluation stay the same.
    Call it before the optimizer is made.

    Args:
        model: changed in place. Where it can't be traced by `torch.fx`, only neighbours inside an
            ``nn.Sequential`` are found.
        example: an input (tuple: several; dict: by name). When given, the model is run before and
            after, in training and in evaluation; should an output differ, all is put back.

    Returns:
        How many biases were removed.

    Raises:
        RuntimeError: an output changed with the biases; the model is as before.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> remove_redundant_bias_(model, torch.randn(2, 3, 8, 8)), model[0].bias
        (1, None)
    """
    found = _redundant_biases(_Flow(model))
    modules = dict(model.named_modules())
    before: list[Tensor] = []
    if example is not None:
        # On (N, L, C) a linear layer's features are not the norm's channels, even if C = L.
        flat: set[str] = set()
        before = _outputs(model, example, flat)
        found = [pair for pair in found if pair[0] in flat]
    undo = rewind(model)
    try:
        for layer, norm in found:
            bias = modules[layer].bias
            running_mean = getattr(modules[norm], "running_mean", None)
            if running_mean is not None:
                running_mean -= bias.to(running_mean)
            modules[layer].register_parameter("bias", None)
        if example is not None:
            for old, new in zip(before, _outputs(model, example, set()), strict=True):
                # Without the bias the same sums round differently, and norms enlarge that.
                scale = torch.finfo(old.dtype).eps ** 0.5 * old.abs().max().clamp(min=1)
                if not (old - new).abs().max() <= scale:
                    raise RuntimeError("removing the biases would change the model's output")
    except BaseException:
        undo()
        raise
    return len(found)


def _outputs(model: nn.Module, example: Any, flat: set[str]) -> list[Tensor]:
    """The model's output in training and in evaluation; model and generators are put back.

    Adds to `flat` the layers whose output has its features in dimension 1.
    """
    outputs = []
    for mode in (True, False):
        undo, undo_rng = rewind(model), rewind_rng()

        def note(module: nn.Module, args: Any, output: Tensor, *, name: str) -> None:
            if output.dim() == 2 or not isinstance(module, nn.Linear):
                flat.add(name)

        handles = [
            module.register_forward_hook(partial(note, name=name))
            for name, module in model.named_modules()
            if isinstance(module, _WEIGHTED)
        ]
        try:
            output = _first_tensor(_call(model.train(mode), example))
        finally:
            for handle in handles:
                handle.remove()
            undo()
            undo_rng()
        if output is not None:
            outputs.append(output)
    return outputs


# --- The linter


@dataclass(frozen=True)
class Finding:
    """One piece of advice of `check_model`.

    Attributes:
        code: what kind, for example ``"bias-before-norm"``.
        where: names of the modules or parameters.
        message: what it is and what to do.
        level: ``"warning"``, or ``"note"`` for what may well be meant.
    """

    code: str
    where: tuple[str, ...]
    message: str
    level: str = "warning"

    def __str__(self) -> str:
        return f"{self.level}: {', '.join(self.where)}: {self.message} [{self.code}]"


def check_model(
    model: nn.Module,
    example: Any = None,
    *,
    batch_size: int | None = None,
    optimizer: Optimizer | None = None,
) -> list[Finding]:
    """Check a model against the literature's advice on regularization and norms.

    ==================== ==========================================================================
    code                 finding
    ==================== ==========================================================================
    bias-before-norm     a bias that the following norm's mean cancels (`remove_redundant_bias_`)
    dropout-before-norm  dropout whose variance a later batch norm learns in training and does not
                         meet in evaluation (Li et al., "Disharmony between dropout and batch
                         normalization", 2018)
    dropout-few-units    dropout over at most two units
    dropout-rate         note: a rate outside (0, 0.5]
    few-values           a batch norm that sees few values per channel (`suggest_norm`)
    decayed-norm         weight decay on norm parameters or biases
    exploding-init       a layer that enlarges or shrinks its input more than fourfold, or a depth
                         over which activations or gradients change more than a thousandfold
    ==================== ==========================================================================

    Args:
        model: left as it is: buffers, gradients, modes and random generators too.
        example: an input (tuple: several; dict: by name). Without it, *few-values*,
            *dropout-few-units* and *exploding-init* are not looked for.
        batch_size: count values per channel as for this batch size instead of the example's.
        optimizer: needed for *decayed-norm*.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        >>> for finding in check_model(model):
        ...     print(finding)
        warning: 0, 1: the bias of 0 is cancelled by the mean of 1; pass bias=False or call \
remove_redundant_bias_ [bias-before-norm]
    """
    flow = _Flow(model)
    findings = [
        Finding(
            "bias-before-norm",
            (layer, norm),
            f"the bias of {layer} is cancelled by the mean of {norm}; pass bias=False or call "
            "remove_redundant_bias_",
        )
        for layer, norm in _redundant_biases(flow)
    ]
    for node, name in flow.module_of.items():
        module = flow.modules[name]
        if not _is(module, *_DROPOUT) or not getattr(module, "p", 0):
            continue
        for norm in flow.next_norms(node):
            if _is(flow.modules[norm], *_BATCH_NORM):
                findings.append(
                    Finding(
                        "dropout-before-norm",
                        (name, norm),
                        f"{norm} learns the variance that {name} adds in training and is off in "
                        "evaluation; put the dropout after the last batch norm",
                    )
                )
    findings += [
        Finding("dropout-rate", (name,), f"p = {module.p}; 0.2 to 0.5 is usual", "note")
        for name, module in model.named_modules()
        if _is(module, *_DROPOUT) and not 0 < getattr(module, "p", 0.5) <= 0.5
    ]
    if optimizer is not None:
        findings += _check_decay(model, optimizer)
    if example is not None:
        findings += _check_run(model, example, batch_size)
    return findings


def _check_decay(model: nn.Module, optimizer: Optimizer) -> list[Finding]:
    decayed = {
        id(p)
        for group in optimizer.param_groups
        if group.get("weight_decay", 0)
        for p in group["params"]
    }
    where = tuple(
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if id(p) in decayed and (_is(module, *_NORM) or "bias" in own)
    )
    text = "norm parameters and biases decay; use param_groups_weight_decay"
    return [Finding("decayed-norm", where, text)] if where else []


def _check_run(model: nn.Module, example: Any, batch_size: int | None) -> list[Finding]:
    """What shows only when the model runs: shapes, activations, gradients."""
    findings: list[Finding] = []
    scales: list[tuple[str, Tensor, Tensor]] = []
    gradients: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 2:
            return
        if _is(module, *_BATCH_NORM):
            n = x.numel() // x.shape[1]
            if batch_size is not None:
                n = n // x.shape[0] * batch_size
            if n < _ENOUGH_VALUES:
                error = suggest_norm(n).relative_error
                findings.append(
                    Finding(
                        "few-values",
                        (name,),
                        f"{n} values per channel, so the variance is uncertain by {error:.0%}; "
                        "use group or layer norm, or a larger batch",
                    )
                )
        elif _is(module, *_DROPOUT):
            whole_channels = _is(module, "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlpha")
            units = x.shape[1] if whole_channels else x[0].numel()
            if units <= 2:
                text = f"dropout over {units} unit{'s' * (units > 1)} removes all of them often"
                findings.append(Finding("dropout-few-units", (name,), text))

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not args or not isinstance(output, Tensor):
            return
        scales.append((name, _rms(args[0]), _rms(output)))
        if output.requires_grad:
            output.register_hook(lambda grad: gradients.update({name: _rms(grad)}))

    undo, undo_rng = rewind(model), rewind_rng()
    handles = []
    try:
        for name, module in model.named_modules():
            if _is(module, *_BATCH_NORM, *_DROPOUT):
                # A batch norm refuses a single value per channel: look before it runs.
                handles.append(module.register_forward_pre_hook(partial(before, name)))
            if isinstance(module, _WEIGHTED):
                handles.append(module.register_forward_hook(partial(after, name)))
        try:
            with torch.enable_grad():
                output = _first_tensor(_call(model.train(), example))
                if output is not None and output.requires_grad:
                    output.backward(torch.randn_like(output))
        except ValueError:
            # A norm that was reported for its single value per channel has just refused it.
            if not any(f.code == "few-values" for f in findings):
                raise
    finally:
        for handle in handles:
            handle.remove()
        undo()
        undo_rng()
    return findings + _check_scales(scales, gradients)


def _rms(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()


def _check_scales(
    scales: Sequence[tuple[str, Tensor, Tensor]], gradients: Mapping[str, Tensor]
) -> list[Finding]:
    findings = []
    for name, before, after in scales:
        gain = (after / before).item()
        # A layer that starts at zero, as the last of a residual branch may, is meant to.
        if after != 0 and before != 0 and not 0.25 <= gain <= 4:
            text = f"the output is {gain:.3g} times the input's size; see fastnorm.init"
            findings.append(Finding("exploding-init", (name,), text))
    sizes = {name: after.item() for name, _, after in scales}
    slopes = {name: value.item() for name, value in gradients.items()}
    for what, values in (("activations", sizes), ("gradients", slopes)):
        some = {name: v for name, v in values.items() if v != 0}
        if not some:
            continue
        low, high = min(some, key=some.__getitem__), max(some, key=some.__getitem__)
        if not some[high] <= 1000 * some[low]:
            text = f"{what} differ {some[high] / some[low]:.1e}-fold between layers"
            findings.append(Finding("exploding-init", (low, high), text))
    return findings


# --- Advice and closed forms

# Below this many values per channel the variance is uncertain by more than a quarter.
_ENOUGH_VALUES = 32


@dataclass(frozen=True)
class Advice:
    """What `suggest_norm` advises.

    Attributes:
        norm: ``"batch_norm"``, ``"group_norm"``, ``"layer_norm"`` or ``"instance_norm"``.
        values_per_channel: the number asked about.
        relative_error: standard error of a batch norm's variance, relative to it.
        reason: one sentence.
    """

    norm: str
    values_per_channel: int
    relative_error: float
    reason: str


def suggest_norm(values_per_channel: int, *, kind: str = "conv") -> Advice:
    r"""Advise a norm by how many values a batch norm would estimate its variance from.

    For Gaussian data the estimate from :math:`n` values has the relative standard error
    :math:`\sqrt{2/(n-1)}`. What counts is `n`, batch times positions, not the batch size; group,
    layer and instance norm do not depend on it. Neighbouring positions of an image resemble each
    other, so that the true error of a convolution's is larger.

    Args:
        values_per_channel: batch size times height times width of the norm's input, at least 1.
        kind: ``"conv"``, ``"mlp"``, ``"rnn"``, ``"transformer"`` or ``"style"`` (transfer).

    Example::

        >>> suggest_norm(5).norm, round(suggest_norm(5).relative_error, 2), suggest_norm(5000).norm
        ('group_norm', 0.71, 'batch_norm')
    """
    n = values_per_channel
    if n < 1:
        raise ValueError(f"values_per_channel must be at least 1, got {n}")
    error = math.sqrt(2 / (n - 1)) if n > 1 else math.inf
    if kind in ("rnn", "transformer"):
        reason = "sequences differ in length and time steps in statistics; normalize each position"
        return Advice("layer_norm", n, error, reason)
    if kind == "style":
        reason = "contrast belongs to the style; normalize each image and channel"
        return Advice("instance_norm", n, error, reason)
    if kind not in ("conv", "mlp"):
        raise ValueError(
            f"kind must be one of 'conv', 'mlp', 'rnn', 'transformer', 'style', got {kind!r}"
        )
    uncertain = f"{n} values leave the variance uncertain by {error:.0%}"
    if n < _ENOUGH_VALUES:
        norm = "group_norm" if kind == "conv" else "layer_norm"
        return Advice(norm, n, error, f"{uncertain}; normalize within each sample")
    return Advice("batch_norm", n, error, f"{uncertain}, which is enough")


def shrinkage_factors(eigenvalues: Tensor, lam: float) -> Tensor:
    r"""Share of the optimum kept by an L2 penalty: :math:`l_i / (l_i + \lambda)`.

    Args:
        eigenvalues: of the Hessian, none negative; any shape and floating dtype.
        lam: :math:`\lambda` of :math:`\tfrac\lambda2\|w\|^2`, at least 0. With 0 nothing shrinks.
    """
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    if lam == 0:
        return torch.ones_like(eigenvalues)
    return eigenvalues / (eigenvalues + lam)


def early_stopping_factors(eigenvalues: Tensor, lr: float, steps: int) -> Tensor:
    r"""Share of the optimum reached by gradient descent from 0: :math:`1 - (1 - \alpha l_i)^\tau`.

    Args:
        eigenvalues: of the Hessian; any shape and floating dtype.
        lr: learning rate :math:`\alpha`, positive. Above ``2 / l`` the descent diverges.
        steps: number of steps :math:`\tau`, at least 0.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    return 1 - (1 - lr * eigenvalues) ** steps
