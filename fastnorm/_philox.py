"""The random bits of dropout in plain PyTorch: ``csrc/common/philox.h``, element for element.

A mask depends on (seed, element index in memory order, p) alone, so that the kernels, this file,
a compiled graph and a recomputation under checkpointing drop the same elements.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnorm import _build
from fastnorm._checks import exporting

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b. The halves of `a` keep every product below 2**63."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(counter: Tensor, seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 of int64 counters under a one-element int64 seed: four words in int64."""
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def threshold(p: float) -> int:
    """An element is kept when its 16 random bits are below this."""
    return round((1.0 - float(p)) * 65536.0)


def scale(p: float) -> float:
    """What a kept element is multiplied by: exact for the probability that `threshold` gives."""
    keep = threshold(p)
    return 65536.0 / keep if keep else 0.0


def keep_mask(numel: int, seed: Tensor, p: float) -> Tensor:
    """Which of `numel` elements, in memory order, dropout with probability `p` keeps; bool."""
    counter = torch.arange((numel + 7) // 8, device=seed.device)
    words = torch.stack(philox_words(counter, seed), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
    return bits[:numel] < threshold(p)


_part = threading.local()


@contextmanager
def part(index: int) -> Iterator[None]:
    """Within it, seeds are drawn for part `index` of a tensor whose parts have one generator."""
    _part.index = index
    try:
        yield
    finally:
        _part.index = 0


def has_operator() -> bool:
    """Whether the operator that draws seeds is registered; loads the kernels if need be."""
    return _build.module is not None or _build.load() is not None


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (1.5 s).
has_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]


def draw_seed(input: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One random int64 on the input's device, from `generator` or the device's default one.

    A compiled graph draws with the operator, because the compiler replaces torch's own random
    functions by others, with other numbers.
    """
    if torch.compiler.is_compiling() and generator is not None:
        raise NotImplementedError(
            "generator: expected None in a compiled graph, which cannot hold a torch.Generator; "
            "call torch.manual_seed instead, or compile without fullgraph=True"
        )
    if torch.compiler.is_compiling() and not exporting() and has_operator():
        seed = torch.ops.fastnorm.draw_seed(input)
    else:
        seed = torch.randint(2**63 - 1, (1,), device=input.device, generator=generator)
    index = getattr(_part, "index", 0)
    return seed ^ (index * 0x9E3779B97F4A7C15 % 2**63) if index else seed
