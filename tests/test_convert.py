"""A model keeps everything but its norms' and dropouts' classes, and gets those back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import convert
from fastnorm.testing import assert_within_budget, random_tensor, rng_state

ARGUMENTS = {
    nn.LayerNorm: (6,),
    nn.RMSNorm: (6,),
    nn.GroupNorm: (2, 4),
    nn.BatchNorm1d: (4,),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (4,),
    nn.SyncBatchNorm: (4,),
    nn.InstanceNorm1d: (4, 1e-5, 0.1, True, True),
    nn.InstanceNorm2d: (4, 1e-5, 0.1, True, True),
    nn.InstanceNorm3d: (4, 1e-5, 0.1, True, True),
}


def shape_of(cls):
    return (3, 4, *[6] * {"1d": 1, "2d": 2, "3d": 3}.get(cls.__name__[-2:], 1))


def randomize(model):
    for p in model.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.again = self.norm
        self.drop = nn.Dropout(0.25)
        self.features = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.AlphaDropout(0.1))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.features(self.again(self.drop(self.norm(self.first(x))))))


@pytest.mark.parametrize("cls", list(convert.CLASSES))
def test_a_module_keeps_all_it_has(cls):
    module = cls(*ARGUMENTS.get(cls, (0.3,)))
    model = randomize(nn.ModuleDict({"m": module.eval()}))
    for p in module.parameters():
        p.requires_grad_(False)
    before = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
    tensors = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    keys = list(model.state_dict())
    report = fastnorm.replace(model)
    assert [(c.name, c.before) for c in report.swapped] == [("m", cls.__name__)]
    assert type(module) is convert.CLASSES[cls][0] and model["m"] is module
    assert list(model.state_dict()) == keys
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == tensors
    assert all(getattr(module, k) == v for k, v in before.items())
    assert not any(p.requires_grad for p in module.parameters())
    fresh = convert.CLASSES[cls][0](*ARGUMENTS.get(cls, (0.3,)))
    assert set(vars(fresh)) == set(vars(module)) - {convert._RECORD}
    assert set(fresh._buffers) == set(module._buffers)
    assert repr(module).split("(", 1)[1] == repr(fresh).split("(", 1)[1]


@pytest.mark.parametrize("cls", [c for c in ARGUMENTS if c is not nn.SyncBatchNorm])
def test_results_agree_with_torch(cls, kernels):
    module = randomize(cls(*ARGUMENTS[cls]))
    exact = copy.deepcopy(module).double()
    theirs = copy.deepcopy(module)
    fastnorm.replace(module)
    x = random_tensor(*shape_of(cls), mean=1.0)
    results = [m(x.to(dtype)) for m, dtype in
               ((module, x.dtype), (theirs, x.dtype), (exact, torch.float64))]  # fmt: skip
    assert_within_budget(*results)
    buffers = [dict(m.named_buffers()) for m in (module, theirs, exact)]
    for name in buffers[0]:
        if name.startswith("running"):
            assert_within_budget(*[b[name] for b in buffers], what=name)
        else:
            assert torch.equal(buffers[0][name], buffers[1][name])


@pytest.mark.parametrize("cls", list(convert.CLASSES))
def test_restore_leaves_no_trace(cls):
    module = cls(*ARGUMENTS.get(cls, (0.3,)))
    before, buffers = dict(vars(module)), dict(module._buffers)
    persistent = set(module._non_persistent_buffers_set)
    fastnorm.replace(module)
    report = fastnorm.restore(module)
    assert [(c.before, c.after) for c in report.swapped] == [
        (f"fastnorm.{cls.__name__}", cls.__name__)
    ]
    assert type(module) is cls and vars(module) == before and module._buffers == buffers
    assert module._non_persistent_buffers_set == persistent
    assert str(fastnorm.restore(module)).startswith("no norm or dropout")


def test_restored_outputs_are_bit_equal():
    model = randomize(Net())
    x = random_tensor(5, 6)

    def run():
        torch.manual_seed(3)
        state = copy.deepcopy(model.state_dict())
        y = model(x)
        model.load_state_dict(state)
        return y

    expected = run()
    fastnorm.replace(model)
    run()
    fastnorm.restore(model)
    assert torch.equal(run(), expected)


def test_shared_modules_stay_one():
    model = Net()
    report = fastnorm.replace(model)
    assert model.norm is model.again
    assert report.swapped[0].name == "norm = again"
    assert len(report.swapped) == 4


def test_the_model_itself_may_be_a_norm():
    norm = nn.LayerNorm(6)
    assert fastnorm.replace(norm).swapped[0].name == "(root)"
    assert type(norm) is fastnorm.LayerNorm
    assert fastnorm.restore(norm).swapped and type(norm) is nn.LayerNorm


def test_hooks_stay():
    norm = nn.LayerNorm(6)
    model = nn.Sequential(norm)
    called = []
    norm.register_forward_pre_hook(lambda *_: called.append("pre"))
    norm.register_forward_hook(lambda *_: called.append("forward"))
    norm.register_full_backward_hook(lambda *_: called.append("backward"))
    norm.register_state_dict_post_hook(lambda *_: called.append("state_dict"))
    norm.register_load_state_dict_post_hook(lambda *_: called.append("load"))
    norm.weight.register_hook(lambda _: called.append("gradient"))
    fastnorm.replace(model)
    model(random_tensor(2, 6).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert called[:2] == ["pre", "forward"]
    assert sorted(called[2:]) == ["backward", "gradient", "load", "state_dict"]


def test_an_optimizer_goes_on():
    model = randomize(Net()).eval()  # without dropout's draws
    theirs = copy.deepcopy(model)
    x, target = random_tensor(8, 6), random_tensor(8, 2)
    losses = []
    for net, swap in ((theirs, False), (model, True)):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        found = []
        for step in range(6):
            if swap and step == 3:
                assert len(fastnorm.replace(net).swapped) == 4
            loss = nn.functional.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_copies_and_pickles_work_and_restore():
    model = randomize(Net()).eval()
    x = random_tensor(5, 6)
    expected = model(x)
    fastnorm.replace(model)
    swapped = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.norm is twin.again and type(twin.norm) is fastnorm.LayerNorm
        assert torch.equal(twin(x), swapped)
        assert len(fastnorm.restore(twin).swapped) == 4
        assert torch.equal(twin(x), expected)
    assert type(model.norm) is fastnorm.LayerNorm


def test_checkpoints_fit_both_ways():
    theirs, ours = randomize(Net()), Net()
    fastnorm.replace(ours)
    for source, target in ((theirs, ours), (ours, theirs)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_module_to_and_half():
    model = randomize(Net())
    fastnorm.replace(model)
    model.to(torch.bfloat16).eval()
    assert model(random_tensor(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.to(torch.float64)(random_tensor(5, 6, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("swap_on_meta", [True, False])
def test_built_on_meta_then_filled(swap_on_meta, device):
    source = randomize(Net()).eval()
    with torch.device("meta"):
        model = Net()
    if swap_on_meta:
        assert len(fastnorm.replace(model).swapped) == 4
    model.to_empty(device=device).eval()
    if not swap_on_meta:
        fastnorm.replace(model)
    model.load_state_dict(source.state_dict())
    assert model(random_tensor(5, 6)).isfinite().all()
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))


def test_skip_init(device):
    norm = nn.utils.skip_init(nn.LayerNorm, 6, device=device)
    ours = nn.utils.skip_init(fastnorm.LayerNorm, 6, device=device)
    assert ours.weight.shape == norm.weight.shape
    assert len(fastnorm.replace(norm).swapped) == 1
    batch_norm = nn.utils.skip_init(fastnorm.BatchNorm2d, 6, device=device)
    batch_norm.reset_parameters()
    assert batch_norm(random_tensor(2, 6, 3, 3)).isfinite().all()


class Subclass(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class FrozenBatchNorm2d(nn.Module):
    pass


def skipped_modules():
    patched = nn.LayerNorm(6)
    patched.forward = lambda x: x
    return {
        "LayerNorm": (patched, "its forward was replaced on the instance"),
        "Subclass": (Subclass(6), "a subclass of torch.nn.LayerNorm, whose code may differ"),
        "LazyBatchNorm1d": (nn.LazyBatchNorm1d(), "lazy: run a forward first"),
        "ParametrizedLayerNorm": (
            nn.utils.parametrizations.weight_norm(nn.LayerNorm(6), dim=None),
            "parametrized: replace the norm first, then parametrize it",
        ),
        "fastnorm.LayerNorm": (fastnorm.LayerNorm(6), "already fastnorm's"),
        "FrozenBatchNorm2d": (
            FrozenBatchNorm2d(),
            "not a class that is known to compute one of our norms",
        ),
    }


@pytest.mark.parametrize("kind", list(skipped_modules()))
def test_what_is_skipped_says_why_and_is_not_touched(kind):
    module, reason = skipped_modules()[kind]
    model = nn.Sequential(nn.Linear(6, 6), module)
    cls, before = type(module), dict(vars(module))
    report = fastnorm.replace(model)
    assert not report.swapped
    assert [(c.name, c.before, c.reason) for c in report.skipped] == [("1", kind, reason)]
    assert type(module) is cls and vars(module) == before
    assert "1 skipped" in str(report) and reason in str(report)


def test_a_model_without_norms_says_so():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    report = fastnorm.replace(model)
    assert not report.swapped and not report.skipped
    assert str(report) == "no norm or dropout that fastnorm knows; nothing changed"
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got list"):
        fastnorm.replace([model])


def test_torch_nn_is_as_it_was():
    names, norm = dict(vars(nn)), dict(vars(nn.LayerNorm))
    fastnorm.replace(Net())
    assert vars(nn) == names and dict(vars(nn.LayerNorm)) == norm
    assert type(nn.LayerNorm(6)) is nn.LayerNorm


def test_restore_keeps_what_torch_can_not_do():
    model = nn.Sequential(nn.LayerNorm(6), nn.BatchNorm1d(6), fastnorm.RMSNorm(6))
    fastnorm.replace(model)
    model[0].activation = "gelu"
    model[1].freeze()
    report = fastnorm.restore(model)
    assert not report.swapped
    assert [c.reason for c in report.skipped] == [
        "activation was set to 'gelu' after replace, which LayerNorm does not have",
        "use_running_stats was set to True after replace, which BatchNorm1d does not have",
        "built as fastnorm's, nothing to go back to",
    ]
    model[0].activation = None
    model[1].unfreeze()
    assert len(fastnorm.restore(model).swapped) == 2


# What model libraries write, in the shapes they write it.


class LlamaRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.dim = "an attribute of ours by another meaning"

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerNormFp32(nn.LayerNorm):
    def forward(self, x):
        wide = [None if t is None else t.float() for t in (x, self.weight, self.bias)]
        return nn.functional.layer_norm(wide[0], self.normalized_shape, *wide[1:], self.eps).to(
            x.dtype
        )


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states)


class OutsideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        root = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * hidden_states / (root + self.variance_epsilon)


class MeanRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class DetachedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * root.detach()).to(hidden_states.dtype)


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(LlamaRMSNorm, (3, 16)), (GemmaRMSNorm, (3, 16)), (LayerNormFp32, (3, 16))],
)
def test_library_norms_are_proven_and_swapped(cls, shape, kernels):
    module = randomize(cls(16))
    before = dict(vars(module))
    exact, theirs = copy.deepcopy(module).double(), copy.deepcopy(module)
    x = random_tensor(*shape)
    state = rng_state()
    report = fastnorm.replace(module)
    assert torch.equal(rng_state(), state) and module.weight.grad is None
    assert isinstance(module, (fastnorm.RMSNorm, fastnorm.LayerNorm)) and len(report.swapped) == 1
    if cls is LayerNormFp32:
        formula = nn.functional.layer_norm(x.double(), (16,), exact.weight, exact.bias, 1e-5)
    else:
        offset = 1.0 if cls is GemmaRMSNorm else 0.0
        formula = nn.functional.rms_norm(x.double(), (16,), exact.weight + offset, 1e-6)
    assert_within_budget(module(x), theirs(x), formula)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    twin = pickle.loads(pickle.dumps(module))
    for m in (module, twin):
        fastnorm.restore(m)
        assert type(m) is cls and vars(m).keys() == before.keys()
    assert vars(module) == before


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (GatedRMSNorm, "its forward takes more than the input"),
        (OutsideRMSNorm, "its results on random inputs"),
        (MeanRMSNorm, "its results on random inputs"),
        (DetachedRMSNorm, "its results on random inputs"),
        (BiasedRMSNorm, "it has more parameters"),
        (LayerNorm2d, "it permutes channels-first input, and its result is channels-last"),
    ],
)
def test_library_norms_of_another_formula_are_skipped(cls, reason):
    module = cls(16)
    report = fastnorm.replace(nn.Sequential(module))
    assert not report.swapped and type(module) is cls
    assert report.skipped[0].reason.startswith(reason)


def test_a_long_report_is_short():
    text = str(fastnorm.replace(nn.Sequential(*[nn.LayerNorm(2) for _ in range(50)])))
    assert text.splitlines() == [
        "50 swapped, 0 skipped",
        "   50  LayerNorm -> fastnorm.LayerNorm  [0, 1, and 48 more]",
    ]


def test_a_compiled_model_sees_the_swap():
    model = nn.Sequential(randomize(nn.LayerNorm(6)))
    x = random_tensor(4, 6)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    fastnorm.replace(model)
    model[0].activation = "relu"
    torch.testing.assert_close(compiled(x), expected.relu())
