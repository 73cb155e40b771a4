import copy
import math
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm.losses import cross_entropy
from fastnorm.penalties import L2, Regularizer
from fastnorm.stopping import EarlyStopping, lr_find, overfitting_gap
from fastnorm.testing import rng_state, seeded

NAN = math.nan

# values, options, (number of calls, best, best step, reason): the published conformance vectors.
VECTORS = [
    ([1, 0.9, 0.8, 0.85, 0.81, 0.8, 0.79], {"patience": 3}, (6, 0.8, 3, "patience")),
    ([1, 0.9, 0.9, 0.9], {"patience": 2}, (4, 0.9, 2, "patience")),
    ([1, 0.95, 0.91, 0.88, 0.86], {"patience": 2, "min_delta": 0.1}, (3, 1, 1, "patience")),
    ([1, 0.95, 0.91, 0.88, 0.86, 0.84], {"patience": 3, "min_delta": 0.1}, (6, 0.88, 4, None)),
    ([1, 0.9, NAN, NAN, NAN], {"patience": 2, "on_nonfinite": "count"}, (4, 0.9, 2, "patience")),
    ([1, 0.9, NAN], {"patience": 2}, (3, 0.9, 2, "non_finite")),
    ([NAN, NAN, 0.5, 0.6, 0.7], {"patience": 3, "on_nonfinite": "count"}, (5, 0.5, 3, None)),
    ([NAN, NAN], {"patience": 2, "on_nonfinite": "count"}, (2, None, None, "patience")),
    (
        [-1, -1.05, -1.2, -1.25, -1.3],
        {"patience": 2, "min_delta": 0.1, "min_delta_mode": "rel"},
        (5, -1.2, 3, "patience"),
    ),
    (
        [-1, -0.95, -0.9],
        {"patience": 2, "min_delta": 0.1, "min_delta_mode": "rel"},
        (3, -1, 1, "patience"),
    ),
    ([0.5, 0.6, 0.6, 0.59, 0.58], {"patience": 3, "mode": "max"}, (5, 0.6, 2, "patience")),
    ([9, 9.5, 9.9, 5, 4, 4.1, 4.2], {"patience": 2, "start_from": 3}, (7, 4, 5, "patience")),
]


def outcome(stopper):
    return stopper.num_steps, stopper.best, stopper.best_step, stopper.reason


def feed(stopper, values, model=None):
    for value in values:
        if stopper.step(value, model=model):
            break
    return outcome(stopper)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def bits(tensors):
    return [t.detach().clone().contiguous().view(-1).view(torch.uint8) for t in tensors]


@pytest.mark.parametrize(("values", "options", "expected"), VECTORS)
def test_E1_T3_conformance_vectors(values, options, expected):
    assert feed(EarlyStopping(**options), values) == expected


@pytest.mark.parametrize(("values", "options", "expected"), VECTORS)
def test_T1_resumed_at_any_step_ends_alike(values, options, expected, tmp_path):
    for k in range(len(values) + 1):
        model = nn.Linear(1, 1, bias=False)

        def run(stopper, part, model=model):
            for i, value in part:
                nn.init.constant_(model.weight, i)
                if stopper.step(value, model=model):
                    break

        first = EarlyStopping(**options, keep_best="cpu")
        numbered = list(enumerate(values, 1))
        run(first, numbered[:k])
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = EarlyStopping(**options, keep_best="cpu")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert second.stopped == first.stopped
        if not second.stopped:
            run(second, numbered[k:])
        assert outcome(second) == expected
        if expected[1] is None:
            assert not second.restore_best_(model, missing_ok=True)
        else:
            second.restore_best_(model)
            assert model.weight.item() == second.best_step


def test_E1_patience_loop_of_the_seed():
    """The counter of the usual hand-written loop; at least two values, strict improvement."""

    def by_hand(values, patience):
        best, bad = math.inf, 0
        for step, value in enumerate(values, 1):
            if value < best:
                best, bad = value, 0
            else:
                bad += 1
                if bad >= patience:
                    return step
        return None

    generator = random.Random(0)
    for _ in range(200):
        values = [generator.choice([0.1, 0.2, 0.3, 0.4, 0.5]) for _ in range(12)]
        patience = generator.randint(1, 5)
        stopper = EarlyStopping(patience)
        steps, *_, reason = feed(stopper, values)
        assert (steps if reason else None) == by_hand(values, patience)


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("min_delta_mode", ["abs", "rel"])
@pytest.mark.parametrize("min_delta", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("patience", [1, 2, 4])
def test_T3_options_against_the_rule_written_out(patience, min_delta, min_delta_mode, cumulative):
    generator = random.Random(f"{patience}{min_delta}{min_delta_mode}{cumulative}")
    for _ in range(50):
        values = [round(generator.uniform(-1, 1), 1) for _ in range(15)]
        best = best_step = None
        bad = 0
        for step, value in enumerate(values, 1):
            scale = 1 if best is None or min_delta_mode == "abs" else abs(best)
            if best is None or value < best - min_delta * scale:
                best, best_step, bad = value, step, 0
            else:
                bad += 1
                if not cumulative and value < best:
                    best, best_step = value, step
            if bad == patience:
                break
        expected = (step, best, best_step, "patience" if bad == patience else None)
        options = {
            "min_delta": min_delta,
            "min_delta_mode": min_delta_mode,
            "cumulative": cumulative,
        }
        assert feed(EarlyStopping(patience, **options), values) == expected
        mirrored = feed(EarlyStopping(patience, mode="max", **options), [-v for v in values])
        assert mirrored == (step, -best, best_step, expected[3])


@pytest.mark.parametrize("keep_best", ["cpu", "device", "path"])
@pytest.mark.parametrize("ending", ["patience", "last epoch", "exception"])
def test_E2_T2_best_weights_and_buffers_come_back(keep_best, ending, tmp_path):
    model = small_model()
    stopper = EarlyStopping(
        patience=2, keep_best=tmp_path / "best.pt" if keep_best == "path" else keep_best
    )
    values = [3.0, 2.0, 2.5, 2.6] if ending == "patience" else [3.0, 2.0, 2.5]
    best = None
    try:
        for i, value in enumerate(values):
            model.train()(torch.randn(8, 3) + i).sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1 * i)
            stopper.step(value, model=model)
            if i == 1:
                best = copy.deepcopy(model.state_dict())
        if ending == "exception":
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stopper.stopped == (ending == "patience")
    assert not torch.equal(model[0].weight, best["0.weight"])
    identity = [id(p) for p in model.parameters()]
    assert stopper.restore_best_(model) is True
    for name, entry in model.state_dict().items():
        assert torch.equal(entry, best[name]), name
    assert [id(p) for p in model.parameters()] == identity


def test_E2_another_runs_file_is_never_restored(tmp_path):
    path = tmp_path / "best.pt"
    model = small_model()
    EarlyStopping(keep_best=path).step(1.0, model=model)
    before = bits(model.state_dict().values())
    fresh = EarlyStopping(keep_best=path, on_nonfinite="count")
    fresh.step(NAN, model=model)
    with pytest.raises(RuntimeError, match="no value has qualified yet"):
        fresh.restore_best_(model)
    mine = EarlyStopping(keep_best=path)
    mine.step(1.0, model=model)
    EarlyStopping(keep_best=path).step(1.0, model=model)
    with pytest.raises(RuntimeError, match="another run"):
        mine.restore_best_(model)
    assert all(map(torch.equal, bits(model.state_dict().values()), before))
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    path.unlink()
    with pytest.raises(RuntimeError, match="is gone"):
        mine.restore_best_(model)


def test_E2_a_failing_write_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    stopper = EarlyStopping(keep_best=tmp_path / "file" / "best.pt")
    with pytest.raises(OSError):
        stopper.step(1.0, model=small_model())
    assert outcome(stopper) == (0, None, None, None)


def test_E3_best_is_kept_on_improvement_whatever_the_rhythm():
    model = nn.Linear(1, 1, bias=False)
    stopper = EarlyStopping(patience=9, keep_best="cpu")
    for step, value in [(10, 3.0), (np.int64(15), 2.0), (40, 2.5)]:
        nn.init.constant_(model.weight, step)
        stopper.step(value, model=model, at=step)
    stopper.restore_best_(model)
    assert stopper.best_step == 15 and type(stopper.best_step) is int
    assert model.weight.item() == 15
    assert stopper.num_steps == 3 and stopper.num_bad == 1


def test_kept_weights_follow_neither_training_nor_the_state_dict():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping(keep_best="device")
    stopper.step(1.0, model=model)
    state = stopper.state_dict()
    other = EarlyStopping(keep_best="device")
    other.load_state_dict(state)
    best = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    stopper.step(0.5, model=model)
    twin = copy.deepcopy(stopper)
    stopper.reset()
    other.restore_best_(model)
    assert torch.equal(model.weight, best)
    twin.restore_best_(model)
    assert not model.weight.any() and twin.best == 0.5


def test_module_versions_and_extra_state_survive():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = {"steps": 0}

        def get_extra_state(self):
            return self.seen

        def set_extra_state(self, state):
            self.seen = state

    model = nn.Sequential(Counter(), nn.BatchNorm1d(2))
    stopper = EarlyStopping(keep_best="cpu")
    stopper.step(1.0, model=model)
    model[0].seen["steps"] = 7
    for _ in range(2):
        stopper.restore_best_(model)
        assert model[0].seen == {"steps": 0}
        model[0].seen["steps"] = 9
    assert stopper.state_dict()["best_model"]._metadata["1"] == {"version": 2}


def test_E6_every_reason_is_told():
    assert feed(EarlyStopping(target=0.5), [1, 0.5])[3] == "target"
    assert feed(EarlyStopping(target=0.5, mode="max"), [0.4, 0.49, 0.5])[::3] == (3, "target")
    assert feed(EarlyStopping(diverged=10), [1, 10, 10.5])[::3] == (3, "diverged")
    assert feed(EarlyStopping(diverged=0.1, mode="max"), [1, 0.05])[3] == "diverged"
    assert feed(EarlyStopping(), [1, math.inf])[3] == "non_finite"
    assert feed(EarlyStopping(1), [1, 1])[3] == "patience"


def test_T4_non_finite_values_are_never_best():
    for mode in ("min", "max"):
        for value in (NAN, math.inf, -math.inf):
            stopper = EarlyStopping(2, mode=mode, on_nonfinite="ignore")
            assert feed(stopper, [value, value, value, 1.0, value]) == (5, 1.0, 4, None)
            assert stopper.num_bad == 0
            with pytest.raises(ValueError, match="value must be finite"):
                EarlyStopping(on_nonfinite="raise", mode=mode).step(value)
    stopper = EarlyStopping(2, on_nonfinite="count", keep_best="cpu")
    feed(stopper, [NAN, NAN], nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="no value has qualified"):
        stopper.restore_best_(nn.Linear(1, 1))


def test_T6_warm_up_is_not_looked_at_and_stopped_stays():
    stopper = EarlyStopping(1, start_from=2, target=0.0)
    assert feed(stopper, [NAN, -1.0, 5.0, 5.0]) == (4, 5.0, 3, "patience")
    assert stopper.step(1.0) and outcome(stopper) == (4, 5.0, 3, "patience")
    stopper.reset()
    assert outcome(stopper) == (0, None, None, None) and not stopper.stopped


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"patience": 1.5}, TypeError, "patience must be an int, got float"),
        ({"patience": True}, TypeError, "patience"),
        ({"mode": "auto"}, ValueError, "mode must be one of 'min', 'max', got 'auto'"),
        ({"min_delta": -1}, ValueError, "min_delta must be finite and at least 0, got -1"),
        ({"min_delta": NAN}, ValueError, "min_delta"),
        ({"min_delta_mode": "percent"}, ValueError, "min_delta_mode"),
        ({"start_from": -1}, ValueError, "start_from"),
        ({"target": "low"}, TypeError, "target must be a real number, got str"),
        ({"diverged": NAN}, ValueError, "diverged"),
        ({"on_nonfinite": "skip"}, ValueError, "on_nonfinite"),
        ({"keep_best": 3}, TypeError, "keep_best"),
        ({"sync": 3}, TypeError, "sync"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        EarlyStopping(**options)


def test_bad_values_change_nothing():
    stopper = EarlyStopping()
    stopper.step(torch.tensor([1.0]))
    for value, error in [
        ("0.5", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
        (torch.ones(2), ValueError),
        (np.ones(2), ValueError),
    ]:
        with pytest.raises(error, match="value must be"):
            stopper.step(value)
    with pytest.raises(ValueError, match="model is needed"):
        EarlyStopping(keep_best="cpu").step(1.0)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        EarlyStopping(keep_best="cpu").step(1.0, model="model")
    assert outcome(stopper) == (1, 1.0, 1, None)
    stopper.step(np.float32(0.5))
    stopper.step(torch.tensor(0.25, requires_grad=True))
    assert type(stopper.best) is float and stopper.best == 0.25


def test_bad_state_changes_nothing():
    stopper = EarlyStopping()
    stopper.step(1.0)
    state = stopper.state_dict()
    with pytest.raises(ValueError, match="mode 'min', this object of 'max'"):
        EarlyStopping(mode="max").load_state_dict(state)
    with pytest.raises(ValueError, match="unknown entries: extra"):
        stopper.load_state_dict({**state, "best": 0.1, "extra": 1})
    assert stopper.best == 1.0


def test_restoring_into_another_model_changes_nothing():
    stopper = EarlyStopping(keep_best="cpu")
    stopper.step(1.0, model=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = bits(other.state_dict().values())
    with pytest.raises(ValueError, match=r"1.weight \(1, 3\) instead of \(2, 3\)"):
        stopper.restore_best_(other)
    with pytest.raises(ValueError, match=r"1\.bias, 1\.weight"):
        stopper.restore_best_(nn.Sequential(nn.Linear(2, 3)))
    assert all(map(torch.equal, bits(other.state_dict().values()), before))
    plain = EarlyStopping()
    plain.step(1.0, model=other)
    with pytest.raises(RuntimeError, match="keep_best is None"):
        plain.restore_best_(other, missing_ok=True)


def test_T5_ranks_agree(tmp_path):
    """Two gloo processes with different values; the second one's are NaN at the end."""
    script = textwrap.dedent(
        f"""
        import math, sys, torch.distributed as dist
        from fastnorm.stopping import EarlyStopping
        rank = int(sys.argv[1])
        dist.init_process_group(
            "gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
        values = [[1.0, .1, .9, .9, .9, 5.0], [1.0, .9, .5, .95, .95, math.nan]][rank]
        for sync in (True, dist.group.WORLD, lambda value: value if rank == 9 else 0.5):
            stopper = EarlyStopping(2, sync=sync)
            for value in values:
                if stopper.step(value):
                    break
            print(stopper.num_steps, stopper.best, stopper.best_step, stopper.reason)
        stopper = EarlyStopping(9, sync=True)
        for value in values:
            stopper.step(value)
        print(stopper.num_steps, stopper.best_step, stopper.reason)
        dist.destroy_process_group()
        """
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0] == [
        "4 0.5 2 patience",
        "4 0.5 2 patience",
        "3 0.5 1 patience",
        "6 2 non_finite",
    ]


def test_T5_without_sync_no_collective_is_called(monkeypatch):
    import torch.distributed as dist

    def forbidden(*args, **kwargs):
        raise AssertionError("a collective was called")

    for name in ("all_gather", "all_reduce", "broadcast", "get_backend"):
        monkeypatch.setattr(dist, name, forbidden)
    assert feed(EarlyStopping(1), [1, 2]) == (2, 1, 1, "patience")
    # The same script on one device: there is no process group to agree with.
    assert feed(EarlyStopping(1, sync=True), [1, 2]) == (2, 1, 1, "patience")


def test_E5_Q1_overfitting_gap():
    steps = range(1, 21)
    train = [1 / t for t in steps]
    val = [1 / t + 0.01 * t for t in steps]  # lowest at t = 10
    report = overfitting_gap(train, val)
    assert report.overfitting and report.best_step == 10
    assert report.gap == pytest.approx(0.2, abs=1e-15)
    assert report.gaps == pytest.approx([0.01 * t for t in steps], abs=1e-15)
    assert report.train_change == pytest.approx(1 / 20 - 1 / 10)
    assert report.val_change == pytest.approx(1 / 20 + 0.2 - 0.2)
    assert not overfitting_gap(train, train).overfitting
    assert not overfitting_gap(train, [1.0] * 20).overfitting
    # Both rise: the training is unstable, which is something else.
    assert not overfitting_gap([1, 0.5, 0.9], [1, 0.5, 0.9]).overfitting
    noisy = [v + (0.3 if t == 4 else 0) for t, v in zip(steps, val, strict=True)]
    assert overfitting_gap(train, noisy, window=2).gaps[-1] == pytest.approx(0.195)
    for bad in ([], [1.0], [1.0, NAN]):
        with pytest.raises(ValueError):
            overfitting_gap(bad, [1.0, 2.0] if bad else [])
    with pytest.raises(ValueError, match="window"):
        overfitting_gap([1], [1], window=0)


# --- learning-rate finder


class Harness:
    """A model with batch norm, dropout, tied and frozen weights, a schedule and a random draw."""

    def __init__(self, optimizer="adamw", fail_at=None, scale=1.0):
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.model = nn.ModuleList([self.trunk, self.head, nn.Linear(2, 2)])
        self.model[2].requires_grad_(False)
        self.model.register_buffer("cache", torch.zeros(4), persistent=False)
        self.model.register_buffer("wide", torch.ones(1, 1).expand(3, 2))
        self.model.generator = seeded(1)
        self.model.calls = 0
        self.trunk[0].eval()
        groups = [
            {"params": self.trunk.parameters(), "lr": 1e-2},
            {"params": self.head.parameters(), "lr": torch.tensor(1e-3)},
        ]
        if optimizer == "lbfgs":
            self.optimizer = torch.optim.LBFGS([*self.head.parameters()], lr=0.1, max_iter=2)
        elif optimizer == "sgd":
            groups[1]["lr"] = 1e-3
            self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.1, amsgrad=True, foreach=False)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.fail_at, self.scale, self.seen = fail_at, scale, []

    def step(self):
        x = torch.randn(16, 5) + random.random() + np.random.rand()
        target = torch.randint(2, (16,), generator=self.model.generator)

        def closure():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.head(self.trunk(x)), target) * self.scale
            loss.backward()
            return loss

        loss = self.optimizer.step(closure)
        self.schedule.step()
        self.model.cache += 1
        self.model.calls += 1
        self.model.extra = [1]
        self.seen.append([group["lr"] for group in self.optimizer.param_groups])
        if self.fail_at == len(self.seen):
            self.model.train()
            self.model[2].requires_grad_(True)
            raise RuntimeError("the step failed")
        return loss

    def snapshot(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for p in self.model.parameters():
            if p.grad is not None:
                tensors.append(p.grad)
        state = copy.deepcopy(self.optimizer.state_dict())
        flat = torch.utils._pytree.tree_flatten((state, self.schedule.state_dict()))[0]
        tensors += [entry for entry in flat if isinstance(entry, torch.Tensor)]
        tensors += [rng_state(), self.model.generator.get_state()]
        others = [entry for entry in flat if not isinstance(entry, torch.Tensor)]
        others += [random.getstate(), np.random.get_state()[1].tolist(), self.model.calls]
        others += [module.training for module in self.model.modules()]
        others += [(p.requires_grad, p.grad is None) for p in self.model.parameters()]
        others += [hasattr(self.model, "extra"), getattr(self.optimizer, "_opt_called", None)]
        ids = [id(p) for p in self.model.parameters()]
        ids += [id(p.grad) for p in self.model.parameters()]
        ids += [
            id(v) for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v)
        ]
        return bits(tensors), others, ids


@pytest.mark.parametrize("ending", ["completed", "diverged", "exception", "fresh"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lbfgs"])
def test_E7_T10_lr_find_leaves_everything_as_it_was(optimizer, ending):
    run = Harness(optimizer)
    if ending != "fresh":
        for _ in range(2):
            run.step()
    del run.seen[:]
    before = run.snapshot()
    if ending == "exception":
        run.fail_at = 4
    options = {"num_iter": 12, "restore": [run.model, run.schedule], "end_lr": 1e-3}
    if ending == "diverged":
        options |= {"end_lr": 1e4, "beta": 0.0, "diverge": 1.01}

    def find():
        if ending == "exception":
            del run.seen[:]
            with pytest.raises(RuntimeError, match="the step failed"):
                lr_find(run.step, run.optimizer, **options)
            return None
        return lr_find(run.step, run.optimizer, **options)

    first = find()
    after = run.snapshot()
    assert all(map(torch.equal, before[0], after[0])) and len(before[0]) == len(after[0])
    assert before[1:] == after[1:]
    assert find() == first
    if ending == "diverged":
        assert first.reason in ("diverged", "non_finite")
    elif ending == "completed":
        assert first.reason == "completed" and len(first.lrs) == 12


def test_lr_find_rewinds_grad_scaler_and_replaced_storage():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    storage = weight.data_ptr()

    def step():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        weight.data = weight.data.clone()
        return loss

    lr_find(step, optimizer, num_iter=4, end_lr=1e-3, restore=scaler)
    assert scaler._scale is None and not scaler._per_optimizer_states
    assert torch.equal(weight.detach(), torch.ones(3)) and weight.data_ptr() == storage
    assert weight.grad is None and optimizer.param_groups[0]["lr"] == 0.5


def test_lr_find_tries_the_rates_it_reports_and_keeps_group_ratios():
    run = Harness("sgd")
    result = lr_find(run.step, run.optimizer, num_iter=5, start_lr=1e-4, end_lr=1e-2)
    assert result.lrs == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.2}, {"params": [], "lr": 0.1}])
    seen = []

    def step():
        seen.append([group["lr"] for group in optimizer.param_groups])
        return 1.0

    result = lr_find(step, optimizer, num_iter=3, start_lr=1, end_lr=3, step_mode="linear")
    assert seen == [[1, 0.5], [2, 1], [3, 1.5]] and result.lrs == (1, 2, 3)


def scripted(losses, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    losses = iter(losses)
    return lr_find(lambda: next(losses), optimizer, **options)


def test_E7_stops_at_the_factor_times_the_best_also_below_zero():
    assert len(scripted([2, 1, 3.9, 4.1, 1], num_iter=5, beta=0).losses) == 4
    assert scripted([2, 1, 4, 4, 4], num_iter=5, beta=0).reason == "completed"
    result = scripted([-1, -2, 3.9, 4.1, 1], num_iter=5, beta=0)
    assert result.reason == "diverged" and len(result.losses) == 4
    result = scripted([1, 0.5, NAN], num_iter=5)
    assert result.reason == "non_finite" and result.losses == (1, 0.5)
    # Debiased: a constant loss is its own average from the first step on.
    assert scripted([3.0] * 5, num_iter=5).smoothed == pytest.approx([3.0] * 5)


@pytest.mark.parametrize("step_mode", ["exp", "linear"])
def test_E7_steepest_slope_is_taken_in_log_lr(step_mode):
    """loss = 2 - 1 / (1 + (c / lr)): steepest in log lr at lr = c, in lr itself at 0."""
    centre, n = 1e-2, 400
    if step_mode == "exp":
        lrs = np.geomspace(1e-4, 1, n)
    else:
        lrs = np.linspace(1e-4, 1, n)
    result = scripted(
        [2 - 1 / (1 + centre / lr) for lr in lrs],
        num_iter=n,
        start_lr=1e-4,
        end_lr=1,
        beta=0,
        step_mode=step_mode,
        suggest="steepest",
    )
    # Ten per cent of the points are skipped at the start, which in linear mode passes the centre.
    expected = centre if step_mode == "exp" else lrs[n // 10]
    assert result.suggestion == pytest.approx(expected, rel=0.03)


def test_suggestions():
    losses = [1.0] * 10 + [1 - 0.1 * i for i in range(1, 9)] + [0.3, 0.5]
    result = scripted(losses, num_iter=20, start_lr=1e-4, end_lr=1e-2, beta=0)
    # The longest descent runs from index 9 to 17.
    assert result.suggestion == result.lrs[13]
    assert result.suggest("minimum") == pytest.approx(result.lrs[17] / 10)
    assert scripted([1.0, 2.0, 3.0], num_iter=3, beta=0).suggestion is None
    assert scripted([1.0, 0.5, 0.2], num_iter=3, suggest=None).suggestion is None
    with pytest.raises(ValueError, match="method"):
        result.suggest("best")


def test_lr_find_plot():
    pytest.importorskip("matplotlib").use("Agg")
    axes = scripted([3, 2, 1, 2], num_iter=4, beta=0).plot()
    assert axes.get_xscale() == "log" and len(axes.lines) == 3
    assert axes is scripted([3, 2], num_iter=2).plot(axes)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"start_lr": 0}, ValueError),
        ({"start_lr": 1, "end_lr": 1}, ValueError),
        ({"end_lr": math.inf}, ValueError),
        ({"num_iter": 1}, ValueError),
        ({"step_mode": "log"}, ValueError),
        ({"beta": 1}, ValueError),
        ({"diverge": 1}, ValueError),
        ({"suggest": "best"}, ValueError),
        ({"restore": "model"}, TypeError),
    ],
)
def test_lr_find_refuses_before_it_runs(options, error):
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    with pytest.raises(error):
        lr_find(lambda: pytest.fail("ran"), optimizer, **options)
    with pytest.raises(TypeError, match="Optimizer, got Linear"):
        lr_find(lambda: pytest.fail("ran"), [nn.Linear(1, 1)])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_E8_N2_penalty_dropout_and_early_stop_resume_alike(tmp_path, device):
    """Interrupted at any epoch and continued in new objects, the run ends as if never so."""
    generator = seeded(0)
    x, noise = torch.randn(60, 6, generator=generator), torch.randn(60, generator=generator)
    target = (x[:, 0] + 0.8 * noise > 0).long()

    def build(seed=1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), fastnorm.Dropout(0.2), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        regularizer = Regularizer(model, L2(1e-3, toward="init"))
        regularizer.attach(optimizer)
        return model, optimizer, EarlyStopping(patience=4, keep_best="cpu"), regularizer

    def train(model, optimizer, stopper, regularizer, epochs):
        for _ in range(epochs):
            model.train()
            optimizer.zero_grad()
            cross_entropy(model(x[:30]), target[:30], label_smoothing=0.05).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                value = F.cross_entropy(model(x[30:]), target[30:])
            if stopper.step(value, model=model):
                return

    whole = build()
    train(*whole, 60)
    expected = outcome(whole[2])
    assert expected[3] == "patience" and expected[0] > 6
    whole[2].restore_best_(whole[0])
    for k in (1, expected[2], expected[0] - 1):
        first = build()
        train(*first, k)
        state = {
            "model": first[0].state_dict(),
            "optimizer": first[1].state_dict(),
            "stopper": first[2].state_dict(),
            "regularizer": first[3].state_dict(),
            "rng": rng_state(),
        }
        torch.save(state, tmp_path / "checkpoint.pt")
        second = build(seed=2)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for part, name in zip(
            second, ("model", "optimizer", "stopper", "regularizer"), strict=True
        ):
            part.load_state_dict(state[name])
        (torch.cuda if device == "cuda" else torch).set_rng_state(state["rng"])
        train(*second, 60)
        assert outcome(second[2]) == expected
        second[2].restore_best_(second[0])
        pairs = zip(second[0].parameters(), whole[0].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
