"""Checks that the public functions share. Each names the argument, the expected and the given."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ClassIdError(IndexError, ValueError):
    """A class id out of range; torch raises `IndexError` for it."""


class DtypeError(TypeError, NotImplementedError):
    """A dtype that no kernel and no reference takes; torch raises `NotImplementedError` for it."""


def check_input(input: object) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dtype not in FLOATING:
        raise DtypeError(
            f"input: expected float32, float64, bfloat16 or float16, got {name(input.dtype)}"
        )


def check_parameter(argument: str, value: object, shape: tuple[int, ...], input: Tensor) -> None:
    """`value` is None or a tensor of `shape` that can scale or shift `input`."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor or None, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(f"{argument}: expected shape {list(shape)}, got {list(value.shape)}")
    if value.dtype not in FLOATING or (value.dtype == torch.float64) != (
        input.dtype == torch.float64
    ):
        raise DtypeError(
            f"{argument}: its dtype {name(value.dtype)} does not go with the input's "
            f"{name(input.dtype)}; expected "
            + ("float64" if input.dtype == torch.float64 else "float32, bfloat16 or float16")
        )
    check_device(argument, value, input)


def check_residual(residual: object, input: Tensor) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(
            f"residual: expected the input's shape {list(input.shape)}, got {list(residual.shape)}"
        )
    if residual.dtype != input.dtype:
        raise DtypeError(
            f"residual: expected the input's dtype {name(input.dtype)}, got {name(residual.dtype)}"
        )
    check_device("residual", residual, input)


def check_generator(generator: object, input: Tensor) -> None:
    """`generator` is None or draws on the input's device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator.device.type != input.device.type:
        raise RuntimeError(
            f"generator: expected one of the input's device {input.device}, got one of "
            f"{generator.device}"
        )


def check_device(argument: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise RuntimeError(
            f"{argument}: expected the input's device {input.device}, got {value.device}"
        )


def to_number(argument: str, value: object) -> float:
    """`value`; one of another library's, such as NumPy's float32, as a float."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    return float(value)


def check_number(argument: str, value: object) -> float:
    number = to_number(argument, value)
    # math.isfinite would break a graph with a symbolic number.
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument}: expected a finite number, got {number}")
    return number


def check_probability(argument: str, p: object) -> float:
    number = to_number(argument, p)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{argument}: expected a probability between 0 and 1, got {number}")
    return number


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exporting() -> bool:
    """Whether `torch.export` traces this call.

    `torch.compiler.is_exporting` reads the same flag, but up to torch 2.11 a call that Dynamo
    traces for torch.compile finds it true.
    """
    return torch.compiler._is_exporting_flag
