"""Several gloo processes on the CPU: synchronized batch norm, data parallel training, DTensor.

The functions without `test_` run in every process of a pool that is started once.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channel_norm_checks import channels_last, parameters
from torch import nn

import fastnorm
from fastnorm.epilogue import ACTIVATIONS
from fastnorm.testing import assert_within_budget, gradient_like, random_tensor

pytestmark = pytest.mark.cpu("gloo")


def work(rank: int, world: int, path: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for function, args in iter(inbox.get, None):
        torch.manual_seed(0)
        try:
            function(*args)
        except BaseException:
            outbox.put(f"rank {rank}: {traceback.format_exc()}")
        else:
            outbox.put(None)
    os._exit(0)  # gloo's threads can abort an ordinary exit


class Pool:
    """Processes that run a function all at once."""

    def __init__(self, world: int, folder: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.inboxes = [context.SimpleQueue() for _ in range(world)]
        self.outbox: Any = context.Queue()
        self.processes = [
            context.Process(
                target=work,
                args=(rank, world, str(folder / "store"), self.inboxes[rank], self.outbox),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        for inbox in self.inboxes:
            inbox.put((function, args))
        errors = [self.outbox.get(timeout=120) for _ in self.processes]
        assert not any(errors), "\n".join(error for error in errors if error)

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Pool]:
    pool = Pool(2, tmp_path_factory.mktemp("pair"))
    yield pool
    pool.close()


# ---- SyncBatchNorm ----


def total(t: torch.Tensor, group: Any = None) -> torch.Tensor:
    out = t.detach().clone()
    dist.all_reduce(out, group=group)
    return out


def single(x, w, b, r, activation, grad, dtype, steps):
    """torch's batch norm of the whole batch: result, gradients and buffers."""
    x, w, b, r = (
        None if t is None else t.to(dtype).detach().requires_grad_() for t in (x, w, b, r)
    )
    mean, var = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    for _ in range(steps):
        y = nn.functional.batch_norm(x, mean, var, w, b, True, 0.1)
    y = ACTIVATIONS[activation].function(y if r is None else y + r)
    y.backward(grad.to(dtype))
    return [y.detach(), *(None if t is None else t.grad for t in (x, w, b, r)), mean, var]


def is_single_process(
    parts: list[int],
    shape: tuple[int, ...],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    residual: bool = False,
    backend: str = "kernel",
    affine: bool = True,
    channel_dim: int = 1,
    group: Any = None,
    **options: Any,
) -> None:
    """Processes with `parts` samples each against one with all of them."""
    rank = dist.get_rank(group)
    n, channels = sum(parts), shape[0]
    x = random_tensor(n, *shape, dtype=dtype, mean=2.0, std=3.0)
    r = random_tensor(n, *shape, dtype=dtype) if residual else None
    grad = gradient_like(x)
    w, b = parameters(channels, torch.float64 if dtype == torch.float64 else torch.float32)
    if not affine:
        w = b = None
    here = slice(sum(parts[:rank]), sum(parts[: rank + 1]))

    def lay(t):
        t = t[here]
        if channel_dim != 1:
            return t.movedim(1, channel_dim).contiguous().requires_grad_()
        return (channels_last(t) if layout == "channels_last" else t.contiguous()).requires_grad_()

    def back(t):
        return t if channel_dim == 1 else t.movedim(channel_dim, 1)

    norm = fastnorm.SyncBatchNorm(
        channels, process_group=group, activation=activation, affine=affine,
        channel_dim=channel_dim, dtype=w.dtype if affine else torch.float32, **options,
    )  # fmt: skip
    if affine:
        norm.weight.data.copy_(w)
        norm.bias.data.copy_(b)
    own, own_r = lay(x), lay(r) if residual else None
    with fastnorm.use_backend(backend):
        for _ in range(2):
            y = norm(own, own_r)
        y.backward(lay(grad).detach())
    assert y.stride() == own.stride() or y.numel() == 0
    assert norm.num_batches_tracked == 2

    peer_dtype = torch.float32 if dtype == torch.float64 else dtype
    theirs = single(x, w, b, r, activation, grad, peer_dtype, 2)
    exact = single(x, w, b, r, activation, grad, torch.float64, 2)
    for want in (theirs, exact):
        for i in (0, 1, 4):
            want[i] = None if want[i] is None else want[i][here]
    ours = [back(y.detach()), back(own.grad)]
    for p in (norm.weight, norm.bias):
        ours.append(None if p is None else total(p.grad, group))
    ours.append(back(own_r.grad) if residual else None)
    assert_within_budget(ours, theirs[:5], exact[:5], what="gradients")
    buffers = [norm.running_mean, norm.running_var]
    if dtype == torch.bfloat16:
        assert buffers[0].dtype == torch.float32
    assert_within_budget(buffers, theirs[5:], exact[5:], what="buffers")


GRID = [
    dict(parts=[3, 5], shape=(65, 4, 3)),
    dict(parts=[3, 5], shape=(65, 4, 3), layout="channels_last", activation="silu", residual=True),
    dict(parts=[3, 5], shape=(65, 4, 3), residual=True),
    dict(parts=[3, 5], shape=(65, 4, 3), residual=True, activation="relu", backend="reference"),
    dict(parts=[5, 3], shape=(65,), dtype=torch.bfloat16, activation="gelu"),
    dict(parts=[3, 5], shape=(65, 7), dtype=torch.float64),
    dict(parts=[3, 5], shape=(65, 7), channel_dim=-1),
    dict(parts=[1, 1], shape=(65,)),
    dict(parts=[0, 4], shape=(65, 6), affine=False),
    dict(parts=[4, 0], shape=(65, 6), residual=True, activation="tanh"),
    dict(parts=[4, 0], shape=(65, 6), backend="reference"),
    dict(parts=[3, 2], shape=(5, 2, 3, 2), layout="channels_last"),
]


def run_grid() -> None:
    for case in GRID:
        torch.manual_seed(0)
        try:
            is_single_process(**case)
        except Exception as error:
            raise AssertionError(f"{case}") from error


def test_unequal_batches_are_one_batch(pair):
    pair.run(run_grid)


def is_differentiable_twice(activation: str | None, residual: bool) -> None:
    """A gradient penalty over both processes, against one."""
    rank = dist.get_rank()
    parts = [2, 3]
    here = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    shape = (5, 3, 4)
    x, r, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    w, b = parameters(3, torch.float64)

    def penalty(norm, x, r, grad):
        x = x.clone().requires_grad_()
        r = r.clone().requires_grad_() if residual else None
        grad = grad.clone().requires_grad_()
        y = norm(x, r)
        sources = [x, norm.weight, *([r] if residual else [])]
        first = torch.autograd.grad(y, sources, grad, create_graph=True)
        # Of the rows only: a weight's gradient is this process's part.
        loss = sum(g.sin().sum() for g in first if g.shape == x.shape)
        second = torch.autograd.grad(loss, [x, grad, norm.weight])
        return [first[0].detach(), *second]

    def make(cls, **options):
        norm = cls(3, activation=activation, dtype=torch.float64, **options)
        norm.weight.data.copy_(w)
        norm.bias.data.copy_(b)
        return norm

    *mine, dw = penalty(make(fastnorm.SyncBatchNorm), x[here], r[here], grad[here])
    *want, want_dw = penalty(make(fastnorm.BatchNorm1d), x, r, grad)
    for a, e in zip(mine, want, strict=True):
        torch.testing.assert_close(a, e[here], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total(dw), want_dw, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("activation", "residual"), [(None, True), ("silu", True), (None, False)])
def test_second_derivatives(pair, activation, residual):
    pair.run(is_differentiable_twice, activation, residual)


def keeps_the_options() -> None:
    rank = dist.get_rank()
    x = random_tensor(8, 5, 6, mean=1.0)
    here = slice(0, 3) if rank == 0 else slice(3, 8)

    def alike(options, prepare=lambda norm: None, steps=3, **arguments):
        norms = [fastnorm.SyncBatchNorm(5, **options), fastnorm.BatchNorm1d(5, **options)]
        for norm in norms:
            prepare(norm)
        for step in range(steps):
            part = {k: v[here] for k, v in arguments.items()}
            mine, want = norms[0](step + x[here], **part), norms[1](step + x, **arguments)
            torch.testing.assert_close(mine, want[here])
        for (name, a), (_, e) in zip(
            norms[0].named_buffers(), norms[1].named_buffers(), strict=True
        ):
            torch.testing.assert_close(a, e, msg=name)
        return norms

    alike({"momentum": None})
    alike({"track_running_stats": False})
    alike({}, lambda norm: norm.freeze())
    alike({}, lambda norm: norm.eval())
    alike({}, lambda norm: setattr(norm, "use_running_stats", True))
    alike({}, lambda norm: setattr(norm, "update_running_stats", False))
    lengths = torch.tensor([1, 6, 3, 4, 5, 2, 6, 1])
    alike({"activation": "gelu"}, lengths=lengths)
    everything = x.clone()
    everything[6, 2, 1] = float("inf")  # on one process, kept out on both
    norm = fastnorm.SyncBatchNorm(5, nonfinite_stats="skip")
    norm(everything[here])
    assert norm.num_batches_skipped == 1 and norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(5))
    dropping = fastnorm.SyncBatchNorm(5, dropout_p=0.5)
    y = dropping(torch.randn(400, 5))
    assert 0.4 < (y == 0).float().mean() < 0.6

    # Bad input is found before any process waits for another.
    norm = fastnorm.SyncBatchNorm(5)
    for bad, error in (
        (lambda: norm(torch.randn(5)), ValueError),
        (lambda: norm(torch.randn(3, 0)), ValueError),
        (lambda: norm(torch.randn(3, 4)), RuntimeError),
        (lambda: norm(x, x[:1]), ValueError),
        (lambda: norm(x.int()), TypeError),
        (lambda: torch.func.vmap(norm)(x[None]), NotImplementedError),
    ):
        with pytest.raises(error):
            bad()
    assert norm.num_batches_tracked == 0

    compiled = torch.compile(fastnorm.SyncBatchNorm(5), backend="eager")
    alone = fastnorm.SyncBatchNorm(5)
    torch.testing.assert_close(compiled(x[here]), alone(x[here]))


def test_options(pair):
    pair.run(keeps_the_options)


def converts() -> None:
    rank = dist.get_rank()
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        fastnorm.BatchNorm2d(4, activation="relu", dropout_p=0.0),
        nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared),
        fastnorm.BatchNorm2d(4, eps=1e-3).freeze(),
    )
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    x = torch.randn(8, 3, 4, 4)
    here = slice(0, 3) if rank == 0 else slice(3, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = model(x)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    model.load_state_dict(state)
    synced = fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synced is model and model[2][0] is model[2][2]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(m) for m in norms] == [fastnorm.SyncBatchNorm] * 3
    assert norms[0].activation == "relu" and norms[2].frozen and norms[2].eps == 1e-3
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    torch.testing.assert_close(model(x[here]), want[here])
    assert called == [1, 1]
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)


def test_convert_sync_batchnorm(pair):
    pair.run(converts)


def test_what_cannot_be_synchronized_is_refused():
    convert = fastnorm.SyncBatchNorm.convert_sync_batchnorm
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
    assert convert(parametrized) is parametrized
    scaled = fastnorm.BatchNorm1d(2)
    nn.utils.parametrize.register_parametrization(scaled, "weight", nn.Softplus())
    for bad in (
        fastnorm.RunningBatchNorm1d(2),
        fastnorm.BatchNorm1d(2, virtual_batch_size=4),
        scaled,
    ):
        model = nn.Sequential(nn.BatchNorm1d(2), bad)
        with pytest.raises(ValueError, match=r"module: .* '1'"):
            convert(model)
        assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: fastnorm.BatchNorm2d(2, activation="relu"), "activation='relu'"),
        (lambda: fastnorm.BatchNorm1d(2, dropout_p=0.5), "dropout_p=0.5"),
        (lambda: fastnorm.BatchNorm1d(2).freeze(), "use_running_stats=True"),
        (lambda: fastnorm.SyncBatchNorm(2, activation="silu"), "activation='silu'"),
        (lambda: fastnorm.RunningBatchNorm1d(2), "several batches"),
        (lambda: fastnorm.BatchNorm2d(2), None),
        (lambda: fastnorm.SyncBatchNorm(2), None),
    ],
)
def test_torchs_converter_loses_nothing(make, lost):
    model = nn.Sequential(nn.Linear(2, 2), make())
    if lost is None:
        assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is nn.SyncBatchNorm
        return
    with pytest.raises(RuntimeError, match=lost):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [name for name, _ in model[1].named_children()] == list(model[1].children()) == []


def test_alone_is_batch_norm():
    torch.manual_seed(0)
    x, r = torch.randn(2, 4, 5, 6)
    outs, states = [], []
    for norm in (
        fastnorm.SyncBatchNorm(5, activation="gelu"),
        fastnorm.BatchNorm1d(5, activation="gelu"),
    ):
        outs.append(norm(x, r))
        states.append(norm.state_dict())
    assert torch.equal(*outs)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    with pytest.raises(ValueError, match="more than 1 value"):
        fastnorm.SyncBatchNorm(5)(x[:1, :, 0])
    assert states[0].keys() == nn.SyncBatchNorm(5).state_dict().keys()


# ---- groups ----


def is_single_process_in_its_group() -> None:
    rank = dist.get_rank()
    first, alone = dist.new_group([0, 2]), dist.new_group([1])
    if rank == 1:
        x = torch.randn(4, 65, 3)
        norms = fastnorm.SyncBatchNorm(65, process_group=alone), fastnorm.BatchNorm1d(65)
        assert torch.equal(*(norm(x) for norm in norms))
    else:
        is_single_process([3, 5], (65, 4), group=first, activation="relu")


def test_process_groups(tmp_path):
    pool = Pool(3, tmp_path)
    try:
        pool.run(is_single_process_in_its_group)
    finally:
        pool.close()


# ---- DTensor ----


def norms_of_dtensors() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = dist.init_device_mesh("cpu", (2,))
    c = 6
    row = random_tensor(5, 3, c, mean=1.0)
    image = channels_last(random_tensor(3, c, 2, 4, mean=1.0))
    w, b = parameters(c, torch.float32)
    mean, var = torch.randn(c), torch.rand(c) + 0.5
    layer, rms = fastnorm.layer_norm, fastnorm.rms_norm
    group, instance, batch = fastnorm.group_norm, fastnorm.instance_norm, fastnorm.batch_norm
    cases = [
        (lambda x, r, w, b: layer(x, (c,), w, b, activation="gelu", residual=r), row, (0, 1)),
        (lambda x, r, w, b: layer(x, (c,), w, b, dim=1, residual=r), image, (0, 2, 3)),
        (lambda x, r, w, b: rms(x, (c,), w, activation="silu", residual=r), row, (0, 1)),
        (lambda x, r, w, b: fastnorm.add_layer_norm(x, r, (c,), w, b), row, (0, 1)),
        (lambda x, r, w, b: fastnorm.add_rms_norm(x, r, (c,), w), row, (0, 1)),
        (lambda x, r, w, b: group(x, 2, w, b, activation="relu", residual=r), image, (0,)),
        (lambda x, r, w, b: instance(x, None, None, w, b, residual=r), image, (0,)),
        (lambda x, r, w, b: batch(x, *stats(x), w, b, residual=r), image, (0, 2, 3)),
        (lambda x, r, w, b: instance(x, *stats(x), w, b, False, residual=r), image, (0, 2, 3)),
        (
            lambda x, r, w, b: fastnorm.dropout(x, 0.3, False, activation="gelu", residual=r),
            row,
            (0, 1, 2),
        ),
    ]

    def stats(x):
        if not isinstance(x, DTensor):
            return mean, var
        return tuple(distribute_tensor(t, mesh, [Replicate()]) for t in (mean, var))

    for number, (f, x, local) in enumerate(cases):
        r, grad = random_tensor(*x.shape), random_tensor(*x.shape)
        whole = [t.clone().requires_grad_() for t in (x, r, w, b)]
        want = f(*whole)
        want = want if isinstance(want, tuple) else (want,)
        torch.autograd.backward(want, [grad] * len(want))
        for dim in range(x.dim()):
            parts = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_()
                for t, p in zip(
                    whole, [Shard(dim), Shard(dim), Replicate(), Replicate()], strict=True
                )
            ]
            if dim not in local:
                with pytest.raises(ValueError, match=r"input: .* redistribute"):
                    f(*parts)
                continue
            with CommDebugMode() as comm:
                y = f(*parts)
                y = y if isinstance(y, tuple) else (y,)
                # Not into .grad, where torch 2.11 gathers a leaf's gradient to copy it.
                upstream = [distribute_tensor(grad, mesh, [Shard(dim)])] * len(y)
                grads = torch.autograd.grad(y, parts, upstream, allow_unused=True)
            # Of distribute_tensor only, which sends the parts of `grad` and `stats`.
            moved = {str(k) for k, v in comm.get_comm_counts().items() if v}
            assert not any("all_" in k for k in moved), moved
            what = f"case {number}, dimension {dim}"
            for a, e in zip(y, want, strict=True):
                assert a.placements == (Shard(dim),) and a.shape == e.shape
                assert a.stride() == e.stride()
                torch.testing.assert_close(a.full_tensor(), e, msg=what)
            for a, e in zip(grads, whole, strict=True):
                if e.grad is None:
                    assert a is None or not a.full_tensor().any(), what
                    continue
                torch.testing.assert_close(a.full_tensor(), e.grad, rtol=1e-5, atol=1e-5, msg=what)

    plane = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("batch", "sequence"))
    whole = [t.clone().requires_grad_() for t in (row, w, b)]
    sharded = [
        distribute_tensor(t.detach(), plane, p).requires_grad_()
        for t, p in zip(whole, ([Shard(0), Shard(1)], *[[Replicate()] * 2] * 2), strict=True)
    ]
    for tensors in (whole, sharded):
        layer(tensors[0], (c,), *tensors[1:]).square().sum().backward()
    for a, e in zip(sharded, whole, strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), e.grad)

    shard = distribute_tensor(image, mesh, [Shard(0)])
    with pytest.raises(TypeError, match="weight: expected a DTensor"):
        fastnorm.group_norm(shard, 2, w)
    with pytest.raises(ValueError, match="input: "):  # the statistics are not this part's
        fastnorm.batch_norm(shard, None, None, training=True)
    copies = distribute_tensor(image, mesh, [Replicate()])
    norm = nn.Sequential(fastnorm.BatchNorm2d(c))
    plain = fastnorm.BatchNorm2d(c)
    torch.distributed.tensor.distribute_module(norm, mesh)
    torch.testing.assert_close(norm(copies).full_tensor(), plain(image))
    for a, e in zip(norm[0].buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a.full_tensor(), e)


def dropout_of_dtensors() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2,))
    x = torch.ones(8, 64, 16)

    def dropped(f, placement):
        torch.manual_seed(3)
        y = f(distribute_tensor(x, mesh, [placement]))
        assert y.placements == (placement,)
        return y, y.full_tensor()

    for f in (
        lambda x: fastnorm.dropout(x, 0.5),
        lambda x: fastnorm.layer_norm(x + 0, (16,), dropout_p=0.5, activation="sigmoid"),
    ):
        _, whole = dropped(f, Replicate())
        _, sharded = dropped(f, Shard(0))
        assert 0.45 < (sharded == 0).float().mean() < 0.55
        assert not torch.equal(sharded[:4], sharded[4:])  # parts draw for themselves
        torch.manual_seed(3)
        torch.testing.assert_close(whole, f(x))  # copies alike, and like one tensor
    # What a channel or sample shares it also shares with the other part.
    _, channels = dropped(lambda x: fastnorm.dropout1d(x, 0.5), Shard(2))
    assert ((channels == 0).all(-1) | (channels == 2).all(-1)).all()
    _, depth = dropped(lambda x: fastnorm.stochastic_depth(x, 0.5, "batch"), Shard(0))
    assert depth.unique().numel() == 1

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: fastnorm.dropout(x, 0.5), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(
        dropped(compiled, Shard(0))[1], dropped(lambda x: fastnorm.dropout(x, 0.5), Shard(0))[1]
    )

    block = nn.ModuleDict({"norm": fastnorm.LayerNorm(16), "drop": fastnorm.Dropout(0.5)})
    plan = {"norm": SequenceParallel(), "drop": SequenceParallel()}
    parallelize_module(block, mesh, plan)
    here = random_tensor(8, 64, 16).chunk(2, 1)[dist.get_rank()]
    y = block["drop"](block["norm"](here))
    assert y.placements == (Shard(1),) and y.shape == (8, 64, 16)
    y.to_local().sum().backward()
    assert block["norm"].weight.grad is not None


def test_dtensors_run_locally(pair):
    pair.run(norms_of_dtensors)


def test_dropout_of_dtensors(pair):
    pair.run(dropout_of_dtensors)


# ---- training ----


class Block(nn.Module):
    """Every kind of layer; batch norm is synchronized, the others need not be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.batch = fastnorm.SyncBatchNorm(6, activation="relu")
        self.frozen = fastnorm.BatchNorm2d(6).freeze()
        self.group = fastnorm.GroupNorm(2, 6, activation="silu")
        self.instance = fastnorm.InstanceNorm2d(6, affine=True)
        self.channels_first = fastnorm.LayerNorm(6, dim=1)
        self.drop_path = fastnorm.DropPath(0.0)
        self.layer = fastnorm.LayerNorm(6, activation="gelu")
        self.rms = fastnorm.RMSNorm(6)
        self.add_layer = fastnorm.AddLayerNorm(6)
        self.add_rms = fastnorm.AddRMSNorm(6)
        self.drop = fastnorm.Dropout(0.0, activation="tanh")
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch(self.stem(x))
        x = self.frozen(x, self.group(x))
        x = self.drop_path(self.instance(x), self.channels_first(x))
        x = x.flatten(2).transpose(1, 2)
        x, total = self.add_layer(self.layer(x), x)
        x, total = self.add_rms(self.rms(x), total)
        return self.head(self.drop(x + total).mean(1))


def training_is_single_process(kind: str) -> None:
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    whole = Block()
    for p in whole.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    whole.frozen.running_var.add_(torch.rand(6))
    model: nn.Module = Block()
    model.load_state_dict(whole.state_dict())
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in (model.batch, model.layer):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, whole)]
    for _ in range(3):
        x, target = torch.randn(8, 3, 6, 6), torch.randn(8, 5)
        here = slice(4 * rank, 4 * rank + 4)
        losses = [
            nn.functional.mse_loss(model(x[here]), target[here]),
            nn.functional.mse_loss(whole_batch(whole, x), target),
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(total(losses[0]) / 2, losses[1].detach())
    trained = model.module if kind == "ddp" else model
    for (name, a), e in zip(trained.named_parameters(), whole.parameters(), strict=True):
        a = a.full_tensor() if kind == "fsdp" else a
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, msg=name)
    for (name, a), e in zip(trained.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, e, msg=name)


def whole_batch(model: Block, x: torch.Tensor) -> torch.Tensor:
    """`model` in a single process: batch norm does not wait for others."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model.batch.process_group = alone[dist.get_rank()]
    return model(x)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training(pair, kind):
    pair.run(training_is_single_process, kind)


def two_forwards_before_a_backward() -> None:
    """The gradients are those of the statistics that each forward saw, also after the others."""
    rank = dist.get_rank()
    for mode in ("train", "eval", "frozen", "running"):
        for options in ({}, {"dropout_p": 1e-9}):  # the way around the eager entry, too
            torch.manual_seed(rank)
            norm = fastnorm.BatchNorm2d(4, activation="leaky_relu", **options)
            norm.train(mode != "eval")
            if mode in ("frozen", "running"):
                norm.use_running_stats, norm.update_running_stats = True, mode == "running"
            norm.running_var.add_(torch.rand(4))  # another on each process until a forward
            critic = nn.parallel.DistributedDataParallel(
                nn.Sequential(norm), broadcast_buffers=True
            )
            seen = []
            norm.register_forward_pre_hook(
                lambda m, _, seen=seen: seen.append((m.running_mean.clone(), m.running_var.clone()))
            )
            inputs = [torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2)]
            outputs = []
            for x in inputs:
                outputs.append(critic(x))
                if rank == 0 and mode != "train":
                    norm.running_var.mul_(3.0)  # reaches the other process with the next forward
                    norm.running_mean.add_(1.0)
            loss = outputs[0].square().mean() - outputs[1].sin().mean()
            grads = torch.autograd.grad(loss, inputs)
            assert not torch.equal(seen[0][1], seen[1][1])
            theirs = [
                nn.functional.leaky_relu(
                    nn.functional.batch_norm(
                        x, mean, var, norm.weight, norm.bias, training=mode == "train"
                    )
                )
                for x, (mean, var) in zip(inputs, seen, strict=True)
            ]
            want = torch.autograd.grad(theirs[0].square().mean() - theirs[1].sin().mean(), inputs)
            for a, e in zip(grads, want, strict=True):
                torch.testing.assert_close(a, e, msg=f"{mode} {options}")


def test_two_forwards_before_a_backward_under_ddp(pair):
    pair.run(two_forwards_before_a_backward)
