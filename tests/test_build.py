"""The build: key, lock, race, death of the builder, cache folder, fallback, install.

The sources are tiny stand-ins for ``csrc``, so that a compile takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_sources import ROOT, TINY, fake_toolkit, no_compiler, write_program, write_sources

from fastnorm import _build, _toolchain
from fastnorm._build import KernelUnavailable
from fastnorm.status import status

pytestmark = [
    pytest.mark.cpu("compilers and caches"),
    pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


# --- compile, load, keep ---------------------------------------------------------------------


def test_first_use_compiles_and_the_next_process_only_loads(fresh, capfd, monkeypatch):
    module = _build.load()
    assert module.answer() == 42
    assert _build.module is module
    assert _build.load() is module
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "compiling the CPU kernels" in lines[0]

    monkeypatch.setattr(_build, "_states", {name: _build._State() for name in _build.DEVICES})
    monkeypatch.setattr(_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert _build.load().answer() == 42
    assert capfd.readouterr().err == ""


def test_nothing_but_the_library_and_its_facts_is_kept(fresh):
    report = _build.build()
    names = sorted(path.name for path in Path(report).iterdir())
    assert names == ["_C" + sysconfig.get_config_var("EXT_SUFFIX"), "built.json"]
    facts = json.loads((report.cpu / "built.json").read_text())
    assert facts["torch"] == torch.__version__
    left = [path.name for path in report.cpu.parent.iterdir() if path.name.endswith(".part")]
    assert left == []


def test_force_compiles_again_and_replaces_the_library(fresh):
    report = _build.build()
    before = next(report.cpu.glob("_C*")).stat().st_ino
    assert _build.build().cpu == report.cpu
    assert next(report.cpu.glob("_C*")).stat().st_ino == before
    assert _build.build(force=True).cpu == report.cpu
    assert next(report.cpu.glob("_C*")).stat().st_ino != before


def test_threads_that_load_at_once_share_one_compile(fresh, monkeypatch):
    compiles = []
    original = _build._compile
    monkeypatch.setattr(_build, "_compile", lambda *a: (compiles.append(1), original(*a)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(_build.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiles) == 1
    assert len(found) == 8
    assert len({id(module) for module in found}) == 1


def test_error_in_a_source_is_one_line_and_the_whole_output_is_kept(fresh):
    (_toolchain.SOURCES / "cpu" / "part.cpp").write_text("int part() { return nonsense; }\n")
    with pytest.raises(
        KernelUnavailable, match=r"part\.cpp does not compile: .*nonsense"
    ) as caught:
        _build.build()
    text = str(caught.value)
    assert "\n" not in text
    log = Path(text.rsplit("output: ", 1)[1].rstrip(")"))
    assert "nonsense" in log.read_text()
    (_toolchain.SOURCES / "cpu" / "part.cpp").write_text("int part() { return 2; }\n")
    _build.build()


def test_verbose_prints_the_commands(fresh, capfd):
    _build.build(verbose=True)
    text = capfd.readouterr().err
    assert text.count(" -c ") == 2
    assert "-ffast-math" not in text


def test_clean_removes_what_was_compiled(fresh):
    report = _build.build()
    (fresh / "cache" / "other").mkdir()
    _build.clean()
    assert not report.cpu.exists()
    assert [path.name for path in (fresh / "cache").iterdir()] == ["other"]


def test_kernels_run_on_torchs_own_threads(fresh):
    """parallel_for in an extension is parallel, and torch.set_num_threads governs it."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("the kernels run on one thread here")
    (_toolchain.SOURCES / "module.cpp").write_text("""
#include <Python.h>
#include <ATen/Parallel.h>
#include <mutex>
#include <set>
#include <thread>
static PyObject* threads(PyObject*, PyObject*) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, 64, 1, [&](int64_t, int64_t) {
    std::lock_guard<std::mutex> guard(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return PyLong_FromLong(seen.size());
}
static PyMethodDef methods[] = {{"threads", threads, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&definition);
}
""")
    module = _build.load()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert module.threads() == count
    needed = subprocess.run(
        ["objdump", "-p", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "omp" not in needed


# --- key -------------------------------------------------------------------------------------


def set_compiler(monkeypatch, text):
    found = _toolchain.find_compiler()[0]
    monkeypatch.setattr(_toolchain, "find_compiler", lambda: (found, text))


KEY_INGREDIENTS = {
    "torch version": lambda m, root: m.setattr(torch, "__version__", "2.99.0"),
    "torch commit": lambda m, root: m.setattr(torch.version, "git_version", "abc"),
    "CUDA version": lambda m, root: m.setattr(torch.version, "cuda", "99.0"),
    "C++ ABI": lambda m, root: m.setattr(torch, "compiled_with_cxx11_abi", lambda: False),
    "Python ABI": lambda m, root: m.setattr(
        sysconfig, "get_config_var", lambda name, _f=sysconfig.get_config_var: f"{_f(name)}-other"
    ),
    "platform": lambda m, root: m.setattr(sysconfig, "get_platform", lambda: "linux-riscv64"),
    "compiler": lambda m, root: set_compiler(m, "g++ 99"),
    "flags": lambda m, root: m.setattr(_toolchain, "_STANDARD", "-std=c++23"),
    "level": lambda m, root: m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    "OpenMP": lambda m, root: m.setattr(torch.__config__, "parallel_info", lambda: "native"),
    "source byte": lambda m, root: (root / "module.cpp").write_text(TINY + " "),
    "header byte": lambda m, root: (root / "common" / "answer.h").write_text("#define ANSWER 43"),
    "new source": lambda m, root: (root / "cpu" / "more.cpp").write_text(""),
    "file name": lambda m, root: (root / "cpu" / "part.cpp").rename(root / "cpu" / "part2.cpp"),
}


@pytest.mark.parametrize("ingredient", KEY_INGREDIENTS)
def test_every_ingredient_changes_the_folder(fresh, monkeypatch, ingredient):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if not _toolchain._IS_X86 and ingredient == "level":
        pytest.skip("one level on this architecture")
    before = _toolchain.cpu_plan().folder
    assert _toolchain.cpu_plan().folder == before
    KEY_INGREDIENTS[ingredient](monkeypatch, _toolchain.SOURCES)
    assert _toolchain.cpu_plan().folder != before


def test_key_is_blind_to_place_and_to_the_other_device(fresh):
    before = _toolchain.cpu_plan().folder
    (_toolchain.SOURCES / "cuda" / "part.cu").write_text("int other;")
    (_toolchain.SOURCES / "notes.txt").write_text("not a source")
    assert _toolchain.cpu_plan().folder == before
    elsewhere = shutil.copytree(_toolchain.SOURCES, fresh / "elsewhere")
    assert _toolchain.cpu_plan(root=elsewhere).folder == before


def test_changed_header_is_compiled_in(fresh, monkeypatch):
    assert _build.load().answer() == 42
    (_toolchain.SOURCES / "common" / "answer.h").write_text("#define ANSWER 43\n")
    monkeypatch.setattr(_build, "_states", {name: _build._State() for name in _build.DEVICES})
    assert _build.load().answer() == 43


def test_flags_never_relax_arithmetic(fresh):
    for level in _toolchain.prebuilt_levels():
        command = _toolchain.cpu_plan(level).compile
        assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(command)
        assert f"-DCPU_CAPABILITY_{level}" in command


# --- one builder at a time -------------------------------------------------------------------

# Imports torch once, then is eight processes, which start together.
RACE = """
import os, sys
from pathlib import Path
import torch
from fastnorm import _build, _toolchain
_toolchain.SOURCES = Path(sys.argv[1])
start, go = os.pipe()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(start, 1)
        module = _build.load()
        os._exit(0 if module is not None and module.answer() == 42 else 1)
    children.append(child)
os.close(go)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes)
"""


def slow_compiler(folder: Path) -> Path:
    """A g++ that notes each start in ``starts`` and takes its time while ``slow`` is there."""
    return write_program(
        folder / "slow-compiler",
        f"""
        case "$*" in *--version*) exec g++ --version;; esac
        case "$*" in *" -c "*) echo compile >> {folder}/starts;; esac
        if [ -e {folder}/slow ]; then exec sleep 60; fi
        sleep 0.2
        exec g++ "$@"
        """,
    )


def test_eight_cold_processes_make_one_compile(fresh):
    environment = {**os.environ, "CXX": str(slow_compiler(fresh)), "MAX_JOBS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(_toolchain.SOURCES)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == str([0] * 8), done.stderr
    assert (fresh / "starts").read_text().count("compile") == 2  # one for each source
    assert done.stderr.count("compiling the CPU kernels") == 1


def test_whoever_waited_for_a_failing_compile_does_not_repeat_it(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(slow_compiler(fresh)))
    (_toolchain.SOURCES / "module.cpp").write_text(TINY + "nonsense\n")
    monkeypatch.setenv("MAX_JOBS", "1")
    plan = _toolchain.cpu_plan()
    reasons = []

    def attempt():
        try:
            _build._make(plan)
        except KernelUnavailable as error:
            reasons.append(str(error))

    first, second = threading.Thread(target=attempt), threading.Thread(target=attempt)
    first.start()
    while not (fresh / "starts").exists():
        time.sleep(0.01)
    second.start()
    first.join()
    second.join()
    assert (fresh / "starts").read_text().count("compile") == 1
    assert len(reasons) == 2
    assert reasons[0] == reasons[1]
    with pytest.raises(KernelUnavailable):
        _build.build()  # asked after the failure: tried again
    assert (fresh / "starts").read_text().count("compile") == 2


def test_killed_builder_frees_its_lock(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(slow_compiler(fresh)))
    monkeypatch.setenv("FASTNORM_BUILD_TIMEOUT", "20")
    (fresh / "slow").touch()
    program = (
        "import sys; from pathlib import Path; from fastnorm import _build, _toolchain\n"
        "_toolchain.SOURCES = Path(sys.argv[1]); _build.build()"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", program, str(_toolchain.SOURCES)],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (fresh / "starts").exists():
            assert time.monotonic() < deadline, "the builder did not start"
            assert builder.poll() is None
            time.sleep(0.02)
        builder.send_signal(signal.SIGKILL)
        builder.wait()
        assert list((fresh / "cache").glob("*.part"))
        (fresh / "slow").unlink()
        start = time.monotonic()
        assert _build.load().answer() == 42
        assert time.monotonic() - start < 15
        assert not list((fresh / "cache").glob("*.part"))
    finally:
        os.killpg(builder.pid, signal.SIGKILL)  # its orphaned compiler


def test_waiting_too_long_names_the_lock_and_its_holder(fresh, monkeypatch, capfd):
    lock = fresh / "cache" / f"{_toolchain.cpu_plan().folder}.lock"
    lock.parent.mkdir()
    monkeypatch.setenv("FASTNORM_BUILD_TIMEOUT", "0.2")
    with (
        _build._locked(lock),
        pytest.raises(KernelUnavailable, match=rf"0\.2 s for the lock .*{os.getpid()}") as caught,
    ):
        _build.build()
    assert str(lock) in str(caught.value)
    assert f"waiting for process {os.getpid()}" in capfd.readouterr().err
    _build.build()


def test_time_limit_must_be_a_number(fresh, monkeypatch):
    monkeypatch.setenv("FASTNORM_BUILD_TIMEOUT", "soon")
    with pytest.raises(KernelUnavailable, match="FASTNORM_BUILD_TIMEOUT=soon"):
        _build.build()


# --- where there is no place, no compiler, no ninja ------------------------------------------


def test_unwritable_cache_falls_to_a_private_temporary_folder(fresh, monkeypatch, capfd):
    (fresh / "file").touch()
    (fresh / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(fresh / "tmp"))
    monkeypatch.delenv("FASTNORM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(fresh / "file"))  # root may write wherever mode bits forbid it
    assert _build.load().answer() == 42
    notices = [line for line in capfd.readouterr().err.splitlines() if "cannot write" in line]
    assert len(notices) == 1
    assert str(fresh / "file") in notices[0]
    (folder,) = (fresh / "tmp").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(_build, "_states", {name: _build._State() for name in _build.DEVICES})
    monkeypatch.setattr(_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert _build.load().answer() == 42


def test_temporary_folder_that_others_can_write_to_is_not_trusted(fresh, monkeypatch):
    (fresh / "file").touch()
    (fresh / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(fresh / "tmp"))
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(fresh / "file" / "cache"))
    trap = _build._temporary_dir()
    trap.mkdir()
    trap.chmod(0o777)
    plan = _toolchain.cpu_plan()
    (trap / plan.folder).mkdir()
    (trap / plan.folder / plan.library).touch()
    assert _build.load().answer() == 42
    assert trap not in Path(_build.module.__file__).parents


def test_read_only_cache_that_holds_the_library_is_used(fresh, monkeypatch):
    _build.build()
    monkeypatch.setattr(_build, "_cannot_write", lambda folder: "Read-only file system")
    monkeypatch.setattr(_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert _build.load().answer() == 42


def test_no_compiler_warns_once_with_cause_and_remedy(fresh, monkeypatch):
    no_compiler(monkeypatch, fresh)
    with pytest.warns(
        RuntimeWarning, match="no C\\+\\+ compiler was found.*apt-get install g"
    ) as seen:
        assert _build.load() is None
    assert len(seen) == 1
    assert _build.module is None
    assert "no C++ compiler" in _build.reason("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _build.load() is None
    with pytest.raises(KernelUnavailable, match="no C\\+\\+ compiler"):
        _build.build()


def test_kernel_backend_raises_where_auto_would_warn(fresh, monkeypatch):
    no_compiler(monkeypatch, fresh)
    monkeypatch.setenv("FASTNORM_BACKEND", "kernel")
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match="CPU kernels are not available: no C\\+\\+"):
            _build.load()


def test_build_after_a_failure_makes_load_try_again(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.warns(RuntimeWarning, match="CXX=/nonexistent/g\\+\\+ names no program"):
        assert _build.load() is None
    monkeypatch.delenv("CXX")
    _build.build()
    assert _build.reason("cpu") is None
    assert _build.load().answer() == 42


def test_compiler_that_does_not_run(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(write_program(fresh / "broken", "exit 1")))
    with pytest.raises(KernelUnavailable, match="does not run"):
        _build.build()


def test_full_disk_is_a_reason_not_a_traceback(fresh, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_build, "_compile", full)
    with pytest.raises(KernelUnavailable, match=r"cannot keep .*cache: .*No space left"):
        _build.build()
    assert not list((fresh / "cache").glob("*.part"))


def test_killed_compiler_is_told_apart(fresh, monkeypatch):
    program = write_program(
        fresh / "dying",
        """
        case "$*" in *--version*) exec g++ --version;; esac
        kill -9 $$
        """,
    )
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(KernelUnavailable, match="was killed.*MAX_JOBS=1"):
        _build.build()


def test_ninja_is_not_needed(fresh, monkeypatch):
    tools = fresh / "tools"
    tools.mkdir()
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    for name in ("g++", "as", "ld"):
        found = [(folder / name).resolve() for folder in folders if (folder / name).exists()]
        # A link to ccache looks for the compiler behind it on PATH.
        (tools / name).symlink_to(next(path for path in found if path.name != "ccache"))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert shutil.which("ninja") is None
    assert _build.load().answer() == 42


def test_library_that_cannot_be_loaded_is_a_reason_not_a_traceback(fresh):
    (_toolchain.SOURCES / "cpu" / "part.cpp").write_text(
        "int missing();\nint part() { return missing(); }\nint now = missing();\n"
    )
    with pytest.warns(RuntimeWarning, match=r"ImportError.*missing"):
        assert _build.load() is None


def test_missing_python_headers(fresh, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(fresh))
    with pytest.raises(KernelUnavailable, match=r"Python\.h is not in .*python3-dev"):
        _build.build()


def test_windows_falls_back(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(KernelUnavailable, match="Windows"):
        _toolchain.cpu_plan()


def test_macos_gets_no_openmp(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    plan = _toolchain.cpu_plan()
    assert "-fopenmp" not in plan.compile
    assert "dynamic_lookup" in plan.link


@pytest.mark.parametrize(
    ("cores", "memory_gb", "asked", "expected"),
    [(64, 100, "", 50), (4, 100, "", 4), (4, 100, "2", 2), (64, 1, "8", 1), (2, 64, "0", 1)],
)
def test_jobs_follow_cores_memory_and_max_jobs(monkeypatch, cores, memory_gb, asked, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(_build, "_memory_available", lambda: memory_gb * 2**30)
    monkeypatch.setenv("MAX_JOBS", asked)
    assert _build.job_count() == expected


def test_memory_is_positive():
    assert 0 < _build._memory_available() < 2**50


# --- backend ---------------------------------------------------------------------------------


def test_backend_comes_from_the_variable_and_is_checked(fresh, monkeypatch):
    assert _build.backend() == "auto"
    monkeypatch.setattr(_build, "_backend", None)
    monkeypatch.setenv("FASTNORM_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTNORM_BACKEND must be 'auto', .* got 'fast'"):
        _build.backend()
    monkeypatch.setenv("FASTNORM_BACKEND", "reference")
    assert _build.backend() == "reference"


def test_use_backend_switches_and_restores(fresh):
    module = _build.load()
    with _build.use_backend("reference"):
        assert _build.backend() == "reference"
        assert _build.module is None
        assert _build.load() is None
        with _build.use_backend("kernel"):
            assert _build.load() is module
        assert _build.module is None
    assert _build.backend() == "auto"
    assert _build.module is module
    _build.use_backend("reference")
    assert _build.backend() == "reference"
    with pytest.raises(ValueError, match="backend must be .* got 'gpu'"):
        _build.use_backend("gpu")
    assert _build.backend() == "reference"


def test_reference_backend_compiles_nothing(fresh, monkeypatch):
    monkeypatch.setattr(_build, "_make", lambda *_: pytest.fail("compiled"))
    with _build.use_backend("reference"):
        assert _build.load() is None
        assert not _build.load_cuda()


# --- CUDA: what can be decided without a device ----------------------------------------------


def test_torch_without_cuda(fresh, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(KernelUnavailable, match="built without CUDA"):
        _build.build(cuda=True)


def test_toolkit_of_another_major_version(cuda_torch, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "cuda", "12.4")))
    with pytest.raises(KernelUnavailable) as caught:
        _build.build(cuda=True)
    text = str(caught.value)
    assert "CUDA 12.4" in text
    assert "CUDA 13.0" in text
    assert "pip install 'nvidia-cuda-nvcc==13.0.*'" in text
    report = _build.build()  # the CPU kernels are built all the same
    assert report.cuda is None
    assert report.cuda_reason == text


def test_toolkit_of_another_minor_version_is_used(cuda_torch, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "cuda", "13.2")))
    plan = _toolchain.cuda_plan()
    assert plan.facts["nvcc"] == "13.2"
    assert plan.compile[0] == str(cuda_torch / "cuda" / "bin" / "nvcc")


def test_toolkit_is_found_beside_one_that_does_not_fit(cuda_torch, monkeypatch):
    old = fake_toolkit(cuda_torch / "old", "12.4")
    wheel = fake_toolkit(cuda_torch / "site" / "nvidia" / "cu13", "13.0")
    monkeypatch.setenv("PATH", f"{old / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(_toolchain.glob, "glob", lambda _: [])
    monkeypatch.setattr(sys, "path", [*sys.path, str(cuda_torch / "site")])
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "/usr/local/cuda" not in str(path) and real(path, mode)
    )
    assert _toolchain.find_nvcc() == (str(wheel / "bin" / "nvcc"), "13.0")


def test_no_toolkit(cuda_torch, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda_torch / "nothing"))
    with pytest.raises(KernelUnavailable, match=r"no CUDA toolkit.*CUDA 13\.0.*pip install"):
        _toolchain.cuda_plan()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(KernelUnavailable, match=r"export CUDA_HOME=/usr/local/cuda-12\.8"):
        _toolchain.cuda_plan()


def test_host_compiler_too_new_is_one_line(cuda_torch, monkeypatch):
    body = "echo '#error -- unsupported GNU version! gcc later than 15 are not supported!'; exit 1"
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "cuda", "13.0", body)))
    with pytest.raises(KernelUnavailable, match=r"NVCC_CCBIN=.* \(or CXX\)") as caught:
        _build.build(cuda=True)
    assert "\n" not in str(caught.value)
    assert _build.load().answer() == 42
    with pytest.warns(RuntimeWarning, match="CUDA kernels are not available.*NVCC_CCBIN"):
        assert not _build.load_cuda()
    assert _build.load().answer() == 42


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_accepts_the_flags(fresh, monkeypatch):
    version = _toolchain._nvcc_version(shutil.which("nvcc"))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    source = _toolchain.SOURCES / "cuda" / "part.cu"
    source.write_text("__global__ void part(float* x) { x[threadIdx.x] = ANSWER; }\n")
    source.write_text('#include "common/answer.h"\n' + source.read_text())
    plan = _toolchain.cuda_plan()
    done = subprocess.run(
        [*plan.compile, "-c", str(source), "-o", str(fresh / "part.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("change", ["architectures", "nvcc", "source", "header", "CXX"])
def test_cuda_key(cuda_torch, monkeypatch, change):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "cuda", "13.0")))
    before = _toolchain.cuda_plan().folder
    (_toolchain.SOURCES / "cpu" / "part.cpp").write_text("int part();")
    assert _toolchain.cuda_plan().folder == before
    if change == "architectures":
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    elif change == "nvcc":
        monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(cuda_torch / "newer", "13.1")))
    elif change == "source":
        (_toolchain.SOURCES / "cuda" / "part.cu").write_text("int other;")
    elif change == "header":
        (_toolchain.SOURCES / "common" / "answer.h").write_text("")
    else:
        monkeypatch.setenv("CXX", shutil.which("g++"))
    assert _toolchain.cuda_plan().folder != before


def test_architecture_list_is_honoured(cuda_torch, monkeypatch):
    assert _toolchain.cuda_architectures() == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;Hopper;9.0a")
    assert _toolchain.cuda_architectures() == ["8.0", "8.6+PTX", "9.0+PTX", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_90")
    with pytest.raises(KernelUnavailable, match="TORCH_CUDA_ARCH_LIST=sm_90 .*expected"):
        _toolchain.cuda_architectures()
    assert _toolchain._gencode(["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_architectures_of_every_visible_device(cuda_torch, monkeypatch, capfd):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_120"])
    monkeypatch.setattr(_toolchain, "_visible_capabilities", lambda: [(8, 6), (9, 0)])
    assert _toolchain.cuda_architectures() == ["8.6", "9.0+PTX"]
    monkeypatch.setattr(_toolchain, "_visible_capabilities", lambda: [(8, 0), (13, 0)])
    assert _toolchain.cuda_architectures() == ["8.0", "12.0+PTX"]
    monkeypatch.setattr(_toolchain, "_visible_capabilities", list)
    assert _toolchain.cuda_architectures() == []
    with pytest.raises(KernelUnavailable, match="no CUDA device is visible and TORCH_CUDA_ARCH"):
        _toolchain.cuda_plan()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["9.0+PTX"], (8, 0), False),
        (["8.0", "9.0"], (9, 0), True),
    ],
)
def test_coverage(architectures, capability, expected):
    assert _toolchain._covers(architectures, capability) is expected


def test_list_without_code_for_the_device(cuda_torch, monkeypatch):
    monkeypatch.setattr(_toolchain, "_visible_capabilities", lambda: [(7, 5)])
    with pytest.raises(KernelUnavailable, match=r"compute capability 7\.5.*ARCH_LIST='7\.5\+PTX'"):
        _toolchain.cuda_plan()


# --- import and install ----------------------------------------------------------------------

IMPORT = """
import sys, time, json
import torch
started = []
watched = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
sys.addaudithook(lambda event, args: started.append(event) if event in watched else None)
before = set(sys.modules)
start = time.process_time()
import fastnorm, fastnorm._build, fastnorm.status
seconds = time.process_time() - start
heavy = [name for name in ("rich", "matplotlib", "torch.utils.cpp_extension", "filelock")
         if name in set(sys.modules) - before]
print(json.dumps([started, seconds, heavy]))
"""


def test_import_starts_no_process_and_is_quick(tmp_path):
    environment = {**os.environ, "FASTNORM_CACHE_DIR": str(tmp_path / "cache")}
    quickest = float("inf")
    for _ in range(3):  # the machine may be busy with something else
        done = subprocess.run(
            [sys.executable, "-c", IMPORT],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=True,
        )
        started, seconds, heavy = json.loads(done.stdout)
        quickest = min(quickest, seconds)
    assert started == []
    assert heavy == []
    assert quickest < 0.3
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def project(tmp_path):
    """This project with the tiny sources, to be installed."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("fastnorm")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastnorm", folder / "fastnorm", ignore=ignore)
    write_sources(folder / "csrc")
    return folder


def pip(*arguments: str, cwd: Path, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation"],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_plain_install_is_a_pure_wheel_made_without_torch_and_compiler(project, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch was imported at build time')")
    variables = {"PYTHONPATH": str(blocked), "PATH": str(blocked), "FASTNORM_AOT": "0"}
    pip("wheel", ".", "-w", str(tmp_path), cwd=project, **variables)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("csrc/module.cpp", "csrc/common/answer.h", "csrc/cuda/part.cu", "py.typed"):
        assert f"fastnorm/{name}" in names
    assert not [name for name in names if "prebuilt" in name]


LOAD = """
import sys, json, warnings
from fastnorm import _build, _toolchain
from fastnorm.status import status
before = str(status())
module = _build.load()
print(json.dumps([before, module and module.__file__, str(status())]))
"""


def load_installed(target: Path, cache: Path, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=target.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(target),
            "FASTNORM_CACHE_DIR": str(cache),
            **variables,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_installed_ahead_of_time(project, tmp_path):
    target = tmp_path / "site"
    pip("install", ".", "--target", str(target), cwd=project, FASTNORM_AOT="1")
    prebuilt = target / "fastnorm" / "prebuilt"
    made = sorted(path.name for path in prebuilt.iterdir())
    assert made == sorted(level.lower() for level in _toolchain.prebuilt_levels())

    # Loaded with no compiler about.
    before, file, after = load_installed(target, tmp_path / "cache", PATH=str(tmp_path), CXX="")
    folder = prebuilt / _toolchain.cpu_level().lower()
    assert Path(file).parent == folder
    assert "kernel: built ahead of time" in before
    assert str(folder) in after
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def prebuilt(fresh):
    _build.build_ahead(_build.PREBUILT)
    return _build.PREBUILT


def test_prebuilt_level_is_the_one_that_torch_uses(prebuilt, monkeypatch):
    for level in _toolchain.prebuilt_levels():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        folder, why_not = _build._find_prebuilt("cpu")
        assert folder == prebuilt / level.lower()
        assert why_not is None
        facts = json.loads((folder / "built.json").read_text())
        assert f"-DCPU_CAPABILITY={level} " in facts["flags"]
        assert facts["flags"] == _toolchain.cpu_plan(level).facts["flags"]


def test_prebuilt_for_another_machine_is_ignored_and_said(prebuilt, fresh):
    recorded = prebuilt / _toolchain.cpu_level().lower() / "built.json"
    facts = json.loads(recorded.read_text())
    for name in ("torch", "torch_git", "cuda", "cxx11_abi", "python", "platform", "sources"):
        recorded.write_text(json.dumps({**facts, name: "other"}))
        text = f"is ignored: it was built with {name} = other, here it is {facts[name]}"
        assert text in str(status())
    assert _build.load().answer() == 42
    assert fresh / "cache" in Path(_build.module.__file__).parents
    assert text in str(status())


def test_build_ahead_needs_the_cpu_kernels(fresh, monkeypatch):
    no_compiler(monkeypatch, fresh)
    with pytest.raises(KernelUnavailable):
        _build.build_ahead(fresh / "out")
