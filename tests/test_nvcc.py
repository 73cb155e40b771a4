"""nvcc compiles every kernel and launcher; registers and occupancy are those on record.

nvcc_registers.json has, per architecture, the registers of every kernel (a ceiling), its launch
bound, and the warps of a multiprocessor that registers and launch bound leave room for (a floor;
shared memory, which is dynamic in every kernel, is the launchers' affair: test_simt_traffic.py). A
kernel that needs more, that spills or has local memory, whose 16-byte accesses are gone, that is
missing, or that isn't on record fails. After a deliberate change:
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
import tempfile
from typing import Any

import cubin
import filelock
import pytest

pytestmark = pytest.mark.cpu("compiles, and runs nothing")

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = pathlib.Path(__file__).with_name("nvcc_registers.json")
ARCHITECTURES = ("80", "90", "100")
HEADERS = ("csrc/*.h", "csrc/common/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
CUBIN = "cubin: "
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
    for path in (*headers, source, pathlib.Path(cubin.__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return command, folder / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.txt"


def compile_source(source: pathlib.Path, architecture: str) -> str:
    """What nvcc and ptxas say about `source`, and after them a line with what its cubin says."""
    command, report = report_of(source, architecture)
    with filelock.FileLock(f"{report}.lock"):
        if not report.exists():
            with tempfile.TemporaryDirectory(dir=report.parent) as folder:
                target = [str(source), "-o", f"{folder}/out.cubin"]
                if "-c" in command:  # an object file; the cubin inside is an intermediate result
                    target = [str(source), "-o", f"{folder}/out.o", "-keep", "-keep-dir", folder]
                result = subprocess.run([*command, *target], capture_output=True, text=True)
                output = result.stdout + result.stderr
                if result.returncode:
                    raise RuntimeError(f"{' '.join(command)} {source}\n{output}")
                (compiled,) = pathlib.Path(folder).glob("*.cubin")
                output += "\n" + CUBIN + json.dumps(cubin.kernels(compiled.read_bytes())) + "\n"
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


def resident_warps(registers: int, threads: int) -> int:
    """Warps of a multiprocessor: 64 K registers, given out to a warp in units of 256, for 64 warps
    at most, in whole blocks of which there are at most 32; the same from sm_80 to sm_100."""
    per_block = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256)
    return min(64 // per_block, by_registers // per_block, 32) * per_block


@functools.cache
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> registers, spills (bytes), shared (bytes of static shared memory),
    warps, and what cubin.kernels counts."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_\d+'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    table: dict[str, dict[str, dict[str, int]]] = {f"sm_{a}": {} for a in ARCHITECTURES}
    for architecture, said in compile_all().items():
        compiled: dict[str, Any] = {}
        for line in said.splitlines():
            if line.startswith(CUBIN):
                compiled |= json.loads(line.removeprefix(CUBIN))
        found = list(entry.finditer(said))
        names = _demangled([match["name"] for match in found])
        for match, name in zip(found, names, strict=True):
            registers, code = int(match["registers"]), compiled[match["name"]]
            table[f"sm_{architecture}"][name] = {
                "registers": registers,
                "spills": int(match["stores"]) + int(match["loads"]),
                "shared": int(match["shared"] or 0),
                "warps": resident_warps(registers, code["threads"]),
                **code,
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
    """Nor has local memory for arrays with a runtime index, nor shared memory of a fixed size."""
    kernels = table[architecture].items()
    assert not {name: k for name, k in kernels if k["spills"] or k["local"] or k["shared"]}


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_packs_are_sixteen_byte_instructions(
    table: dict[str, dict[str, dict[str, int]]], architecture: str
) -> None:
    packed = re.compile(
        r"^(row|pixel|dropout|cross|scale)\w*<\w+, [248][,>]"
        r"|_ragged_|^(column|plane)_(norm|resident)"
    )
    seen = 0
    for name, kernel in table[architecture].items():
        if packed.search(name):
            assert kernel["wide_loads"] and kernel["wide_stores"], name
            seen += 1
    assert seen == 76


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_registers_and_occupancy_are_no_worse_than_recorded(
    table: dict[str, dict[str, dict[str, int]]], architecture: str
) -> None:
    recorded = json.loads(RECORD.read_text())[architecture]
    for name, kernel in table[architecture].items():
        record = recorded.get(name)
        if record is None:
            continue  # another test's failure
        assert kernel["threads"] == record["threads"], name
        assert kernel["registers"] <= record["registers"], name
        assert kernel["warps"] >= record["warps"], name


def test_resident_warps() -> None:
    assert resident_warps(32, 1024) == 64
    assert resident_warps(33, 1024) == 32  # 1280 registers a warp: 51 warps, one block
    assert resident_warps(64, 512) == 32
    assert resident_warps(168, 128) == 12
    assert resident_warps(255, 128) == 8
    assert resident_warps(16, 32) == 32  # 32 blocks


def main() -> None:
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/test_nvcc.py --update")
    reason = reason_to_skip()
    if reason:
        raise SystemExit(reason)
    blocks = []
    for architecture, kernels in measured().items():
        lines = [
            f"  {json.dumps(name)}: "
            + json.dumps({key: kernel[key] for key in ("registers", "threads", "warps")})
            for name, kernel in sorted(kernels.items())
        ]
        blocks.append(f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }")
    RECORD.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    spilled = [
        f"{architecture} {name}: {kernel['spills']} bytes, {kernel['local']} local accesses"
        for architecture, kernels in measured().items()
        for name, kernel in kernels.items()
        if kernel["spills"] or kernel["local"]
    ]
    print(f"{RECORD.name}: {sum(map(len, measured().values()))} kernels")
    if spilled:
        raise SystemExit("spills:\n" + "\n".join(spilled))


if __name__ == "__main__":
    main()
