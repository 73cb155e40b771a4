"""nvcc compiles every kernel and launcher; registers and spills are those on record.

nvcc_registers.json has, per architecture, the registers of every kernel: a ceiling. A kernel that
needs more, that spills, that is missing, or that isn't on record fails. After a deliberate change:
python tests/test_nvcc.py --update
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import filelock
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = pathlib.Path(__file__).with_name("nvcc_registers.json")
ARCHITECTURES = ("80", "90", "100")
HEADERS = ("csrc/*.h", "csrc/common/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(pathlib.Path(home) / "bin" / "nvcc") if home else "nvcc")


def reason_to_skip() -> str | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc on PATH or in CUDA_HOME"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    lacking = [a for a in ARCHITECTURES if f"sm_{a}" not in listed.split()]
    if lacking:
        return f"{nvcc} cannot compile for sm_{', sm_'.join(lacking)}"
    return None


def has_kernels(source: pathlib.Path) -> bool:
    return re.search(r'#include "cuda/\w+\.cuh"', source.read_text()) is not None


def _command(source: pathlib.Path, architecture: str, generated: pathlib.Path) -> list[str]:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    nvcc = find_nvcc()
    assert nvcc is not None
    # The host's side of a file is the same for every architecture: once is enough.
    output = "-c" if architecture == ARCHITECTURES[0] else "-cubin"
    return [
        nvcc,
        "-O3",
        "-std=c++17",
        *COMMON_NVCC_FLAGS,
        "--compiler-options=-fPIC",
        "-Xptxas=-v",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        f"-I{ROOT / 'csrc'}",
        f"-I{generated}",
        *(flag for path in include_paths() for flag in ("-isystem", path)),
        output,
    ]


def _generated_headers(folder: pathlib.Path) -> pathlib.Path:
    """torch's CPU wheel ships c10/cuda without the one header that its build generates."""
    header = folder / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    return folder / "include"


def report_of(source: pathlib.Path, architecture: str) -> tuple[list[str], pathlib.Path]:
    """The command that compiles `source`, and the file that keeps what it says."""
    folder = pathlib.Path(os.environ.get("FASTNORM_NVCC_CACHE", ROOT / "build" / "nvcc"))
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(source, architecture, _generated_headers(folder))
    digest = hashlib.sha256("\0".join(command).encode())
    digest.update(subprocess.run([command[0], "--version"], capture_output=True).stdout)
    headers = [path for pattern in HEADERS for path in sorted(ROOT.glob(pattern))]
    for path in (*headers, source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return command, folder / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.txt"


def compile_source(source: pathlib.Path, architecture: str) -> str:
    """What nvcc and ptxas say about `source`, from the cache if nothing has changed."""
    command, report = report_of(source, architecture)
    with filelock.FileLock(f"{report}.lock"):
        if not report.exists():
            result = subprocess.run(
                [*command, str(source), "-o", os.devnull], capture_output=True, text=True
            )
            output = result.stdout + result.stderr
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} {source}\n{output}")
            part = report.with_suffix(f".{os.getpid()}")
            part.write_text(output)
            part.rename(report)
    return report.read_text()


def compile_all() -> dict[str, str]:
    """Architecture -> what was said about all sources; two compilers at a time."""
    # Code without kernels is the same for every architecture.
    jobs = [
        (architecture, source)
        for source in SOURCES
        for architecture in ARCHITECTURES
        if has_kernels(source) or architecture == ARCHITECTURES[0]
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda job: compile_source(job[1], job[0]), jobs))
    said = dict.fromkeys(ARCHITECTURES, "")
    for (architecture, _), text in zip(jobs, texts, strict=True):
        said[architecture] += text
    return said


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return [
        re.sub(r"^void |\(anonymous namespace\)::|\(.*$|fastnorm::cuda::|fastnorm::", "", line)
        for line in result.stdout.splitlines()
    ]


@functools.cache
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> registers, spills (bytes), stack (bytes)."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_\d+'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    table: dict[str, dict[str, dict[str, int]]] = {f"sm_{a}": {} for a in ARCHITECTURES}
    for architecture, said in compile_all().items():
        found = list(entry.finditer(said))
        names = _demangled([match["name"] for match in found])
        for match, name in zip(found, names, strict=True):
            table[f"sm_{architecture}"][name] = {
                "registers": int(match["registers"]),
                "spills": int(match["stores"]) + int(match["loads"]),
                "stack": int(match["stack"]),
            }
    return table


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, dict[str, int]]]:
    pytest.importorskip("torch")
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    return measured()


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_kernels_are_those_on_record(
    table: dict[str, dict[str, dict[str, int]]], architecture: str
) -> None:
    recorded = json.loads(RECORD.read_text())[architecture]
    assert sorted(table[architecture]) == sorted(recorded), "see the head of test_nvcc.py"


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_no_kernel_spills(table: dict[str, dict[str, dict[str, int]]], architecture: str) -> None:
    spilled = {name: k for name, k in table[architecture].items() if k["spills"]}
    assert not spilled


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_registers_stay_under_their_ceiling(
    table: dict[str, dict[str, dict[str, int]]], architecture: str
) -> None:
    recorded = json.loads(RECORD.read_text())[architecture]
    above = {
        name: (k["registers"], recorded[name])
        for name, k in table[architecture].items()
        if name in recorded and k["registers"] > recorded[name]
    }
    assert not above, "measured and recorded registers; see the head of test_nvcc.py"


def main() -> None:
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/test_nvcc.py --update")
    reason = reason_to_skip()
    if reason:
        raise SystemExit(reason)
    table = {
        architecture: {name: kernel["registers"] for name, kernel in sorted(kernels.items())}
        for architecture, kernels in measured().items()
    }
    RECORD.write_text(json.dumps(table, indent=1) + "\n")
    spilled = [
        f"{architecture} {name}: {kernel['spills']} bytes"
        for architecture, kernels in measured().items()
        for name, kernel in kernels.items()
        if kernel["spills"]
    ]
    print(f"{RECORD.name}: {sum(map(len, table.values()))} kernels")
    if spilled:
        raise SystemExit("spills:\n" + "\n".join(spilled))


if __name__ == "__main__":
    main()
