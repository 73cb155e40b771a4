"""Stand-ins for ``csrc``, compilers and toolkits: with these a build takes under a second."""

from __future__ import annotations

import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = """
#include <Python.h>
#include "common/answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&definition);
}
"""


def write_sources(root: Path) -> Path:
    (root / "common").mkdir(parents=True)
    (root / "cpu").mkdir()
    (root / "cuda").mkdir()
    (root / "common" / "answer.h").write_text("#define ANSWER 42\n")
    (root / "module.cpp").write_text(TINY)
    (root / "cpu" / "part.cpp").write_text("int part() { return 1; }\n")
    (root / "cuda" / "part.cu").write_text("int cuda_part() { return 1; }\n")
    return root


def write_program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def no_compiler(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def fake_toolkit(home: Path, version: str, body: str = "exit 1") -> Path:
    (home / "bin").mkdir(parents=True)
    write_program(
        home / "bin" / "nvcc",
        f"""
        case "$*" in *--version*) echo "Cuda tools, release {version}, V{version}.1"; exit;; esac
        {body}
        """,
    )
    return home
