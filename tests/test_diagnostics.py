import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnorm.diagnostics import (
    ActivationStats,
    check_model,
    early_stopping_factors,
    gradient_norms,
    outliers,
    remove_redundant_bias_,
    shrinkage_factors,
    suggest_norm,
    update_ratios,
)
from fastnorm.testing import rng_state, seeded

TRACKED_INSTANCE = partial(nn.InstanceNorm1d, track_running_stats=True)


def codes(model, *args, **kwargs):
    return sorted({finding.code for finding in check_model(model, *args, **kwargs)})


def state(model):
    tensors = [*model.parameters(), *model.buffers(), rng_state()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    others = [module.training for module in model.modules()]
    others += [len(module._forward_hooks) for module in model.modules()]
    return [t.detach().clone() for t in tensors], others


# --- activation statistics


@pytest.mark.parametrize("sample", [None, 2**16])
def test_statistics_equal_those_of_all_outputs_together(sample):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    with torch.no_grad():
        model[0].bias[3] = -100
    inputs = [torch.randn(n, 2, 6, 6) * (1 + n) for n in (4, 1, 7)]
    with (
        ActivationStats(model, hist=12, hist_range=(-3, 3), sample=sample) as stats,
        torch.no_grad(),
    ):
        outputs = [model[:2](x) for x in inputs]
        [model(x) for x in inputs]
    outputs = torch.cat(outputs).double()
    # model[:2] shares its layers, so each of the two was used twice on every input.
    assert stats.calls == {"0": 6, "1": 6, "2": 3, "3": 3}
    # float32 sums of about a thousand elements.
    close = {"rel": 1e-5}
    assert stats.mean["1"].item() == pytest.approx(outputs.mean().item(), **close)
    assert stats.std["1"].item() == pytest.approx(outputs.std(correction=0).item(), **close)
    near = (outputs.abs() <= 0.05).double().mean().item()
    assert stats.near_zero["1"].item() == pytest.approx(near, abs=1e-7)
    assert stats.dead["1"].item() == pytest.approx(1 / 5)
    expected = 2 * torch.histc(outputs.float(), 12, -3, 3)
    assert torch.equal(stats.histogram["1"], expected)
    row = stats.summary()[1]
    assert (row.name, row.calls) == ("1", 6) and row.dead == pytest.approx(0.2)


def test_std_far_from_zero_does_not_cancel():
    model = nn.Sequential(nn.Identity())
    parts = [torch.randn(100, 3) + 1e4 for _ in range(5)]
    with ActivationStats(model) as stats:
        for part in parts:
            model(part)
    exact = torch.cat(parts).double().std(correction=0).item()
    assert stats.std["0"].item() == pytest.approx(exact, rel=1e-2)


def test_sampling_looks_at_rows_from_the_whole_batch():
    x = torch.cat([torch.zeros(512, 1000), torch.ones(512, 1000)])
    model = nn.Sequential(nn.Identity())
    with ActivationStats(model) as stats:
        model(x)
    assert stats.mean["0"].item() == pytest.approx(0.5, abs=0.02)


def test_choice_of_layers_tuples_half_precision_and_cleanup():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    x = torch.randn(5, 2, 3)
    with ActivationStats(model, [nn.LSTM, "head"]) as stats:
        out, _ = model["rnn"](x)
        model["head"](out)
        model["head"].bfloat16()(out.bfloat16())
    assert list(stats.mean) == ["rnn", "head"] and stats.calls["head"] == 2
    with pytest.raises(RuntimeError, match="inside"), ActivationStats(model):
        raise RuntimeError("inside")
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"\['tail'\]"):
        ActivationStats(model, ["tail"])
    with pytest.raises(ValueError, match="hist"):
        ActivationStats(model, hist=0)
    assert list(ActivationStats(model, "head").__enter__().__exit__() or []) == []


def test_watching_changes_nothing_and_reads_nothing_back():
    """On the meta device any read of a value raises; gradients are the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ActivationStats(model, hist=None):
        model(x).sum().backward()
    assert all(map(torch.equal, plain, (p.grad for p in model.parameters())))
    meta = nn.Sequential(nn.Identity()).to("meta")
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with ActivationStats(meta, hist=8) as stats, Watch():
        for _ in range(2):
            meta(torch.randn(4, 3))
    assert calls and not any("_local_scalar_dense" in call for call in calls)
    assert set(stats.mean) == {"0"}


# --- gradients and updates


@pytest.mark.parametrize(("scale", "healthy"), [(1.0, False), (2.0**0.5, True), (4.0, False)])
def test_F8_gradient_norms_flag_a_bad_init(scale, healthy):
    """A normal init of variance scale^2 / fan_in on 20 ReLU layers: only 2 / fan_in is healthy."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(20):
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=scale / 8)
        nn.init.zeros_(layer.bias)
        model += nn.Sequential(layer, nn.ReLU())
    x = torch.randn(128, 64)
    model(x).sum().backward()
    norms = {k: v for k, v in gradient_norms(model).items() if k.endswith("weight")}
    assert len(norms) == 20
    exploding = "exploding-init" in codes(model, x)
    assert exploding != healthy
    if healthy:
        assert not outliers(norms)


def test_F1_naive_init_is_flagged_and_the_right_ones_are_not():
    torch.manual_seed(0)
    x = torch.randn(256, 784)

    def net(init):
        model = nn.Sequential(
            nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10), nn.ReLU(), nn.Linear(10, 1)
        )
        for layer in model[::2]:
            init(layer)
        return model

    naive = net(lambda layer: [nn.init.normal_(p) for p in layer.parameters()])
    found = [f for f in check_model(naive, x) if f.code == "exploding-init"]
    assert found and found[0].where == ("0",)
    good = net(lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"))
    assert codes(good, x) == []
    assert codes(net(lambda layer: None), x) == []


def test_Q2_update_ratios_flag_a_hundredfold_outlier():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    groups = [{"params": model[i].parameters(), "lr": 1e-3} for i in range(5)]
    groups[3]["lr"] = 0.1
    optimizer = torch.optim.SGD(groups)
    for p in model.parameters():
        p.grad = p.detach().clone()
    before = model[3].weight.detach().clone()
    with update_ratios(model) as ratios:
        optimizer.step()
    moved = (model[3].weight.detach() - before).norm() / before.norm()
    assert ratios["3.weight"] == moved
    found = outliers(ratios)
    assert sorted(found) == ["3.bias", "3.weight"]
    assert found["3.weight"] == pytest.approx(100, rel=1e-3)
    assert outliers({"a": 1.0, "b": 2.0, "c": 0.0, "d": 0.01}, 50) == {"d": 0.01}
    assert list(outliers({"a": 1.0, "b": math.nan, "c": math.inf})) == ["b", "c"]
    assert list(outliers({"b": math.nan})) == ["b"] and outliers({}) == {}
    with pytest.raises(ValueError, match="factor"):
        outliers({}, 1)


# --- the linter


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.conv(x)
        return self.drop(F.relu(self.norm(y))) + y


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x


def test_C3_C6_findings_of_a_model_that_does_everything_wrong():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.7), nn.Linear(8, 2),
        nn.Dropout(0.5), nn.BatchNorm1d(2), nn.Linear(2, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[4].weight *= 50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 6)).sum().backward()
    model.eval()
    before = state(model)
    found = check_model(model, torch.randn(8, 6, generator=seeded(0)), optimizer=optimizer)
    after = state(model)
    assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1]
    table = {(f.code, f.where): f for f in found}
    assert ("bias-before-norm", ("0", "1")) in table
    assert ("dropout-before-norm", ("3", "6")) in table
    assert ("dropout-before-norm", ("5", "6")) in table
    assert table["dropout-rate", ("3",)].level == "note"
    assert "over 2 units" in table["dropout-few-units", ("5",)].message
    assert "8 values per channel" in table["few-values", ("1",)].message
    assert ("exploding-init", ("4",)) in table
    decayed = next(f for f in found if f.code == "decayed-norm")
    assert set(decayed.where) == {
        "0.bias",
        "1.weight",
        "1.bias",
        "4.bias",
        "6.weight",
        "6.bias",
        "7.bias",
    }
    assert str(decayed).startswith("warning: 0.bias, ")


def test_N1_dropout_before_batch_norm_is_found_through_graphs():
    found = [f for f in check_model(nn.Sequential(Residual(), Residual())) if "dropout" in f.code]
    assert [f.where for f in found] == [("0.drop", "1.norm")]
    after = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
    assert "dropout-before-norm" not in codes(after)
    # A layer norm in between has no running statistics to spoil, and resets the variance.
    between = nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(4), nn.BatchNorm1d(4))
    assert "dropout-before-norm" not in codes(between)
    assert "dropout-before-norm" not in codes(nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(4)))


def test_N1_the_variance_shift_is_real():
    """Training variance over evaluation variance: (E[x^2]/keep - mean^2) / var, 2.46 here."""
    torch.manual_seed(0)
    x = torch.randn(200_000, dtype=torch.float64).relu()
    keep = 0.5
    predicted = (x.square().mean() / keep - x.mean() ** 2) / x.var(correction=0)
    measured = F.dropout(x, 1 - keep).var(correction=0) / x.var(correction=0)
    assert predicted.item() == pytest.approx(2.46, abs=0.02)
    assert measured.item() == pytest.approx(predicted.item(), rel=0.02)


def test_M2_few_values_by_batch_size_and_single_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    assert codes(model, x) == []
    assert codes(model, torch.randn(1, 3, 6, 6)) == ["few-values"]
    assert codes(model, x, batch_size=1) == ["few-values"]
    # Without padding a larger kernel leaves fewer positions: 2 of 6 in each direction.
    large = nn.Sequential(nn.Conv2d(3, 4, 5, bias=False), nn.BatchNorm2d(4))
    (found,) = check_model(large, x)
    assert "8 values per channel" in found.message
    padded = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2, bias=False), nn.BatchNorm2d(4))
    assert codes(padded, x) == []
    mlp = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    assert "few-values" in codes(mlp, torch.randn(1, 3))
    assert mlp[1].num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="shapes"):
        check_model(mlp, torch.randn(8, 5))
    assert not any(module._forward_pre_hooks for module in mlp.modules())


def test_untraceable_models_and_other_inputs():
    assert codes(Untraceable()) == ["bias-before-norm"]
    assert "few-values" in codes(Untraceable(), torch.randn(8, 4))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, a, b):
            return {"out": self.layer(a + b)}

    class Keeps(nn.Module):
        def forward(self, x):
            self.last = x
            return x

    keeps = Keeps()
    assert check_model(keeps) == [] and not hasattr(keeps, "last")
    x = torch.randn(4, 2)
    assert check_model(Two(), (x, x)) == check_model(Two(), {"a": x, "b": x}) == []


# --- biases


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (4, 3, 6, 6), 1),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), (8, 3), 1),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), TRACKED_INSTANCE(4)), (4, 3, 6), 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4)), (4, 3, 6, 6), 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), (4, 3, 6, 6), 0),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (8, 3), 0),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)), (8, 3), 0),
        (lambda: nn.Sequential(Residual(), Residual()), (4, 3, 6, 6), 0),
    ],
)  # fmt: skip
def test_H6_outputs_stay_equal_without_the_bias(make, shape, count, with_example):
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    model.train()
    for _ in range(3):
        model(x + 1)

    def run(mode):
        torch.manual_seed(1)
        copied = [b.clone() for b in model.buffers()]
        out = model.train(mode)(x)
        for b, c in zip(model.buffers(), copied, strict=True):
            b.copy_(c)
        return out.detach()

    before = [run(mode) for mode in (True, False)]
    model.train()
    assert remove_redundant_bias_(model, x if with_example else None) == count
    assert model.training
    if count:
        assert model[0].bias is None
    for old, mode in zip(before, (True, False), strict=True):
        torch.testing.assert_close(run(mode), old, rtol=1e-9, atol=1e-9)


def test_H6_the_bias_has_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    (model(torch.randn(8, 3).double()) ** 3).sum().backward()
    assert model[0].bias.grad.abs().max() < 1e-12 * model[0].weight.grad.abs().max()


def test_H6_features_that_are_not_the_norms_channels():
    """On (N, L, C) with L = C a batch norm's channels are the positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    assert remove_redundant_bias_(model, torch.randn(4, 5, 3)) == 0
    assert remove_redundant_bias_(model, torch.randn(4, 3)) == 1


def test_H6_untraceable_shared_and_failing_models():
    model = Untraceable()
    assert remove_redundant_bias_(model, torch.randn(8, 4)) == 1
    assert model.body[0].bias is None

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.layer(x)) + self.layer(2 * x)

    assert remove_redundant_bias_(Shared()) == 0

    class Hidden(Untraceable):
        """Untraceable, and the bias is used where a graph would show it."""

        def forward(self, x):
            return super().forward(x) + (0 if self.body[0].bias is None else self.body[0].bias)

    model, x = Hidden(), torch.randn(8, 4)
    before = state(model)
    with pytest.raises(RuntimeError, match="would change the model's output"):
        remove_redundant_bias_(model, x)
    assert model.body[0].bias is not None
    assert all(map(torch.equal, before[0], state(model)[0])) and before[1] == state(model)[1]


# --- advice


def test_M1_M2_M3_advice():
    for n, error in [(2, 1.41), (5, 0.71), (16, 0.37), (32, 0.25), (64, 0.18), (1000, 0.045)]:
        assert suggest_norm(n).relative_error == pytest.approx(error, abs=0.006)
        assert suggest_norm(n).relative_error == math.sqrt(2 / (n - 1))
    assert suggest_norm(1).norm == suggest_norm(16).norm == "group_norm"
    assert suggest_norm(16, kind="mlp").norm == "layer_norm"
    assert suggest_norm(64).norm == suggest_norm(1000, kind="mlp").norm == "batch_norm"
    for n in (1, 10**6):
        assert suggest_norm(n, kind="rnn").norm == "layer_norm"
        assert suggest_norm(n, kind="transformer").norm == "layer_norm"
        assert suggest_norm(n, kind="style").norm == "instance_norm"
    with pytest.raises(ValueError, match="values_per_channel"):
        suggest_norm(0)
    with pytest.raises(ValueError, match="kind must be one of"):
        suggest_norm(5, kind="gan")


def test_M1_the_relative_error_is_that_of_gaussian_data():
    torch.manual_seed(0)
    for n in (2, 5, 32):
        var = torch.randn(200_000, n, dtype=torch.float64).var(1)
        assert var.std().item() == pytest.approx(suggest_norm(n).relative_error, rel=0.03)


def test_A13_fixed_point_of_weight_decay():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4).double())[0]
    eigenvalues = torch.tensor([0.01, 0.1, 1, 3]).double()
    hessian = basis @ eigenvalues.diag() @ basis.T
    optimum, lam = torch.randn(4).double(), 0.2
    w = torch.zeros(4).double().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.3, weight_decay=lam)
    for _ in range(2000):
        w.grad = hessian @ (w.detach() - optimum)
        optimizer.step()
    expected = basis @ (shrinkage_factors(eigenvalues, lam) * (basis.T @ optimum))
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)
    assert shrinkage_factors(torch.zeros(2), 0).tolist() == [1, 1]
    with pytest.raises(ValueError, match="lam"):
        shrinkage_factors(eigenvalues, -1)


def test_E4_early_stopping_is_like_l2_for_small_curvature_only():
    """The published table: alpha l_max = .1, 50 steps, lambda = 1 / (tau alpha)."""
    lr, steps = 0.1, 50
    lam = 1 / (steps * lr)
    eigenvalues = torch.tensor([0.0036, 0.0142, 0.08, 0.55, 1.0], dtype=torch.float64)
    stopped = early_stopping_factors(eigenvalues, lr, steps)
    shrunk = shrinkage_factors(eigenvalues, lam)
    # Descent itself, along each eigenvector.
    w = torch.zeros(5).double()
    for _ in range(steps):
        w = w - lr * eigenvalues * (w - 1)
    torch.testing.assert_close(stopped, w, rtol=1e-12, atol=1e-12)
    # The lambda that would keep the same share: l (1 - f) / f.
    same = eigenvalues * (1 - stopped) / stopped
    torch.testing.assert_close(eigenvalues / (eigenvalues + same), stopped)
    relative = (same - lam).abs() / lam
    assert relative[0] < 0.02 and relative[-1] > 0.9
    pairs = [(0.018, 0.017), (0.068, 0.066), (0.33, 0.29), (0.94, 0.73), (0.99, 0.83)]
    for got, want in zip(zip(stopped.tolist(), shrunk.tolist(), strict=True), pairs, strict=True):
        assert got == pytest.approx(want, abs=0.006)
    for bad in ({"lr": 0, "steps": 1}, {"lr": 1, "steps": -1}):
        with pytest.raises(ValueError):
            early_stopping_factors(eigenvalues, **bad)


def test_an_output_is_found_wherever_it_lies():
    from fastnorm.diagnostics import _first_tensor

    x = torch.zeros(2)
    assert _first_tensor({"a": [None, (x,)]}) is x
    assert _first_tensor([None, {}]) is None
