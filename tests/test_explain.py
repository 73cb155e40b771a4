from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fastnorm

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.cpu("names a form of the CPU kernels")
def test_kernel_and_its_form():
    x = torch.randn(6, 8, requires_grad=True)
    got = fastnorm.explain(fastnorm.layer_norm, x, (8,))
    assert got.implementation == "kernel"
    assert got.reason is None
    assert str(got) == "kernel\n  norm on cpu: row, resident in cache, float32 [6, 8]"


@pytest.mark.cpu("names a form of the CPU kernels")
def test_long_rows_stream():
    got = fastnorm.explain(fastnorm.rms_norm, torch.randn(1, 2**17), (2**17,))
    assert "row, streaming" in str(got)


def test_copies_are_named(device):
    got = fastnorm.explain(fastnorm.layer_norm, torch.randn(6, 8).t(), (6,))
    assert [step.split(":")[0] for step in got.steps] == ["input", f"norm on {device}"]
    assert "strides (1, 8)" in got.steps[0]


def test_the_reason_of_the_reference():
    x = torch.randn(3, 4)
    with fastnorm.use_backend("reference"):
        got = fastnorm.explain(fastnorm.rms_norm, x, (4,))
        assert (got.implementation, got.reason) == ("reference", "the backend is 'reference'")
    got = fastnorm.explain(torch.func.vmap(lambda v: fastnorm.layer_norm(v, (4,))), x)
    assert got.reason == "a torch.func transform is active"
    got = fastnorm.explain(fastnorm.layer_norm, x.to("meta"), (4,))
    assert got.reason == "there are no kernels for meta"


def test_a_module_and_nothing(device):
    norm = fastnorm.AddLayerNorm(4)
    got = fastnorm.explain(norm, torch.randn(2, 4), torch.randn(2, 4))
    assert f"add_norm on {device}" in str(got)
    assert fastnorm.explain(lambda: None).implementation == "none"


def test_dropout_and_cross_entropy():
    x = torch.randn(4, 6).t()
    device = x.device
    got = fastnorm.explain(fastnorm.dropout2d, torch.randn(2, 4, 3, 3), 0.5)
    assert str(got) == f"kernel\n  dropout on {device}: float32 [2, 4, 3, 3]"
    got = fastnorm.explain(fastnorm.cross_entropy, x, torch.arange(6) % 4)
    assert got.steps[0].startswith("input: copied")
    assert got.steps[1:] == [f"cross_entropy on {device}: float32 [6, 4]"]


def test_the_fast_entry_is_back_afterwards():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fastnorm.explain(fastnorm.layer_norm, torch.randn(2, 4), (3,))
    x = torch.randn(2, 4)
    y = fastnorm._build.module.row_norm(x, (4,), None, None, 1e-5, 0, 0.0, 0, None)
    assert y is not None


def test_a_masked_batch_runs_a_kernel(device):
    norm = fastnorm.BatchNorm1d(4)
    told = str(fastnorm.explain(norm, torch.randn(3, 4, 5), lengths=[5, 2, 1]))
    assert f"norm on {device}" in told and "reference" not in told


def test_parameters_of_other_classes():
    class Tagged(nn.Parameter):
        pass

    x, weight = torch.randn(2, 6), torch.ones(6)
    found = fastnorm.explain(fastnorm.layer_norm, x, (6,), Tagged(weight))
    assert found.implementation == "kernel"
    both = nn.Parameter(TwoTensor(weight, weight))  # its class is TwoTensor
    found = fastnorm.explain(fastnorm.layer_norm, x, (6,), both)
    assert found.reason == "TwoTensor is a subclass of Tensor"
