"""The status screen and the command line."""

from __future__ import annotations

import pytest
import torch
from tiny_sources import fake_toolkit, no_compiler

import fastnorm
from fastnorm import _build, _toolchain
from fastnorm.__main__ import main
from fastnorm.status import status

pytestmark = pytest.mark.cpu("compilers and caches")


def test_before_and_after_the_first_use(fresh):
    before = status()
    assert before.cpu.runs == "kernel"
    assert "not compiled yet" in before.cpu.detail
    assert not (fresh / "cache").exists()
    _build.build()
    assert "compiled, not loaded yet" in status().cpu.detail
    _build.load()
    after = status()
    assert after.cpu.detail == "loaded"
    assert after.cpu.key == _toolchain.cpu_plan().folder
    assert _toolchain.find_compiler()[1] == after.cpu.compiler


def test_screen_names_what_a_bug_report_needs(fresh, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "1")
    _build.load()
    text = str(status())
    for part in (
        fastnorm.__version__,
        torch.__version__,
        f"{torch.get_num_threads()} threads",
        "backend auto",
        _toolchain.cpu_level(),
        "cpu        kernel: loaded",
        "cuda       ",
        str(fresh / "cache"),
        "MAX_JOBS=1",
        "1 compile jobs",
    ):
        assert part in text
    assert len(text.splitlines()) < 24


def test_no_compiler_is_said_for_the_device(fresh, monkeypatch):
    no_compiler(monkeypatch, fresh)
    for _ in range(2):  # before and after the attempt
        assert "cpu        reference: no C++ compiler was found" in str(status())
        with pytest.warns(RuntimeWarning):
            _build.load()
        monkeypatch.setattr(_build._states["cpu"], "warned", False)


def test_reference_backend(fresh):
    with _build.use_backend("reference"):
        assert status().cpu.runs == "reference"
        assert "the backend is 'reference'" in status().cpu.detail


def test_invalid_backend_is_shown_not_raised(fresh, monkeypatch):
    monkeypatch.setenv("FASTNORM_BACKEND", "fast")
    assert "backend invalid (FASTNORM_BACKEND must be" in str(status())


def test_cuda_reason_and_toolkit(cuda_torch, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "cuda", "12.4")))
    assert "cuda       reference: the CUDA toolkit is CUDA 12.4" in str(status())
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "fits", "13.1")))
    cuda = status().cuda
    assert cuda.runs == "kernel"
    assert cuda.compiler.startswith("nvcc 13.1 with ")
    no_compiler(monkeypatch, cuda_torch)
    assert status().cuda.runs == "reference"


def test_command_line_builds_and_cleans(fresh, capsys):
    assert main(["build"]) == 0
    assert str(fresh / "cache") in capsys.readouterr().out
    assert main(["build", "--clean"]) == 0
    assert not list((fresh / "cache").iterdir())
    assert main(["status"]) == 0
    assert "cpu        kernel: loaded" in capsys.readouterr().out


def test_command_line_failure_is_one_line(fresh, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "nothing-of-the-kind")
    assert main(["build"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "fastnorm: CXX=nothing-of-the-kind names no program; set CXX to a C++ compiler, or unset it"
    ]
    assert main(["build", "--cuda"]) == 1


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["brew"])
    assert "invalid choice: 'brew'" in capsys.readouterr().err


def test_command_line_build_fails_where_the_library_does_not_load(fresh, capfd):
    source = _toolchain.SOURCES / "cpu" / "part.cpp"
    source.write_text("int missing();\nint now = missing();\n")
    assert main(["build"]) == 1
    assert "undefined symbol" in capfd.readouterr().err
