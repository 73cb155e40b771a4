"""What surrounds a norm becomes part of its call: same results, same model, and back again."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import convert, fusion
from fastnorm.testing import assert_within_budget, random_tensor, rng_state


def randomize(model):
    for p in model.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    return model


class BasicBlock(nn.Module):
    """torchvision's, with its one ReLU."""

    def __init__(self, c, shared=True, downsample=False):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.relu2 = self.relu if shared else nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)) if downsample else None
        )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu2(out)


class ResNet(nn.Module):
    def __init__(self, shared=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(4, shared), BasicBlock(4, shared, True))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class PreNorm(nn.Module):
    def __init__(self, c, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(c), norm(c)
        self.attention = nn.Linear(c, c)
        self.drop1, self.drop2 = nn.Dropout(0.3), nn.Dropout(0.3)
        self.mlp = nn.Sequential(
            nn.Linear(c, 2 * c), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * c, c)
        )

    def forward(self, x, mask=None):
        h = self.attention(self.norm1(x))
        if mask is not None:
            h = h * mask
        x = x + self.drop1(h)
        return x + self.drop2(self.mlp(self.norm2(x)))


class PostNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(c, c), nn.Dropout(0.3), nn.LayerNorm(c)

    def forward(self, hidden, residual):
        return self.norm(self.dropout(self.dense(hidden)) + residual)


MODELS = {
    "resnet": (lambda: ResNet(), (3, 3, 8, 8), 5),
    "resnet, separate relus": (lambda: ResNet(shared=False), (3, 3, 8, 8), 5),
    "pre-norm": (lambda: nn.Sequential(PreNorm(12), PreNorm(12, nn.RMSNorm)), (2, 5, 12), 2),
    "sequential": (
        lambda: nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.SiLU(),
            nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU("tanh"), nn.Dropout(0.5),
        ),
        (4, 6),
        3,
    ),
}  # fmt: skip


def run(model, x, seed=5):
    """Results, running statistics and gradients of a training step."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.train().zero_grad()
    y = model(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    statistics = [b.clone() for b in model.buffers() if b.is_floating_point()]
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()], *statistics]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_training_step_is_as_near_to_float64_as_before(name, kernels):
    make, shape, expected = MODELS[name]
    model, x = randomize(make()), random_tensor(*shape)
    state, original = rng_state(), copy.deepcopy(model)
    kept = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    values = copy.deepcopy(model.state_dict())
    report = fastnorm.fuse(model, x)
    assert report.failure is None and len(report.fused) == expected, report
    # Nothing but forwards changed: not the random numbers, the statistics, the parameters, modes.
    assert torch.equal(rng_state(), state)
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == kept
    assert list(model.state_dict()) == list(values)
    assert all(map(torch.equal, model.state_dict().values(), values.values()))
    assert all(m.training for m in model.modules())
    unfused = copy.deepcopy(original)
    fastnorm.replace(unfused)
    exact = copy.deepcopy(unfused).double()
    assert_within_budget(run(model, x), run(unfused, x), run(exact, x.double()))
    # And all of it goes back.
    fastnorm.restore(model)
    model.load_state_dict(original.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert repr(model) == repr(original)
    assert torch.equal(model.eval()(x), original.eval()(x))


def test_what_became_of_a_residual_block():
    model = BasicBlock(4)
    report = fastnorm.fuse(model, random_tensor(2, 4, 6, 6))
    assert str(report).splitlines() == [
        "2 fused, 0 not; replaced: 2 swapped, 0 skipped",
        "    1  fastnorm.BatchNorm2d -> fastnorm.BatchNorm2d + relu  [bn1]",
        "    1  fastnorm.BatchNorm2d -> fastnorm.BatchNorm2d + add + relu  [bn2]",
    ]
    assert isinstance(model, BasicBlock) and type(model).__name__ == "FusedBasicBlock"
    assert model.bn2.activation == "relu" and type(model.bn2) is fastnorm.BatchNorm2d


def test_dropout_and_sum_before_a_norm():
    report = fastnorm.fuse(block := PostNorm(6), random_tensor(2, 3, 6), random_tensor(2, 3, 6))
    assert [c.after for c in report.fused] == ["dropout + add + fastnorm.LayerNorm"]
    assert type(block.norm) is fastnorm.AddLayerNorm and block.norm.dropout_p == 0.3


class Around(nn.Module):
    def __init__(self, function, norm=None):
        super().__init__()
        self.norm, self.function = norm or nn.LayerNorm(6), function

    def forward(self, x):
        return self.function(self, x)


FOLDED = {
    "F.relu": (lambda m, x: F.relu(m.norm(x)), "relu"),
    "F.relu in place": (lambda m, x: F.relu(m.norm(x), inplace=True), "relu"),
    "torch.relu": (lambda m, x: torch.relu(m.norm(x)), "relu"),
    "method": (lambda m, x: m.norm(x).relu_(), "relu"),
    "F.gelu": (lambda m, x: F.gelu(m.norm(x)), "gelu"),
    "F.gelu tanh": (lambda m, x: F.gelu(m.norm(x), approximate="tanh"), "gelu_tanh"),
    "F.silu": (lambda m, x: F.silu(m.norm(x)), "silu"),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.norm(x)), "leaky_relu"),
    "torch.sigmoid": (lambda m, x: torch.sigmoid(m.norm(x)), "sigmoid"),
    "tanh": (lambda m, x: m.norm(x).tanh(), "tanh"),
    "residual first": (lambda m, x: (x + m.norm(x)).relu(), "add + relu"),
    "torch.add": (lambda m, x: F.silu(torch.add(m.norm(x), x)), "add + silu"),
    "method add_": (lambda m, x: m.norm(x).add_(x), "add"),
    "in place": (lambda m, x: operator_iadd(m.norm(x), x), "add"),
}


def operator_iadd(a, b):
    a += b
    return a


@pytest.mark.parametrize("name", list(FOLDED))
def test_what_is_folded(name):
    function, expected = FOLDED[name]
    report = fastnorm.fuse(Around(function), random_tensor(3, 6))
    assert [c.after for c in report.fused] == [f"fastnorm.LayerNorm + {expected}"], report


def test_a_functional_dropout_reads_the_training_flag():
    """As the blocks of `transformers` have it. Its masks are torch's, so it stays an operation."""
    model = Around(lambda m, x: m.norm(x + F.dropout(x.exp(), 0.5, training=m.training)))
    before, x = copy.deepcopy(model), random_tensor(3, 6)
    report = fastnorm.fuse(model, x)
    assert [c.after for c in report.fused] == ["add + fastnorm.LayerNorm"], report
    for training in (True, False):
        results = []
        for m in (before, model):
            torch.manual_seed(0)
            results.append(m.train(training)(x))
        torch.testing.assert_close(*results)


def in_place_on_the_sum(m, x):
    x = x * 2
    x += m.norm(x)
    return x


def residual_is_written_between(m, x):
    y, x = m.norm(x), x * 2
    z = y * 1
    return z + x.mul_(2) + F.relu(y)


def input_is_written_between(m, x):
    x = x * 2
    y = m.norm(x)
    x.mul_(3)
    return y.relu() + x


def sum_is_written_between(m, x):
    s = x + x.exp()
    s.mul_(2)
    return m.norm(s)


def the_summand_is_kept(m, x):
    kept = x = x * 2
    x += m.norm(x)
    return x + kept


def the_callers_tensor_is_the_sum(m, x):
    x += x.detach().exp()
    return m.norm(x)


LEFT = {
    "caller's tensor": the_callers_tensor_is_the_sum,
    "kept summand": the_summand_is_kept,
    "written sum": in_place_on_the_sum,
    "used twice": lambda m, x: m.norm(x).mul(F.relu(m.norm.weight)),
    "two users": residual_is_written_between,
    "input written": input_is_written_between,
    "summand written": sum_is_written_between,
    "slope": lambda m, x: F.leaky_relu(m.norm(x), 0.2),
    "other slope": lambda m, x: F.leaky_relu(m.norm(x), negative_slope=0.2),
    "alpha": lambda m, x: torch.add(m.norm(x), x, alpha=2),
    "scalar": lambda m, x: m.norm(x) + 1,
    "broadcast": lambda m, x: m.norm(x) + x[:1],
    "twice itself": lambda m, x: (y := m.norm(x)) + y,
    "no activation of ours": lambda m, x: F.softplus(m.norm(x)),
}


@pytest.mark.parametrize("name", list(LEFT))
def test_what_is_left_alone(name):
    model, x = Around(LEFT[name]), random_tensor(3, 6)
    expected = model(x.clone())
    report = fastnorm.fuse(model, x)
    assert not report.fused and report.failure is None, report
    assert report.skipped[0].reason.startswith("no activation, dropout or residual add")
    assert type(model) is Around and "0 fused, 1 not" in str(report)
    torch.testing.assert_close(model(x), expected)


def test_reasons():
    x = random_tensor(3, 6)
    hooked = nn.Sequential(nn.LayerNorm(6), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    twice = Around(lambda m, x: F.relu(m.norm(x)) + m.norm(x))
    own = nn.Sequential(fastnorm.LayerNorm(6, activation="gelu"), nn.Dropout(0.1))
    flow = Around(lambda m, x: m.norm(x).relu() if x.sum() > 0 else x)
    mode = Around(lambda m, x: m.norm(x).relu() if m.training else m.norm(x))
    constant = Around(lambda m, x: F.relu(m.norm(x)) + torch.zeros(6))
    draws = Around(lambda m, x: F.relu(m.norm(x)) if random.random() < 2 else x)
    draws_too = Around(lambda m, x: F.relu(m.norm(x)) if torch.rand(()) < 2 else x)
    writes = Around(lambda m, x: setattr(m, "seen", x) or F.relu(m.norm(x)))
    counts = Around(lambda m, x: m.count.add_(1) * 0 + F.relu(m.norm(x)))
    counts.register_buffer("count", torch.zeros(()))
    assert fastnorm.fuse(counts, x).fused and counts.count == 0
    assert counts(x) is not None and counts.count == 1
    for model, reason in (
        (draws, "the forward that calls it draws random numbers of its own"),
        (draws_too, "the forward that calls it draws random numbers of its own"),
        (writes, "the forward that calls it writes to its module"),
        (constant, "the forward that calls it writes to its module"),
        (hooked, "it has hooks"),
        (twice, "it is called in several places"),
        (own, "it has an activation or dropout of its own"),
        (flow, "torch.fx can't trace the forward that calls it: TraceError"),
        (mode, "the forward that calls it does something else in training mode"),
    ):
        held = set(vars(model))
        states = random.getstate(), rng_state()
        report = fastnorm.fuse(model, x)
        assert not report.fused and report.skipped[0].reason.startswith(reason), report
        assert set(vars(model)) - {"seen"} == held and not isinstance(
            vars(model).get("seen"), torch.fx.Proxy
        )
        assert torch.equal(rng_state(), states[1])


def test_a_child_that_writes_to_the_input():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.child = nn.LayerNorm(6), nn.Sequential(nn.ReLU(inplace=True))

        def forward(self, x):
            x = x * 2
            y = self.norm(x)
            return self.child(x) + y

    assert not fastnorm.fuse(PreActivation(), random_tensor(3, 6)).fused


def test_a_dropout_with_hooks_or_a_mask_of_its_own_stays():
    hooked = nn.Sequential(nn.LayerNorm(6), nn.Dropout(0.1))
    hooked[1].register_forward_hook(lambda *_: None)
    shared = nn.Sequential(nn.LayerNorm(6), fastnorm.Dropout(0.1, shared_dims=0))
    for model in (hooked, shared):
        report = fastnorm.fuse(model, random_tensor(3, 6))
        assert not report.fused and report.failure is None


def test_the_order_of_the_draws_stays():
    def function(m, x):
        y, z = m.first(x), m.second(x)
        return m.norm(x + y) + z

    model = Around(function)
    model.first, model.second = nn.Dropout(0.4), nn.Dropout(0.4)
    report = fastnorm.fuse(model, random_tensor(3, 6))
    # The first dropout stays where it is; only the sum is the norm's.
    assert [c.after for c in report.fused] == ["add + fastnorm.LayerNorm"], report


class Output(dict):
    pass


torch.utils._pytree.register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda v, k: Output(zip(k, v, strict=True))
)


def test_a_result_that_a_trace_would_change():
    model = Around(lambda m, x: Output(y=F.relu(m.norm(x))))
    report = fastnorm.fuse(model, random_tensor(3, 6))
    assert report.skipped[0].reason == "the forward that calls it returns what torch.fx can't build"
    assert type(model(random_tensor(3, 6))) is Output


def test_a_model_without_norms_says_so():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    report = fastnorm.fuse(model, random_tensor(2, 6))
    assert str(report) == (
        "0 fused, 0 not; replaced: no norm or dropout that fastnorm knows; nothing changed"
    )
    assert type(model) is nn.Sequential


class Suspicious(nn.Module):
    """Does something else when a part of it was rewritten."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x):
        return self.part(x) * (1.0 if type(self.part) is nn.Sequential else 1.001)


def test_a_failed_proof_leaves_everything_as_it_was():
    model, x = Suspicious(), random_tensor(4, 6)
    fastnorm.replace(model.part[2])
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    state, values = rng_state(), copy.deepcopy(model.state_dict())
    report = fastnorm.fuse(model, x)
    assert not report.fused and "against float64" in report.failure
    assert str(report).startswith("nothing changed: the fused model could not be proven: ")
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == before
    assert torch.equal(rng_state(), state)
    assert all(map(torch.equal, model.state_dict().values(), values.values()))


def test_an_example_that_fails_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fastnorm.fuse(model, random_tensor(2, 5))
    with pytest.raises(TypeError, match="example_inputs: expected what to call the model with"):
        fastnorm.fuse(model)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got function"):
        fastnorm.fuse(lambda x: x, 1)
    assert type(model[1]) is nn.LayerNorm and model.training


def test_a_batch_too_small_to_train_is_no_proof():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    report = fastnorm.fuse(model, random_tensor(1, 6))
    assert "more than 1 value per channel" in report.failure
    assert type(model[1]) is nn.BatchNorm1d


def test_calls_of_another_form_run_the_forward_itself():
    model = randomize(PreNorm(6)).eval()
    plain = copy.deepcopy(model)
    x, mask = random_tensor(2, 5, 6), random_tensor(2, 5, 1)
    assert len(fastnorm.fuse(model, x).fused) == 1
    for args, kwargs in (((x, mask), {}), ((x,), {"mask": mask}), ((), {"x": x, "mask": None})):
        torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))
    assert type(model.norm2) is fastnorm.AddLayerNorm


def test_operands_that_only_broadcasting_or_promotion_brings_together(device):
    model = nn.ModuleDict(
        {"post": PostNorm(6), "after": Around(lambda m, x: F.gelu(m.norm(x) + m.r))}
    )
    model["after"].r = nn.Parameter(random_tensor(1, 5, 6))
    randomize(model).eval()
    plain = copy.deepcopy(model)
    x = random_tensor(1, 5, 6)
    assert fastnorm.fuse(model["post"], x, x).fused
    assert fastnorm.fuse(model["after"], x).fused
    many = random_tensor(3, 5, 6)
    for residual in (x, x.bfloat16()):
        torch.testing.assert_close(model["post"](many, residual), plain["post"](many, residual))
    torch.testing.assert_close(model["after"](many), plain["after"](many))
    with torch.autocast(device, torch.bfloat16):
        y = model["post"](many, many)
    torch.testing.assert_close(y.float(), plain["post"](many, many), rtol=0.03, atol=0.03)


def test_hooks_of_a_block_and_of_the_model_stay():
    model, seen = ResNet(), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.layer1[0].register_forward_hook(lambda *_: seen.append("block"))
    assert fastnorm.fuse(model, random_tensor(3, 3, 8, 8)).fused
    seen.clear()
    model(random_tensor(3, 3, 8, 8))
    assert seen == ["block", "model"]


def test_copies_pickles_and_compiled_models(tmp_path):
    model = randomize(nn.Sequential(PreNorm(6), nn.LayerNorm(6), nn.GELU())).eval()
    x = random_tensor(2, 5, 6)
    plain = model(x)
    assert len(fastnorm.fuse(model, x).fused) == 2
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in twins:
        assert type(twin[0]).__name__ == "FusedPreNorm" and isinstance(twin[0], PreNorm)
        assert torch.equal(twin(x), expected)
        twin.to(torch.float64)(x.double())
        fastnorm.restore(twin.to(torch.float32))
        assert torch.equal(twin(x), plain)
    assert type(model[0].norm2) is fastnorm.AddLayerNorm
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_fusing_twice_changes_nothing_more():
    model, x = randomize(ResNet()).eval(), random_tensor(3, 3, 8, 8)
    fastnorm.fuse(model, x)
    expected, shown = model(x), repr(model)
    assert not fastnorm.fuse(model, x).fused
    assert repr(model) == shown and torch.equal(model(x), expected)
    assert fastnorm.restore(model).swapped


def test_a_part_is_not_restored_alone():
    model, x = BasicBlock(4), random_tensor(2, 4, 6, 6)
    fastnorm.fuse(model, x)
    expected = model.eval()(x)
    report = fastnorm.restore(model.bn2)
    assert report.skipped[0].reason == "fused into a module outside of this part: restore that"
    assert torch.equal(model(x), expected)


def test_a_class_that_was_changed_again_stays():
    model, x = nn.Sequential(PostNorm(6)), random_tensor(2, 6)
    fastnorm.fuse(model[0], x, x)
    for module in (model[0], model[0].norm):
        module.__class__ = type("Sharded", (type(module),), {})
    report = fastnorm.restore(model)
    assert [(c.name, c.reason) for c in report.skipped] == [
        (name, "its class was changed again after fuse: undo that first")
        for name in ("0", "0.norm")
    ]
    assert isinstance(model[0].norm, fastnorm.AddLayerNorm)


def test_synchronized_afterwards():
    model, x = randomize(BasicBlock(4)), random_tensor(2, 4, 6, 6)
    fastnorm.fuse(model, x)
    expected = model.eval()(x)
    fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(model(x), expected)
    report = fastnorm.restore(model)
    assert {c.reason for c in report.skipped} == {
        "its class was changed again after replace: undo that first"
    }
    assert type(model) is BasicBlock and type(model.bn2) is fastnorm.SyncBatchNorm
    torch.testing.assert_close(model(x), expected)


def test_export():
    model, x = randomize(BasicBlock(4)).eval(), random_tensor(2, 4, 6, 6)
    fastnorm.fuse(model, x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_float64_model():
    model = randomize(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU())).double()
    assert len(fastnorm.fuse(model, random_tensor(3, 6, dtype=torch.float64)).fused) == 1


def test_a_model_that_casts_to_float32():
    model = Around(lambda m, x: F.gelu(m.norm(x)).float())
    assert len(fastnorm.fuse(model, random_tensor(3, 6)).fused) == 1


def test_an_optimizer_goes_on():
    model = randomize(ResNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, target = random_tensor(6, 3, 8, 8), torch.randint(5, (6,))
    losses = []
    for step in range(6):
        if step == 2:
            assert fastnorm.fuse(model, x).fused
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_marks_of_a_norm():
    model = nn.Sequential(nn.LayerNorm(6), nn.ReLU())
    fastnorm.fuse(model, random_tensor(2, 6))
    assert vars(model[0])[convert.FOLDED].activation == "relu"
    assert fusion.is_norm(model[0]) and not fusion.is_norm(nn.LayerNorm(6))
