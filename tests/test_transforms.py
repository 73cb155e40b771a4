import copy

import pytest
import torch
from torch import nn

from fastnorm.testing import seeded
from fastnorm.transforms import StandardScaler


def data(n=50, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return (x * torch.tensor([0.1, 1, 10, 3]) + torch.tensor([5.0, -2, 1e3, 0])).to(dtype)


def test_G1_X1_mean_0_std_1_and_constants_become_0():
    x = data()
    x[:, 3] = 0.1
    y = StandardScaler(4).fit(x)(x)
    assert y.mean(0).abs().max() < 1e-12
    assert torch.allclose(y[:, :3].std(0, correction=0), torch.ones(3).double(), atol=1e-12)
    assert not y[:, 3].any()
    # Dividing by the variance would leave 1 / std: 10, 1 and 0.1.
    assert StandardScaler().fit(data()).scale()[:3].tolist() == pytest.approx([0.1, 1, 10], rel=0.3)


@pytest.mark.parametrize("value", [0.1, 1e-20, 1e20, 7.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_G1_a_constant_of_any_size_in_any_batches(value, dtype):
    scaler = StandardScaler(1)
    for n in (1, 7, 1000, 3):
        scaler.partial_fit(torch.full((n, 1), value, dtype=dtype))
    y = scaler(torch.full((2, 1), value, dtype=dtype))
    assert y.abs().max() <= abs(value) * torch.finfo(dtype).eps
    assert scaler.scale().item() == 1


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [3, 17, 1, 29], [49, 1], [0, 50, 0]])
def test_G2_batches_merge_exactly(sizes):
    x = data()
    whole, parts = StandardScaler(4).fit(x), StandardScaler()
    for part in x.split(sizes):
        parts.partial_fit(part)
    for name in ("mean", "var", "count"):
        got, want = getattr(parts, name), getattr(whole, name)
        assert torch.allclose(got.double(), want.double(), rtol=1e-12, atol=0), name
    assert torch.allclose(whole.var, x.var(0, correction=0), rtol=1e-12)


def test_G2_G4_use_never_updates():
    scaler = StandardScaler(4).fit(data())
    before = copy.deepcopy(scaler.state_dict())
    for mode in (True, False):
        scaler.train(mode)(data(seed=1) + 100)
        scaler.inverse(data(seed=2))
    assert all(torch.equal(before[k], v) for k, v in scaler.state_dict().items())
    assert not list(scaler.parameters())


def test_G2_state_dict_round_trip(tmp_path):
    scaler = StandardScaler().fit(data())
    model = nn.Sequential(scaler, nn.Linear(4, 1).double())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(StandardScaler(), nn.Linear(4, 1).double())
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = data(seed=3)
    assert torch.equal(fresh(x), model(x))
    # It goes on learning as if never interrupted.
    scaler.partial_fit(x)
    fresh[0].partial_fit(x)
    assert torch.equal(scaler.var, fresh[0].var) and torch.equal(scaler.count, fresh[0].count)
    with pytest.raises(RuntimeError, match="size mismatch"):
        StandardScaler(3).load_state_dict(scaler.state_dict())


def test_G3_fewer_steps_after_scaling():
    torch.manual_seed(0)
    raw = torch.randn(200, 3).double() * torch.tensor([0.3, 1, 5])
    raw -= raw.mean(0)
    target = raw @ torch.tensor([3.0, 1.0, 0.1]).double()

    def steps(x):
        w = torch.zeros(3, dtype=torch.float64)
        hessian = x.T @ x / len(x)
        lr = 1 / torch.linalg.eigvalsh(hessian)[-1]
        for step in range(20_000):
            error = x @ w - target
            if error.square().mean() < 1e-6:
                return step
            w -= lr * (x.T @ error) / len(x)

    scaled = StandardScaler().fit(raw)(raw)
    assert 10 * steps(scaled) < steps(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_far_from_zero_keeps_precision(dtype):
    """The mean is used to more digits than the dtype has; only the input's own rounding counts."""
    x = (1000 + torch.randn(200, 2, dtype=torch.float64)).to(dtype)
    scaler = StandardScaler().fit(x)
    exact = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    y = scaler(x)
    assert y.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * exact.abs().max() + 4 * 1000 * 2.0**-52
    assert (y.double() - exact).abs().max() <= tolerance
    back = scaler.inverse(y)
    spread = torch.finfo(dtype).eps * (1000 + 8)
    assert (back.double() - x.double()).abs().max() <= 2 * spread


def test_masks_and_dims():
    x = torch.randn(6, 3, 5).double()
    scaler = StandardScaler(3, dim=1).fit(x)
    assert torch.allclose(scaler.mean, x.mean((0, 2)))
    y = scaler(x)
    assert torch.allclose(y.var((0, 2), correction=0), torch.ones(3).double())
    assert torch.allclose(scaler.inverse(y), x)
    mask = torch.rand(6, 1, 5) > 0.5
    dirty = x.masked_fill(~mask, float("nan"))
    masked = StandardScaler(dim=-2).fit(dirty, mask)
    chosen = x.movedim(1, 2)[mask[:, 0]]
    assert torch.allclose(masked.mean, chosen.mean(0))
    assert torch.allclose(masked.var, chosen.var(0, correction=0))
    # A mask per element: every feature has its own count; a feature never seen is left alone.
    each = torch.rand(6, 3, 5) > 0.5
    each[:, 2] = False
    scaler = StandardScaler(dim=1).fit(x, each)
    assert torch.allclose(scaler.mean[0], x[:, 0][each[:, 0]].mean())
    assert scaler.count.tolist() == each.sum((0, 2)).tolist() and scaler.var[2] == 1


def test_casting_moves_but_keeps_float64():
    scaler = StandardScaler().fit(data())
    mean = scaler.mean.clone()
    model = nn.Sequential(scaler, nn.Linear(4, 1)).to(torch.bfloat16).half().float()
    assert scaler.mean.dtype == torch.float64 and torch.equal(scaler.mean, mean)
    assert model[1].weight.dtype == torch.float32
    assert scaler.to("meta").mean.device.type == "meta"


def test_integers_gradients_and_eps():
    x = torch.arange(12).reshape(4, 3)
    scaler = StandardScaler().fit(x)
    assert scaler(x).dtype == torch.float32
    assert torch.allclose(scaler(x).mean(0), torch.zeros(3), atol=1e-6)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaler, z)
    assert StandardScaler(eps=100).fit(x).scale().tolist() == [100] * 3
    assert not scaler.mean.requires_grad
    assert StandardScaler().fit(z).mean.grad_fn is None


def test_compiles_to_one_graph():
    scaler = StandardScaler().fit(data(dtype=torch.float32))
    x = data(seed=5, dtype=torch.float32)
    compiled = torch.compile(scaler, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), scaler(x))


def test_errors_change_nothing():
    scaler = StandardScaler(4).fit(data())
    before = scaler.mean.clone()
    with pytest.raises(ValueError, match=r"4 features in dim -1, got shape \(2, 3\)"):
        scaler.fit(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="broadcastable"):
        scaler.fit(torch.zeros(2, 4), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        scaler.partial_fit(torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="dimension 3"):
        StandardScaler(dim=3).fit(torch.zeros(2, 4))
    assert torch.equal(scaler.mean, before)
    for unfitted in (StandardScaler(), StandardScaler(4)):
        with pytest.raises(RuntimeError, match="must be fitted"):
            unfitted(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="num_features"):
        StandardScaler(0)
    with pytest.raises(ValueError, match="eps"):
        StandardScaler(eps=-1)
