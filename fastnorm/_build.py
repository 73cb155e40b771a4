"""Find, compile and load the kernels: sources, flags, key, lock, load.

A library lives in a folder named after a digest of everything it was made from (`Plan.key`). It is
compiled in a private folder under a lock of the operating system and renamed into place: a process
that dies while it compiles frees the lock and leaves nothing that another could load.

Importing this module starts no process and compiles nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType

import torch

from fastnorm import _toolchain
from fastnorm._toolchain import (
    KernelUnavailable,
    Plan,
    check_coverage,
    check_torch_has_cuda,
    cpu_level,
    cpu_plan,
    cuda_plan,
    machine_facts,
    prebuilt_levels,
    source_digest,
)

__all__ = [
    "BuildReport",
    "KernelUnavailable",
    "backend",
    "build",
    "load",
    "load_cuda",
    "reason",
    "use_backend",
]

PREBUILT = Path(__file__).resolve().parent / "prebuilt"
DEVICES = ("cpu", "cuda")


# ---------------------------------------------------------------------------------------------
# Where libraries are kept
# ---------------------------------------------------------------------------------------------

_noticed: set[str] = set()


def _say(text: str) -> None:
    print(f"fastnorm: {text}", file=sys.stderr, flush=True)


def _say_once(text: str) -> None:
    if text not in _noticed:
        _noticed.add(text)
        _say(text)


def cache_dir() -> Path:
    """The folder asked for: ``FASTNORM_CACHE_DIR``, or ``fastnorm`` in the user's cache folder."""
    named = os.environ.get("FASTNORM_CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base).absolute() / "fastnorm"


def _temporary_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"fastnorm-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Whether only this user can write to `folder`: what lies in it is loaded as code."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def _cannot_write(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _writable_dir() -> Path:
    folder = cache_dir()
    why = _cannot_write(folder)
    if why is None:
        return folder
    instead = _temporary_dir()
    with contextlib.suppress(FileExistsError):
        instead.mkdir(mode=0o700)
    if not _is_private(instead):
        instead = Path(tempfile.mkdtemp(prefix="fastnorm-"))
    _say_once(f"cannot write to the cache folder {folder} ({why}); the kernels go to {instead}")
    return instead


def _find_built(plan: Plan) -> Path | None:
    """The folder of a finished library, in the cache (which may be read-only) or its substitute."""
    for root in (cache_dir(), _temporary_dir()):
        folder = root / plan.folder
        with contextlib.suppress(OSError):
            if (folder / plan.library).exists() and (root == cache_dir() or _is_private(root)):
                return folder
    return None


def _find_prebuilt(device: str) -> tuple[Path | None, str | None]:
    """The ahead-of-time library of this package, or why it is not used (None: there is none)."""
    folder = PREBUILT / (cpu_level().lower() if device == "cpu" else "cuda")
    try:
        recorded = json.loads((folder / "built.json").read_text())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"the prebuilt library in {folder} is ignored: {error}"
    other = "cuda" if device == "cpu" else "cpu"
    expected = {
        **machine_facts(),
        "device": device,
        "sources": source_digest(_toolchain.SOURCES, leave_out=other),
    }
    for name, value in expected.items():
        if recorded.get(name) != value:
            return None, (
                f"the prebuilt library in {folder} is ignored: it was built with "
                f"{name} = {recorded.get(name)}, here it is {value}"
            )
    if device == "cuda":
        try:
            check_coverage(recorded["architectures"].split(";"), "the prebuilt library")
        except KernelUnavailable as error:
            return None, f"the prebuilt library in {folder} is ignored: {error}"
    return folder, None


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------

_GIB = 2**30


def _memory_available() -> int:
    """Bytes that may still be used: the machine's, or this control group's if that is less."""
    available = 2**62
    with contextlib.suppress(OSError, ValueError, AttributeError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        available = int(found.group(1)) * 1024 if found else available
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, limit - used)
    return available


def job_count() -> int:
    """How many compilers run at once: min(MAX_JOBS, cores, memory / 2 GB), at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [cores or 1, _memory_available() // (2 * _GIB)]
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit():
        limits.append(int(asked))
    return max(1, min(limits))


class _Progress:
    """A bar on a terminal, where rich is installed; one line otherwise."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.text = f"compiling the {plan.title}"
        self.total = len(plan.sources) + 1
        self.bar = None
        self.start = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(Exception):  # no rich, or a bar of someone else's: do without
                self.bar = self._rich()
        if self.bar is None:
            files = f"{len(plan.sources)} file{'s' * (len(plan.sources) != 1)}"
            _say(f"{self.text}, {files}, {jobs} at a time; this is done once")

    def _rich(self):  # type: ignore[no-untyped-def]
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        columns = (TextColumn("fastnorm: {task.description}"), BarColumn(), MofNCompleteColumn())
        bar = Progress(*columns, Elapsed(), console=Console(stderr=True), transient=True)
        self.task = bar.add_task(self.text, total=self.total)
        bar.start()
        return bar

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def close(self, finished: bool) -> None:
        if self.bar is not None:
            self.bar.stop()
            if finished:
                _say(f"{self.text} took {time.monotonic() - self.start:.0f} s")


def _explain_failure(plan: Plan, source: str, code: int, output: str) -> str:
    """One line: what failed and what to do."""
    if re.search(r"unsupported (GNU|clang) version", output):
        return (
            f"nvcc {plan.facts['nvcc']} refuses its host compiler as too new or too old; install a "
            "g++ that it supports and name it: export NVCC_CCBIN=g++-13 (or CXX)"
        )
    if code == -signal.SIGKILL or "Killed signal terminated program" in output:
        return f"the compiler was killed at {source}, mostly a want of memory; export MAX_JOBS=1"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error = next((line for line in lines if re.search(r"\berror\b", line, re.I)), None)
    return f"{source} does not compile: {error or (lines or [f'exit status {code}'])[-1]}"


def _run_jobs(
    plan: Plan, folder: Path, commands: dict[str, list[str]], jobs: int, verbose: bool, log: list
) -> Iterator[str]:
    """Run `commands` (by source), at most `jobs` at once; yield each source as it is done."""
    waiting = list(commands.items())
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                source, command = waiting.pop(0)
                output = folder / f"{len(waiting)}.log"
                if verbose:
                    _say(shlex.join(command))
                with output.open("wb") as stream:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        env=environment,
                    )
                running[source] = process, output
            done = [
                source for source, (process, _) in running.items() if process.poll() is not None
            ]
            for source in done:
                process, output = running.pop(source)
                text = output.read_text(errors="replace")
                log.append(f"$ {shlex.join(commands[source])}\n{text}")
                if verbose and text:
                    _say(text)
                if process.returncode != 0:
                    raise KernelUnavailable(
                        _explain_failure(plan, source, process.returncode, text)
                    )
                yield source
            if not done:
                time.sleep(0.01)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()


def _compile(plan: Plan, folder: Path, verbose: bool = False) -> None:
    """Compile `plan` into `folder`: the library and ``built.json``, its facts."""
    jobs = job_count()
    folder = folder.absolute()  # the compilers run in it
    objects = {path.name: folder / f"{path.name}.o" for path in plan.sources}
    compile_commands = {
        path.name: [*plan.compile, "-c", str(path), "-o", str(objects[path.name])]
        for path in plan.sources
    }
    library = folder / plan.library
    names = [str(path) for path in objects.values()]
    link_command = [plan.link[0], *plan.link[1:2], *names, *plan.link[2:], "-o", str(library)]
    progress = _Progress(plan, jobs)
    log: list[str] = []
    finished = False
    try:
        for _ in _run_jobs(plan, folder, compile_commands, jobs, verbose, log):
            progress.advance()
        for _ in _run_jobs(plan, folder, {plan.library: link_command}, 1, verbose, log):
            progress.advance()
        finished = True
    except KernelUnavailable as error:
        kept = folder.parent / f"{plan.folder}.log"
        cause = f"{error} (the compiler's output: {kept})"
        with contextlib.suppress(OSError):
            kept.write_text("\n".join([cause, *log]))
        raise KernelUnavailable(cause) from None
    finally:
        progress.close(finished)
    for path in folder.iterdir():
        if path != library:
            path.unlink()
    (folder / "built.json").write_text(json.dumps(plan.facts, indent=1, sort_keys=True))


def _wait_limit() -> float:
    named = os.environ.get("FASTNORM_BUILD_TIMEOUT", "600")
    try:
        return float(named)
    except ValueError:
        raise KernelUnavailable(
            f"FASTNORM_BUILD_TIMEOUT={named} is not a number of seconds"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`. The kernel frees it when its holder dies, however it dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    holder = path.with_suffix(".holder")
    limit = _wait_limit()
    patience = min(1.0, limit)
    try:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            _say(f"waiting for process {_read(holder)}, which compiles the same kernels")
            lock.acquire(timeout=limit - patience)
    except Timeout:
        raise KernelUnavailable(
            f"waited {limit:g} s for the lock {path}, held by process {_read(holder)}; wait longer "
            "with FASTNORM_BUILD_TIMEOUT=<seconds>, or end that process"
        ) from None
    try:
        with contextlib.suppress(OSError):
            holder.write_text(f"{os.getpid()} on {os.uname().nodename}")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def _make(plan: Plan, verbose: bool = False, force: bool = False) -> Path:
    """The folder of `plan`'s library, compiled now if it is not there yet."""
    folder = None if force else _find_built(plan)
    if folder is not None:
        return folder
    root = _writable_dir()
    try:
        return _make_in(root, plan, verbose, force)
    except OSError as error:
        raise KernelUnavailable(f"cannot keep the compiled kernels in {root}: {error}") from error


def _make_in(root: Path, plan: Plan, verbose: bool, force: bool) -> Path:
    folder = root / plan.folder
    asked = time.time()
    with _locked(root / f"{plan.folder}.lock"):
        if not force and (folder / plan.library).exists():
            return folder
        # Of many processes that wait for one compile, the first failure is everyone's.
        log = root / f"{plan.folder}.log"
        if log.exists() and log.stat().st_mtime >= asked:
            raise KernelUnavailable(log.read_text().splitlines()[0])
        # Whoever holds the lock is the only one to compile this key: these are a dead builder's.
        for left in root.glob(f"{plan.folder}.*.part"):
            shutil.rmtree(left, ignore_errors=True)
        private = Path(tempfile.mkdtemp(prefix=f"{plan.folder}.", suffix=".part", dir=root))
        try:
            _compile(plan, private, verbose)
            private.chmod(root.stat().st_mode & 0o777)  # a cache that others may read stays so
            old = root / f"{private.name}.old.part"
            if folder.exists():
                folder.rename(old)  # not removed in place: another process may be loading it
            private.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(private, ignore_errors=True)
    return folder


def build_ahead(destination: Path) -> list[str]:
    """Compile every SIMD level, and CUDA where it can be had, into `destination`.

    For ``FASTNORM_AOT=1 pip install --no-build-isolation .``; raises `KernelUnavailable` when the
    CPU kernels cannot be compiled.
    """
    made = []
    for name, plan_of in [
        *((level.lower(), lambda level=level: cpu_plan(level)) for level in prebuilt_levels()),
        ("cuda", cuda_plan),
    ]:
        try:
            plan = plan_of()
            folder = destination / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _compile(plan, folder)
            made.append(plan.title)
        except KernelUnavailable as error:
            if name != "cuda":
                raise
            shutil.rmtree(destination / name, ignore_errors=True)
            _say(f"no CUDA kernels in this build: {error}")
    return made


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What is known of a device's library in this process."""

    loaded: ModuleType | None = None
    folder: Path | None = None
    reason: str | None = None
    note: str | None = None
    warned: bool = False
    facts: dict[str, str] = field(default_factory=dict)


_states = {device: _State() for device in DEVICES}
_mutex = threading.RLock()

# The hot path's whole check. The loaded CPU module and whether the CUDA library is loaded; None and
# False until the first load, and while the backend is "reference".
module: ModuleType | None = None
cuda_loaded: bool = False


def _import(folder: Path, library: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastnorm._C", folder / library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder / library} is not an extension module")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _library_in(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.name.startswith(("_C.", "_cuda.")):
            return path
    raise KernelUnavailable(f"{folder} holds no library; remove that folder")


def _attempt(device: str) -> None:
    """Find or compile, then load; leaves either `loaded` or `reason` in the device's state."""
    state = _states[device]
    try:
        folder, state.note = _find_prebuilt(device)
        if device == "cuda":
            check_torch_has_cuda()
        if folder is None:
            folder = _make(cpu_plan() if device == "cpu" else cuda_plan())
        library = _library_in(folder)
        if device == "cpu":
            state.loaded = _import(folder, library.name)
        else:
            torch.ops.load_library(str(library))
            state.loaded = _states["cpu"].loaded
        state.folder = folder
        state.facts = json.loads((folder / "built.json").read_text())
    except KernelUnavailable as error:
        state.reason = str(error)
    except Exception as error:
        # Whatever else goes wrong here has happened on a machine unlike ours: the reference runs
        # there, and the report carries the cause.
        state.reason = f"{type(error).__name__}: {error}"


def _refuse(device: str, setting: str) -> None:
    state = _states[device]
    if setting == "kernel":
        raise KernelUnavailable(f"the {device.upper()} kernels are not available: {state.reason}")
    if not state.warned:
        state.warned = True
        warnings.warn(
            f"fastnorm: the {device.upper()} kernels are not available: {state.reason}. Plain "
            "PyTorch runs instead: the same results, but slower. FASTNORM_BACKEND=reference asks "
            "for this without a warning; python -m fastnorm status tells more.",
            RuntimeWarning,
            stacklevel=4,
        )


def _load(device: str, setting: str) -> ModuleType | None:
    state = _states[device]
    if state.loaded is None and state.reason is None:
        with _mutex:
            if state.loaded is None and state.reason is None:
                _attempt(device)
    if state.loaded is None:
        _refuse(device, setting)
    return state.loaded


def load() -> ModuleType | None:
    """The compiled CPU module, which also registers ``torch.ops.fastnorm``; compiled if need be.

    None where plain PyTorch is to run: with the backend ``"reference"``, and with ``"auto"`` where
    the kernels cannot be had, after one `RuntimeWarning` per process that names the cause.

    Raises:
        KernelUnavailable: with the backend ``"kernel"``, where the kernels cannot be had.
    """
    global module
    setting = backend()
    if setting == "reference":
        return None
    module = _load("cpu", setting)
    return module


def load_cuda() -> bool:
    """Whether the operators have their CUDA implementation; compiled and loaded if need be.

    False and KernelUnavailable as for `load`.
    """
    global cuda_loaded
    setting = backend()
    if load() is None:
        return False
    cuda_loaded = _load("cuda", setting) is not None
    return cuda_loaded


def reason(device: str = "cpu") -> str | None:
    """Why the kernels of `device` ("cpu" or "cuda") could not be had; None if nothing failed."""
    return _states[device].reason


@dataclass(frozen=True)
class BuildReport(os.PathLike):
    """What `build` made: each library's folder, or why it is missing. Itself the CPU one's path."""

    cpu: Path
    cuda: Path | None
    cuda_reason: str | None
    seconds: float

    def __fspath__(self) -> str:
        return str(self.cpu)

    def __str__(self) -> str:
        cuda = self.cuda if self.cuda is not None else f"none: {self.cuda_reason}"
        return f"cpu   {self.cpu}\ncuda  {cuda}"


def build(*, verbose: bool = False, force: bool = False, cuda: bool | None = None) -> BuildReport:
    """Compile the kernels for this machine now, unless they are compiled already.

    Args:
        verbose: print every command and what the compilers say.
        force: compile even if a finished library is there. A library that this process has loaded
            stays loaded.
        cuda: True demands the CUDA kernels, False leaves them out, None builds them where a device
            is visible or ``TORCH_CUDA_ARCH_LIST`` is set.

    Returns:
        A report, which is also the path of the CPU library's folder.

    Raises:
        KernelUnavailable: the CPU kernels, or demanded CUDA kernels, cannot be compiled, or another
            process held the lock for longer than ``FASTNORM_BUILD_TIMEOUT`` (600 seconds).

    Example:
        >>> report = fastnorm.build()  # doctest: +SKIP
    """
    start = time.monotonic()
    with _mutex:
        plans = [cpu_plan()]
        cuda_folder, cuda_reason = None, "not asked for"
        if cuda is not False:
            try:
                plans.append(cuda_plan())
            except KernelUnavailable as error:
                if cuda:
                    raise
                cuda_reason = str(error)
        # Both at once where every file can have a core: the time is that of the longest file.
        at_once = job_count() >= sum(len(plan.sources) for plan in plans)
        with ThreadPoolExecutor(len(plans)) as pool:
            cpu_made = pool.submit(_make, plans[0], verbose, force)
            if not at_once:
                cpu_made.result()
            cuda_made = [pool.submit(_make, plan, verbose, force) for plan in plans[1:]]
            folder = cpu_made.result()
        for made in cuda_made:
            try:
                cuda_folder, cuda_reason = made.result(), ""
            except KernelUnavailable as error:
                if cuda:
                    raise
                cuda_reason = str(error)
        for state in _states.values():
            state.reason = None
    return BuildReport(folder, cuda_folder, cuda_reason or None, time.monotonic() - start)


def clean() -> Path:
    """Remove every compiled library from the cache folder; return that folder."""
    folder = cache_dir()
    for pattern in ("cpu-*", "cuda-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------
# Which implementation runs
# ---------------------------------------------------------------------------------------------

_BACKENDS = ("auto", "kernel", "reference")
_backend: str | None = None


def _check_backend(value: str, origin: str) -> str:
    if value not in _BACKENDS:
        raise ValueError(f"{origin} must be 'auto', 'kernel' or 'reference', got {value!r}")
    return value


def backend() -> str:
    """The backend in force: ``"auto"``, ``"kernel"`` or ``"reference"``.

    Until `use_backend` is called it is the variable ``FASTNORM_BACKEND``, or ``"auto"``.
    """
    _settle_backend()
    assert _backend is not None
    return _backend


def _settle_backend() -> None:
    global _backend
    if _backend is None:
        _backend = _check_backend(os.environ.get("FASTNORM_BACKEND") or "auto", "FASTNORM_BACKEND")


# Dynamo runs it while it traces, and then meets a backend that stays: its guard would otherwise be
# None, which every later call fails. (What torch.compiler.assume_constant_result sets.)
_settle_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _set_backend(value: str | None) -> None:
    global _backend, module, cuda_loaded
    with _mutex:
        _backend = value
        off = value == "reference"
        module = None if off else _states["cpu"].loaded
        cuda_loaded = not off and _states["cuda"].loaded is not None


class _Restore:
    def __init__(self, before: str | None) -> None:
        self.before = before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _set_backend(self.before)


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose what runs from now on, in the whole process; as a context manager, until its end.

    Args:
        name: ``"auto"`` runs the kernels, and plain PyTorch after one warning where they cannot be
            had; ``"kernel"`` raises `KernelUnavailable` there; ``"reference"`` is plain PyTorch.

    Raises:
        ValueError: another name.

    Example:
        >>> with fastnorm.use_backend("reference"):
        ...     y = fastnorm.layer_norm(torch.randn(4, 8), (8,))
    """
    before = _backend
    _set_backend(_check_backend(name, "backend"))
    return _Restore(before)
