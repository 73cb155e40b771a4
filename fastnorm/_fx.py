"""`torch.fx` traces our modules as one node each, as it does torch's own: so that `train()` and
`eval()` of the traced model reach dropout and running statistics, and no check meets a proxy."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy as Proxy


def leaf(module: nn.Module, input: Proxy, *args: Any, **kwargs: Any) -> Any:
    """The `call_module` node of a call under `torch.fx.Tracer`; arguments that are None are left
    out."""
    while args and args[-1] is None:
        args = args[:-1]
    given = {name: value for name, value in kwargs.items() if value is not None}
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), given)
