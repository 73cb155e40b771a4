"""fastnorm.activations: outputs of layers, and penalties on them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastnorm.activations import (
    ActivityRegularization,
    activations,
    capture,
    collect_activity,
)
from fastnorm.penalties import L1, L1L2, L2, GroupLasso, MaxNorm, Regularizer

# The outputs of three layers that Flux's manual prints, and the sum of their squares.
FLUX_MANUAL = (
    [
        0.3274892431795043,
        0.5360197770386552,
        0.3447464835514667,
        0.5273025865532305,
        0.7513168089280781,
    ],
    [-0.3533774181890544, -0.010937055274926138],
    [0.4152168057978045, 0.5847831942021956],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Softmax(1)).double()


def test_B1_every_layer_in_order() -> None:
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    outputs = activations([lambda x: x + 1, lambda x: 2 * x, lambda x: x**3], one)
    assert [output.item() for output in outputs] == [2, 4, 64]
    outputs[-1].backward()
    assert one.grad.item() == 3 * 4**2 * 2
    model, x = net(), torch.randn(2, 4, dtype=torch.float64)
    outputs = activations(model, x)
    assert len(outputs) == 4 and torch.equal(outputs[-1], model(x))
    assert torch.equal(outputs[-1].sum(1), outputs[3].sum(1))


def test_B2_penalty_reaches_inputs_and_weights() -> None:
    model, x = net(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    sum(a.square().sum() for a in activations(model, x)).backward()
    hidden = [model[0](x)]
    for layer in model[1:]:
        hidden.append(layer(hidden[-1]))
    expected = torch.autograd.grad(sum(a.square().sum() for a in hidden), [x, *model.parameters()])
    for got, want in zip([x, *model.parameters()], expected, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=0, atol=1e-12)
        assert want.any()


def test_fixture_flux_manual() -> None:
    values = iter(torch.tensor(layer, dtype=torch.float64) for layer in FLUX_MANUAL)
    outputs = activations([lambda _: next(values)] * 3, torch.zeros(10))
    assert sum(a.square().sum() for a in outputs).item() == pytest.approx(
        1.9953131077618562, abs=1e-15
    )


def test_B3_reductions() -> None:
    model, x = net(), torch.randn(6, 4, dtype=torch.float64)
    with capture(model) as outputs:
        model(x)
    by_hand = activations(model, x)
    total = sum(a.square().sum() for a in by_hand)
    assert list(outputs) == ["0", "1", "2", "3"]
    torch.testing.assert_close(outputs.penalty(L2(1.0), "sum"), total)
    torch.testing.assert_close(outputs.penalty(L2(1.0)), total / 6)
    torch.testing.assert_close(
        outputs.penalty(L2(0.5), "mean"), 0.5 * sum(a.square().mean() for a in by_hand)
    )
    torch.testing.assert_close(
        outputs.penalty(L1(0.5), "sum"), 0.5 * sum(a.abs().sum() for a in by_hand)
    )


def test_fixture_keras_activity_of_a_dense_layer() -> None:
    layer = nn.Linear(5, 5, bias=False)
    nn.init.ones_(layer.weight)
    with capture(layer) as outputs:
        layer(torch.full((5, 5), 2.0))
    loss = Regularizer(layer, L1(0.01))() + outputs.penalty(L2(0.01))
    assert loss.item() == pytest.approx(5.25)
    model = nn.Sequential(layer, ActivityRegularization(l2=0.01))
    model(torch.full((5, 5), 2.0))
    loss = Regularizer(layer, L1(0.01))() + collect_activity(model)
    assert loss.item() == pytest.approx(5.25)


def test_activations_of_in_place_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    first, second, _ = activations(model, x)
    assert torch.equal(first, model[0](x)) and torch.equal(second, first.relu())
    with torch.inference_mode():
        assert len(activations(model, x)) == 3
    with pytest.raises(RuntimeError, match="layer 1 changes"):
        activations([nn.Linear(4, 5), lambda x: x.mul_(2)], x)
    with pytest.raises(TypeError, match="Bilinear"):
        activations(nn.Bilinear(2, 2, 2), x)


class Reused(nn.Module):
    def __init__(self, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4).double(), nn.Tanh()
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if self.use_checkpoint:
                x = checkpoint(lambda x: self.act(self.layer(x)), x, use_reentrant=False)
            else:
                x = self.act(self.layer(x))
        return x


def test_reused_layers_count_every_call_and_checkpoints_once() -> None:
    model, x = Reused(), torch.randn(2, 4, dtype=torch.float64)
    checkpointed = copy.deepcopy(model)
    checkpointed.use_checkpoint = True
    for each in (model, checkpointed):
        with capture(each, [nn.Tanh]) as outputs:
            loss = each(x).sum() + outputs.penalty(L1L2(0.1, 0.2), "sum")
            loss.backward()
        assert list(outputs) == ["act"] and len(outputs["act"]) == 3
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in checkpointed.parameters()]
    )
    outputs.clear()
    assert outputs["act"] == [] and outputs.penalty(L2(1.0)).item() == 0
    model(x)
    assert not model.act._forward_hooks
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with capture(normed) as outputs:
        normed(x.float())
    assert list(outputs) == ["0"]


def test_capture_chooses_layers_and_notices_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.LSTM(5, 3))
    x = torch.randn(6, 4)
    with capture(model, ["0", nn.ReLU, model[2]], copy=True) as outputs:
        model(x)
    assert list(outputs) == ["0", "1", "2"]
    assert torch.equal(outputs["0"][0], model[0](x))
    assert outputs["2"][0].shape == (6, 3)  # the LSTM's output, not its states
    with capture(model) as outputs:
        model(x)
    with pytest.raises(RuntimeError, match=r"'0'.*copy=True"):
        outputs.penalty(L2(1.0))
    with torch.inference_mode(), capture(model) as outputs:
        model(x)
    assert torch.equal(outputs["0"][0], model[0](x))


def test_capture_errors() -> None:
    model = net()
    for layers, error in (
        (["9*"], ValueError),
        ([nn.Conv2d], ValueError),
        ([nn.Tanh()], ValueError),
        ([3], TypeError),
        ("0", TypeError),
    ):
        with pytest.raises(error, match="layers"), capture(model, layers):
            pass
    compiled = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"))
    with pytest.raises(TypeError, match="0 is compiled"), capture(compiled):
        pass
    with capture(model) as outputs:
        model(torch.ones(2, 4, dtype=torch.float64))
    for rule, reduction, error in (
        (0.1, "sum", TypeError),
        (MaxNorm(1.0), "sum", ValueError),
        (L2(1.0, toward=1.0), "sum", ValueError),
        (L2(1.0), "average", ValueError),
        (GroupLasso(1.0, dim=4), "sum", ValueError),
    ):
        with pytest.raises(error):
            outputs.penalty(rule, reduction)
    with pytest.raises(ValueError, match="no dimension 2"):
        outputs.penalty(L2(1.0), batch_dim=2)
    with pytest.raises(RuntimeError, match="stop"), capture(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())


def test_activity_layer() -> None:
    model = nn.Sequential(
        nn.Linear(4, 5), ActivityRegularization(l1=0.1, l2=0.2), nn.Linear(5, 2)
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    hidden = model[0](x)
    expected = 0.1 * hidden.abs().sum() + 0.2 * hidden.square().sum()
    assert torch.equal(model(x), model[2](hidden))
    torch.testing.assert_close(collect_activity(model, "sum"), expected)
    assert collect_activity(model).item() == 0  # taken once
    model(x), model(x)
    value = collect_activity(model)
    torch.testing.assert_close(value, 2 * expected / 3)
    value.backward()
    assert model[0].weight.grad.any()
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert collect_activity(model, "mean").item() == 0
    with pytest.raises(ValueError, match="no ActivityRegularization"):
        collect_activity(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reduction"):
        collect_activity(model, "average")
    with pytest.raises(ValueError, match="l2"):
        ActivityRegularization(0.0, -1.0)
    assert "l1=0.1, l2=0.2" in repr(model)


def test_activity_layer_can_be_copied_and_saved_with_a_penalty_waiting() -> None:
    model = nn.Sequential(nn.Linear(4, 5), ActivityRegularization(l1=0.1))
    model(torch.ones(1, 4))
    twin = copy.deepcopy(model)
    assert collect_activity(twin).item() == 0 and collect_activity(model).item() > 0
    torch.save(model, io.BytesIO())
    off = ActivityRegularization()
    off(torch.ones(3))
    assert off._waiting == []


def test_activity_under_checkpoint_counts_once() -> None:
    layer, activity = nn.Linear(4, 4).double(), ActivityRegularization(l2=0.5)
    model = nn.Sequential(layer, activity)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=False)
    loss = out.sum() + collect_activity(model, "sum")
    loss.backward()
    assert activity._waiting == []
    expected = torch.autograd.grad(layer(x).sum() + 0.5 * layer(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
