"""What a call does: the implementation, the kernel's form, the copies, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastnorm import _build, _ops

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The steps that a call took, as `explain` found them; `str` gives one line for each.

    Attributes:
        implementation: "kernel", "reference", or "none" where nothing was to be computed.
        reason: why the reference ran; None where it did not.
        steps: copies made and kernels run, in order.
    """

    implementation: str
    reason: str | None = None
    steps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = self.implementation if self.reason is None else f"reference: {self.reason}"
        return "\n  ".join([head, *self.steps])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` and say which of fastnorm's implementations computed it.

    The call really happens, with its side effects (running statistics, random numbers). A function
    that makes several fastnorm calls gives the steps of them all; the implementation is
    "reference" if any of them ran on it.

    Args:
        function: a fastnorm function or module, or anything that calls one.

    Raises:
        Whatever `function` raises.

    Example:
        >>> x = torch.randn(4, 6).t()
        >>> print(fastnorm.explain(fastnorm.layer_norm, x, (4,)))
        kernel
          input: copied, its strides (1, 6) are not a layout we read
          norm on cpu: row, resident in cache, float32 [6, 4]
    """
    steps = _ops.start_notes()
    module = _build.load() if _build.backend() != "reference" else None
    if module is not None:
        module.set_explaining(True)
    try:
        function(*args, **kwargs)
    finally:
        if module is not None:
            module.set_explaining(False)
        _ops.stop_notes()
    reasons = [step.removeprefix("reference: ") for step in steps if step.startswith("reference: ")]
    rest = [step for step in steps if not step.startswith("reference: ")]
    if reasons:
        return Explanation("reference", "; ".join(dict.fromkeys(reasons)), rest)
    return Explanation("kernel" if rest else "none", None, rest)
