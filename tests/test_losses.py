import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import _ops
from fastnorm.losses import LabelSmoothingCrossEntropy, cross_entropy, smooth_labels
from fastnorm.testing import seeded

INF = math.inf


def by_hand(input, target, weight, smoothing, ignore, reduction, torch_mean=False, prior=None):
    """The formula of the module, position by position, in float64 with gradients by autograd.

    ``ignore`` is a function of the position's target. Returns the loss.
    """
    x = input.double()
    if x.dim() > 1:
        x = x.movedim(1, -1)
    num_classes = x.shape[-1]
    rows = x.reshape(-1, num_classes)
    soft = target.is_floating_point()
    if soft:
        t = target.movedim(1, -1) if target.dim() > 1 else target
        targets = list(t.reshape(-1, num_classes).double())
    else:
        targets = list(target.reshape(-1))
    w = torch.ones(num_classes).double() if weight is None else weight.double()
    losses, masses = [], []
    for row, label in zip(rows, targets, strict=True):
        if ignore(label):
            losses.append(row.new_zeros(()))
            masses.append(0.0)
            continue
        hard = label if soft else F.one_hot(label, num_classes).double()
        u = torch.ones(num_classes).double() if prior is None else prior.double()
        u = torch.where(row.detach() == -INF, 0.0, u)
        t = (1 - smoothing) * hard + smoothing * u / u.sum()
        log_p = row - row.logsumexp(0)
        losses.append(-sum(w[k] * t[k] * log_p[k] for k in range(num_classes) if w[k] * t[k] != 0))
        if torch_mean:
            masses.append(1.0 if soft else float(w[label]))
        else:
            masses.append(1.0 if weight is None else float((w * t).sum()))
    loss = torch.stack(losses)
    if reduction == "none":
        shape = (input.shape[:1] + input.shape[2:]) if input.dim() > 1 else ()
        return loss.reshape(shape)
    if reduction == "sum":
        return loss.sum()
    total = sum(masses)
    return loss.sum() / (total if total != 0 or torch_mean else 1)


def make(shape, kind, dtype=torch.float64, seed=0, ignore_index=None, classes=5):
    generator = seeded(seed)
    input = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if kind == "soft":
        # Not normalized on purpose: nothing may renormalize it silently.
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(classes, positions, generator=generator)
        if ignore_index is not None:
            target[torch.rand(positions, generator=generator) < 0.3] = ignore_index
    return input.requires_grad_(), target


def gradient(loss, input, seed=1):
    generator = seeded(seed)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.dtype)
    return torch.autograd.grad(loss, input, upstream)[0]


@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 2)])
@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [2, -7, None])
def test_T7_grid(shape, kind, reduction, weighted, ignore_index):
    for smoothing, torch_mean in itertools.product([0.0, 0.1, 1.0], [False, True]):
        input, target = make(shape, kind, ignore_index=ignore_index)
        weight = torch.tensor([0.3, 2.0, 0.7, 1.1, 0.05]).double() if weighted else None
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        options |= {"torch_mean": torch_mean}
        if kind == "ids":
            number = -100 if ignore_index is None else ignore_index
            options |= {"ignore_index": number}
            ignore = lambda label, number=number: label == number  # noqa: E731
        elif ignore_index is None:
            ignore = lambda label: False  # noqa: E731
        else:
            # Torch refuses ignore_index with soft targets; a mask says the same.
            first = target.select(1, 0)
            mask = first < 0.7
            if torch_mean and weighted:
                continue
            options |= {"mask": mask}
            ignore = lambda label: not label[0] < 0.7  # noqa: E731
        loss = cross_entropy(input, target, **options)
        expected = by_hand(input, target, weight, smoothing, ignore, reduction, torch_mean)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradient(loss, input), gradient(expected, input), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 2), (5,), (3, 1), (4, 5, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_D1_D4_equals_torch(dtype, shape, reduction, smoothing):
    """Class ids, per-pixel ones included; with weights where torch's rule is ours."""
    classes = shape[min(len(shape) - 1, 1)]
    for weighted in (False, True):
        input, target = make(
            shape, "ids", dtype, ignore_index=-100 if len(shape) > 1 else None, classes=classes
        )
        weight = torch.linspace(0.5, 2, classes).to(dtype) if weighted else None
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        loss = cross_entropy(input, target, **options, torch_mean=True)
        assert loss.dtype == dtype
        x64 = input.detach().double().requires_grad_()
        w64 = None if weight is None else weight.double()
        exact = F.cross_entropy(x64, target, w64, label_smoothing=smoothing, reduction=reduction)
        ours, reference = gradient(loss, input), gradient(exact, x64)
        # One rounding of the result, plus a float32 sum of at most a few dozen terms.
        eps = torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps * (
            dtype != torch.float64
        )
        for got, want in ((loss, exact), (ours, reference)):
            tolerance = 2 * eps * (1 + want.abs().max().item())
            assert (got.double() - want).abs().max().item() <= tolerance


def test_D1_smooth_labels():
    target = torch.tensor([[0, 3], [1, 1]])
    for dim in (0, 1, 2, -1):
        got = smooth_labels(target, 4, 0.2, dim=dim)
        assert got.shape[dim] == 4 and torch.allclose(got.sum(dim), torch.ones(2, 2))
        onehot = F.one_hot(target, 4).movedim(-1, dim)
        assert torch.allclose(got, torch.where(onehot == 1, 0.8 + 0.05, 0.05))
        assert torch.allclose(smooth_labels(onehot.float(), 4, 0.2, dim=dim), got)
    others = smooth_labels(torch.tensor([2]), 10, 0.1, others_only=True)
    assert others[0].tolist() == pytest.approx([0.1 / 9] * 2 + [0.9] + [0.1 / 9] * 7)
    prior = torch.tensor([0.5, 0.25, 0.25])
    assert smooth_labels(torch.tensor(1), 3, 0.2, prior=prior).tolist() == pytest.approx(
        [0.1, 0.85, 0.05]
    )
    assert smooth_labels(torch.tensor([1]), 3, 0.2, prior=prior, others_only=True)[
        0
    ].tolist() == pytest.approx([0.2 * 2 / 3, 0.8, 0.2 / 3])
    binary = smooth_labels(torch.tensor([0.0, 1.0]), 2, 0.2, dim=None)
    assert binary.tolist() == pytest.approx([0.1, 0.9])
    assert smooth_labels(torch.tensor([0.0, 1.0]).double(), 2).dtype == torch.float64


def test_smooth_labels_feed_cross_entropy():
    input, target = make((6, 5), "ids")
    prior = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).double()
    dense = smooth_labels(F.one_hot(target, 5).double(), 5, 0.3, prior=prior)
    torch.testing.assert_close(
        cross_entropy(input, dense), cross_entropy(input, target, label_smoothing=0.3, prior=prior)
    )


def test_D2_optimal_logit_gap():
    logits = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3])
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(logits, target, label_smoothing=0.1)
        loss.backward()
        return loss

    optimizer.step(closure)
    gap = logits[0, 3] - logits[0, 0]
    assert gap.item() == pytest.approx(math.log(10 * 0.9 / 0.1 + 1), abs=1e-5)
    assert math.log(91) == pytest.approx(4.51086, abs=1e-5)


def test_A4_soft_targets_are_not_normalized():
    torch.manual_seed(0)
    logits, target = torch.randn(10).double(), torch.rand(10).double()
    assert target.sum() > 2
    expected = -(target * logits.log_softmax(0)).sum()
    torch.testing.assert_close(cross_entropy(logits, target), expected)
    with pytest.raises(ValueError, match="sum 1 within 1e-3, got a sum of"):
        cross_entropy(logits, target, check_targets=True)
    cross_entropy(logits, target / target.sum(), check_targets=True)
    with pytest.raises(ValueError, match="nonnegative"):
        cross_entropy(torch.zeros(2), torch.tensor([1.5, -0.5]), check_targets=True)
    with pytest.raises(ValueError, match="sum 1"):
        cross_entropy(torch.zeros(2), torch.tensor([math.nan, 0.5]), check_targets=True)
    masked = torch.tensor([[0.5, 0.5], [3.0, 3.0]])
    cross_entropy(torch.zeros(2, 2), masked, check_targets=True, mask=torch.tensor([True, False]))


@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given_prior", [False, True])
def test_masked_logits_stay_finite(kind, weighted, reduction, given_prior):
    torch.manual_seed(0)
    base, target = make((6, 5), kind)
    allowed = torch.rand(6, 5) > 0.4
    allowed[0] = torch.tensor([False, True, False, False, False])
    if kind == "ids":
        target = allowed.double().multinomial(1)[:, 0]
    else:
        target = (target * allowed).detach()
    input = base.detach().masked_fill(~allowed, -INF).requires_grad_()
    weight = torch.tensor([0.3, 2.0, 0.7, 1.1, 0.05]).double() if weighted else None
    prior = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).double() if given_prior else None
    for smoothing in (0.0, 0.1, 1.0):
        loss = cross_entropy(
            input,
            target,
            weight=weight,
            label_smoothing=smoothing,
            prior=prior,
            reduction=reduction,
        )
        expected = by_hand(
            input, target, weight, smoothing, lambda label: False, reduction, prior=prior
        )
        assert loss.isfinite().all()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        grad = gradient(loss, input)
        assert grad.isfinite().all() and not grad[~allowed].any()
        # The same as leaving the masked classes out, row by row.
        reduced = []
        for row, ok, label in zip(base.detach(), allowed, target, strict=True):
            new = label[ok] if kind == "soft" else ok[:label].sum()
            w = None if weight is None else weight[ok]
            p = None if prior is None else prior[ok] / prior[ok].sum()
            reduced.append(
                cross_entropy(
                    row[ok], new, weight=w, label_smoothing=smoothing, prior=p, reduction="sum"
                )
            )
        if reduction == "none":
            torch.testing.assert_close(loss, torch.stack(reduced))


def test_a_target_on_a_masked_class_is_infinitely_wrong():
    logits = torch.tensor([[0.0, -INF]])
    assert cross_entropy(logits, torch.tensor([1]), label_smoothing=0.1) == INF
    assert cross_entropy(logits, torch.tensor([1]), label_smoothing=1.0) == 0
    assert cross_entropy(logits, torch.tensor([[0.5, 0.5]])) == INF
    assert cross_entropy(torch.full((1, 2), -INF), torch.tensor([1])).isnan()


def test_a_prior_that_allows_nothing_smooths_nothing():
    logits = torch.tensor([[0.0, 1.0, -INF]])
    prior = torch.tensor([0.0, 0.0, 1.0])
    loss = cross_entropy(logits, torch.tensor([0]), label_smoothing=0.1, prior=prior)
    torch.testing.assert_close(loss, 0.9 * cross_entropy(logits, torch.tensor([0])))


@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_T7_nothing_left_is_zero_with_zero_gradient(kind, smoothing, weighted):
    input, target = make((4, 5), kind)
    with torch.no_grad():
        input[1] = math.nan
        input[2] = -INF
    weight = torch.rand(5).double() if weighted else None
    options = {
        "label_smoothing": smoothing,
        "weight": weight,
        "mask": torch.zeros(4, dtype=torch.bool),
    }
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(input, target, reduction=reduction, **options)
        assert not loss.any() and not gradient(loss, input).any()
    if kind == "ids":
        all_ignored = torch.full((4,), -100)
        assert cross_entropy(input, all_ignored, label_smoothing=smoothing) == 0
        assert cross_entropy(input, all_ignored, torch_mean=True, weight=weight).isnan()
    assert cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 0


def test_ignored_positions_are_not_read():
    input, target = make((4, 5), "ids")
    clean = cross_entropy(input[:2], target[:2], label_smoothing=0.1)
    with torch.no_grad():
        input[2] = math.nan
        input[3] = INF
    target[2:] = -100
    loss = cross_entropy(input, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, clean)
    grad = gradient(loss, input)
    assert grad.isfinite().all() and not grad[2:].any()


def test_weighted_mean_is_one_rule_for_ids_and_distributions():
    input, target = make((7, 5), "ids")
    weight = torch.tensor([0.3, 2.0, 0.7, 1.1, 0.05]).double()
    onehot = F.one_hot(target, 5).double()
    for smoothing in (0.0, 0.2):
        ids = cross_entropy(input, target, weight=weight, label_smoothing=smoothing)
        dense = cross_entropy(input, onehot, weight=weight, label_smoothing=smoothing)
        torch.testing.assert_close(ids, dense)
    torch.testing.assert_close(
        cross_entropy(input, target, weight=weight), F.cross_entropy(input, target, weight)
    )
    for torch_target in (target, onehot):
        torch.testing.assert_close(
            cross_entropy(input, torch_target, weight=weight, label_smoothing=0.2, torch_mean=True),
            F.cross_entropy(input, torch_target, weight, label_smoothing=0.2),
        )
    zero = torch.zeros(5).double()
    loss = cross_entropy(input, target, weight=zero)
    assert loss == 0 and not gradient(loss, input).any()


@pytest.mark.parametrize("kind", ["ids", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.5])
def test_gradgradcheck(kind, reduction, upstream):
    input, target = make((3, 4), kind, classes=4)
    weight = torch.tensor([0.3, 2.0, 0.7, 1.1]).double()

    def fn(x):
        loss = cross_entropy(x, target, weight=weight, label_smoothing=0.1, reduction=reduction)
        return upstream * loss

    assert torch.autograd.gradcheck(fn, input)
    assert torch.autograd.gradgradcheck(fn, input)


def test_gradient_reaches_soft_targets_and_prior():
    input, target = make((3, 4), "soft")
    prior = torch.rand(4).double().requires_grad_()
    target.requires_grad_()

    def fn(x, t, u):
        return cross_entropy(x, t, label_smoothing=0.2, prior=u)

    assert torch.autograd.gradcheck(fn, (input, target, prior))


def test_function_transforms():
    input, target = make((6, 5), "ids")
    x = input.detach()

    def fn(x, t):
        return cross_entropy(x, t, label_smoothing=0.1)

    torch.testing.assert_close(
        torch.func.grad(fn)(x, target),
        torch.func.grad(F.cross_entropy)(x, target) * 0.9 + 0.1 * (x.softmax(-1) - 0.2) / 6,
    )
    rows = torch.vmap(fn)(x, target)
    torch.testing.assert_close(rows.mean(), fn(x, target))
    _, tangent = torch.func.jvp(lambda x: fn(x, target), (x,), (torch.ones_like(x),))
    assert tangent.abs() < 1e-12


def test_meta():
    x = torch.randn(3, 5, device="meta", requires_grad=True)
    loss = cross_entropy(x, torch.zeros(3, dtype=torch.long, device="meta"))
    assert loss.shape == () and torch.autograd.grad(loss, x)[0].shape == (3, 5)


def test_autocast_computes_in_float32(device):
    input, target = make((6, 5), "ids", torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        loss = cross_entropy(input, target, label_smoothing=0.1)
        theirs = F.cross_entropy(input, target, label_smoothing=0.1)
    assert loss.dtype == theirs.dtype == torch.float32
    # On CUDA torch's own log_softmax still rounds to 16 bits here.
    expected = F.cross_entropy(input.float(), target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_module():
    input, target = make((6, 5), "ids", torch.float32)
    weight = torch.rand(5)
    module = LabelSmoothingCrossEntropy(0.2, weight=weight, ignore_index=1)
    expected = cross_entropy(input, target, weight=weight, label_smoothing=0.2, ignore_index=1)
    assert torch.equal(module(input, target), expected)
    assert list(module.state_dict()) == list(nn.CrossEntropyLoss(weight).state_dict())
    assert repr(module) == "LabelSmoothingCrossEntropy(smoothing=0.2, reduction='mean')"
    mask = torch.tensor([True] * 3 + [False] * 3)
    assert torch.equal(module(input, target, mask), module(input[:3], target[:3]))


@pytest.mark.parametrize(
    ("target", "options", "error", "text"),
    [
        ([0, 4, 1], {}, IndexError, "Target 4 is out of bounds: expected 0 to 3"),
        ([0, -1, 1], {}, IndexError, "Target -1 is out of bounds"),
        ([0, 1], {}, ValueError, r"shape \(3,\) or distributions of shape \(3, 4\)"),
        ([True] * 3, {}, ValueError, "torch.bool"),
        ([0, 1, 2], {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
        ([0, 1, 2], {"label_smoothing": math.nan}, ValueError, "label_smoothing"),
        ([0, 1, 2], {"reduction": "max"}, ValueError, "max is not a valid value"),
        ([0, 1, 2], {"weight": torch.ones(3)}, RuntimeError, r"all 4 classes, got shape \(3,\)"),
        ([0, 1, 2], {"prior": torch.ones(3)}, ValueError, "prior must be defined for all 4"),
        ([0, 1, 2], {"mask": torch.ones(3)}, ValueError, r"mask must be bool of shape \(3,\)"),
        ([[0.1] * 4] * 3, {"ignore_index": 0}, RuntimeError, "use mask"),
    ],
)
def test_bad_arguments(target, options, error, text):
    with pytest.raises(error, match=text):
        cross_entropy(torch.zeros(3, 4), torch.tensor(target), **options)


def test_bad_arguments_elsewhere():
    with pytest.raises(RuntimeError, match="floating point"):
        cross_entropy(torch.zeros(3, 4, dtype=torch.long), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="smoothing must be between"):
        LabelSmoothingCrossEntropy(-0.1)
    with pytest.raises(ValueError, match="valid value"):
        LabelSmoothingCrossEntropy(reduction="average")
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        smooth_labels(torch.tensor([0]), 1, others_only=True)
    with pytest.raises(ValueError, match="Target 3"):
        smooth_labels(torch.tensor([3]), 3)
    with pytest.raises(ValueError, match="4 classes in dim 1"):
        smooth_labels(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="num_classes=2"):
        smooth_labels(torch.zeros(2), 3, dim=None)


# --- the kernel


@pytest.fixture
def kernel():
    with fastnorm.use_backend("kernel"):
        yield


def both(input, target, upstream=None, **options):
    """Loss and gradient of the kernel and of the reference in float64."""
    results = []
    for backend in ("kernel", "reference"):
        x = input.detach().clone().requires_grad_()
        if backend == "reference":
            x = input.detach().double().requires_grad_()
            double = {
                k: v.double() for k, v in options.items() if torch.is_tensor(v) and k != "mask"
            }
            options = {**options, **double}
        with fastnorm.use_backend(backend):
            loss = cross_entropy(x, target, **options)
        up = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        results += [loss.detach().double(), torch.autograd.grad(loss, x, up)[0].double()]
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 511, 512, 513, 1500])
def test_kernel_at_every_ragged_size(dtype, classes):
    reductions = itertools.cycle(["mean", "sum", "none", "mean", "none"])
    generator = seeded(classes)
    for smoothing, weighted, given_prior, masked in itertools.product(
        (0.0, 0.1, 1.0), (False, True), (False, True), (False, True)
    ):
        x = 3 * torch.randn(6, classes, generator=generator, dtype=torch.float64)
        target = torch.randint(classes, (6,), generator=generator)
        if masked:
            allowed = torch.rand(6, classes, generator=generator) > 0.5
            allowed[torch.arange(6), target] = True
            x = x.masked_fill(~allowed, -INF)
        target[1] = -100
        options = {"label_smoothing": smoothing, "reduction": next(reductions)}
        if weighted:
            options["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
        if given_prior:
            options["prior"] = torch.rand(classes, generator=generator, dtype=torch.float64)
        loss, grad, exact_loss, exact_grad = both(x.to(dtype), target, **options)
        # The result's own rounding, and that of chunk sums in the accumulation type. In float64
        # the reference rounds as well, in proportion to the logarithms.
        inner = 8 * torch.finfo(torch.float32).eps
        eps = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1)
        eps += inner if dtype != torch.float64 else 0
        assert (loss - exact_loss).abs().max() <= eps * (1 + exact_loss.abs().max())
        assert (grad - exact_grad).abs().max() <= eps * (exact_grad.abs().max() + 0.1)
        assert not grad[1].any() and not grad[x == -INF].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_kernel_is_as_accurate_as_torch(dtype, spread):
    torch.manual_seed(0)
    x = (spread * torch.randn(64, 3000)).to(dtype)
    target = torch.randint(3000, (64,))
    loss, grad, exact_loss, exact_grad = both(x, target, label_smoothing=0.1, reduction="none")
    y = x.clone().requires_grad_()
    theirs = F.cross_entropy(y, target, label_smoothing=0.1, reduction="none")
    their_grad = torch.autograd.grad(theirs.sum(), y)[0]
    for got, torchs, exact in ((loss, theirs, exact_loss), (grad, their_grad, exact_grad)):
        error, their_error = ((t.double() - exact).abs().max() for t in (got, torchs))
        assert error <= 1.5 * their_error


def test_kernel_is_stable_far_from_zero(kernel):
    for x in (
        torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4 + 1]]),
        torch.tensor([[1.0, torch.finfo(torch.float32).min, 0.0]] * 2),
        torch.cat([torch.full((2, 600), -1e4), torch.tensor([[0.0, 1.0]] * 2)], 1),
    ):
        target = torch.tensor([0, 1])
        loss, grad, exact_loss, exact_grad = both(x, target, label_smoothing=0.0)
        torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-6, atol=1e-7)
    for value in (INF, math.nan):
        x = torch.zeros(2, 600)
        x[0, 550] = value
        x.requires_grad_()
        loss = cross_entropy(x, torch.tensor([0, 1]), reduction="none")
        assert loss[0].isnan() and loss[1].isfinite()
        grad = torch.autograd.grad(loss.sum(), x)[0]
        assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_kernel_gives_the_same_bits_for_any_threads_and_batch(kernel):
    torch.manual_seed(0)
    x, target = torch.randn(300, 1000), torch.randint(1000, (300,))
    options = {"label_smoothing": 0.1, "reduction": "none"}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = x.clone().requires_grad_()
            loss = cross_entropy(y, target, **options)
            mean = cross_entropy(x, target, label_smoothing=0.1)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), y)[0], mean))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    for part in (slice(0, 1), slice(37, 90)):
        assert torch.equal(cross_entropy(x[part], target[part], **options), results[0][0][part])


def test_kernel_backward_twice_and_scaled(kernel):
    torch.manual_seed(0)
    x = torch.randn(4, 9, requires_grad=True)
    hidden = x * 1
    target = torch.tensor([0, 3, -100, 8])
    loss = cross_entropy(hidden, target, label_smoothing=0.1)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.zero_()  # what backward returned is the caller's
    (second,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
    torch.testing.assert_close(second, 2 * kept)
    leaf = x.detach().clone().requires_grad_()
    loss = cross_entropy(leaf, target, label_smoothing=0.1)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * kept)
    with torch.no_grad():
        assert not cross_entropy(x, target).requires_grad


def test_kernel_layouts(kernel):
    torch.manual_seed(0)
    base = torch.randn(2, 7, 5, 6)
    target = torch.randint(7, (2, 5, 6))
    for x in (
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        loss, grad, exact_loss, exact_grad = both(x, target, label_smoothing=0.1)
        torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-9)
    loss, *_ = both(torch.randn(40)[::4], torch.tensor(3))
    assert loss.shape == ()
    strided = torch.randint(7, (60,))[::10]
    assert cross_entropy(torch.randn(6, 7), strided).isfinite()


def test_kernel_checks_its_arguments(kernel):
    op = torch.ops.fastnorm.cross_entropy
    x, ids = torch.randn(3, 4), torch.tensor([0, 1, 2])
    rest = (None, None, 0.1, -100, 1, False, True)
    with pytest.raises(RuntimeError, match="contiguous rows"):
        op(x.T, ids, *rest)
    with pytest.raises(RuntimeError, match="3 contiguous int64 class ids"):
        op(x, ids.int(), *rest)
    with pytest.raises(RuntimeError, match="each of 4 classes"):
        op(x, ids, torch.ones(3), *rest[1:])
    with pytest.raises(IndexError, match="Target 4 is out of bounds: expected 0 to 3"):
        op(x, ids + 2, *rest)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_kernel_opcheck(kernel, reduction):
    x, ids = torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2])
    cross_entropy(x, ids)
    _ops.register_fakes()
    for need_grad in (False, True):
        torch.library.opcheck(
            torch.ops.fastnorm.cross_entropy.default,
            (x, ids, torch.rand(4), None, 0.1, -100, reduction, False, need_grad),
        )


@pytest.mark.parametrize("backend", ["kernel", "auto"])
def test_compiles_to_one_graph(backend):
    torch.manual_seed(0)
    x, target = torch.randn(6, 5), torch.randint(5, (6,))

    def fn(x):
        return cross_entropy(2 * x, target, label_smoothing=0.1)

    with fastnorm.use_backend(backend):
        torch._dynamo.reset()
        results = []
        for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            y = x.clone().requires_grad_()
            loss = run(y)
            results.append((loss.detach(), torch.autograd.grad(loss, y)[0]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
