"""What is compiled, by which compilers, with which flags: one `Plan` for each library.

Two libraries are made from ``csrc``. ``cpu`` is the pybind11 module ``_C``: ``csrc/module.cpp``,
which includes its neighbours, and every ``csrc/cpu/*.cpp``; loading it registers the operators
``torch.ops.fastnorm.*``. ``cuda`` is a plain shared library of ``csrc/cuda/*.cu`` that adds CUDA
implementations to those operators, so a machine on which it cannot be built keeps the CPU kernels.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.machinery
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the sources inside the package, a checkout keeps them beside it.
SOURCES = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"


class KernelUnavailable(RuntimeError):
    """A compiled kernel was demanded (backend ``"kernel"``, or `build`) and cannot be had.

    The message names the cause and what would remove it.
    """


# ATen's vector classes read the level from CPU_CAPABILITY and CPU_CAPABILITY_<level>.
_LEVELS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mavx2 -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
    "DEFAULT": "",
}
_IS_X86 = sysconfig.get_platform().rsplit("-", 1)[-1].lower() in ("x86_64", "amd64")
_STANDARD = "-std=c++20"
_SUFFIXES = (".h", ".hpp", ".cuh", ".cpp", ".cu")


@dataclass(frozen=True)
class Plan:
    """One library: its sources, its two commands, and the facts that its key is a digest of."""

    device: str
    level: str
    library: str
    sources: tuple[Path, ...]
    compile: tuple[str, ...]
    link: tuple[str, ...]
    facts: dict[str, str]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        return f"{self.device}-{self.level.lower()}-{self.key[:24]}"

    @property
    def title(self) -> str:
        return f"{self.device.upper()} kernels ({self.level})"


def cpu_level() -> str:
    """The SIMD level that torch's own kernels use in this process: AVX512, AVX2 or DEFAULT."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if _IS_X86 and capability in _LEVELS else "DEFAULT"


def prebuilt_levels() -> tuple[str, ...]:
    """The levels that an ahead-of-time build makes on this architecture."""
    return tuple(_LEVELS) if _IS_X86 else ("DEFAULT",)


def machine_facts() -> dict[str, str]:
    """What must be equal between the process that compiled a library and the one that loads it."""
    return {
        "torch": str(torch.__version__),
        "torch_git": str(torch.version.git_version),
        "cuda": str(torch.version.cuda),
        "cxx11_abi": str(torch.compiled_with_cxx11_abi()),
        "python": str(sysconfig.get_config_var("SOABI")),
        "platform": sysconfig.get_platform(),
    }


def source_digest(root: Path, leave_out: str) -> str:
    """Digest of the name and bytes of every source and header but those of the other device."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in _SUFFIXES and relative.parts[0] != leave_out:
            content = path.read_bytes()
            digest.update(f"{relative.as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _output(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    return done.stdout.decode(errors="replace").strip()


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of its ``--version``.

    ``CXX`` decides when it is set; otherwise g++, c++, clang++, in this order.
    """
    if sys.platform == "win32":
        raise KernelUnavailable("the kernels are not built on Windows")
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise KernelUnavailable(
                f"CXX={named} names no program; set CXX to a C++ compiler, or unset it"
            )
    else:
        found = next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        if found is None:
            raise KernelUnavailable(
                "no C++ compiler was found: CXX is not set; g++, c++ and clang++ are not on PATH; "
                "install one (Debian and Ubuntu: apt-get install g++)"
            )
        command = [found]
    version = _output(*command, "--version")
    if not version:
        raise KernelUnavailable(f"the C++ compiler {shlex.join(command)} does not run")
    return command, version.splitlines()[0]


def _openmp_flags(compiler_id: str) -> tuple[str, ...]:
    """``-fopenmp`` where at::parallel_for needs it, which is at compile time only.

    The library is linked to no OpenMP runtime: its references are then bound to the one that torch
    has loaded, and torch.set_num_threads governs it. clang's code asks for a runtime that torch's
    Linux wheels do not have, so there the kernels run on one thread.
    """
    uses_openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    is_gcc = "clang" not in compiler_id.lower()
    return ("-fopenmp",) if sys.platform == "linux" and uses_openmp and is_gcc else ()


def _torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [flag for path in include_paths() for flag in ("-isystem", path)]


def _torch_links(*libraries: str) -> tuple[str, ...]:
    from torch.utils.cpp_extension import library_paths

    link = [f"-L{path}" for path in library_paths()] + [f"-l{name}" for name in libraries]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return tuple(link)


def cpu_plan(level: str | None = None, root: Path | None = None) -> Plan:
    """How the CPU kernels are compiled for `level` (default: this process's)."""
    level = cpu_level() if level is None else level
    root = SOURCES if root is None else root
    module = root / "module.cpp"
    if not module.exists():
        raise KernelUnavailable(f"{module} is missing; reinstall fastnorm")
    # The module takes longest, so it is compiled first.
    sources = (module, *sorted((root / "cpu").glob("*.cpp"), key=lambda p: -p.stat().st_size))
    compiler, compiler_id = find_compiler()
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        raise KernelUnavailable(
            f"Python.h is not in {python_include}; install Python's headers "
            "(Debian and Ubuntu: apt-get install python3-dev)"
        )
    flags = [
        "-O3",
        _STANDARD,
        "-fPIC",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        *_LEVELS[level].split(),
        f"-DCPU_CAPABILITY={level}",
        f"-DCPU_CAPABILITY_{level}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        "-DTORCH_EXTENSION_NAME=_C",
        *_openmp_flags(compiler_id),
    ]
    facts = {
        **machine_facts(),
        "device": "cpu",
        "level": level,
        "compiler": compiler_id,
        "flags": shlex.join(flags),
        "sources": source_digest(root, leave_out="cuda"),
    }
    includes = [f"-I{root}", *_torch_includes(), "-isystem", str(python_include)]
    return Plan(
        device="cpu",
        level=level,
        library="_C" + importlib.machinery.EXTENSION_SUFFIXES[0],
        sources=sources,
        compile=(*compiler, *flags, *includes),
        link=(*compiler, "-shared", *_torch_links("c10", "torch_cpu", "torch", "torch_python")),
        facts=facts,
    )


# ---------------------------------------------------------------------------------------------
# CUDA: toolkit and architectures
# ---------------------------------------------------------------------------------------------


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _nvcc_version(nvcc: str) -> str | None:
    match = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    return match.group(1) if match else None


def _nvcc_candidates(major: int) -> Iterator[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        yield str(Path(home) / "bin" / "nvcc")
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield on_path
    yield "/usr/local/cuda/bin/nvcc"
    yield from sorted(glob.glob(f"/usr/local/cuda-{major}*/bin/nvcc"), reverse=True)
    for folder in sys.path:
        yield str(Path(folder) / "nvidia" / f"cu{major}" / "bin" / "nvcc")


def find_nvcc() -> tuple[str, str]:
    """The nvcc that fits this torch, and its version: the same major version, or none.

    ``CUDA_HOME`` (or ``CUDA_PATH``) decides when it is set. Otherwise the first that fits of: PATH,
    /usr/local/cuda, /usr/local/cuda-<major>*, and the ``nvidia-cuda-nvcc`` wheels.
    """
    wanted = str(torch.version.cuda)
    major = _major(wanted)
    other = None
    for nvcc in _nvcc_candidates(major):
        if os.access(nvcc, os.X_OK):
            version = _nvcc_version(nvcc)
            if version and _major(version) == major:
                return nvcc, version
            if version and other is None:
                other = f"CUDA {version} ({nvcc})"
    if major >= 13:
        minor = ".".join(wanted.split(".")[:2])
        parts = ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm")
        remedy = "pip install " + " ".join(f"'nvidia-{part}=={minor}.*'" for part in parts)
    else:
        remedy = f"install CUDA toolkit {wanted} and: export CUDA_HOME=/usr/local/cuda-{wanted}"
    if other is None:
        raise KernelUnavailable(
            f"no CUDA toolkit was found, and torch {torch.__version__} is built for CUDA {wanted}; "
            f"to fix it: {remedy}"
        )
    raise KernelUnavailable(
        f"the CUDA toolkit is {other}, but torch {torch.__version__} is built for CUDA {wanted}; "
        f"the major versions must be equal; to fix it: {remedy}"
        + (" and unset CUDA_HOME and CUDA_PATH" if major >= 13 else "")
    )


_NAMED_ARCHITECTURES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def _visible_capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return sorted({torch.cuda.get_device_capability(index) for index in range(count)})


def cuda_architectures() -> list[str]:
    """The architectures to compile for, such as ``["8.0", "9.0+PTX"]``; empty: build for CPU only.

    ``TORCH_CUDA_ARCH_LIST`` decides when it is set (not to "native"). Otherwise every visible
    device, with PTX of the highest, so that a newer device still runs.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named and named != "native":
        architectures: list[str] = []
        for word in named.replace(",", " ").replace(";", " ").split():
            for entry in _NAMED_ARCHITECTURES.get(word, word).split(";"):
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
                    raise KernelUnavailable(
                        f"TORCH_CUDA_ARCH_LIST={named} has the entry {entry!r}; expected entries "
                        "such as '9.0', '9.0a' or '9.0+PTX', separated by ';'"
                    )
                if entry not in architectures:
                    architectures.append(entry)
        return architectures
    # A device newer than torch itself supports runs torch's PTX; nvcc of that age can do no better.
    supported = [
        (int(name[3:].rstrip("af")[:-1]), int(name[3:].rstrip("af")[-1]))
        for name in torch.cuda.get_arch_list()
        if name.startswith("sm_")
    ]
    capabilities = {min(c, max(supported, default=c)) for c in _visible_capabilities()}
    architectures = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    if architectures:
        architectures[-1] += "+PTX"
    return architectures


def _covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` runs on a device: same major, minor not above it; or PTX."""
    for entry in architectures:
        number = entry.removesuffix("+PTX")
        major, minor = (int(part.rstrip("af")) for part in number.split("."))
        if number[-1] in "af":
            if (major, minor) == capability:
                return True
        elif (major == capability[0] and minor <= capability[1]) or (
            entry.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def check_coverage(architectures: list[str], origin: str) -> None:
    for major, minor in _visible_capabilities():
        if not _covers(architectures, (major, minor)):
            raise KernelUnavailable(
                f"{origin} holds {';'.join(architectures)}, which has no code for the visible "
                f"device of compute capability {major}.{minor}; "
                f"export TORCH_CUDA_ARCH_LIST='{major}.{minor}+PTX'"
            )


def _gencode(architectures: list[str]) -> list[str]:
    flags = []
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def check_torch_has_cuda() -> None:
    if torch.version.cuda is None:
        other = " (ROCm is not supported)" if torch.version.hip else ""
        raise KernelUnavailable(f"torch {torch.__version__} is built without CUDA{other}")


def cuda_plan(root: Path | None = None) -> Plan:
    """How the CUDA kernels are compiled."""
    root = SOURCES if root is None else root
    check_torch_has_cuda()
    architectures = cuda_architectures()
    if not architectures:
        raise KernelUnavailable(
            "no CUDA device is visible and TORCH_CUDA_ARCH_LIST is not set; to build without a "
            "device: export TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        )
    check_coverage(architectures, "TORCH_CUDA_ARCH_LIST")
    sources = tuple(sorted((root / "cuda").glob("*.cu"), key=lambda p: -p.stat().st_size))
    if not sources:
        raise KernelUnavailable(f"no CUDA sources in {root / 'cuda'}; reinstall fastnorm")
    nvcc, nvcc_version = find_nvcc()
    compiler, compiler_id = find_compiler()
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    flags = [
        "-O3",
        _STANDARD,
        *COMMON_NVCC_FLAGS,
        "--compiler-options=-fPIC,-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *_gencode(architectures),
    ]
    # nvcc reads NVCC_CCBIN by itself, and looks for g++ on PATH when neither is given.
    host = os.environ.get("NVCC_CCBIN")
    if not host and os.environ.get("CXX"):
        flags.append(f"-ccbin={compiler[-1]}")
    facts = {
        **machine_facts(),
        "device": "cuda",
        "architectures": ";".join(architectures),
        "compiler": compiler_id,
        "host_compiler": _output(host, "--version") if host and shutil.which(host) else str(host),
        "nvcc": nvcc_version,
        "flags": shlex.join(flags),
        "sources": source_digest(root, leave_out="cpu"),
    }
    numbers = ["sm" + entry.removesuffix("+PTX").replace(".", "") for entry in architectures]
    # The CUDA runtime that torch has loaded is the one to use, so none is linked.
    return Plan(
        device="cuda",
        level="-".join(numbers),
        library="_cuda.so",
        sources=sources,
        compile=(nvcc, *flags, f"-I{root}", *_torch_includes()),
        link=(*compiler, "-shared", *_torch_links("c10", "c10_cuda", "torch_cpu", "torch_cuda")),
        facts=facts,
    )
