"""torch.fx.symbolic_trace of models that have our modules: a node each, like torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fastnorm


class Model(nn.Module):
    """Calls `layer` with one or two tensors, and adds up what it returns."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.inputs == 1:
            return self.layer(x)
        if isinstance(self.layer, (fastnorm.AddLayerNorm, fastnorm.AddRMSNorm)):
            y, total = self.layer(x, residual)
            return y + total
        return self.layer(x, residual)


IMAGES = (4, 6, 5, 5)
LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...], int]] = [
    ("LayerNorm", (8,), {"dropout_p": 0.5, "activation": "gelu"}, (64, 8), 2),
    ("RMSNorm", (8,), {"dropout_p": 0.5}, (64, 8), 1),
    ("AddLayerNorm", (8,), {"dropout_p": 0.5}, (64, 8), 2),
    ("AddRMSNorm", (8,), {"dropout_p": 0.5}, (64, 8), 2),
    ("GroupNorm", (2, 6), {"dropout_p": 0.5}, IMAGES, 2),
    ("BatchNorm2d", (6,), {"activation": "relu"}, IMAGES, 2),
    ("RunningBatchNorm2d", (6,), {}, IMAGES, 1),
    ("SyncBatchNorm", (6,), {}, IMAGES, 1),
    ("InstanceNorm2d", (6,), {"track_running_stats": True}, IMAGES, 1),
    ("Dropout", (0.5,), {}, (64, 8), 1),
    ("Dropout2d", (0.5,), {}, IMAGES, 1),
    ("StochasticDepth", (0.5,), {}, (64, 8), 2),
    ("GaussianDropout", (0.5,), {}, (64, 8), 1),
    ("GaussianNoise", (0.5,), {}, (64, 8), 1),
    ("DropBlock2d", (0.5, 3), {}, IMAGES, 1),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "shape", "inputs"), LAYERS)
def test_a_module_is_a_node_that_follows_train_and_eval(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...], inputs: int
) -> None:
    model = Model(getattr(fastnorm, name)(*args, **kwargs), inputs)
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    x, residual = torch.randn(shape), torch.randn(shape)
    outputs = []
    for training in (True, False):
        for m in (model, traced):
            torch.manual_seed(0)
            outputs.append(m.train(training)(x, residual))
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[1], outputs[3])  # traced while training, it still follows eval()
    if not name.startswith(("BatchNorm", "RunningBatchNorm", "SyncBatchNorm", "InstanceNorm")):
        assert torch.equal(outputs[0], outputs[1])  # the others' statistics have moved on
