"""Batch norm against torch's: values, derivatives, running statistics, freezing, masks."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from channel_norm_checks import (
    LAYOUTS,
    channels_last,
    check,
    check_derivatives,
    composed,
    parameters,
    strides,
    with_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm import _ops
from fastnorm.epilogue import ACTIVATIONS

SHAPES = [(5, 3), (3, 4, 7), (2, 5, 3, 6), (1, 3, 4, 5), (2, 3, 2, 3, 2)]
BACKENDS = pytest.mark.parametrize("backend", ["kernel", "reference"])


def running(channels, dtype=torch.float32):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


def ours(training, stats=(None, None), activation=None, **kwargs):
    def run(x, w, b, r=None):
        mean, var = (None if s is None else s.to(x.dtype, copy=True) for s in stats)
        return fastnorm.batch_norm(
            x, mean, var, w, b, training, activation=activation, residual=r, **kwargs
        )

    return run


def theirs(training, stats=(None, None), activation=None):
    def norm(x, w, b):
        mean, var = (None if s is None else s.to(x.dtype, copy=True) for s in stats)
        return F.batch_norm(x, mean, var, w, b, training)

    return composed(norm, activation)


def buffers_close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance, msg=key)


# ---- values and derivatives ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives(activation, residual, training):
    memory = "channels_last" if residual else "contiguous"
    for weight, bias in itertools.product([False, True], repeat=2):
        x, r = (LAYOUTS[memory](t) for t in torch.randn(2, 3, 2, 2, 2, dtype=torch.float64))
        tensors = [x, *parameters(2, x.dtype, weight, bias), r if residual else None]
        stats = running(2, torch.float64)
        check_derivatives(
            ours(training, stats, activation), theirs(training, stats, activation), tensors
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(shape, dtype, training):
    channels = shape[1]
    w, b = parameters(channels, dtype)
    stats = running(channels)
    for layout, of_grad in itertools.product(LAYOUTS, LAYOUTS):
        if len(shape) < 3 and ("channels_last" in layout + of_grad or layout == "expanded"):
            continue
        x = LAYOUTS[layout](torch.randn(shape).to(dtype))
        r = LAYOUTS[of_grad](torch.randn(shape).to(dtype))
        given = stats if not training else (None, None)
        check(
            ours(training, given, "relu"), theirs(training, given, "relu"), [x, w, b, r], r,
            f"{layout} {of_grad}", 16,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 33, 14, 14), (1000, 32), (7, 130, 3, 3)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_larger(shape, offset):
    x = torch.randn(shape) + offset
    tensors = [x, *parameters(shape[1], x.dtype)]
    check(ours(True), theirs(True), tensors, torch.randn(shape))
    if len(shape) > 2:
        check(ours(True), theirs(True), [channels_last(x), *tensors[1:]], torch.randn(shape))


@BACKENDS
def test_memory_format_is_kept(backend):
    with fastnorm.use_backend(backend):
        for shape in SHAPES[1:]:
            x = channels_last(torch.randn(shape)).requires_grad_()
            y = fastnorm.batch_norm(x, None, None, training=True, activation="relu")
            assert strides(y) == strides(x)
            y.backward(torch.randn(shape))
            assert strides(x.grad) == strides(x)


@BACKENDS
def test_channel_dim(backend):
    with fastnorm.use_backend(backend):
        for shape, dim in (((4, 7, 3), -1), ((4, 3, 7), 1), ((2, 4, 3, 5), 2)):
            mine, ref = fastnorm.BatchNorm1d(3, channel_dim=dim), nn.BatchNorm1d(3)
            mine._check_input_dim = lambda x: None
            x, r = torch.randn(2, *shape)
            flat = x.movedim(dim, 1).flatten(2)
            want = ref(flat).view(x.movedim(dim, 1).shape).movedim(1, dim) + r
            torch.testing.assert_close(mine(x, r), want)
            buffers_close(mine.state_dict(), ref.state_dict())
    x = torch.randn(4, 7, 3)
    assert fastnorm.BatchNorm1d(3, channel_dim=-1)(x).is_contiguous()
    with pytest.raises(IndexError, match="channel"):
        fastnorm.batch_norm(x, None, None, training=True, channel_dim=3)


def test_dropout():
    norm = fastnorm.BatchNorm2d(8, dropout_p=0.4)
    x = channels_last(torch.randn(4, 8, 5, 5))
    torch.manual_seed(1)
    y = norm(x)
    assert 0.3 < (y == 0).float().mean() < 0.5
    torch.manual_seed(1)
    with fastnorm.use_backend("reference"):
        assert torch.equal(norm(x) == 0, y == 0)
    assert (norm.eval()(x) != 0).all()


# ---- running statistics ----


@pytest.mark.parametrize("momentum", [0, 0.1, 1, None])
@BACKENDS
@pytest.mark.parametrize("cls", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_five_steps_leave_torchs_buffers(cls, backend, momentum):
    shape = {"BatchNorm1d": (6, 5), "BatchNorm2d": (2, 5, 3, 3), "BatchNorm3d": (2, 5, 1, 2, 1)}
    mine, ref = (getattr(m, cls)(5, momentum=momentum) for m in (fastnorm, nn))
    with fastnorm.use_backend(backend):
        for _ in range(5):
            x = torch.randn(shape[cls]) * 3 + 2
            torch.testing.assert_close(mine(x), ref(x))
        buffers_close(mine.state_dict(), ref.state_dict())
        torch.testing.assert_close(mine.eval()(x), ref.eval()(x))


def test_buffers_know_that_they_changed():
    norm = fastnorm.BatchNorm1d(3)
    before = [b._version for b in norm.buffers()]
    norm(torch.randn(4, 3))
    assert all(b._version > v for b, v in zip(norm.buffers(), before, strict=True))


@BACKENDS
@pytest.mark.parametrize("n", [8, 9, 4, 3, 2])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_virtual_batches_are_a_loop(momentum, n, backend):
    def loop(x, w, b):
        return torch.cat([F.batch_norm(c, None, None, w, b, True).relu() for c in x.split(4)])

    ghost = ours(True, activation="relu", virtual_batch_size=4)
    with fastnorm.use_backend(backend):
        for memory in ("contiguous", "channels_last"):
            x, g = (LAYOUTS[memory](t) for t in torch.randn(2, n, 5, 3, 2))
            check(ghost, loop, [x, *parameters(5, x.dtype)], g)
        mine, ref = (
            fastnorm.BatchNorm2d(5, momentum=momentum, virtual_batch_size=4),
            nn.BatchNorm2d(5, momentum=momentum),
        )
        for _ in range(2):
            x = torch.randn(n, 5, 3, 2)
            torch.testing.assert_close(mine(x), torch.cat([ref(part) for part in x.split(4)]))
        buffers_close(mine.state_dict(), ref.state_dict())
        torch.testing.assert_close(mine.eval()(x), ref.eval()(x))


def test_a_last_part_of_one_value_is_refused():
    norm = fastnorm.BatchNorm1d(3, virtual_batch_size=4)
    state = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="virtual_batch_size: .* last part of 1"):
        norm(torch.randn(9, 3))
    buffers_close(norm.state_dict(), state, 0)
    norm.eval()(torch.randn(9, 3))
    with pytest.raises(ValueError, match="at least 1"):
        fastnorm.batch_norm(torch.randn(4, 3), None, None, training=True, virtual_batch_size=0)


@BACKENDS
def test_bad_batches_are_kept_out(backend):
    with fastnorm.use_backend(backend):
        norm, clean = fastnorm.BatchNorm1d(3, nonfinite_stats="skip"), nn.BatchNorm1d(3)
        for i in range(4):
            x = torch.randn(6, 3)
            if i in (1, 2):
                x[0, i] = float("inf")
                assert torch.equal(norm(x).isnan(), nn.BatchNorm1d(3)(x).isnan())
            else:
                norm(x)
                clean(x)
        assert norm.num_batches_skipped == 2
        buffers_close(norm.state_dict(), clean.state_dict())
        poisoned = fastnorm.BatchNorm1d(3)
        poisoned(x * float("nan"))
        assert poisoned.running_mean.isnan().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_statistics_of_a_16_bit_module_are_float32(cast):
    norm = getattr(fastnorm.BatchNorm1d(4), cast)()
    assert norm.weight.dtype != torch.float32
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    x = getattr(torch.randn(64, 4) * 316, cast)()
    for _ in range(60):
        y = norm(x)
    assert y.dtype == x.dtype and norm.running_var.isfinite().all()
    torch.testing.assert_close(norm.running_var, x.float().var(0), rtol=0.01, atol=0)
    assert fastnorm.BatchNorm1d(4, dtype=x.dtype).running_var.dtype == torch.float32
    assert norm.double().running_var.dtype == torch.float64
    # Buffers that the user makes 16-bit are updated in float32 all the same.
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    fastnorm.batch_norm(x / 316, mean, var, training=True)
    torch.testing.assert_close(mean.float(), 0.1 * (x / 316).float().mean(0), atol=1e-3, rtol=1e-2)


# ---- freezing and saving ----


def test_state_dict_is_torchs():
    mine, ref = fastnorm.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3)
    mine(torch.randn(2, 3, 4, 4))
    ref.load_state_dict(mine.state_dict(), strict=True)
    buffers_close(mine.state_dict(), ref.state_dict(), 0)
    fresh = fastnorm.BatchNorm2d(3)
    fresh.load_state_dict(ref.state_dict(), strict=True)
    buffers_close(fresh.state_dict(), ref.state_dict(), 0)
    old = ref.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    fresh.load_state_dict(old, strict=True)
    assert isinstance(mine, nn.BatchNorm2d)


@BACKENDS
def test_freeze_survives(backend):
    model = nn.Sequential(fastnorm.BatchNorm1d(3))
    norm = model[0]
    with fastnorm.use_backend(backend):
        norm(torch.randn(8, 3))
        norm.freeze()
        state = {k: v.clone() for k, v in norm.named_buffers()}
        x = torch.randn(8, 3, requires_grad=True)
        for mode in (True, False, True):
            model.train(mode)
            y = model(x)
            torch.testing.assert_close(
                y, F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
        for k, v in norm.named_buffers():
            assert torch.equal(v, state[k])
        y.sum().backward()
        torch.testing.assert_close(x.grad, (norm.running_var + 1e-5).rsqrt().expand(8, 3))

        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        stream.seek(0)
        for loaded in (
            nn.Sequential(fastnorm.BatchNorm1d(3)),
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
        ):
            stream.seek(0)
            loaded.load_state_dict(torch.load(stream), strict=True)
            assert loaded[0].frozen and loaded.train()[0].frozen
            assert torch.equal(loaded(x), y)
        # A checkpoint that says nothing leaves the choice alone.
        norm.load_state_dict(nn.BatchNorm1d(3).state_dict(), strict=True)
        assert norm.frozen
        norm.unfreeze()
        assert set(norm.state_dict()) == set(nn.BatchNorm1d(3).state_dict())
        norm(x)
        assert norm.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="track_running_stats"):
        fastnorm.BatchNorm1d(3, track_running_stats=False).freeze()


@BACKENDS
def test_the_two_flags_are_separate(backend):
    with fastnorm.use_backend(backend):
        x = torch.randn(8, 3)
        norm, ref = fastnorm.BatchNorm1d(3), nn.BatchNorm1d(3)
        norm.use_running_stats = True  # but go on updating
        torch.testing.assert_close(norm(x), nn.BatchNorm1d(3).eval()(x))
        ref(x)
        buffers_close(
            {k: v for k, v in norm.state_dict().items() if "flags" not in k}, ref.state_dict()
        )
        norm = fastnorm.BatchNorm1d(3)
        norm.update_running_stats = False  # but use the batch's
        torch.testing.assert_close(norm(x), ref(x))
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_options(options):
    mine, ref = fastnorm.BatchNorm1d(3, **options), nn.BatchNorm1d(3, **options)
    for mode in (True, False):
        x = torch.randn(5, 3, 2)
        torch.testing.assert_close(mine.train(mode)(x), ref.train(mode)(x))
    assert mine.state_dict().keys() == ref.state_dict().keys()
    assert fastnorm.BatchNorm1d(3, bias=False).bias is None
    assert "activation='relu'" in repr(fastnorm.BatchNorm1d(3, activation="relu"))


# ---- with the rest of torch ----


@BACKENDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_updates_once(reentrant, backend):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 1), fastnorm.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 1, 1)
        )

    plain, saved = model(), model()
    with fastnorm.use_backend(backend):
        for _ in range(3):
            x = torch.randn(3, 2, 4, 4, requires_grad=True)
            plain(x).square().sum().backward()
            checkpoint(saved, x, use_reentrant=reentrant).square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_buffers(), saved.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert saved[1].num_batches_tracked == 3
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_switching_the_mode_between_forward_and_backward():
    norm = fastnorm.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    grads = []
    for late in (True, False):
        norm.train()
        y = norm(x)
        norm.train(late)
        norm.reset_running_stats()
        grads.append(torch.autograd.grad(y.square().mean() + y[0].sum(), x)[0])
    assert torch.equal(*grads)


@BACKENDS
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_writing_to_buffers_between_forward_and_backward(dropout_p, backend):
    """As DistributedDataParallel does."""
    with fastnorm.use_backend(backend):
        norm = fastnorm.BatchNorm1d(3, activation="silu", dropout_p=dropout_p).freeze()
        norm.running_var.fill_(2.0)
        x = torch.randn(6, 3, requires_grad=True)
        grads = []
        for factor in (1.0, 4.0):
            torch.manual_seed(1)
            y = norm(x)
            norm.running_var.mul_(factor)
            norm.running_mean.add_(factor - 1)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert torch.equal(*grads)


def test_compiled_steps_leave_the_eager_buffers():
    def steps(run, norm):
        torch.manual_seed(0)
        for _ in range(5):
            x = torch.randn(4, 3, 5, requires_grad=True)
            run(x).square().sum().backward()
        return norm.state_dict()

    for backend in ("reference", "kernel"):
        with fastnorm.use_backend(backend):
            torch._dynamo.reset()
            _ops.register_fakes()
            eager, norm = (fastnorm.BatchNorm1d(3, activation="silu") for _ in range(2))
            compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
            buffers_close(steps(compiled, norm), steps(eager, eager), 0)


def test_compiled_checkpointing_updates_once():
    """Compiled around the checkpoint; a module compiled inside one can't tell the second run."""
    norm = fastnorm.BatchNorm1d(3, activation="relu")
    torch._dynamo.reset()
    step = torch.compile(lambda x: checkpoint(norm, x, use_reentrant=False), backend="aot_eager")
    step(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
    assert norm.num_batches_tracked == 1


def test_vmap_names_the_way_out():
    norm = fastnorm.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="track_running_stats=False"):
        torch.func.vmap(norm)(torch.randn(2, 4, 3))
    assert norm.num_batches_tracked == 0
    plain = fastnorm.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(torch.func.vmap(plain)(x), torch.stack([plain(one) for one in x]))


# ---- masks ----


@BACKENDS
def test_masked_positions_do_not_count(backend):
    lengths = torch.tensor([7, 3, 1, 0])
    x = torch.randn(4, 6, 7)
    mask = torch.arange(7) < lengths[:, None]
    x = x.masked_fill(~mask[:, None], float("nan"))
    r, grad = torch.randn(2, 4, 6, 7)
    w, b = parameters(6, x.dtype)
    mine, ref = fastnorm.BatchNorm1d(6, activation="silu"), nn.BatchNorm1d(6)

    def padded(x, w, b, r):
        return torch.func.functional_call(
            mine, {"weight": w, "bias": b}, (x, r), {"lengths": lengths}
        )

    def packed(t):
        return t.movedim(1, 2)[mask]

    def cut(x, w, b, r):
        return F.silu(torch.func.functional_call(ref, {"weight": w, "bias": b}, (x,)) + r)

    with fastnorm.use_backend(backend):
        y, dx, dw, db, dr = with_gradients(padded, [x, w, b, r], grad)
    want = with_gradients(cut, [packed(x), w, b, packed(r)], packed(grad))
    for a, e in zip((packed(y), packed(dx), dw, db, packed(dr)), want, strict=True):
        torch.testing.assert_close(a, e)
    for t in (y, dx, dr):
        assert (t.movedim(1, 2)[~mask] == 0).all()
    buffers_close(mine.state_dict(), ref.state_dict())


def test_masks_in_images_and_twice_differentiable():
    norm = fastnorm.BatchNorm2d(3, activation="silu").double()
    x, r = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64)
    mask = torch.rand(4, 2, 3) > 0.3
    for training in (True, False):
        norm.train(training)
        y = norm(channels_last(x), r, mask=mask)
        assert strides(y) == strides(channels_last(x))
        with fastnorm.use_backend("reference"):
            torch.testing.assert_close(y, norm(x, r, mask=mask))
        inputs = [t.clone().requires_grad_() for t in (x, r)]
        assert torch.autograd.gradgradcheck(
            lambda x, r: norm(x, r, mask=mask), inputs, fast_mode=True
        )


def test_masks_at_the_edges():
    norm = fastnorm.BatchNorm1d(3)
    x = torch.randn(2, 3, 4)
    assert torch.equal(norm(x, mask=torch.ones(2, 4, dtype=torch.bool)), norm(x))
    state = copy.deepcopy(norm.state_dict())
    assert torch.equal(norm(x, lengths=[0, 0]), torch.zeros_like(x))
    buffers_close(norm.state_dict(), state, 0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x, lengths=[1, 0])
    with pytest.raises(ValueError, match="mask: expected shape"):
        norm(x, mask=torch.ones(2, 3))
    buffers_close(norm.state_dict(), state, 0)
    last = fastnorm.BatchNorm1d(3, channel_dim=-1)
    y = last(x.transpose(1, 2), lengths=[2, 4])
    assert (y[0, 2:] == 0).all() and (y[0, :2] != 0).all()
    norm.eval()
    torch.testing.assert_close(norm(x, lengths=[1, 0])[0, :, 0], norm(x)[0, :, 0])


# ---- bad input ----


@pytest.mark.parametrize(
    ("shape", "cls"),
    [
        ((1, 3), "BatchNorm1d"),
        ((1, 3, 1), "BatchNorm1d"),
        ((1, 3, 1, 1), "BatchNorm2d"),
        ((4, 3), "BatchNorm2d"),
        ((4, 3, 2, 2), "BatchNorm1d"),
        ((4, 3, 2), "BatchNorm3d"),
        ((4, 5, 2, 2), "BatchNorm2d"),
    ],
)
@BACKENDS
def test_module_errors_are_torchs(backend, shape, cls):
    with fastnorm.use_backend(backend):
        x = torch.randn(shape)
        mine = getattr(fastnorm, cls)(3)
        state = copy.deepcopy(mine.state_dict())
        with pytest.raises(Exception) as expected:
            getattr(nn, cls)(3)(x)
        with pytest.raises(expected.type):
            mine(x)
        buffers_close(mine.state_dict(), state, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 3), None, None, None, None, False),
        (torch.randn(4, 3), None, None, torch.ones(4), None, True),
        (torch.randn(4, 3), torch.zeros(2), torch.ones(2), None, None, True),
        (torch.randn(4, 3), None, None, None, None, True, 0.1, -1.0),
        (torch.randn(4), None, None, None, None, True),
        (torch.randn(4, 3), torch.zeros(3, requires_grad=True), torch.ones(3)),
        (torch.randn(4, 3), torch.zeros(3), torch.ones(3, requires_grad=True), None, None, True),
        (torch.ones(4, 3, dtype=torch.int64), None, None, None, None, True),
    ],
)
def test_function_errors_are_torchs(arguments):
    with pytest.raises(Exception) as expected:
        F.batch_norm(*arguments)
    with pytest.raises(expected.type):
        fastnorm.batch_norm(*arguments)


def test_a_failed_call_changes_nothing():
    norm = fastnorm.BatchNorm1d(3)
    state = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3)
    for bad in (
        lambda: norm(x, torch.randn(4, 2)),
        lambda: norm(x, torch.randn(4, 3).double()),
        lambda: norm(x.double()),
        lambda: norm(x, mask=torch.ones(4, 2)),
        *(
            lambda momentum=momentum: fastnorm.batch_norm(
                x, norm.running_mean, norm.running_var, training=True, momentum=momentum
            )
            for momentum in (math.nan, 0.5j, None, "0.1")
        ),
        lambda: fastnorm.batch_norm(
            x, norm.running_mean, norm.running_var, training=True, activation="swish"
        ),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            bad()
        buffers_close(norm.state_dict(), state, 0)
    with pytest.raises(ValueError, match="activation"):
        fastnorm.BatchNorm1d(3, activation="swish")
    with pytest.raises(ValueError, match="nonfinite_stats"):
        fastnorm.BatchNorm1d(3, nonfinite_stats="ignore")
    with pytest.raises(TypeError, match="virtual_batch_size: expected an int or None, got float"):
        fastnorm.BatchNorm1d(3, virtual_batch_size=2.5)
    with pytest.raises(ValueError, match="virtual_batch_size: expected at least 1, got 0"):
        fastnorm.BatchNorm1d(3, virtual_batch_size=0)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_empty_batch(shape, backend):
    with fastnorm.use_backend(backend):
        norm = fastnorm.BatchNorm1d(3, activation="relu")
        x = torch.randn(shape, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert torch.equal(norm.weight.grad, torch.zeros(3))
        assert torch.equal(norm.bias.grad, torch.zeros(3))
        buffers_close(norm.state_dict(), fastnorm.BatchNorm1d(3).state_dict(), 0)


# ---- running batch norm ----


def test_H11_running_batch_norm_is_the_notebooks():
    """Sums, squares and counts as in fastai's course v3, with debiasing left out as it cancels."""
    mom, eps = 0.1, 1e-5
    norm = fastnorm.RunningBatchNorm2d(3, momentum=mom).double()
    w, b = parameters(3, torch.float64)
    with torch.no_grad():
        norm.weight.copy_(w)
        norm.bias.copy_(b)
    sums = squares = torch.zeros(3, dtype=torch.float64)
    count, seen = 0.0, 0
    for bs in (2, 6, 3, 16):
        x = (torch.randn(bs, 3, 4, 4, dtype=torch.float64) * 0.05 + 3).requires_grad_()
        a = 1 - (1 - mom) / (bs - 1) ** 0.5
        sums = sums.detach() * (1 - a) + a * x.sum((0, 2, 3))
        squares = squares.detach() * (1 - a) + a * x.square().sum((0, 2, 3))
        count = count * (1 - a) + a * x.numel() / 3
        seen += bs
        mean = sums / count
        var = squares / count - mean.square()
        used = var.clamp_min(0.01) if seen < 20 else var
        spread = (-1, 1, 1)
        want = (x - mean.view(spread)) / (used + eps).sqrt().view(spread)
        want = want * w.view(spread) + b.view(spread)
        got = norm(x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        g = torch.randn_like(x)
        for p, q in zip(
            torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var.detach(), rtol=1e-6, atol=1e-9)
    norm.eval()
    torch.testing.assert_close(
        norm(x), F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )


def test_H11_running_batch_norm_alone_and_saved():
    norm = fastnorm.RunningBatchNorm1d(3, activation="relu")
    for _ in range(300):
        y = norm(torch.randn(1, 3) * 0.5 + 2)
    assert y.isfinite().all() and (norm.running_mean - 2).abs().max() < 0.5
    with torch.no_grad():
        norm.weight.fill_(2.0)  # as an optimizer's step would
    norm.eval()
    x = torch.randn(4, 3)
    want = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    torch.testing.assert_close(norm(x), want)
    other = fastnorm.RunningBatchNorm1d(3, activation="relu")
    other.load_state_dict(norm.state_dict(), strict=True)
    norm.train()
    assert torch.equal(norm(x), other(x))
    buffers_close(norm.state_dict(), other.state_dict(), 0)
    with pytest.raises(RuntimeError, match="checkpointing"):
        checkpoint(norm, x.requires_grad_(), use_reentrant=False).sum().backward()


# ---- a network ----


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.norm3(self.shortcut(x)))


class FusedBlock(TorchBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = fastnorm.BatchNorm2d(8, activation="relu")
        self.norm2 = fastnorm.BatchNorm2d(8, activation="relu")
        self.norm3 = fastnorm.BatchNorm2d(8)

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(h), self.norm3(self.shortcut(x)))


# Contiguous only: torch 2.13's own convolutional blocks crash in channels-last on some CPUs.
def test_basic_block_trains_alike():
    x, target = torch.randn(6, 4, 8, 8), torch.randn(6, 8, 4, 4)
    start = TorchBlock().double().state_dict()
    losses = {}
    for name, cls, dtype in (
        ("exact", TorchBlock, torch.float64),
        ("torch", TorchBlock, torch.float32),
        ("ours", FusedBlock, torch.float32),
    ):
        model = cls().to(dtype)
        model.load_state_dict(copy.deepcopy(start))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[name] = []
        for _ in range(8):
            loss = F.mse_loss(model(x.to(dtype)), target.to(dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    exact = torch.tensor(losses["exact"])
    peer = (torch.tensor(losses["torch"]) - exact).abs().max()
    own = (torch.tensor(losses["ours"]) - exact).abs().max()
    assert own <= 4 * peer + 8 * 2.0**-24 * exact.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 65), (5, 65, 7), (5, 33, 28, 28), (5, 64, 3, 3)])
def test_evaluation_of_a_sample_does_not_depend_on_its_batch(shape, dtype):
    mean, var = (s for s in running(shape[1]))
    weight, bias = torch.randn(2, shape[1]).unbind()

    def evaluate(x):
        return fastnorm.batch_norm(x, mean, var, weight, bias, activation="silu")

    x = torch.randn(shape).to(dtype)
    y = evaluate(x)
    for i in range(shape[0]):
        assert torch.equal(evaluate(x[i : i + 1]), y[i : i + 1])
