"""fastnorm.init: variances, fans, gains, and the inits that look at data."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastnorm.init import (
    fans_of,
    gain,
    init_,
    lecun_normal_,
    lecun_uniform_,
    lsuv_,
    variance_scaling_,
    weight_norm_init_,
)
from fastnorm.testing import rng_state, seeded


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def deep(activation: nn.Module, depth: int, width: int = 256) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation]
    return nn.Sequential(*layers)


def assert_variance(tensor: Tensor, expected: float) -> None:
    """Within 4 standard errors, √(2 / n) of the variance for normal values and less for uniform."""
    values = tensor.detach().double()
    assert abs(values.mean().item()) < 4 * math.sqrt(expected / values.numel())
    ratio = values.square().mean().item() / expected
    assert abs(ratio - 1) < 4 * math.sqrt(2 / values.numel()), ratio


# ---- Acceptance list


def test_F1_naive_normal_weights_explode() -> None:
    x = torch.randn(20_000, 784)
    stds = []
    for fan_in, fan_out in ((784, 50), (50, 10)):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        with torch.no_grad():
            x = layer(x).relu()
        stds.append(x.std().item())
        if fan_in == 784:
            # 28 / √(2π) and 28 √(1/2 − 1/2π) for 784 unit inputs.
            assert x.mean().item() == pytest.approx(11.2, rel=0.1)
            assert stds[0] == pytest.approx(16.3, rel=0.1)
    assert stds[1] / stds[0] == pytest.approx(math.sqrt(50 / 2), rel=0.5)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(300, 200), 300),
        (nn.Conv2d(32, 64, 3), 288),
        (nn.Conv2d(32, 64, 3, groups=8), 36),
        (nn.ConvTranspose2d(8, 64, 3), 72),
        (nn.ConvTranspose2d(32, 64, 4, stride=2, groups=4), 32),
        (nn.Bilinear(8, 9, 50), 72),
    ],
)
def test_F2_lecun_variance(layer: nn.Module, fan_in: int) -> None:
    assert_variance(lecun_normal_(layer.weight, fans=fans_of(layer)), 1 / fan_in)
    uniform = lecun_uniform_(layer.weight, fans=fans_of(layer))
    assert uniform.abs().max().item() <= math.sqrt(3 / fan_in)
    assert_variance(uniform, 1 / fan_in)
    init_(layer, "linear", distribution="truncated_normal")
    assert_variance(layer.weight, 1 / fan_in)
    # 2 standard deviations of the normal before it is cut, 2 / 0.8796 of the result.
    assert layer.weight.abs().max().item() <= 2 / 0.87962 / math.sqrt(fan_in)
    assert layer.weight.abs().max().item() > 2 / math.sqrt(fan_in)
    assert not layer.bias.any()


def test_F3_second_moment_after_20_relu_layers() -> None:
    model = init_(deep(nn.ReLU(), 20, 512), "relu")
    with torch.no_grad():
        assert 0.5 < model(torch.randn(512, 512)).square().mean().item() < 2


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_lsuv_holds_where_a_fixed_gain_drifts(activation: nn.Module) -> None:
    model, x = deep(activation, 12, 64), torch.randn(256, 64)
    assert lsuv_(model, x).ok
    with torch.no_grad():
        assert model[:-1](x).std().item() == pytest.approx(1, abs=0.06)


def test_F4_tanh_has_gain_1() -> None:
    layer = init_(nn.Linear(400, 300), "tanh")
    assert_variance(layer.weight, 1 / 400)
    assert nn.init.calculate_gain("tanh") == pytest.approx(5 / 3)
    assert gain("tanh") == pytest.approx(1.593, abs=1e-3)


def test_F5_glorot_is_torchs_xavier() -> None:
    for distribution, torchs in (
        ("normal", nn.init.xavier_normal_),
        ("uniform", nn.init.xavier_uniform_),
    ):
        ours, theirs = torch.empty(30, 50), torch.empty(30, 50)
        variance_scaling_(ours, 1.0, "fan_avg", distribution, generator=seeded(3))
        torchs(theirs, generator=seeded(3))
        torch.testing.assert_close(ours, theirs)
    for mode in ("fan_in", "fan_out"):
        ours, theirs = torch.empty(30, 50, 3), torch.empty(30, 50, 3)
        variance_scaling_(ours, 2.0, mode, generator=seeded(3))
        generator = seeded(3)
        nn.init.kaiming_normal_(theirs, mode=mode, nonlinearity="relu", generator=generator)
        torch.testing.assert_close(ours, theirs)


def test_F6_selu_keeps_itself_normal_with_gain_1() -> None:
    x = torch.randn(1000, 256)
    for factor, low, high in ((1.0, 0.9, 1.1), (0.75**2, 0.1, 0.35)):
        model = init_(deep(nn.SELU(), 40), "selu")
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight *= math.sqrt(factor)
            y = model(x)
        assert low < y.std().item() < high
        assert abs(y.mean().item()) < 0.1
    assert gain("selu") == pytest.approx(1.0, abs=1e-6)


def test_F7_fans_come_from_the_layer() -> None:
    lstm, gru = nn.LSTM(6, 4, proj_size=2), nn.GRUCell(6, 4)
    attention = nn.MultiheadAttention(8, 2)
    cross = nn.MultiheadAttention(8, 2, kdim=6)
    for layer, name, fans in (
        (nn.Linear(7, 3), "weight", (7, 3)),
        (nn.Bilinear(3, 4, 5), "weight", (12, 5)),
        (nn.Conv2d(8, 32, 3), "weight", (72, 288)),
        (nn.ConvTranspose2d(8, 32, 3), "weight", (72, 288)),
        (nn.ConvTranspose2d(8, 32, 4, stride=2), "weight", (32, 512)),
        (nn.ConvTranspose1d(8, 32, 1, stride=2), "weight", (8, 32)),
        (nn.Conv2d(4, 4, 3, groups=4), "weight", (9, 9)),
        (nn.Conv1d(8, 16, 5, groups=2), "weight", (20, 40)),
        (nn.ConvTranspose3d(8, 16, 2, groups=4), "weight", (16, 32)),
        (attention, "in_proj_weight", (8, 8)),
        (attention.out_proj, "weight", (8, 8)),
        (cross, "k_proj_weight", (6, 8)),
        (lstm, "weight_ih_l0", (6, 4)),
        (lstm, "weight_hh_l0", (2, 4)),
        (lstm, "weight_hr_l0", (4, 2)),
        (gru, "weight_hh", (4, 4)),
        (nn.Embedding(10, 3), "weight", (1, 3)),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4)), "weight", (9, 9)),
    ):
        assert fans_of(layer, name) == fans, (layer, name)
    for bad, error in (
        (nn.BatchNorm1d(3), TypeError),
        ("weight", TypeError),
        (nn.LazyLinear(3), ValueError),
    ):
        with pytest.raises(error, match="module"):
            fans_of(bad)
    with pytest.raises(ValueError, match=r"name.*'kernel'"):
        fans_of(nn.Linear(2, 2), "kernel")
    with pytest.raises(ValueError, match=r"name.*'bias'"):
        fans_of(nn.Linear(2, 2), "bias")


def test_F7_strided_transposed_convolution_keeps_variance() -> None:
    layer = init_(nn.ConvTranspose2d(64, 64, 4, stride=2), "linear")
    with torch.no_grad():
        y = layer(torch.randn(8, 64, 16, 16))[..., 4:-4, 4:-4]
    assert y.square().mean().item() == pytest.approx(1.0, rel=0.1)


def test_F8_gradients_vanish_explode_or_neither() -> None:
    def first_and_last(std: float | None) -> tuple[float, float]:
        model = init_(deep(nn.ReLU(), 20).double(), "relu")
        for layer in model[::2]:
            if std is not None:
                nn.init.normal_(layer.weight, std=std)
        (model(torch.randn(64, 256, dtype=torch.float64)).square().sum() / 2).backward()
        return model[0].weight.grad.norm().item(), model[-2].weight.grad.norm().item()

    first, last = first_and_last(None)
    assert 0.1 < first / last < 10
    # Every layer changes the signal by std √128, forwards and again backwards.
    for std in (0.05, 0.3):
        expected = (std * math.sqrt(128)) ** 40
        assert 0.01 < first_and_last(std)[0] / first / expected < 100


# ---- Gains


@pytest.mark.parametrize(
    "name",
    ["relu", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "hardswish", "tanh"],
)
def test_T11_gain_equals_a_monte_carlo_estimate(name: str) -> None:
    function = torch.tanh if name == "tanh" else getattr(F, name.removesuffix("_tanh"))
    if name == "gelu_tanh":
        function = lambda z: F.gelu(z, approximate="tanh")  # noqa: E731
    z = torch.randn(2_000_000, generator=seeded(1))
    assert gain(name) == pytest.approx(function(z).square().mean().item() ** -0.5, rel=0.01)
    assert gain(function) == pytest.approx(gain(name))


def test_gain_values_and_errors() -> None:
    assert gain("linear") == pytest.approx(1.0, abs=1e-12)
    assert gain("relu") == pytest.approx(math.sqrt(2), abs=1e-6)
    assert gain("leaky_relu", 0.2) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.2))
    for bad, error in (("rlu", ValueError), (3, TypeError), (lambda z: 0 * z, ValueError)):
        with pytest.raises(error, match="nonlinearity"):
            gain(bad)
    with pytest.raises(ValueError, match="negative_slope"):
        gain("relu", 0.2)


# ---- variance_scaling_ and init_


def test_variance_scaling_errors_change_nothing() -> None:
    tensor = torch.ones(3, 4)
    for options, word in (
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"mode": "fan"}, "mode"),
        ({"distribution": "cauchy"}, "distribution"),
        ({"fans": (0, 3)}, r"fans\[0\]"),
    ):
        with pytest.raises(ValueError, match=word):
            variance_scaling_(tensor, **options)
    with pytest.raises(TypeError, match="scale"):
        variance_scaling_(tensor, "2")
    assert torch.equal(tensor, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"fans.*\(5,\)"):
        lecun_normal_(torch.empty(5))
    assert lecun_normal_(torch.empty(0, 5)).shape == (0, 5)
    assert_variance(lecun_normal_(torch.empty(20_000), fans=(4, 1)), 0.25)
    assert_variance(lecun_normal_(torch.empty(300, 400, dtype=torch.bfloat16)), 1 / 400)


def test_init_of_a_whole_model() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(64, 64, 3, groups=4),
            "norm": nn.BatchNorm2d(64),
            "attention": nn.MultiheadAttention(128, 4, add_bias_kv=True),
            "lstm": nn.LSTM(128, 64),
            "table": nn.Embedding(10, 8),
            "wn": parametrizations.weight_norm(nn.Linear(200, 100)),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "tied": nn.Linear(128, 128),
            "tied_too": nn.Linear(128, 128),
        }
    )
    model["tied_too"].weight = model["tied"].weight
    before = copy.deepcopy(model.state_dict())
    assert init_(model, "gelu", bias=0.5) is model
    squared = gain("gelu") ** 2
    assert_variance(model["conv"].weight, squared / 144)
    assert_variance(model["wn"].weight, squared / 200)
    assert_variance(model["tied"].weight, squared / 128)
    assert_variance(model["attention"].in_proj_weight, 1 / 128)
    assert_variance(model["attention"].out_proj.weight, 1 / 128)
    assert_variance(model["lstm"].weight_ih_l0, 1 / 128)
    for gate in model["lstm"].weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-5)
    assert (model["conv"].bias == 0.5).all() and (model["lstm"].bias_hh_l0 == 0.5).all()
    after = model.state_dict()
    for name in before:
        if name.startswith(("norm", "table", "frozen")) or "bias_k" in name or "bias_v" in name:
            assert torch.equal(before[name], after[name]), name
    first = init_(nn.Linear(5, 5), generator=seeded(1)).weight
    second = init_(nn.Linear(5, 5), generator=seeded(1)).weight
    assert torch.equal(first, second)
    kept = nn.Linear(5, 5)
    bias = kept.bias.detach().clone()
    assert torch.equal(init_(kept, bias=None).bias, bias)


def test_init_errors_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    before = model[0].weight.detach().clone()
    for options, error in (
        ({"nonlinearity": "rlu"}, ValueError),
        ({"distribution": "cauchy"}, ValueError),
        ({"bias": "0"}, TypeError),
        ({}, ValueError),  # the lazy layer
    ):
        with pytest.raises(error):
            init_(model, **options)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(TypeError, match="model"):
        init_([nn.Linear(2, 2)])


def test_low_precision_recurrent_weights() -> None:
    gru = init_(nn.GRU(8, 8).to(torch.bfloat16))
    gate = gru.weight_hh_l0[:8].float()
    torch.testing.assert_close(gate @ gate.T, torch.eye(8), rtol=0, atol=0.03)


# ---- LSUV


class Branches(nn.Module):
    """Batch norm, dropout in two forms, a shared layer, tied weights and an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(16, 4)
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.dropout, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = F.dropout(x, 0.5, self.training)
        for _ in range(2):
            x = self.relu(self.shared(x))
        x = self.dropout(x.mean((2, 3)))
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.late(x)


def outputs_of(model: nn.Module, x: Tensor) -> dict[nn.Module, list[Tensor]]:
    seen: dict[nn.Module, list[Tensor]] = {}

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        seen.setdefault(module, []).append(output.clone())

    handles = [m.register_forward_hook(hook) for m in model.modules()]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for m in model.modules():
        m.training = isinstance(m, nn.BatchNorm2d)
    with torch.no_grad():
        model(x)
    for m, training in modes:
        m.training = training
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("orthogonal", [True, False])
def test_T11_lsuv(orthogonal: bool) -> None:
    model, x = Branches(), torch.randn(64, 3, 12, 12)
    model.norm.eval()
    state = copy.deepcopy(model.state_dict())
    rng = rng_state()
    report = lsuv_(model, x, orthogonal=orthogonal)
    assert torch.equal(rng_state(), rng)
    assert model.training and not model.norm.training and model.dropout.training
    after = model.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        assert torch.equal(state[f"norm.{name}"], after[f"norm.{name}"])
    assert [layer.name for layer in report] == ["conv", "shared", "first", "late", "unused"]
    assert [layer.status for layer in report] == ["ok"] * 4 + ["not reached"]
    assert not report.ok and "not reached" in str(report)
    seen = outputs_of(model, x)
    for group in ([model.conv], [model.shared], [model.first, model.second], [model.late]):
        outputs = torch.cat([y.flatten() for module in group for y in seen[module]])
        assert outputs.std().item() == pytest.approx(1, abs=0.051)
        if len(group) == 1:  # two biases share one weight: not centered
            assert abs(outputs.mean().item()) < 0.051
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_lsuv_options_inputs_and_dead_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)).double()
    x = torch.randn(256, 8, dtype=torch.float64)
    for batch in (x, (x,), {"input": x}):
        report = lsuv_(model, batch, target_std=2.0, center=False, tol=1e-6)
        assert report.ok
        assert model(x).std(correction=0).item() == pytest.approx(2.0, rel=1e-6)
    dead = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    nn.init.constant_(dead[0].bias, -1e9)
    report = lsuv_(dead, x, center=False)
    assert [layer.status for layer in report] == ["ok", "constant output"]
    wn = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2))
    assert lsuv_(wn, x.float()).ok
    assert lsuv_(nn.Linear(64, 64).to(torch.bfloat16), torch.randn(99, 64).bfloat16()).ok
    model[0].weight.requires_grad_(False)
    assert [layer.name for layer in lsuv_(model, x)] == ["2"]


def test_lsuv_errors_change_nothing() -> None:
    model = Branches()
    state = copy.deepcopy(model.state_dict())
    for options, error in (
        ({"target_std": 0.0}, ValueError),
        ({"tol": math.inf}, ValueError),
        ({"max_iter": 0}, ValueError),
        ({"max_iter": 1.5}, ValueError),
        ({"target_std": "1"}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            lsuv_(model, torch.randn(2, 3, 8, 8), **options)
    with pytest.raises(RuntimeError):
        lsuv_(model, torch.randn(2, 5, 8, 8))

    def fail(module: nn.Module, args: object, output: Tensor) -> None:
        if module.weight.std() > 0.3 or module.weight.std() < 0.2:
            raise RuntimeError("late failure")

    nn.init.normal_(model.late.weight, std=0.25)
    state = copy.deepcopy(model.state_dict())
    model.late.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="late failure"):
        lsuv_(model, 5 * torch.randn(8, 3, 8, 8), target_std=100.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.training
    with pytest.raises(ValueError, match="no trainable layer"):
        lsuv_(nn.ReLU(), torch.randn(2))
    with pytest.raises(ValueError, match="lazy"):
        lsuv_(nn.LazyLinear(3), torch.randn(2, 3))


# ---- Weight norm


def test_weight_norm_init_gives_every_unit_mean_0_and_variance_1() -> None:
    norm = parametrizations.weight_norm
    model = nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(8, 6, 3), dim=1),
        nn.ReLU(),
        nn.Flatten(2),
        norm(nn.Linear(64, 5)),
    ).double()
    x = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    rng = rng_state()
    report = weight_norm_init_(model, x)
    assert torch.equal(rng_state(), rng)
    assert report.ok and [layer.name for layer in report] == ["0", "2", "5"]
    seen = outputs_of(model, x)
    for layer, dims in ((0, (0, 2, 3)), (2, (0, 2, 3)), (5, (0, 1))):
        std, mean = torch.std_mean(seen[model[layer]][0], dims, correction=0)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-9)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)


def test_weight_norm_init_without_bias_and_errors() -> None:
    norm = parametrizations.weight_norm
    x = 2 + 3 * torch.randn(64, 4, dtype=torch.float64)
    layer = norm(nn.Linear(4, 5, bias=False)).double()
    with torch.no_grad():
        direction = layer(x) / layer.parametrizations["weight"].original0.T
    weight_norm_init_(layer, x)
    std = direction.std(0, correction=0)
    torch.testing.assert_close(layer(x), direction / std)
    frozen = norm(nn.Linear(4, 5)).double()
    frozen.bias.requires_grad_(False)
    report = weight_norm_init_(nn.Sequential(frozen), x)
    assert torch.allclose(frozen(x).std(0, correction=0), torch.ones(5, dtype=torch.float64))
    assert report[0].std == pytest.approx(frozen(x).std(correction=0).item())
    constant = weight_norm_init_(norm(nn.Linear(4, 5)), torch.ones(3, 4))
    assert constant[0].status == "constant output"
    for bad in (norm(nn.Linear(4, 5), dim=1), norm(nn.Linear(4, 5), dim=None), nn.Linear(4, 5)):
        with pytest.raises(ValueError, match="model"):
            weight_norm_init_(bad, x.float())
