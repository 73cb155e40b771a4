from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_norm_checks import RowNormChecks

import fastnorm
from fastnorm.testing import random_tensor

pytestmark = pytest.mark.usefixtures("kernels")


class TestRMSNorm(RowNormChecks):
    has_bias = False

    @staticmethod
    def ours(x, shape, weight=None, bias=None, eps=None, **kwargs):
        return fastnorm.rms_norm(x, shape, weight, eps, **kwargs)

    @staticmethod
    def theirs(x, shape, weight=None, bias=None):
        # The default eps depends on the dtype, so that of the exact result must be float32's.
        eps = torch.finfo(torch.float32).eps
        return F.rms_norm(x, shape, weight, eps)

    def fused(self, shape, **kwargs):
        eps = torch.finfo(torch.float32).eps
        return lambda x, w, b, r=None: self.ours(x, shape, w, b, eps, residual=r, **kwargs)

    @staticmethod
    def ours_add(x, residual, shape, weight, bias, **options):
        eps = torch.finfo(torch.float32).eps
        return fastnorm.add_rms_norm(x, residual, shape, weight, eps, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_default_eps_is_torchs(dtype):
    x = random_tensor(3, 8, dtype=dtype, std=1e-3)
    torch.testing.assert_close(fastnorm.rms_norm(x, (8,)), F.rms_norm(x, (8,)))


def test_weight_offset_is_added_in_float32():
    weight = torch.full((8,), 0.00390625, dtype=torch.bfloat16)
    x = torch.ones(2, 8)
    y = fastnorm.rms_norm(x, (8,), weight, 0.0, weight_offset=1.0)
    assert torch.equal(y, torch.full_like(x, 1.00390625))


def test_weight_offset_gradients():
    x = random_tensor(4, 8, dtype=torch.float64).requires_grad_()
    w = random_tensor(8, dtype=torch.float64).requires_grad_()

    def run(x, w):
        return fastnorm.rms_norm(x, (8,), w, 1e-6, weight_offset=1.0, activation="silu")

    torch.testing.assert_close(run(x, w), F.silu(F.rms_norm(x, (8,), w + 1.0, 1e-6)))
    assert torch.autograd.gradcheck(run, (x, w))
    assert torch.autograd.gradgradcheck(run, (x, w))


def test_module_is_torchs_with_more():
    theirs = torch.nn.RMSNorm(6, eps=1e-3)
    ours = fastnorm.RMSNorm(6, eps=1e-3, activation="relu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = random_tensor(3, 6)
    torch.testing.assert_close(ours(x), F.relu(theirs(x)))
    assert repr(ours) == "RMSNorm((6,), eps=0.001, elementwise_affine=True, activation='relu')"
    gemma = fastnorm.RMSNorm(6, weight_offset=1.0)
    assert torch.equal(gemma.weight, torch.zeros(6))
    torch.testing.assert_close(gemma(x), F.rms_norm(x, (6,)))


def test_add_module():
    norm = fastnorm.AddRMSNorm(6, eps=1e-6, weight_offset=1.0)
    x, r = random_tensor(2, 3, 6).unbind()
    y, total = norm(x, r)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.rms_norm(x + r, (6,), eps=1e-6))
