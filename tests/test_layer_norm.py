from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_norm_checks import RowNormChecks

import fastnorm
from fastnorm.testing import random_tensor

pytestmark = pytest.mark.usefixtures("kernels")


class TestLayerNorm(RowNormChecks):
    has_bias = True
    ours = staticmethod(fastnorm.layer_norm)
    theirs = staticmethod(F.layer_norm)

    @staticmethod
    def ours_add(x, residual, shape, weight, bias, **options):
        return fastnorm.add_layer_norm(x, residual, shape, weight, bias, **options)


@pytest.mark.parametrize(
    ("mean", "std", "shape"), [(100.0, 0.01, (64, 32768)), (2000.0, 1.0, (512, 4))]
)
def test_variance_does_not_cancel(mean, std, shape):
    x = random_tensor(*shape, mean=mean, std=std)
    y = fastnorm.layer_norm(x, shape[-1:], eps=0.0)
    d = x.double() - x.double().mean(-1, keepdim=True)
    rstd = d.square().mean(-1).rsqrt()
    # y = (x - mean) * rstd: its norm gives rstd back.
    ours = y.double().square().sum(-1).sqrt() / d.square().sum(-1).sqrt()
    assert ((ours - rstd) / rstd).abs().max() < 1e-3


def test_module_is_torchs_with_more():
    theirs = torch.nn.LayerNorm((4, 6), eps=1e-3, bias=False)
    ours = fastnorm.LayerNorm((4, 6), eps=1e-3, bias=False, activation="gelu", dropout_p=0.25)
    assert isinstance(ours, torch.nn.LayerNorm)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)[:-1] + ", activation='gelu', dropout_p=0.25)"
    ours.eval()
    x = random_tensor(3, 4, 6)
    torch.testing.assert_close(ours(x), F.gelu(theirs(x)))
    torch.testing.assert_close(ours(x, x), F.gelu(theirs(x) + x))


def test_add_module():
    norm = fastnorm.AddLayerNorm(6)
    x, r = random_tensor(2, 3, 6).unbind()
    y, total = norm(x, r)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.layer_norm(x + r, (6,)))
    with pytest.raises(TypeError, match="residual"):
        norm(x, None)


@pytest.mark.parametrize("make", [fastnorm.LayerNorm, fastnorm.AddLayerNorm])
def test_module_arguments_are_checked(make):
    with pytest.raises(ValueError, match="dropout_p"):
        make(6, dropout_p=-0.1)


def test_activation_of_the_module_is_checked():
    with pytest.raises(ValueError, match="activation"):
        fastnorm.LayerNorm(6, activation="mish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_with_a_gradient_of_the_sum_alone(dtype):
    total, grad_sum = random_tensor(2, 5, 33).to(dtype).unbind()
    mean, var = torch.zeros(5), torch.ones(5)
    dx, dw, db, dr = torch.ops.fastnorm.add_norm_bwd(
        None, grad_sum, total, torch.ones(33, dtype=dtype), mean, var, None,
        (5, 1, 1, 33, 1, 1), 0, 1e-5, 0.0, 0.0, [False, True, True, True],
    )  # fmt: skip
    assert torch.equal(dr, grad_sum)
    assert not dw.any() and not db.any() and dx.numel() == 0


def test_rounding_keeps_every_nan_and_infinity():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    weight = bits.view(torch.float32)
    x = random_tensor(3, 5).bfloat16()
    y = fastnorm.layer_norm(x, (5,), weight)
    torch.testing.assert_close(y, F.layer_norm(x, (5,)) * weight.bfloat16(), equal_nan=True)
    assert y[:, :3].isnan().all()
