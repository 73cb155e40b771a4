"""fastnorm.penalties against hand-written formulas; tests named after the acceptance list."""

from __future__ import annotations

import copy
import itertools
import math
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm.penalties import (
    L1,
    L1L2,
    L2,
    GroupLasso,
    MaxNorm,
    NonNegative,
    Regularizer,
    Rule,
    UnitNorm,
    l1_penalty,
    l2_penalty,
    param_groups_weight_decay,
)
from fastnorm.testing import seeded

RULES = [L1(0.3), L2(0.7), L2(0.7, half=True), L1L2(0.2, 0.4), L1L2(0.2, 0.4, half=True)]
RULES += [GroupLasso(0.5), L1(0.3, toward="init"), L2(0.3, toward=0.5)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(got: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


class Ops(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# ---- Values and gradients


def test_A1_l2_of_one_layer() -> None:
    layer = nn.Linear(10, 5, dtype=torch.float64)
    value = Regularizer(layer, L2(1.0), bias=True)()
    assert_equal(value, layer.weight.square().sum() + layer.bias.square().sum())
    value.backward()
    assert_equal(layer.weight.grad, 2 * layer.weight.detach())
    assert_equal(layer.bias.grad, 2 * layer.bias.detach())


def test_A2_every_parameter_tied_once_frozen_out() -> None:
    model = mlp(4, 5, 6, 3)
    reg = Regularizer(model, L2(1.0), bias=True)
    assert len(reg.describe()) == 6
    assert_equal(reg(), sum(p.square().sum() for p in model.parameters()))
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    tied[1].weight = tied[0].weight
    assert_equal(Regularizer(tied, L2(1.0))(), tied[0].weight.square().sum())
    model[0].weight.requires_grad_(False)
    assert_equal(reg(), sum(p.square().sum() for p in model.parameters() if p.requires_grad))
    assert reg.describe()[0].reason == "frozen"
    model[0].weight.requires_grad_(True)  # unfreezing brings it back
    assert_equal(reg(), sum(p.square().sum() for p in model.parameters()))


def test_A3_size_of_the_penalty_of_an_mlp() -> None:
    model = mlp(28 * 28, 128, 32, 10, dtype=torch.float32)
    for layer in model[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert sum(p.numel() for p in model.parameters()) == 104_938
    # Glorot: in * out * 2 / (in + out) for each layer, that is 220.1 + 51.2 + 15.2.
    assert Regularizer(model, L2(1.0), bias=True)().item() == pytest.approx(286.5, rel=0.05)


def test_A5_l1() -> None:
    model = mlp(4, 5, 3)
    with torch.no_grad():
        model[0].weight[0] = 0
    value = Regularizer(model, L1(0.3), bias=True)()
    assert_equal(value, 0.3 * sum(p.abs().sum() for p in model.parameters()))
    value.backward()
    assert_equal(grads(model), [0.3 * p.sign() for p in weights(model)])
    assert not model[0].weight.grad[0].any()


def test_A6_l2() -> None:
    model = mlp(4, 5, 3)
    value = Regularizer(model, L2(0.3), bias=True)()
    assert_equal(value, 0.3 * sum(p.square().sum() for p in model.parameters()))
    value.backward()
    assert_equal(grads(model), [0.6 * p for p in weights(model)])


def test_A7_elastic_net_and_terms_that_cost_nothing() -> None:
    model = mlp(4, 5, 3)
    both, l1, l2 = (Regularizer(model, rule) for rule in (L1L2(0.3, 0.4), L1(0.3), L2(0.4)))
    assert_equal(both(), l1() + l2())
    off = Regularizer(model, L1L2(0.0, 0.0))
    model(torch.zeros(1, 4, dtype=torch.float64)).sum().backward()
    with Ops() as ops:
        value = off()
        off.add_grads_()
        off.decay_(0.1)
        off.prox_(0.1)
    # Nothing but the zeros that are returned.
    assert set(ops.names) <= {"aten.zeros.default"}
    assert value.grad_fn is None and value.item() == 0
    with Ops() as ops:
        assert l1_penalty(model.parameters(), 0).grad_fn is None
        assert Regularizer(model, L1L2(0.3, 0.0))().grad_fn is not None
    assert not any("dot" in name or "pow" in name for name in ops.names)


def test_A8_coupled_decay_through_adam() -> None:
    lam, data = 1e-2, torch.randn(32, 4, dtype=torch.float64)
    models = [mlp(4, 5, 1) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers = [
        torch.optim.Adam(models[0].parameters(), lr=1e-2, weight_decay=2 * lam),
        torch.optim.Adam(models[1].parameters(), lr=1e-2),
        torch.optim.AdamW(models[2].parameters(), lr=1e-2, weight_decay=2 * lam),
    ]
    Regularizer(models[1], L2(lam), bias=True).attach(optimizers[1])
    for _ in range(50):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
    assert_equal(weights(models[1]), weights(models[0]), 0)
    assert not torch.allclose(weights(models[2])[0], weights(models[0])[0])


def test_A9_biases_and_norms_are_left_out_unless_asked_for() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)).double()
    default = Regularizer(model, L2(1.0))
    assert_equal(default(), model[0].weight.square().sum())
    reasons = {line.name: line.reason for line in default.describe()}
    assert reasons["0.bias"] == "bias" and reasons["1.weight"] == reasons["2.bias"] == "norm"
    everything = Regularizer(model, L2(1.0), bias=True, norm=True)
    assert_equal(everything(), sum(p.square().sum() for p in model.parameters()))


def test_A10_rules_by_pattern_type_and_parameter() -> None:
    model = nn.ModuleDict(
        {"body": mlp(4, 4), "head": nn.Linear(4, 2), "table": nn.Embedding(3, 4)}
    ).double()
    extra = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
    model.register_parameter("extra", extra)
    rules = {"head.*": L1(0.1), nn.Embedding: None, extra: L2(0.2)}
    reg = Regularizer(model, L2(0.3), rules=rules)
    value = reg.value()
    assert_equal(value["head.*"], 0.1 * model["head"].weight.abs().sum().detach())
    assert_equal(value["extra"], 0.2 * extra.square().sum().detach())
    assert_equal(value["default"], 0.3 * model["body"][0].weight.square().sum().detach())
    assert_equal(reg().detach(), sum(value.values()))
    lines = {line.name: line for line in reg.describe()}
    assert len(lines) == len(reg.describe()) == len(list(model.parameters()))
    assert lines["table.weight"].rule is None and lines["table.weight"].reason == "rule Embedding"
    assert lines["head.bias"].reason == "bias" and lines["head.weight"].reason == "rule 'head.*'"
    assert "rule 'head.*'" in repr(reg) and "4×4" in repr(reg)


def test_rules_that_mean_a_left_out_kind_take_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    reg = Regularizer(model, rules={"*.bias": L1(1.0), "1.weight": L2(1.0, toward=1.0)})
    assert_equal(reg(), model[0].bias.abs().sum() + model[1].bias.abs().sum())
    assert Regularizer(model, rules={nn.LayerNorm: L2(1.0)}).value().keys() == {
        "normalization.LayerNorm"
    }


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"nothing*": L1(1.0)}, ["'nothing*'", "no parameter"]),
        ({nn.Conv2d: L1(1.0)}, ["Conv2d", "no parameter"]),
        ({nn.Parameter(torch.ones(2)): None}, ["shape (2,)", "no parameter"]),
        ({"0.*": L1(1.0), nn.Linear: L2(1.0)}, ["'0.weight'", "'0.*'", "Linear", "two rules"]),
        ({"0.weight": L1(1.0, toward={"x": torch.ones(2)})}, ["no entry", "'0.weight'"]),
        ({"0.weight": L1(1.0, toward={"0.weight": torch.ones(2)})}, ["(4, 3)", "(2,)"]),
        ({"0.bias": GroupLasso(1.0, dim=1)}, ["dimension 1", "'0.bias'", "(4,)"]),
        ({"0.weight": L1(1.0, toward=math.nan)}, ["finite", "nan"]),
    ],
)
def test_bad_rules_are_named(rules: dict, words: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError) as error:
        Regularizer(model, L2(1.0), rules=rules)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_types_are_named() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"default: expected a rule .*got 0\.1"):
        Regularizer(model, 0.1)
    with pytest.raises(TypeError, match=r"rules: 'weight': expected a rule"):
        Regularizer(model, rules={"weight": 0.1})
    with pytest.raises(TypeError, match=r"rules: expected keys"):
        Regularizer(model, rules={3: L1(1.0)})
    with pytest.raises(TypeError, match="toward"):
        Regularizer(model, L1(1.0, toward="start"))
    with pytest.raises(TypeError, match="model"):
        Regularizer(list(model.parameters()), L1(1.0))
    with pytest.raises(TypeError, match="dim"):
        MaxNorm(1.0, dim=0.5)
    with pytest.raises(TypeError, match=r"params.*module"):
        l1_penalty(model)
    with pytest.raises(TypeError, match=r"params.*int64"):
        l2_penalty([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="lazy"):
        Regularizer(nn.LazyLinear(3), L2(1.0))


@pytest.mark.parametrize("strength", [-1.0, math.inf, math.nan])
def test_strengths_are_checked_also_when_changed(strength: float) -> None:
    makers = [L1, L2, GroupLasso, MaxNorm, L1L2, lambda s: L1L2(0.0, s), L1L2.from_ratio]
    for make in makers:
        with pytest.raises(ValueError, match=r"finite number >= 0, got"):
            make(strength)
    rule = L1(0.1)
    with pytest.raises(ValueError, match="lam"):
        rule.lam = strength
    assert rule.lam == 0.1
    for call in (l1_penalty, l2_penalty):
        with pytest.raises(ValueError, match="lam"):
            call([torch.ones(2)], strength)
    reg = Regularizer(nn.Linear(2, 2), rule)
    with pytest.raises(ValueError, match="lr"):
        reg.prox_(strength)
    with pytest.raises(ValueError, match="scale"):
        reg.add_grads_(scale=strength)
    with pytest.raises(TypeError, match=r"lam: expected a number, got '1'"):
        L1("1")
    with pytest.raises(TypeError, match="lam"):
        L1(True)
    with pytest.raises(ValueError, match=r"ratio.*\[0, 1\]"):
        L1L2.from_ratio(1.0, 2.0)


def train(model: nn.Module, data: torch.Tensor, optimizer, steps: int = 20, extra=None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(data).square().mean()
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        optimizer.step()


def test_A11_half_is_weight_decay_in_every_form() -> None:
    lam, lr, data = 0.1, 0.05, torch.randn(32, 4, dtype=torch.float64)
    start = mlp(4, 5, 1)
    expected = copy.deepcopy(start)
    train(expected, data, torch.optim.SGD(expected.parameters(), lr, weight_decay=lam))

    term = copy.deepcopy(start)
    reg = Regularizer(term, L2(lam, half=True), bias=True)
    train(term, data, torch.optim.SGD(term.parameters(), lr), extra=reg)
    assert_equal(weights(term), weights(expected))
    for how in ("grad", "decoupled", "prox"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        Regularizer(model, L2(lam, half=True), bias=True).attach(optimizer, how)
        train(model, data, optimizer)
        assert_equal(weights(model), weights(expected))
    other = copy.deepcopy(start)  # L2(λ) and L2(2λ, half=True) are one rule
    optimizer = torch.optim.SGD(other.parameters(), lr)
    Regularizer(other, L2(lam / 2), bias=True).attach(optimizer)
    train(other, data, optimizer)
    assert_equal(weights(other), weights(expected))


@pytest.mark.parametrize("kind", ["init", "mapping", "number"])
def test_A12_towards_a_reference_point(kind: str) -> None:
    model = mlp(4, 3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "number":
        for p in model.parameters():
            nn.init.constant_(p, 0.25)
    toward = {"init": "init", "mapping": start, "number": 0.25}[kind]
    reg = Regularizer(model, L2(0.3, half=True, toward=toward))
    assert reg().item() == 0
    with torch.no_grad():
        model[0].weight += 1.5
    assert reg().item() == pytest.approx(0.15 * 12 * 1.5**2)
    reg().backward()
    assert_equal(model[0].weight.grad, torch.full((3, 4), 0.3 * 1.5, dtype=torch.float64))
    assert sum(p.numel() for p in model.parameters()) == 15  # the reference is not trained
    for how in (lambda: reg.decay_(1 / 0.3), lambda: reg.prox_(1e9)):
        with torch.no_grad():
            model[0].weight += 1.5
        how()
        assert reg().item() < 1e-8
    saved = reg.state_dict()
    fresh = Regularizer(model, L2(9.0, half=True, toward="init" if kind == "init" else toward))
    fresh.load_state_dict(saved)
    assert_equal(fresh(), reg())
    saved["toward"]["0.weight"].zero_()  # a copy both ways
    assert_equal(fresh(), reg())


def test_state_dict_round_trip_and_errors_change_nothing() -> None:
    model = mlp(4, 3)
    reg = Regularizer(model, L1L2(0.1, 0.2), rules={"0.bias": L1(0.3, toward="init")})
    saved = copy.deepcopy(reg.state_dict())
    saved["strengths"]["default"]["l1"] = 0.5
    bad = copy.deepcopy(saved)
    bad["toward"]["0.bias"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"expected shape \(3,\), got \(7,\)"):
        reg.load_state_dict(bad)
    bad = copy.deepcopy(saved)
    bad["strengths"]["0.bias"]["lam"] = -1.0
    with pytest.raises(ValueError, match="finite"):
        reg.load_state_dict(bad)
    with pytest.raises(ValueError, match="strengths"):
        reg.load_state_dict({"toward": saved["toward"]})
    assert reg.state_dict()["strengths"]["default"]["l1"] == 0.1
    reg.load_state_dict(saved)
    assert reg.state_dict()["strengths"] == saved["strengths"]


def test_A13_fixed_point_on_a_quadratic() -> None:
    # Minimum of ½(w−w*)ᵀA(w−w*) + ½λ‖w‖²: each eigendirection shrinks by l / (l + λ).
    lam, eigenvalues = 0.3, torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    hessian = rotation @ eigenvalues.diag() @ rotation.T
    best = torch.randn(4, dtype=torch.float64)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), 0.4)
    Regularizer(model, rules={"w": L2(lam, half=True)}).attach(optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (model.w - best) @ hessian @ (model.w - best)).backward()
        optimizer.step()
    shrunk = rotation @ (eigenvalues / (eigenvalues + lam) * (rotation.T @ best))
    assert_equal(model.w.detach(), shrunk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_A14_constraints(dtype: torch.dtype) -> None:
    model = nn.Linear(50, 20).to(dtype)
    with torch.no_grad():
        model.weight[::2] *= 10
    before = model.weight.detach().clone()
    norms = before.double().norm(dim=1)
    bound = norms.median().item()
    reg = Regularizer(model, MaxNorm(bound))
    assert reg().item() == 0 and reg().grad_fn is None
    reg.project_()
    after = model.weight.detach().clone()
    inside = norms <= bound
    assert 0 < inside.sum() < 20
    assert torch.equal(after[inside], before[inside])
    assert (after.double().norm(dim=1) <= bound).all()
    assert (after.double().norm(dim=1)[~inside] > 0.95 * bound).all()
    reg.project_()
    assert torch.equal(model.weight, after)
    tolerance = 8 * torch.finfo(dtype).eps
    Regularizer(model, UnitNorm(dim=1)).project_()
    assert_equal(model.weight.double().norm(dim=0), torch.ones(50).double(), tolerance)
    Regularizer(model, NonNegative()).project_()
    assert model.weight.min() == 0
    columns = MaxNorm(1.0, dim=1).project(torch.ones(4, 2, dtype=dtype))
    assert (columns.double().norm(dim=0) <= 1).all()


def test_A14_attached_constraints_hold_after_every_step() -> None:
    model = mlp(4, 5, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    Regularizer(model, MaxNorm(0.5)).attach(optimizer)
    for _ in range(5):
        train(model, torch.randn(8, 4, dtype=torch.float64), optimizer, steps=1)
        assert all((model[i].weight.norm(dim=1) <= 0.5).all() for i in (0, 2))


def lasso_problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    x = torch.randn(200, 50, generator=generator, dtype=torch.float64)
    true = torch.zeros(50, dtype=torch.float64)
    true[:5] = torch.tensor([3.0, -2.0, 1.5, 4.0, -1.0], dtype=torch.float64)
    return x, x @ true + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)


def fit(rule: Rule, how: str, optimizer: str = "SGD", lr: float = 0.4, steps: int = 300):
    x, y = lasso_problem()
    model = nn.Linear(50, 1, bias=False, dtype=torch.float64)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr)
    Regularizer(model, rule).attach(opt, how)
    for _ in range(steps):
        opt.zero_grad()
        (0.5 * (model(x).squeeze(1) - y).square().mean()).backward()
        opt.step()
    return model.weight.detach()[0]


def test_A15_only_proximal_steps_make_exact_zeros() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    weight = fit(L1(0.1), "prox")
    assert (weight == 0).sum() == 45 and (weight[:5] != 0).all()
    for optimizer, lr in (("SGD", 0.05), ("Adam", 0.01)):
        assert (fit(L1(0.1), "grad", optimizer, lr) == 0).sum() == 0
    x, y = (tensor.numpy(force=True) for tensor in lasso_problem())
    lasso = sklearn.Lasso(0.1, fit_intercept=False, tol=1e-10).fit(x, y)
    assert_equal(weight, torch.asarray(lasso.coef_), 1e-6)


def test_T9_elastic_net_by_ratio_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = (tensor.numpy(force=True) for tensor in lasso_problem())
    for ratio in (0.2, 0.5, 0.9):
        weight = fit(L1L2.from_ratio(0.2, ratio, half=True), "prox")
        net = sklearn.ElasticNet(0.2, l1_ratio=ratio, fit_intercept=False, tol=1e-10).fit(x, y)
        assert_equal(weight, torch.asarray(net.coef_), 1e-6)
    only_l1, only_l2 = L1L2.from_ratio(0.2, 1.0), L1L2.from_ratio(0.2, 0.0)
    assert (only_l1.l1, only_l1.l2, only_l2.l1, only_l2.l2) == (0.2, 0.0, 0.0, 0.2)
    assert L1L2.from_ratio(0.2).l1 == 0.1


def test_A16_l2_shrinks_and_never_zeroes() -> None:
    fits = [fit(L2(lam, half=True), "prox") for lam in (0.01, 0.1, 1.0)]
    norms = [weight.norm().item() for weight in fits]
    assert norms == sorted(norms, reverse=True) and norms[0] > norms[-1]
    assert all((weight != 0).all() for weight in fits)


def test_group_lasso_removes_whole_units() -> None:
    torch.manual_seed(1)
    x = torch.randn(300, 10, dtype=torch.float64)
    y = x[:, :3] @ torch.randn(3, 4, dtype=torch.float64)
    model = nn.Linear(10, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Regularizer(model, GroupLasso(0.05, dim=1)).attach(optimizer, "prox")
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    zero = (model.weight == 0).all(dim=0)
    assert zero.tolist() == [False] * 3 + [True] * 7


def test_group_lasso_value_gradient_and_zero_groups() -> None:
    w = torch.randn(4, 3, 2, dtype=torch.float64)
    w[1] = 0
    model = nn.Module()
    model.w = nn.Parameter(w.clone())
    reg = Regularizer(model, GroupLasso(0.5))
    value = reg()
    assert_equal(value, 0.5 * math.sqrt(6) * sum(g.norm() for g in w))
    value.backward()
    expected = 0.5 * math.sqrt(6) * w / w.flatten(1).norm(dim=1).view(4, 1, 1)
    assert_equal(model.w.grad, expected.nan_to_num(0))
    reg.prox_(1e6)
    assert not model.w.any() and torch.isfinite(model.w).all()


# ---- The ways of applying a rule agree


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_add_grads_equals_the_differentiable_term(rule: Rule, dtype: torch.dtype) -> None:
    model = mlp(7, 9, 3).to(dtype)
    reg = Regularizer(model, rule, bias=not isinstance(rule, GroupLasso))
    with torch.no_grad():
        model[0].weight[0] = 0
        for p in model.parameters():
            p += torch.randn_like(p) * 0.1 * (p != 0)
    start = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), start, strict=True):
        p.grad = g.clone()
    value = reg()
    value.backward()
    expected = grads(model)
    for p, g in zip(model.parameters(), start, strict=True):
        p.grad = g.clone()
    got = reg.add_grads_()
    eps = torch.finfo(dtype).eps
    # Two roundings to dtype against three; gradients here are below 8.
    torch.testing.assert_close(grads(model), expected, rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(got, value.detach(), rtol=1e-5, atol=1e-6)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad
    assert_equal(sum(reg.value().values()), value.detach(), 1e-4 * abs(value.item()))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_prox_is_the_minimum_it_claims(rule: Rule) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    reg = Regularizer(model, rule)
    with torch.no_grad():
        model.w += 0.5 * torch.randn(4, 3, dtype=torch.float64)
    start, step = model.w.detach().clone(), 0.7

    def objective() -> float:
        return (reg() + (model.w - start).square().sum() / (2 * step)).item()

    reg.prox_(step)
    minimum, best = model.w.detach().clone(), objective()
    for _ in range(200):
        with torch.no_grad():
            model.w.copy_(minimum + 10 ** -(4 * torch.rand(1).item()) * torch.randn(4, 3).double())
        assert objective() >= best - 1e-12


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_decay_is_a_gradient_step_on_the_penalty(rule: Rule) -> None:
    model = mlp(5, 4)
    reg = Regularizer(model, rule)
    with torch.no_grad():
        model[0].weight += 0.3
    reg().backward()
    expected = model[0].weight.detach() - 0.2 * model[0].weight.grad
    version = model[0].weight._version
    reg.decay_(0.2)
    assert model[0].weight._version > version  # a graph that saved the old weight must notice
    assert_equal(model[0].weight.detach(), expected)
    reg().backward()
    with pytest.raises(ValueError, match="initial_lr"):
        reg.decay_(0.2, schedule="relative")
    with pytest.raises(ValueError, match=r'"lr" or "relative", got \'cosine\''):
        reg.decay_(0.2, schedule="cosine")


def test_penalties_are_twice_differentiable_and_functional() -> None:
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for function in (lambda w: l2_penalty(w, 0.3), lambda w: l2_penalty([w, w], half=True)):
        assert torch.autograd.gradcheck(function, (w,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (w,))
    zero = torch.zeros(3, dtype=torch.float64)
    assert_equal(torch.func.hessian(l2_penalty)(zero), 2 * torch.eye(3, dtype=torch.float64))
    assert_equal(torch.func.vmap(l2_penalty)(torch.ones(2, 3)), torch.full((2,), 3.0))
    assert_equal(torch.func.grad(l1_penalty)(zero), zero)
    compiled = torch.compile(
        lambda w: l2_penalty([w]) + l1_penalty(w), backend="eager", fullgraph=True
    )
    assert_equal(compiled(w), l2_penalty(w) + l1_penalty(w))


def test_fp16_sums_do_not_overflow() -> None:
    w = torch.full((1000, 1000), 0.5, dtype=torch.float16)
    assert l2_penalty(w).item() == pytest.approx(250_000, rel=1e-4)
    assert l1_penalty(w.to(torch.bfloat16)).item() == pytest.approx(500_000, rel=1e-4)


def test_layouts_and_empty_lists() -> None:
    w = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for view in (w, w[:, ::2], w[0, 0].T, w.expand(2, 4, 3, 5, 5)):
        assert_equal(l2_penalty(view), view.square().sum(), 1e-3)
        assert_equal(l1_penalty(view), view.abs().sum(), 1e-3)
    assert l1_penalty([]).item() == 0 and l2_penalty(torch.empty(0, 3)).item() == 0
    assert Regularizer(nn.ReLU(), L2(1.0))().item() == 0
    assert "no parameters" in repr(Regularizer(nn.ReLU()))


# ---- Fixtures


def test_fixture_allennlp() -> None:
    model = nn.Sequential(nn.Linear(5, 10), nn.Linear(10, 5))
    for p in model.parameters():
        nn.init.constant_(p, -1)
    assert Regularizer(model, L1(1.0), bias=True)().item() == 115
    assert Regularizer(model, L1(1.0))().item() == 100
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    assert Regularizer(model, L2(1.0), bias=True)().item() == 28.75
    assert Regularizer(model, L2(1.0))().item() == 25


class Adversarial(nn.Module):
    """The parameter-group model on which each common heuristic fails."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.pos = nn.Parameter(torch.randn(1, 6, 8))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.norm = nn.LayerNorm((4, 5, 6))
        self.bn = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.lstm = nn.LSTM(8, 4, bidirectional=True, proj_size=2)
        self.act = nn.PReLU(8)
        self.wn = parametrizations.weight_norm(nn.Linear(8, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.old_wn = nn.utils.weight_norm(nn.Linear(8, 4))
        self.spectral = parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
        self.layernorm_proj = nn.Linear(8, 1)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


DECAYED = {
    "embedding.weight",
    "pos",
    *(f"attention.{n}" for n in ("in_proj_weight", "out_proj.weight")),
    *(f"cross.{n}_proj_weight" for n in "qkv"),
    "cross.out_proj.weight",
    *(f"lstm.weight_{n}_l0{d}" for n in ("ih", "hh", "hr") for d in ("", "_reverse")),
    "wn.parametrizations.weight.original1",
    "old_wn.weight_v",
    "spectral.parametrizations.weight.original",
    "layernorm_proj.weight",
}


def test_fixture_adversarial_parameter_groups() -> None:
    model = Adversarial()
    decayed, rest = param_groups_weight_decay(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert set(decayed["param_names"]) == DECAYED
    names = dict(model.named_parameters())
    assert set(rest["param_names"]) == set(names) - DECAYED
    for group in (decayed, rest):
        assert all(
            p is names[n] for n, p in zip(group["param_names"], group["params"], strict=True)
        )
    first, _ = param_groups_weight_decay(model, no_decay=("*pos*",))
    assert set(first["param_names"]) == DECAYED - {"pos"}
    reg = Regularizer(model, L2(1.0))
    assert {line.name for line in reg.describe() if line.rule} == DECAYED


def test_L3_weight_norm_gain_is_never_decayed_by_default() -> None:
    _, rest = param_groups_weight_decay(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    assert "parametrizations.weight.original0" in rest["param_names"]


class UserNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 5))


class SubNorm(nn.LayerNorm):
    pass


def test_T8_groups_by_module_type() -> None:
    model = nn.Sequential(nn.Linear(4, 4), SubNorm((2, 2)), UserNorm(), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    groups = param_groups_weight_decay(model, 0.1, norm_types=(UserNorm,))
    assert [g["param_names"] for g in groups] == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias", "2.gain", "3.bias"],
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert "2.gain" in param_groups_weight_decay(model)[0]["param_names"]
    groups = param_groups_weight_decay(model, 0.1, rules={"3.*": 0.5, UserNorm: None})
    assert [(g["weight_decay"], g["param_names"][0]) for g in groups] == [
        (0.1, "0.weight"),
        (0.5, "3.weight"),
        (0.0, "0.bias"),
    ]
    (only,) = param_groups_weight_decay(model, 0.1, bias=True, norm=True, embedding=True)
    assert len(only["params"]) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.1), lr=0.1)
    other = torch.optim.AdamW(param_groups_weight_decay(copy.deepcopy(model), 0.1), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["0.weight", "2.gain", "3.weight"]
    for bad, error in (
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"rules": {"0.*": math.nan}}, "'0.\\*'"),
        ({"no_decay": ("none*",)}, "no_decay: 'none\\*'"),
        ({"no_decay": ("0.*",), "rules": {nn.Linear: 0.3}}, "two rules"),
        ({"no_decay": ("0.*",), "rules": {"0.*": 0.3}}, "in rules too"),
    ):
        with pytest.raises(ValueError, match=error):
            param_groups_weight_decay(model, **bad)
    with pytest.raises(TypeError, match="no_decay"):
        param_groups_weight_decay(model, no_decay="pos")
    with pytest.raises(TypeError, match="norm_types"):
        param_groups_weight_decay(model, norm_types=("LayerNorm",))


def test_wrappers_are_looked_through() -> None:
    model = mlp(4, 3)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert [line.name for line in Regularizer(wrapped, L2(1.0)).describe()] == [
        "0.weight",
        "0.bias",
    ]
    assert fastnorm.penalties.Regularizer is Regularizer


# ---- Attached to an optimizer


def test_attach_and_remove() -> None:
    model = mlp(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = Regularizer(model, L2(0.5))
    before = weights(model)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()

    with reg.attach(optimizer) as handle:
        with pytest.raises(ValueError, match="attached"):
            reg.attach(optimizer)
        step()
    assert_equal(weights(model), [before[0] * 0.9, before[1]])
    handle.remove()
    step()
    assert_equal(weights(model), [before[0] * 0.9, before[1]])
    reg.attach(optimizer, "prox").remove()
    for bad, error in (({"how": "l2"}, "how"), ({"schedule": "relative"}, "schedule")):
        with pytest.raises(ValueError, match=error):
            reg.attach(optimizer, **bad)
    with pytest.raises(TypeError, match="optimizer"):
        reg.attach(model)
    with pytest.raises(ValueError, match="none of the parameters"):
        reg.attach(torch.optim.SGD(mlp(2, 2).parameters(), 0.1))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_parameters_without_gradient_and_with_sparse_ones() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)}).double()
    model["table"] = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    reg = Regularizer(model, L2(0.5))
    (model["used"](model["table"](torch.tensor([1])))).sum().backward()
    value = reg.add_grads_()
    assert reg.skipped == {"no_grad": 1, "sparse": 1}
    assert model["unused"].weight.grad is None
    assert_equal(value, reg().detach())
    always = Regularizer(model, rules={"unused.weight": L2(0.5, always=True)})
    always.add_grads_()
    assert_equal(model["unused"].weight.grad, model["unused"].weight.detach())
    model.zero_grad()
    before = model["unused"].weight.detach().clone()
    optimizer = torch.optim.SGD(model["unused"].parameters(), 0.1)
    with reg.attach(optimizer, "decoupled"):
        optimizer.step()
    assert_equal(model["unused"].weight.detach(), before)
    with always.attach(optimizer, "decoupled"):
        optimizer.step()
    assert_equal(model["unused"].weight.detach(), 0.9 * before)


def test_each_optimizer_gets_its_own_parameters_and_rates() -> None:
    model = mlp(3, 3, 3)
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.SGD([{"params": model[2].weight, "lr": 0.2}], 0.3)
    reg = Regularizer(model, L2(0.5))
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reg.attach(first, "decoupled")
    reg.attach(second, "decoupled")
    first.step()
    second.step()
    after = weights(model)
    assert_equal([after[0], after[2]], [before[0] * 0.9, before[2] * 0.8])


def test_relative_schedule_ignores_the_base_rate() -> None:
    for lr in (0.1, 0.001):
        model = mlp(3, 2)
        before = weights(model)[0]
        optimizer = torch.optim.Adam(model.parameters(), lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        Regularizer(model, L2(0.05)).attach(optimizer, "decoupled", schedule="relative")
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            scheduler.step()
        assert_equal(weights(model)[0], before * (1 - 0.1) * (1 - 0.05))
    with pytest.raises(ValueError, match="initial_lr"):
        Regularizer(model, L2(0.1)).attach(
            torch.optim.SGD(model.parameters(), 0.0), "prox", schedule="relative"
        )


def test_combined_weight_decay_warns() -> None:
    model = mlp(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    with pytest.warns(UserWarning, match=r"'0.weight'.*weight_decay=0.01"):
        Regularizer(model, L2(0.1)).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Regularizer(model, L1(0.1)).attach(optimizer)


def test_closures_are_penalized_after_each_call() -> None:
    x, y = lasso_problem()
    model = nn.Linear(50, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    Regularizer(model, L2(0.5, half=True)).attach(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure=closure)
    gram = x.T @ x / 200 + 0.5 * torch.eye(50, dtype=torch.float64)
    assert_equal(model.weight.detach()[0], torch.linalg.solve(gram, x.T @ y / 200), 1e-5)


@pytest.mark.parametrize("how", ["grad", "decoupled", "prox"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", [L1(0.05), L2(0.05), L1L2(0.05, 0.02)], ids=repr)
def test_grad_scaler_changes_nothing(how: str, fused: bool, rule: Rule) -> None:
    data = torch.randn(16, 4)
    models = [mlp(4, 5, 1, dtype=torch.float32)]
    models.append(copy.deepcopy(models[0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0, fused=fused)
        Regularizer(model, rule).attach(optimizer, how)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            if model is models[0]:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-5, atol=1e-6)
    # A step that the scaler skips leaves everything as it was.
    before = weights(models[1])
    scaler.scale(models[1](data).sum() * math.inf).backward()
    scaler.step(optimizer)
    assert_equal(weights(models[1]), before, 0)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_gradients_are_not_scaled_again(fused: bool) -> None:
    models = [mlp(4, 1, dtype=torch.float32)]
    models.append(copy.deepcopy(models[0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
        Regularizer(model, L2(0.5)).attach(optimizer)
        loss = model(torch.ones(2, 4)).square().mean()
        if model is models[0]:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            scaler.step(optimizer)
    torch.testing.assert_close(weights(models[1]), weights(models[0]))


def test_under_autocast_the_sum_stays_in_float32(device) -> None:
    model = mlp(300, 300, dtype=torch.float32)
    reg = Regularizer(model, L1L2(0.1, 0.1))
    expected = reg()
    with torch.autocast(device, torch.bfloat16):
        value = reg()
        value.backward()
        added = reg.add_grads_()
    assert value.dtype == torch.float32
    assert_equal(value, expected, 0)
    # The kernel and torch sum in different orders: neither is further off than float32 allows.
    exact = Regularizer(copy.deepcopy(model).double(), L1L2(0.1, 0.1))().item()
    spread = abs(expected.item() - exact) + exact * 2.0**-23
    assert abs(added.item() - exact) <= spread


def test_gradient_accumulation_adds_the_penalty_once() -> None:
    data = torch.randn(8, 4, dtype=torch.float64)
    models = [mlp(4, 1)]
    models.append(copy.deepcopy(models[0]))
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        Regularizer(model, L2(0.5)).attach(optimizer)
        for part in data.chunk(parts):
            (model(part).square().mean() / parts).backward()
        optimizer.step()
    assert_equal(weights(models[1]), weights(models[0]))


def _ddp_rank(rank: int, store: str, results) -> None:  # type: ignore[no-untyped-def]
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = torch.randn(8, 4, dtype=torch.float64)
    model = nn.parallel.DistributedDataParallel(mlp(4, 3, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    Regularizer(model, L1(0.1), rules={"2.weight": L2(0.3)}).attach(optimizer, "grad")
    for _ in range(3):
        optimizer.zero_grad()
        model(data[rank::2]).square().mean().backward()
        optimizer.step()
    results.put((rank, [p.detach().numpy() for p in model.parameters()]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_agree_with_one_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_ddp_rank, args=(rank, str(tmp_path / "store"), results))
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    by_rank = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    data = torch.randn(8, 4, dtype=torch.float64)
    model = mlp(4, 3, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    Regularizer(model, L1(0.1), rules={"2.weight": L2(0.3)}).attach(optimizer, "grad")
    train(model, data, optimizer, steps=3)
    for rank in (0, 1):
        assert_equal([torch.asarray(a) for a in by_rank[rank]], weights(model))


def test_a_changed_strength_acts_at_once() -> None:
    model, rule = mlp(3, 2), L2(0.0)
    reg = Regularizer(model, rule)
    assert reg().item() == 0
    rule.lam = 0.5
    assert_equal(reg(), 0.5 * model[0].weight.square().sum())


# ---- The training code of the sources


def test_P2_training_with_l1_and_l2_terms() -> None:
    data, target = torch.randn(64, 4, dtype=torch.float64), torch.randint(3, (64,))
    by_hand = mlp(4, 8, 3)
    ours = copy.deepcopy(by_hand)
    l1_lambda, l2_lambda = 1e-3, 1e-2
    reg = Regularizer(ours, L1L2(l1_lambda, l2_lambda), bias=True)
    for model in (by_hand, ours):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data), target)
            if model is ours:
                loss = loss + reg()
            else:
                loss = loss + l1_lambda * sum(p.abs().sum() for p in model.parameters())
                loss = loss + l2_lambda * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
    assert_equal(weights(ours), weights(by_hand), 1e-10)
