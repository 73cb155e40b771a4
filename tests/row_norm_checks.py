"""The checklist of the row norms: layer norm and RMS norm, and both with the residual add."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastnorm
from fastnorm import _build
from fastnorm.epilogue import ACTIVATIONS
from fastnorm.testing import (
    LAYOUTS,
    assert_within_budget,
    gradient_like,
    poisoned_memory,
    random_tensor,
    rng_state,
    run_with_gradients,
    seeded,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around the vector widths, the chunks (512) and the stretches (4096) that a row is cut into.
WIDTHS = [1, 3, 15, 16, 17, 65, 127, 128, 129, 511, 513, 1009, 4095, 4096, 4097, 9001]


def activate(y: Tensor, activation: str | None) -> Tensor:
    return ACTIVATIONS[activation].function(y)


class RowNormChecks:
    """Subclasses say which norm; `has_bias` and the four functions below are all that differs."""

    has_bias: bool

    @staticmethod
    def ours(*args, **kwargs):  # (input, shape, weight, bias, eps)
        raise NotImplementedError

    @staticmethod
    def theirs(*args):
        raise NotImplementedError

    @staticmethod
    def ours_add(*args):
        raise NotImplementedError

    def fused(self, shape, **kwargs) -> Callable:
        return lambda x, w, b, r=None: self.ours(x, shape, w, b, residual=r, **kwargs)

    def unfused(self, shape, activation=None) -> Callable:
        def run(x, w, b, r=None):
            w, b = (None if t is None else t.to(x.dtype) for t in (w, b))
            y = self.theirs(x, shape, w, b)
            return activate(y if r is None else y + r, activation)

        return run

    def parameters(self, n: int, dtype: torch.dtype):
        weight = random_tensor(n, dtype=dtype)
        return weight, random_tensor(n, dtype=dtype) if self.has_bias else None

    def check(self, fused, unfused, tensors, grads, what="") -> None:
        with poisoned_memory():
            ours = run_with_gradients(fused, tensors, grads)
        # Float64 is what everything is measured against, so torch's float32 stands in for itself.
        double = tensors[0].dtype == torch.float64
        theirs = run_with_gradients(unfused, tensors, grads, torch.float32 if double else None)
        exact = run_with_gradients(unfused, tensors, grads, torch.float64)
        assert_within_budget(ours, theirs, exact, what=what)
        for t, g in zip([t for t in tensors if t is not None], ours[-len(tensors) :], strict=False):
            assert g is None or g.dtype in {t.dtype, *(u.dtype for u in tensors if u is not None)}

    # ---- values ----

    @pytest.mark.parametrize("n", WIDTHS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_widths(self, dtype, n):
        x = random_tensor(11, n, dtype=dtype)
        tensors = [x, *self.parameters(n, dtype)]
        self.check(self.fused((n,)), self.unfused((n,)), tensors, [gradient_like(x)], f"width {n}")

    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 63, 127, 1000])
    def test_rows(self, rows):
        x = random_tensor(rows, 65)
        tensors = [x, *self.parameters(65, x.dtype)]
        self.check(self.fused((65,)), self.unfused((65,)), tensors, [gradient_like(x)])

    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_epilogue(self, dtype, activation, residual):
        x, r = random_tensor(2, 9, 600, dtype=dtype).unbind()
        tensors = [x, *self.parameters(600, dtype), r if residual else None]
        self.check(
            self.fused((600,), activation=activation),
            self.unfused((600,), activation),
            tensors,
            [gradient_like(x)],
        )

    @pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (3, 2, 4, 5), (2, 3, 2, 4, 5)])
    @pytest.mark.parametrize("dims", [1, 2])
    def test_ranks(self, shape, dims):
        normalized = shape[-dims:]
        x = random_tensor(*shape)
        w, b = (
            None if p is None else p.view(normalized)
            for p in self.parameters(torch.Size(normalized).numel(), x.dtype)
        )
        self.check(self.fused(normalized), self.unfused(normalized), [x, w, b], [gradient_like(x)])

    @pytest.mark.parametrize("input_dtype", DTYPES[:3])
    @pytest.mark.parametrize("weight_dtype", DTYPES[:3])
    def test_mixed_dtypes(self, input_dtype, weight_dtype):
        x = random_tensor(40, 130, dtype=input_dtype)
        w, b = self.parameters(130, weight_dtype)
        g = gradient_like(x)
        ours = run_with_gradients(self.fused((130,)), [x, w, b], [g])
        exact = run_with_gradients(self.unfused((130,)), [x, w, b], [g], torch.float64)
        wide = [None if t is None else t.float() for t in (x, w, b)]
        peer = run_with_gradients(self.unfused((130,)), wide, [g.float()])
        assert ours[0].dtype == input_dtype
        for result, like in zip(ours, (x, x, w, b), strict=True):
            assert result is None or result.dtype == like.dtype
        # Torch in float32, rounded to the dtype of each result, is what may be reached.
        rounded = [None if p is None else p.to(o.dtype) for p, o in zip(peer, ours, strict=True)]
        assert_within_budget(ours, rounded, exact)

    # ---- layouts ----

    @pytest.mark.parametrize("shape", [(6, 10), (3, 5, 10), (2, 3, 4, 10), (2, 2, 3, 4, 10)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts(self, dtype, shape):
        n = shape[-1]
        w, b = self.parameters(n, dtype)
        strided_w = LAYOUTS["step"](w)
        for x_layout, g_layout in itertools.product(LAYOUTS, LAYOUTS):
            x = LAYOUTS[x_layout](random_tensor(*shape, dtype=dtype))
            r = LAYOUTS[g_layout](random_tensor(*shape, dtype=dtype))
            self.check(
                self.fused((n,), activation="silu"),
                self.unfused((n,), "silu"),
                [x, strided_w, b, r],
                [gradient_like(x, g_layout)],
                f"{x_layout} input, {g_layout} gradient and residual",
            )

    # ---- accuracy (large means, constants, overflow) ----

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [14.0, 1e6, -3.0])
    @pytest.mark.parametrize("n", [1, 7, 64, 5000])
    def test_constant_rows(self, n, value, dtype):
        if not self.has_bias:
            pytest.skip("a constant row is not zero to RMS norm")
        if dtype == torch.float16 and value > 65504:
            value = 60000.0
        x = torch.full((5, n), value, dtype=dtype)
        w, b = self.parameters(n, dtype)
        y, _, dw, _ = run_with_gradients(self.fused((n,)), [x, w, b], [gradient_like(x)])
        assert torch.equal(y, b.expand_as(y))
        assert torch.equal(dw, torch.zeros_like(dw))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_no_overflow_in_16_bits(self, dtype):
        n = 2**14
        x = torch.full((3, n), 60000.0, dtype=dtype)
        x[:, ::2] = -60000.0
        w, b = self.parameters(n, dtype)
        for result in run_with_gradients(self.fused((n,)), [x, w, b], [gradient_like(x)]):
            assert result is None or result.isfinite().all()

    @pytest.mark.parametrize("rows", [1, 3, 127, 4096, 131072])
    def test_parameter_gradients(self, rows):
        x = random_tensor(rows, 17, dtype=torch.bfloat16)
        tensors = [x, *self.parameters(17, torch.float32)]
        g = gradient_like(x)
        ours = run_with_gradients(self.fused((17,)), tensors, [g])
        exact = run_with_gradients(self.unfused((17,)), tensors, [g], torch.float64)
        wide = [None if t is None else t.float() for t in tensors]
        peer = run_with_gradients(self.unfused((17,)), wide, [g.float()])
        assert_within_budget(ours[2:], peer[2:], exact[2:])

    # ---- determinism ----

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threads_and_repeats_give_the_same_bits(self, dtype):
        for shape in [(257, 300), (2, 70000)]:
            x = random_tensor(*shape, dtype=dtype)
            tensors = [x, *self.parameters(shape[-1], dtype), x.flip(0)]
            g = gradient_like(x)
            first = None
            for threads in (1, 2, 5, 1):
                torch.set_num_threads(threads)
                run = run_with_gradients(self.fused(shape[-1:], activation="gelu"), tensors, [g])
                first = first or run
                for a, b in zip(first, run, strict=True):
                    assert a is None or torch.equal(a, b)

    def test_a_row_does_not_depend_on_the_others(self):
        x = random_tensor(4097, 70)
        w, b = self.parameters(70, x.dtype)
        g = gradient_like(x)
        y, dx, *_ = run_with_gradients(self.fused((70,)), [x, w, b], [g])
        for part in (slice(0, 1), slice(255, 257), slice(100, 357), slice(1, 4097, 16)):
            ys, dxs, *_ = run_with_gradients(self.fused((70,)), [x[part], w, b], [g[part]])
            assert torch.equal(ys, y[part])
            assert torch.equal(dxs, dx[part])

    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_short_rows_in_blocks(self, dtype, activation):
        # Blocks of 16 rows, of fewer from 65 columns on; each Wide may reach into the next rows.
        results: list[list[Tensor]] = []
        for n in (*range(1, 41), 63, 64, 65, 127, 128):
            x = random_tensor(37, n, dtype=dtype)
            r = x.flip(0) if activation else None
            w, b = self.parameters(n, dtype)
            g = gradient_like(x)
            ours, theirs = self.fused((n,), activation=activation), self.unfused((n,), activation)
            peer = torch.float32 if dtype == torch.float64 else None
            for run in ((ours, None), (theirs, peer), (theirs, torch.float64)):
                results.append(run_with_gradients(run[0], [x, w, b, r], [g], run[1]))
            y, dx = results[-3][:2]
            x[20] = float("inf")
            for part in (slice(0, 1), slice(15, 17), slice(3, 20), slice(21, 37), slice(0, 37)):
                few = [x[part], w, b, None if r is None else r[part]]
                ys, dxs, *_ = run_with_gradients(ours, few, [g[part]])
                clean = torch.arange(37)[part] != 20
                assert torch.equal(ys[clean], y[part][clean]), f"width {n}"
                assert torch.equal(dxs[clean], dx[part][clean]), f"width {n}"
        # A parameter of few columns has too few errors to compare: all widths together.
        together = [
            [
                torch.cat([t.flatten() for t in same])
                for same in zip(*kind, strict=True)
                if same[0] is not None
            ]
            for kind in (results[0::3], results[1::3], results[2::3])
        ]
        assert_within_budget(*together)

    # ---- gradients of gradients ----

    @pytest.mark.parametrize("weight", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("activation", [None, "gelu", "silu", "tanh"])
    def test_gradcheck(self, activation, residual, bias, weight):
        if bias and not self.has_bias:
            pytest.skip("RMS norm has no bias")
        x, r = random_tensor(2, 3, 5, dtype=torch.float64).unbind()
        w, b = random_tensor(2, 5, dtype=torch.float64).unbind()
        given = [x, w if weight else None, b if bias else None, r if residual else None]
        inputs = [t.clone().requires_grad_() for t in given if t is not None]

        def run(*tensors):
            rest = iter(tensors)
            args = [next(rest) if t is not None else None for t in given]
            return self.fused((5,), activation=activation)(*args)

        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)

    def test_gradients_of_an_expanded_gradient(self):
        x = random_tensor(4, 6, dtype=torch.float64)
        w, b = self.parameters(6, x.dtype)
        tensors = [x, w, b]
        g = random_tensor(1, 1, dtype=torch.float64).expand(4, 6)
        ours = run_with_gradients(self.fused((6,)), tensors, [g])
        theirs = run_with_gradients(self.unfused((6,)), tensors, [g])
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e)

    def test_recorded_gradients_are_the_plain_ones(self):
        """With create_graph, also where inputs depend on one another or are one tensor."""
        x = random_tensor(4, 8, dtype=torch.float64).requires_grad_()
        w, b = (p if p is None else p.requires_grad_() for p in self.parameters(8, x.dtype))
        norm = self.fused((8,), activation="gelu")
        losses = {
            "one weight twice": lambda: norm(norm(x, w, b).sin(), w, b),
            "input from the residual": lambda: norm(x.sin(), w, b, x * 2),
            "input as residual": lambda: norm(x, w, b, x),
            "input from the weight": lambda: norm(x * w, w, b),
            "add": lambda: sum(self.ours_add(x * w, x, (8,), w, b)),
        }
        sources = [t for t in (x, w, b) if t is not None]
        for name, loss in losses.items():
            plain = torch.autograd.grad(loss().pow(3).sum(), sources)
            recorded = torch.autograd.grad(loss().pow(3).sum(), sources, create_graph=True)
            for p, r in zip(plain, recorded, strict=True):
                torch.testing.assert_close(r, p, msg=lambda text, name=name: f"{name}: {text}")

    def test_forward_mode(self):
        import torch.autograd.forward_ad as forward_ad

        x, t = random_tensor(2, 4, 8, dtype=torch.float64).unbind()
        w, b = self.parameters(8, x.dtype)
        _, expected = torch.func.jvp(lambda x: self.theirs(x, (8,), w, b), (x,), (t,))
        for wanted in (False, True):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x.clone().requires_grad_(wanted), t)
                tangent = forward_ad.unpack_dual(self.ours(dual, (8,), w, b)).tangent
                torch.testing.assert_close(tangent.detach(), expected, rtol=1e-4, atol=1e-4)

    def test_third_derivative(self):
        x = random_tensor(2, 4, dtype=torch.float64).requires_grad_()
        w, b = self.parameters(4, x.dtype)

        def third(function):
            out = function(x, w, b).tanh().sum()
            for _ in range(3):
                (g,) = torch.autograd.grad(out, x, create_graph=True)
                out = g.pow(3).sum()
            return out

        def primitive(x, w, b):
            mean = x.mean(-1, keepdim=True) if self.has_bias else 0.0
            d = x - mean
            y = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
            return y if b is None else y + b

        fused = lambda x, w, b: self.ours(x, (4,), w, b, 1e-5)  # noqa: E731
        torch.testing.assert_close(third(fused), third(primitive), rtol=1e-6, atol=1e-6)

    def test_only_what_is_asked_for(self):
        for wanted in itertools.product([False, True], repeat=4):
            x, r = random_tensor(2, 3, 5).unbind()
            w, b = self.parameters(5, x.dtype)
            tensors = [
                t if t is None else t.clone().requires_grad_(want)
                for t, want in zip((x, w, b, r), wanted, strict=True)
            ]
            y = self.fused((5,), activation="gelu")(*tensors)
            assert y.requires_grad == any(t.requires_grad for t in tensors if t is not None)
            if y.requires_grad:
                y.sum().backward()
            for t in tensors:
                assert t is None or (t.grad is not None) == t.requires_grad

    # ---- residual add before the norm ----

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [3, 17, 600, 4100])
    def test_add(self, dtype, n):
        x, r = random_tensor(2, 9, n, dtype=dtype).unbind()
        tensors = [x, *self.parameters(n, dtype), r]

        def fused(x, w, b, r):
            return self.ours_add(x, r, (n,), w, b)

        def unfused(x, w, b, r):
            total = x + r
            return self.unfused((n,))(total, w, b), total

        for grads in ([True, True], [True, False], [False, True]):
            g = [gradient_like(x) if wanted else None for wanted in grads]
            self.check(fused, unfused, tensors, g, f"gradients into {grads}")

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_an_unused_norm_adds_nothing_to_the_gradients(self, p):
        x = torch.zeros(2, 8)
        x[0, 0] = torch.inf  # the norm's derivative is NaN there
        x, r = x.requires_grad_(), torch.zeros_like(x).requires_grad_()
        w = torch.ones(8, requires_grad=True)
        torch.manual_seed(0)
        _, total = self.ours_add(x, r, (8,), w, None, dropout_p=p)
        total.backward(torch.ones_like(total))
        torch.manual_seed(0)
        assert torch.equal(x.grad, fastnorm.dropout(torch.ones_like(x), p))
        assert torch.equal(r.grad, torch.ones_like(r))
        assert w.grad is None

    def test_add_gradcheck(self):
        x, r = random_tensor(2, 3, 5, dtype=torch.float64).unbind()
        w, b = self.parameters(5, x.dtype)
        inputs = [t.clone().requires_grad_() for t in (x, r, w, b) if t is not None]

        def run(x, r, w, b=None):
            return self.ours_add(x, r, (5,), w, b)

        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)

    # ---- edges ----

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 0)])
    def test_empty(self, shape):
        n = shape[-1]
        x = torch.zeros(shape, requires_grad=True)
        w, b = (None if p is None else p.requires_grad_() for p in self.parameters(n, x.dtype))
        y = self.ours(x, (n,), w, b)
        y.sum().backward()
        assert y.shape == x.shape and x.grad.shape == x.shape
        assert torch.equal(w.grad, torch.zeros_like(w))

    def test_saves_input_and_statistics_only(self):
        x = random_tensor(64, 256).requires_grad_()
        w, b = (None if p is None else p.requires_grad_() for p in self.parameters(256, x.dtype))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            self.ours(x, (256,), w, b)
        assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 2 * 256 + 2 * 64

    def test_inputs_are_untouched(self):
        x, r = random_tensor(2, 5, 40).unbind()
        w, b = self.parameters(40, x.dtype)
        before = [None if t is None else t.clone() for t in (x, w, b, r)]
        run_with_gradients(self.fused((40,), activation="relu"), [x, w, b, r], [gradient_like(x)])
        for a, e in zip((x, w, b, r), before, strict=True):
            assert a is None or torch.equal(a, e)

    # ---- errors: torch's classes, and what was expected and given ----

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                dict(shape=(4,)),
                RuntimeError,
                r"normalized_shape: expected an input of shape \[\*, 4",
            ),
            (dict(shape=()), RuntimeError, "normalized_shape"),
            (dict(shape=(2**70,)), RuntimeError, "normalized_shape"),
            (dict(shape=2.5), TypeError, "normalized_shape: expected an int or a sequence"),
            (dict(shape=(5.0,)), TypeError, r"normalized_shape: .* sequence of int, got \(5.0,\)"),
            (dict(shape="5"), TypeError, "normalized_shape: .* sequence of int, got '5'"),
            (dict(weight=torch.ones(4)), RuntimeError, r"weight: expected shape \[5\], got \[4\]"),
            (dict(weight=torch.ones(5).double()), TypeError, "weight.*float64.*float32"),
            (
                dict(weight=torch.ones(5, device="meta")),
                RuntimeError,
                "weight.*device .*, got meta",
            ),
            (dict(weight=[1.0] * 5), TypeError, "weight: expected a tensor or None, got list"),
            (
                dict(x=torch.ones(3, 5, dtype=torch.int64)),
                TypeError,
                "input: expected float32.*int64",
            ),
            (dict(x=torch.ones(3, 5, dtype=torch.int64)), NotImplementedError, "int64"),
            (dict(x=torch.ones(3, 5, dtype=torch.complex64)), TypeError, "complex64"),
            (dict(x=[1.0]), TypeError, "input: expected a tensor, got list"),
            (
                dict(activation="swish"),
                ValueError,
                "activation: expected one of .*'silu'.* got 'swish'",
            ),
            (dict(activation=3), ValueError, "activation"),
            (dict(eps=float("inf")), ValueError, "eps: expected a finite number, got inf"),
            (dict(eps=float("nan")), ValueError, "eps"),
            (dict(eps="small"), TypeError, "eps: expected a number, got str"),
            (dict(residual=torch.ones(5)), ValueError, r"residual: .*\[3, 5\], got \[5\]"),
            (dict(residual=torch.ones(3, 5).half()), TypeError, "residual.*float32, got float16"),
            (dict(dropout_p=1.5), ValueError, "dropout_p: .*between 0 and 1, got 1.5"),
        ],
    )
    def test_errors(self, change, error, message):
        state = rng_state()
        call = dict(x=torch.ones(3, 5), shape=(5,), weight=None, eps=1e-5) | change
        x, shape, weight, eps = (call.pop(k) for k in ("x", "shape", "weight", "eps"))
        with pytest.raises(error, match=message):
            self.ours(x, shape, weight, None, eps, **call)
        assert torch.equal(state, rng_state())

    # ---- the other implementations ----

    def test_reference_agrees(self):
        x, r = random_tensor(2, 4, 60, dtype=torch.float64).unbind()
        tensors = [x, *self.parameters(60, x.dtype), r]
        g = gradient_like(x)
        fused = self.fused((60,), activation="gelu")
        kernel = run_with_gradients(fused, tensors, [g])
        with _build.use_backend("reference"):
            reference = run_with_gradients(fused, tensors, [g])
        for a, e in zip(kernel, reference, strict=True):
            assert a is None or torch.allclose(a, e, rtol=1e-12, atol=1e-12)

    def test_function_transforms(self):
        x = random_tensor(6, 5, dtype=torch.float64)
        w, b = self.parameters(5, x.dtype)

        def loss(w, x):
            return self.ours(x, (5,), w, b, activation="silu").square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
        loop = torch.stack([torch.func.grad(loss)(w, row) for row in x])
        torch.testing.assert_close(per_sample, loop)
        _, tangent = torch.func.jvp(lambda w: loss(w, x), (w,), (torch.ones_like(w),))
        torch.testing.assert_close(tangent, loop.sum())

    def test_compiles_without_a_break(self):
        x, r = random_tensor(2, 4, 60).unbind()
        w, b = self.parameters(60, x.dtype)
        for backend in ("auto", "kernel"):
            torch._dynamo.reset()
            _build.use_backend(backend)
            fused = self.fused((60,), activation="silu")
            compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
            g = gradient_like(x)
            a = run_with_gradients(compiled, [x, w, b, r], [g])
            e = run_with_gradients(fused, [x, w, b, r], [g])
            for got, want in zip(a, e, strict=True):
                assert got is None or torch.allclose(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("backend", ["auto", "kernel"])
    def test_compiles_with_dynamic_shapes_and_repeated_tensors(self, backend):
        _build.use_backend(backend)
        torch._dynamo.reset()
        w, _ = self.parameters(8, torch.float32)

        def run(x):
            y, total = self.ours_add(x, x, (8,), w, w if self.has_bias else None)
            return self.ours(y, (8,), w, None, 1e-5, residual=y) + total

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 6):
            x = random_tensor(rows, 8).requires_grad_()
            torch.testing.assert_close(compiled(x), run(x))
            compiled(x).sum().backward()

    def test_one_mask_for_kernel_and_reference(self):
        for dim in (0, 1, 2, 3, -1):
            x = random_tensor(2, 3, 4, 5).to(memory_format=torch.channels_last)
            shape = (x.shape[dim],)
            kept = []
            for backend in ("kernel", "reference"):
                with _build.use_backend(backend):
                    seed = seeded(1)
                    y = self.ours(x, shape, dim=dim, dropout_p=0.5, generator=seed)
                    kept.append(y != 0)
            assert torch.equal(*kept)
