"""Running statistics: how a forward updates them, and how modules keep, freeze and save them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from fastnorm import _build
from fastnorm._checks import check_parameter
from fastnorm._reference import accumulate_dtype

if TYPE_CHECKING:
    from typing_extensions import Self  # comes with torch; typing's from Python 3.11 on


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing's second forward.

    Its batch is in the running statistics since the first one, reentrant or not.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_running(mean: Tensor | None, var: Tensor | None, channels: int, input: Tensor) -> None:
    check_parameter("running_mean", mean, (channels,), input)
    check_parameter("running_var", var, (channels,), input)
    if (mean is None) != (var is None):
        raise RuntimeError(
            "running_mean, running_var: expected both or neither, got only "
            + ("running_var" if mean is None else "running_mean")
        )
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: expected a tensor that needs no gradient, got one that does"
            )


def check_updatable(running_mean: Tensor, input: Tensor) -> None:
    """A batched input can't enter statistics that all of its samples share."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        is_batched = torch._C._functorch.is_batchedtensor
        if is_batched(input) and not is_batched(running_mean):
            raise RuntimeError(
                "running_mean: expected no running statistics to update under torch.func.vmap, got "
                "a tensor that every sample shares; set track_running_stats=False, call freeze() "
                "or use torch.func.replace_all_batch_norm_modules_"
            )


def snapshot(buffer: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a buffer whose old value a backward needs after this forward has overwritten it."""
    buffer = buffer.to(dtype or buffer.dtype, copy=not torch.compiler.is_compiling())
    if torch.compiler.is_compiling():
        # A plain copy would be made again in the backward, of the overwritten buffer (AOTAutograd
        # of torch 2.13 at least). Cumulative sums, here of one number, are not computed twice.
        return buffer.unsqueeze(0).cumsum(0).squeeze(0)
    return buffer


def frozen_statistics(
    mean: Tensor, var: Tensor, update: bool, input: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Running statistics for the kernels: copies where they are saved for a backward.

    `update`: they will be written to in this forward. DistributedDataParallel writes to buffers
    between a forward and its backward.
    """
    dtype = accumulate_dtype(input.dtype)
    if update:
        return snapshot(mean.detach(), dtype), snapshot(var.detach(), dtype)
    # torch.jit.trace runs again without gradients, and must find the same graph.
    saved = torch.jit.is_tracing() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *others))
    )
    return (
        mean.detach().to(dtype, copy=saved).contiguous(),
        var.detach().to(dtype, copy=saved).contiguous(),
    )


@torch.no_grad()
def update(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    mean: Tensor,
    var: Tensor,
    counts: tuple[int, int] | Tensor,
    momentum: float | None,
    average: bool = False,
) -> None:
    """``running = (1 - momentum) * running + momentum * new``, with the unbiased variance.

    One step for each block of `mean` and `var`, [outer][kept], each over `counts` values; with
    `average` one step with their mean. `momentum` None weighs all batches alike by their number
    `tracked`. With `skipped`, a block that is not finite is counted there and left out. A block
    of fewer than two values is left out.
    """
    if recomputing():
        return
    module = _build.module
    if (
        module is not None
        and not torch.compiler.is_compiling()
        and isinstance(counts, tuple)
        and module.update_running(
            running_mean, running_var, tracked, skipped, mean, var, momentum, *counts, average
        )
    ):
        return
    if momentum is None and tracked is None:
        momentum = 0.0
    # In double where there is one: the result then does not depend on how products and sums
    # are contracted (csrc/eager_channels.cpp has the same).
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    mean, var = mean.to(wide), var.to(wide)
    if average:
        if isinstance(counts, Tensor):
            some = counts > 0
            share = (some / some.sum().clamp(min=1)).to(wide).unsqueeze(1)
            n = counts.clamp(min=2).to(wide).unsqueeze(1)
            mean, var = (mean * share).sum(0, True), (var * (n / (n - 1)) * share).sum(0, True)
            counts = some.any().reshape(1) * 2
            bessel: list[float | Tensor] = [1.0]
        else:
            mean, var = mean.mean(0, True), var.mean(0, True)
            bessel = [counts[0] / max(counts[0] - 1, 1)]
    else:
        sizes = (
            list(counts.to(wide))
            if isinstance(counts, Tensor)
            else [counts[0]] * (len(mean) - 1) + [counts[1]]
        )
        bessel = [
            n / (n - 1).clamp(min=1) if isinstance(n, Tensor) else n / max(n - 1, 1) for n in sizes
        ]
    for i, correction in enumerate(bessel):
        new_mean, new_var = mean[i], var[i] * correction
        enters: bool | Tensor
        if isinstance(counts, Tensor):
            enters = counts[i] > 1
        else:
            enters = (counts[1] if i + 1 == len(bessel) else counts[0]) > 1
            if not enters:
                continue
        if skipped is not None:
            finite = new_mean.isfinite().all() & new_var.isfinite().all()
            skipped.add_(~finite & enters)
            enters = finite & enters
        factor: float | Tensor
        if momentum is None:
            assert tracked is not None
            factor = 1.0 / (tracked.to(wide) + 1.0)
        else:
            factor = momentum
        for running, new in ((running_mean, new_mean), (running_var, new_var)):
            value = running.to(wide) * (1 - factor) + new * factor
            if isinstance(enters, Tensor):
                value = torch.where(enters, value, running.to(wide))
            running.copy_(value)
        if tracked is not None and not average:
            tracked.add_(enters if isinstance(enters, Tensor) else 1)


class RunningStatistics(_NormBase):
    """What the modules with running statistics add to torch's.

    Attributes:
        use_running_stats: None normalizes as torch does, with the batch's statistics in training
            mode and with the running ones in evaluation mode. True takes the running ones in both,
            False the batch's.
        update_running_stats: whether training mode updates the running statistics.
    """

    _FLAGS = "running_stats_flags"
    use_running_stats: bool | None
    update_running_stats: bool

    def _init_running(self) -> None:
        self.use_running_stats = None
        self.update_running_stats = True
        for name in ("running_mean", "running_var"):
            buffer = self._buffers[name]
            if buffer is not None and is_short(buffer):
                self._buffers[name] = buffer.float()

    @property
    def frozen(self) -> bool:
        """Normalizes with the running statistics and leaves them alone, in training mode too."""
        return self.use_running_stats is True and not self.update_running_stats

    def freeze(self) -> Self:
        """Keep the running statistics and use them, whatever `train` and `eval` say.

        Weight and bias keep training; set ``requires_grad_(False)`` to stop them too. Saved in the
        state_dict (under the additional key ``running_stats_flags``, while frozen) and in pickles.

        Raises:
            RuntimeError: the module has no running statistics.
        """
        if self.running_mean is None:
            raise RuntimeError(
                "freeze: expected a module with running statistics, got track_running_stats=False"
            )
        self.use_running_stats = True
        self.update_running_stats = False
        return self

    def unfreeze(self) -> Self:
        """Back to torch's behaviour: the batch's statistics in training mode."""
        self.use_running_stats = None
        self.update_running_stats = True
        return self

    def _mode(self, running_mean: Tensor | None) -> tuple[bool, bool]:
        """Whether a forward now normalizes with its input's statistics, and keeps them."""
        if running_mean is None:
            return True, False
        training, use = self.training, self.use_running_stats
        return (
            training if use is None else not use,
            training and self.track_running_stats and self.update_running_stats,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Running statistics stay float32 in a 16-bit module: a mean over many batches can't be
        # kept in 8 bits, and a variance above 65504 not in float16.
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and is_short(new) and not is_short(old):
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.use_running_stats is not None or not self.update_running_stats:
            use = {None: 2, True: 1, False: 0}[self.use_running_stats]
            # Whatever the default device, which may be one that keeps no values.
            destination[prefix + self._FLAGS] = torch.tensor(
                [use, self.update_running_stats], dtype=torch.uint8, device="cpu"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        flags = state_dict.pop(prefix + self._FLAGS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if flags is not None:
            use, updates = flags.tolist()
            self.use_running_stats = {2: None, 1: True, 0: False}[use]
            self.update_running_stats = bool(updates)


def is_short(t: Tensor) -> bool:
    return t.dtype in (torch.float16, torch.bfloat16)


def extra_repr(module: RunningStatistics) -> str:
    text = ""
    for name, default in (
        ("activation", None),
        ("dropout_p", 0.0),
        ("channel_dim", 1),
        ("virtual_batch_size", None),
        ("nonfinite_stats", "propagate"),
        ("use_running_stats", None),
        ("update_running_stats", True),
    ):
        value = getattr(module, name, default)
        if value != default:
            text += f", {name}={value!r}"
    return text
