import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastnorm.parametrizations import weight_standardization

LAYERS = [
    (lambda: nn.Linear(6, 4), (5, 6)),
    (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    (lambda: nn.Conv2d(3, 8, 3), (2, 3, 7, 6)),
    (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
]


def unit_rows(layer, weight):
    """One row of weights for each output unit, in the order of the output channels."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        per_group = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return per_group.flatten(0, 1).flatten(1)
    return weight.flatten(1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_each_output_unit_is_standardized(make, shape, scaled):
    torch.manual_seed(0)
    layer = make().double()
    original = layer.weight.detach().clone()
    assert weight_standardization(layer, scaled=scaled) is layer
    rows, raw = unit_rows(layer, layer.weight), unit_rows(layer, original)
    var = raw.var(1, correction=0, keepdim=True)
    expected = (raw - raw.mean(1, keepdim=True)) / (var + 1e-6).sqrt()
    if scaled:
        expected = expected / raw.shape[1] ** 0.5
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    # Rows of the layer as it is applied: the response to a unit impulse of each input.
    x = torch.randn(shape, dtype=torch.float64)
    assert layer(x).isfinite().all()
    assert torch.autograd.gradcheck(
        lambda w: layer.parametrizations.weight[0](w), original.requires_grad_()
    )


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_scaled_keeps_unit_variance(make, shape):
    torch.manual_seed(0)
    layer = weight_standardization(make(), scaled=True)
    gain = layer.parametrizations.weight[0].gain
    assert gain.requires_grad
    assert gain.numel() == unit_rows(layer, layer.weight).shape[0]
    rows = unit_rows(layer, layer.weight)
    torch.testing.assert_close(rows.square().sum(1), torch.ones(len(rows)), rtol=1e-2, atol=0)
    with torch.no_grad():
        gain.view(-1)[1] *= 3
    torch.testing.assert_close(unit_rows(layer, layer.weight)[1], 3 * rows[1])


def test_equal_weights_give_zero_and_scale_does_not_matter():
    layer = nn.Linear(4, 2)
    nn.init.constant_(layer.weight, 0.3)
    weight_standardization(layer)
    assert layer.weight.abs().max() < 1e-3 and layer.weight.isfinite().all()
    layer.weight = torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(7).add_(2)
    torch.testing.assert_close(layer.weight, before)


def test_training_saving_removing(tmp_path):
    torch.manual_seed(0)
    layer = weight_standardization(nn.Conv2d(3, 4, 3), scaled=True)
    x = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    fresh = weight_standardization(nn.Conv2d(3, 4, 3), scaled=True)
    fresh.load_state_dict(layer.state_dict())
    expected = layer(x)
    assert torch.equal(fresh(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), expected) and "weight" in dict(layer.named_parameters())


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    layer = nn.Linear(1000, 2)
    exact = F.layer_norm(layer.weight.detach().bfloat16().float(), (1000,), eps=1e-6)
    layer = weight_standardization(layer.bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.float(), exact, rtol=2**-8, atol=0)


def test_errors():
    with pytest.raises(AttributeError, match="Linear has no parameter 'kernel'"):
        weight_standardization(nn.Linear(2, 2), "kernel")
    with pytest.raises(ValueError, match=r"several weights per output unit, got shape \(4,\)"):
        weight_standardization(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="several weights"):
        weight_standardization(nn.Linear(1, 4))
    with pytest.raises(ValueError, match="parametrized already"):
        weight_standardization(weight_standardization(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="eps"):
        weight_standardization(nn.Linear(2, 2), eps=-1)


@pytest.mark.parametrize("dim", [0, None])
def test_L1_weight_norm_is_torchs(dim):
    """W = g v / |v|, per output unit or over the whole tensor; the gradient of v is normal to v."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    before = layer.weight.detach().clone()
    parametrizations.weight_norm(layer, dim=dim)
    g, v = (getattr(layer.parametrizations.weight, f"original{i}") for i in range(2))
    norm = v.norm() if dim is None else v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight, g * v / norm)
    torch.testing.assert_close(layer.weight, before)
    (layer(torch.randn(4, 5).double()) ** 3).sum().backward()
    inner = (v.grad * v).sum() if dim is None else (v.grad * v).sum(1)
    assert inner.abs().max() < 1e-12 * v.grad.abs().max()


def test_L2_weight_norm_separates_amount_from_direction():
    layer = parametrizations.weight_norm(nn.Linear(5, 3).double())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(torch.tensor([[2.0], [0.1], [30.0]]))
    torch.testing.assert_close(layer.weight, before)
