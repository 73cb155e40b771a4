"""What runs on this machine and why: one screen for a bug report."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from fastnorm import _build, _toolchain
from fastnorm._build import KernelUnavailable

__all__ = ["DeviceStatus", "Status", "status"]

_VARIABLES = (
    "FASTNORM_BACKEND",
    "FASTNORM_CACHE_DIR",
    "FASTNORM_BUILD_TIMEOUT",
    "CXX",
    "NVCC_CCBIN",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "XDG_CACHE_HOME",
)


@dataclass(frozen=True)
class DeviceStatus:
    """What runs for tensors of one device.

    Attributes:
        runs: ``"kernel"`` or ``"reference"`` (plain PyTorch).
        detail: where the kernel stands, or why it is not what runs.
        folder: the compiled library's folder, if there is one.
        key: the digest in the folder's name, of everything the library was made from.
        compiler: the compiler that made it or would make it.
    """

    runs: str
    detail: str
    folder: str | None = None
    key: str | None = None
    compiler: str | None = None


@dataclass(frozen=True)
class Status:
    """The answer of `status`; its text is one screen."""

    fastnorm: str
    torch: str
    torch_cuda: str | None
    python: str
    system: str
    backend: str
    level: str
    threads: int
    jobs: int
    cache: str
    variables: dict[str, str]
    cpu: DeviceStatus
    cuda: DeviceStatus

    def __str__(self) -> str:
        lines = [
            f"fastnorm   {self.fastnorm}, backend {self.backend}",
            f"torch      {self.torch}, CUDA {self.torch_cuda or 'none'}, {self.threads} threads",
            f"python     {self.python}, {self.system}",
            f"simd       {self.level}",
        ]
        for name, device in (("cpu", self.cpu), ("cuda", self.cuda)):
            lines.append(f"{name:<10} {device.runs}: {device.detail}")
            if device.folder:
                lines.append(f"{'':<10} library   {device.folder}")
            if device.key:
                lines.append(f"{'':<10} key       {device.key}")
            if device.compiler:
                lines.append(f"{'':<10} compiler  {device.compiler}")
        lines.append(f"cache      {self.cache}, {self.jobs} compile jobs")
        variables = " ".join(f"{name}={value}" for name, value in self.variables.items())
        lines.append(f"variables  {variables or 'none set'}")
        return "\n".join(lines)


def _device_status(device: str, backend: str) -> DeviceStatus:
    state = _build._states[device]
    compiler = state.facts.get("nvcc" if device == "cuda" else "compiler")
    folder = str(state.folder) if state.folder else None
    key = state.folder.name if state.folder else None
    if backend == "reference":
        return DeviceStatus("reference", "the backend is 'reference'", folder, key, compiler)
    if state.loaded is not None:
        detail = "loaded" + (f" ({state.note})" if state.note else "")
        return DeviceStatus("kernel", detail, folder, key, compiler)
    if state.reason is not None:
        return DeviceStatus("reference", state.reason)
    try:
        if device == "cuda":
            _toolchain.check_torch_has_cuda()
        prebuilt, note = _build._find_prebuilt(device)
        suffix = f" ({note})" if note else ""
        if prebuilt is not None:
            return DeviceStatus("kernel", "built ahead of time, not loaded yet", str(prebuilt))
        plan = _toolchain.cpu_plan() if device == "cpu" else _toolchain.cuda_plan()
        built = _build._find_built(plan)
    except (KernelUnavailable, OSError) as error:
        return DeviceStatus("reference", str(error))
    compiler = plan.facts["compiler"]
    if device == "cuda":
        compiler = f"nvcc {plan.facts['nvcc']} with {compiler}"
    if built is None:
        return DeviceStatus(
            "kernel", f"not compiled yet, the first use will{suffix}", None, plan.key, compiler
        )
    return DeviceStatus("kernel", f"compiled, not loaded yet{suffix}", str(built), None, compiler)


def status() -> Status:
    """What runs on this machine: versions, per device the kernel or why not, and where it is kept.

    Compiles and loads nothing. ``str(status())`` is meant to be pasted into a bug report.

    Example:
        >>> print(fastnorm.status())  # doctest: +SKIP
    """
    from fastnorm import __version__

    try:
        backend = _build.backend()
    except ValueError as error:
        backend = f"invalid ({error})"
    cpu = _device_status("cpu", backend)
    cuda = _device_status("cuda", backend)
    if cpu.runs == "reference" and cuda.runs == "kernel":
        cuda = DeviceStatus("reference", "the operators are registered by the CPU library")
    return Status(
        fastnorm=__version__,
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        python=platform.python_version(),
        system=platform.platform(),
        backend=backend,
        level=_toolchain.cpu_level(),
        threads=torch.get_num_threads(),
        jobs=_build.job_count(),
        cache=str(_build.cache_dir()),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        cpu=cpu,
        cuda=cuda,
    )
