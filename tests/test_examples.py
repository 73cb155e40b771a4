"""Every example runs in its quick form, writes its picture and shows what it claims."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.cpu("scripts that choose their devices")

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parent.parent / "examples"


def sparse_regression(zeros: dict[str, int]) -> None:
    assert zeros["lasso, proximal"] > zeros["elastic net, proximal"] > 10
    assert not any(count for name, count in zeros.items() if "proximal" not in name)


def digits(runs: dict[str, Any]) -> None:
    # Both copies learn, and learn the same: 22 steps apart only by rounding.
    by_torch, by_fastnorm = (run.losses for run in runs.values())
    assert by_torch[-1] < 0.9 * by_torch[0]
    assert by_fastnorm == pytest.approx(by_torch, abs=2e-3)


def initialization(accuracies: dict[str, float]) -> None:
    assert max(accuracies["normal(0, 0.01)"], accuracies["PyTorch's default"]) < 0.2
    assert min(accuracies["init_ for selu"], accuracies["init_ for tanh"]) > 0.5


def digits_cnn(accuracies: dict[str, float]) -> None:
    assert accuracies["regularized"] > max(accuracies["plain"], 0.9)


def sequence_rnn(accuracies: dict[str, float]) -> None:
    assert min(accuracies.values()) > 0.7
    assert accuracies["inside the cell"] > accuracies["nowhere"]


def denoising_autoencoder(errors: dict[float, float]) -> None:
    assert errors[0.3] < errors[0.0] < 0.3


def digits_resnet(losses: dict[str, list[float]]) -> None:
    by_torch, by_fastnorm = losses.values()
    assert by_torch[-1] < 0.5 * by_torch[0]
    # The first steps differ by rounding only.
    assert by_fastnorm[:3] == pytest.approx(by_torch[:3], abs=2e-3)
    assert by_fastnorm[-1] < 0.5 * by_fastnorm[0]


def transformer_digits(runs: dict[str, Any]) -> None:
    # Their masks differ, so that only the accuracies are comparable: 0.28 % is one image.
    by_torch, by_fastnorm = (run.accuracies[-1] for run in runs.values())
    assert min(by_torch, by_fastnorm) > 0.6
    assert by_fastnorm == pytest.approx(by_torch, abs=0.12)
    # Without dropout, and with the same weights, they are the same function.
    torch_model, fast_model = (run.model.eval() for run in runs.values())
    fast_model.load_state_dict(torch_model.state_dict())
    images = torch.randn(16, 8, 8)
    torch.testing.assert_close(fast_model(images), torch_model(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The models are small: threads would wait for each other, the more so on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Name of the file, what to expect of what its main() returns.
CASES: list[tuple[str, Callable[[Any], None]]] = [
    ("digits", digits),
    ("digits_resnet", digits_resnet),
    ("sparse_regression", sparse_regression),
    ("initialization", initialization),
    ("digits_cnn", digits_cnn),
    ("sequence_rnn", sequence_rnn),
    ("denoising_autoencoder", denoising_autoencoder),
    ("transformer_digits", transformer_digits),
]


@pytest.mark.parametrize(("name", "expect"), CASES, ids=[name for name, _ in CASES])
def test_O3_P2_example(
    name: str,
    expect: Callable[[Any], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    picture = tmp_path / f"{name}.png"
    expect(module.main(["--quick", "--output", str(picture)]))
    assert picture.stat().st_size > 10_000
    assert "…" not in capsys.readouterr().out  # every table fits 80 columns
