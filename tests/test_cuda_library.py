"""The CUDA library as a GPU machine builds it: compiled, linked and loaded by torch's CUDA build.

Needs a torch with CUDA and an nvcc that fits it, but no GPU.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from fastnorm import _build, _toolchain

pytestmark = pytest.mark.cpu("builds without a GPU")

OPERATORS = ("norm_fwd", "norm_bwd", "add_norm_fwd", "add_norm_bwd", "dropout_fwd", "dropout_bwd")
OPERATORS += ("dropout_", "cross_entropy", "scale_gradient_")


@pytest.fixture(scope="module")
def loaded():
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
        try:
            _toolchain.find_nvcc()
        except _toolchain.KernelUnavailable as error:
            pytest.skip(str(error))
        with _build.use_backend("kernel"):
            assert _build.build(cuda=True).cuda is not None
            assert _build.load_cuda()
            yield


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_their_cuda_implementation(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnorm::{name}", "CUDA")


@pytest.mark.usefixtures("loaded")
def test_no_symbol_is_missing() -> None:
    """A library is bound lazily: what isn't there would show at the first launch."""
    folder = _build._states["cuda"].folder
    assert folder is not None
    ctypes.CDLL(str(_build._library_in(folder)), mode=os.RTLD_NOW)
