"""What the textbooks say about the norms, checked; tests named after the acceptance list.

H batch norm, I layer norm, J instance norm, K group norm. "Equal" is a largest difference below
1e-12 in float64. The other letters are in the files of what they are about.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

import fastnorm

pytestmark = pytest.mark.usefixtures("kernels")

BATCH_NORMS = [
    (nn.BatchNorm1d, fastnorm.BatchNorm1d, (7, 4)),
    (nn.BatchNorm2d, fastnorm.BatchNorm2d, (3, 4, 5, 2)),
    (nn.BatchNorm3d, fastnorm.BatchNorm3d, (2, 4, 3, 2, 3)),
]


def equal(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def shaken(norm: nn.Module) -> nn.Module:
    """In float64, with weights and running statistics that are neither 0 nor 1."""
    norm = norm.double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return norm


def twin(ours: type[nn.Module], theirs: nn.Module, *args: object, **options: object) -> nn.Module:
    norm = ours(*args, **options).double()
    norm.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return norm


def normalized(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return fastnorm.batch_norm(x, None, None, weight, bias, training=True)


def gradients(model: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], upstream)]


# ---- Batch norm


@pytest.mark.parametrize(("theirs", "ours", "shape"), BATCH_NORMS)
def test_H1_H2_equals_torch_with_its_gradients(theirs, ours, shape):
    peer = shaken(theirs(4))
    norm = twin(ours, peer, 4)
    x, upstream = randn(*shape), randn(*shape)
    for got, expected in zip(
        gradients(norm, x, upstream), gradients(peer, x, upstream), strict=True
    ):
        equal(got, expected)
    w, b = norm.weight.detach(), norm.bias.detach()
    across = [d for d in range(x.dim()) if d != 1]
    spread = (-1, *(1,) * (x.dim() - 2))
    mean, var = x.mean(across, keepdim=True), x.var(across, correction=0, keepdim=True)
    equal(norm(x), w.view(spread) * (x - mean) / (var + 1e-5).sqrt() + b.view(spread))
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    assert gradcheck(normalized, inputs, fast_mode=True)


@pytest.mark.parametrize(("theirs", "ours", "shape"), BATCH_NORMS)
def test_H2_H17_starts_as_the_identity_scale_and_learns(theirs, ours, shape):
    norm = ours(4)
    assert norm.weight.tolist() == [1] * 4 and norm.bias.tolist() == [0] * 4
    assert norm.running_mean.tolist() == [0] * 4 and norm.running_var.tolist() == [1] * 4
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.1)
    norm(torch.randn(shape)).exp().sum().backward()
    optimizer.step()
    assert (norm.weight != 1).all() and (norm.bias != 0).all()


def test_H3_running_averages_are_torchs():
    norm, peer = fastnorm.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    for n in (2, 5, 9):
        x = 3 + 2 * randn(n, 3)
        norm(x), peer(x)
    equal(norm.state_dict(), peer.state_dict())
    # Of two values 0 and 2 the buffer takes the unbiased variance 2; 1 is what normalizes.
    last = fastnorm.BatchNorm1d(1, momentum=1.0, eps=1e-12)
    assert last(torch.tensor([[0.0], [2.0]])).tolist() == [[-1], [1]]
    assert last.running_var.item() == 2.0 and last.running_mean.item() == 1.0


def test_H4_one_example_is_evaluated_as_in_its_batch():
    norm = shaken(fastnorm.BatchNorm2d(3)).eval()
    x = randn(5, 3, 4, 4)
    whole = norm(x)
    for i in range(5):
        equal(norm(x[i : i + 1])[0], whole[i])


def test_H5_the_identity_is_recovered_by_weight_std_and_bias_mean():
    x = 3 + 2 * randn(50, 4)
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()
    equal(normalized(x, std, mean), x)
    swapped = normalized(x, mean, std)
    assert (swapped - x).abs().max() > 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_H7_norm_and_activation_are_one(activation):
    peer = shaken(nn.BatchNorm2d(3))
    fused = twin(fastnorm.BatchNorm2d, peer, 3, activation=activation)
    x, upstream = randn(4, 3, 5, 5), randn(4, 3, 5, 5)
    activate = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[activation]()
    composed = gradients(nn.Sequential(peer, activate), x, upstream)
    for got, expected in zip(gradients(fused, x, upstream), composed, strict=True):
        equal(got, expected)


def test_H9_trains_at_ten_times_the_rate_that_a_bare_network_bears():
    x = torch.randn(128, 10)
    target = (x[:, 0] * x[:, 1] > 0).long()

    def loss_after_training(norm: bool, lr: float) -> float:
        torch.manual_seed(1)
        model = nn.Sequential()
        for i in range(4):
            layer = nn.Linear(64 if i else 10, 64)
            nn.init.normal_(layer.weight)
            model.append(layer)
            model.append(fastnorm.BatchNorm1d(64, activation="relu") if norm else nn.ReLU())
        model.append(nn.Linear(64, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr)
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_after_training(False, 0.01) < 0.4
    assert math.isnan(loss_after_training(False, 0.1))
    assert loss_after_training(True, 0.1) < 0.4


def test_H10_the_noise_of_random_batches_falls_as_one_over_n():
    population = randn(4096, 1)
    fixed = torch.full((1, 1), 0.7, dtype=torch.float64)

    def variance(n: int) -> float:
        outputs = []
        for _ in range(800):
            others = population[torch.randint(4096, (n - 1,))]
            outputs.append(normalized(torch.cat([fixed, others]))[0, 0])
        return torch.stack(outputs).var().item()

    small, large = variance(16), variance(128)
    # Both variances have a relative standard error of sqrt(2 / 800), 5 %; the law holds to O(1/n).
    assert small / large == pytest.approx(8, rel=0.25)


def test_H11_running_batch_norm_of_weight_1_is_batch_norm():
    peer = shaken(nn.BatchNorm1d(3))
    norm = fastnorm.RunningBatchNorm1d(3, momentum=1.0, warmup_samples=0).double()
    norm.load_state_dict(peer.state_dict(), strict=False)
    x, upstream = randn(6, 3), randn(6, 3)
    norm(randn(8, 3))  # history, of which momentum 1 leaves nothing
    for got, expected in zip(
        gradients(norm, x, upstream), gradients(peer, x, upstream), strict=True
    ):
        equal(got, expected)


def test_H11_running_batch_norm_of_a_constant_stream_converges():
    norm = fastnorm.RunningBatchNorm1d(2).double()
    x = 3 + 2 * randn(25, 2)
    for _ in range(20):
        y = norm(x)
    equal(norm.running_mean, x.mean(0))
    equal(norm.running_var, x.var(0, correction=0))
    equal(norm.eval()(x), y)


@pytest.mark.parametrize(("theirs", "ours", "shape"), BATCH_NORMS)
def test_H12_one_value_per_channel_has_no_variance(theirs, ours, shape):
    x = torch.randn(1, 4, *(1,) * (len(shape) - 2))
    messages = []
    for norm in (theirs(4), ours(4)):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            norm(x)
        messages.append(str(caught.value))
        assert norm.eval()(x).shape == x.shape
    assert messages[0] in messages[1]


def test_H13_a_convolutional_batch_norm_flattens_space_into_the_batch():
    norm = shaken(fastnorm.BatchNorm2d(3))
    flat = twin(fastnorm.BatchNorm1d, norm, 3)
    x = randn(4, 3, 5, 2)
    rows = flat(x.permute(0, 2, 3, 1).reshape(-1, 3))
    equal(norm(x), rows.view(4, 5, 2, 3).permute(0, 3, 1, 2))
    equal(norm.state_dict(), flat.state_dict())


def test_H16_the_convolutional_example_runs_unchanged():
    def example(layers: object) -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            layers.BatchNorm2d(16),  # type: ignore[attr-defined]
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(1),
            nn.Linear(16 * 16 * 16, 10),
        ).double()

    x, target = randn(4, 3, 32, 32), torch.randint(10, (4,))
    results = []
    for layers in (nn, fastnorm):
        model = example(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((losses, model.state_dict(), model.eval()(x).detach()))
    equal(results[1], results[0])


# ---- Layer norm


def test_I1_layer_norm_knows_no_batch_and_no_mode():
    norm = shaken(fastnorm.LayerNorm(6))
    x = randn(8, 6)
    y = norm(x)
    order = torch.randperm(8)
    assert torch.equal(norm(x[order]), y[order])
    assert torch.equal(torch.cat([norm(x[:3]), norm(x[3:])]), y)
    assert torch.equal(norm.eval()(x), y)
    assert not list(norm.buffers())


def test_I2_layer_norm_is_batch_norm_of_the_transpose():
    x = randn(5, 5)
    equal(fastnorm.layer_norm(x, (5,)), normalized(x.t()).t())
    assert (fastnorm.layer_norm(x, (5,)) - normalized(x)).abs().max() > 0.1


def test_I3_group_norm_holds_layer_and_instance_norm():
    x = randn(2, 4, 3, 5)
    equal(fastnorm.group_norm(x, 1), fastnorm.layer_norm(x, (4, 3, 5)))
    equal(fastnorm.group_norm(x, 4), fastnorm.instance_norm(x))


def test_I4_the_recurrent_example_needs_the_norm_of_its_last_step_only():
    torch.manual_seed(3)
    lstm = nn.LSTM(5, 7, batch_first=True).double()
    norm = shaken(fastnorm.LayerNorm(7))
    head = nn.Linear(7, 2).double()
    hidden = lstm(randn(3, 6, 5))[0]
    everywhere = head(norm(hidden)[:, -1])
    equal(everywhere, head(norm(hidden[:, -1])))
    equal(everywhere, head(F.layer_norm(hidden, (7,), norm.weight, norm.bias)[:, -1]))


@pytest.mark.parametrize("space", [(3, 5), (2, 3, 5)])
def test_I5_layer_norm_of_channels_first_at_batch_1(space):
    x, weight, bias = randn(1, 4, *space), randn(4), randn(4)
    expected = F.layer_norm(x.movedim(1, -1), (4,), weight, bias).movedim(-1, 1)
    equal(fastnorm.layer_norm(x, 4, weight, bias, dim=1), expected)


# ---- Instance and group norm


def test_J1_instance_norm_ignores_contrast_and_brightness():
    x = randn(2, 3, 6, 6)
    contrast, brightness = 0.5 + torch.rand(2, 3, 1, 1).double(), randn(2, 3, 1, 1)
    y = fastnorm.instance_norm(x, eps=0.0)
    equal(fastnorm.instance_norm(contrast * x + brightness, eps=0.0), y)
    equal(y.mean((2, 3)), torch.zeros(2, 3).double())
    equal(y.var((2, 3), correction=0), torch.ones(2, 3).double())


def test_K1_group_norm_groups_channels_within_a_sample():
    norm = shaken(fastnorm.GroupNorm(2, 6))
    x = randn(3, 6, 4, 5)
    groups = x.view(3, 2, 3 * 4 * 5)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
    normal = ((groups - mean) / (var + norm.eps).sqrt()).view_as(x)
    weight, bias = (p.view(1, 6, 1, 1) for p in (norm.weight, norm.bias))
    equal(norm(x), normal * weight + bias)
    assert torch.equal(norm(x[1:2]), norm(x)[1:2])
    with pytest.raises(ValueError, match="divisible"):
        fastnorm.GroupNorm(4, 6)
