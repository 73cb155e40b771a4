"""What every CUDA kernel asks of the memory system, counted by the emulator.

simt_traffic.json has, for each kernel as it is launched on an aligned bfloat16 shape:

    coalescing   128-byte segments that the requests of its warps touch, over the fewest that hold
                 as many bytes; 1 is best, a broadcast counts less
    conflicts    passes that its shared memory needs, over the fewest; 1 is best
    shared       bytes of shared memory of a block, with its threads
    warps        of a multiprocessor of sm_90, out of 64, that threads, shared memory and the
                 registers of nvcc_registers.json leave room for

A kernel that is worse, or that isn't there, fails. After a deliberate change:
PYTHONPATH=. python tests/test_simt_traffic.py --update
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import test_simt_column_norm as column  # noqa: E402
import test_simt_cross_entropy as entropy  # noqa: E402
import test_simt_dropout as dropout  # noqa: E402
import test_simt_row_norm as row  # noqa: E402
from simt import driver, norms  # noqa: E402

pytestmark = [
    pytest.mark.cpu("emulated kernels"),
    pytest.mark.skipif(driver.compiler() is None, reason="no C++ compiler"),
]

RECORD = pathlib.Path(__file__).with_name("simt_traffic.json")
REGISTERS = pathlib.Path(__file__).with_name("nvcc_registers.json")
DTYPE = torch.bfloat16
# Kernel by the name of its launch: the first pattern that matches. Of the instances of a template
# the one with the most registers counts.
KERNELS = (
    (r"row_norm_fwd, (block|cluster)", r"row_norm_fwd_staged_kernel<__nv_bfloat16, 8>"),
    (r"row_norm_fwd, streaming", r"row_norm_fwd_streaming_kernel<__nv_bfloat16, 8>"),
    (r"row_norm_(fwd|bwd), ragged", r"row_norm_\1_ragged_kernel<__nv_bfloat16>"),
    (r"row_norm_fwd", r"row_norm_fwd_kernel<__nv_bfloat16, 8, .*>"),
    (r"row_norm_bwd, streaming", r"row_norm_bwd_streaming_kernel<__nv_bfloat16, 8>"),
    (r"(row_norm_bwd|cross_entropy|pixel_norm_\w+),", r"\1_kernel<__nv_bfloat16, 8>"),
    (r"(scale_gradient|dropout)", r"\1_kernel<__nv_bfloat16, 8>"),
    (r"(\w+)", r"\1_kernel<__nv_bfloat16>"),
)


def row_norm(size: int, rows: int = 2, **options: Any) -> Callable[[driver.Library], object]:
    def call(lib: driver.Library) -> None:
        norm = norms.Norm(norms.row_view(rows, size), **options)
        row.check_forward(lib, norm, DTYPE)
        row.check_backward(lib, norm, DTYPE)

    return call


def column_norm(view: norms.View, **options: Any) -> Callable[[driver.Library], object]:
    def call(lib: driver.Library) -> None:
        case = column.Case(norms.Norm(view, **options), DTYPE)
        case.check_forward(lib)
        case.check_backward(lib)

    return call


def cross_entropy(classes: int, rows: int = 2) -> Callable[[driver.Library], object]:
    weight = entropy.class_values(classes, 1)
    call = entropy.draw(rows, classes, DTYPE, smoothing=0.1, weight=weight)
    return call.on_cuda


def scale_gradient(lib: driver.Library) -> None:
    grad, factor = torch.ones(16384, dtype=DTYPE), torch.tensor([0.5])
    entropy.scale(lib, grad, factor)


CASES: dict[str, list[Callable[[driver.Library], object]]] = {
    "row_norm": [
        row_norm(64, rows=32),
        row_norm(1024),
        row_norm(8192),
        row_norm(8191),
        row_norm(32768),
        row_norm(140000 // 8 * 8, rows=1),
        row_norm(40000, rows=1, clusters=False, max_shared=8 * 1024),
        lambda lib: row.check_backward(lib, norms.Norm((2, 1, 4, 4 * 64, 64, 1)), DTYPE),
    ],
    "column_norm": [
        column_norm(column.batch_nhwc(32, 64)),
        column_norm(column.batch_nhwc(1100, 64)),
        column_norm(column.batch_nchw(8, 4, 784), **column.SMALL),
        column_norm(column.batch_nchw(16, 4, 784)),
        column_norm(column.group_nhwc(2, 230, 8, 16)),
        column_norm(column.pixel_nchw(2, 96, 64)),
    ],
    "dropout": [
        lambda lib: dropout.run(lib, (8192, 1, 1), torch.ones(8192, dtype=DTYPE), 0.1),
    ],
    "cross_entropy": [
        cross_entropy(1024),
        cross_entropy(32000),
        cross_entropy(65536),
        scale_gradient,
    ],
}


def resident_warps(kernel: str, launch: dict[str, int]) -> int | None:
    """Of a multiprocessor with 228 KB of shared memory, of which a block takes 1 KB more."""
    import test_nvcc

    for pattern, replacement in KERNELS:
        match = re.match(pattern, kernel)
        if match:
            name = re.escape(match.expand(replacement)).replace(r"\.\*", ".*")
            break
    recorded = json.loads(REGISTERS.read_text())["sm_90"]
    found = [k["registers"] for n, k in recorded.items() if re.fullmatch(name, n)]
    assert found, f"{kernel}: no kernel {name} in {REGISTERS.name}"
    per_block = launch["threads"] // 32
    by_shared = 228 * 1024 // (launch["shared"] + 1024)
    blocks = test_nvcc.resident_warps(max(found), launch["threads"]) // per_block
    return min(blocks, by_shared) * per_block


def measure(name: str) -> dict[str, dict[str, Any]]:
    """Kernel as launched -> what it asks for."""
    lib = driver.library(name)
    table: dict[str, dict[str, Any]] = {}
    for call in CASES[name]:
        with lib.counting():
            reports = []
            # A call may start several entry points.
            original = lib.call

            def recorded(*arguments: Any, original=original, reports=reports) -> None:  # type: ignore[no-untyped-def]
                original(*arguments)
                reports += lib.reports()

            lib.call = recorded  # type: ignore[method-assign]
            try:
                call(lib)
            finally:
                del lib.call
        for report in reports:
            segments = report["load"]["segments"] + report["store"]["segments"]
            least = report["load"]["least_segments"] + report["store"]["least_segments"]
            shared, launch = report["shared"], report["launch"]
            entry = {
                "coalescing": round(segments / least, 2),
                "conflicts": round(shared["wavefronts"] / max(shared["least_wavefronts"], 1), 2),
                "shared": launch["shared"],
                "threads": launch["threads"],
                "warps": resident_warps(report["kernel"], launch),
            }
            table.setdefault(report["kernel"], entry)
    return table


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_recorded(name: str) -> None:
    recorded = json.loads(RECORD.read_text())[name]
    measured = measure(name)
    assert sorted(measured) == sorted(recorded), "see the head of test_simt_traffic.py"
    for kernel, entry in measured.items():
        record = recorded[kernel]
        for key in ("coalescing", "conflicts", "shared"):
            assert entry[key] <= record[key], (kernel, key)
        assert entry["threads"] == record["threads"], kernel
        assert entry["warps"] >= record["warps"], kernel


def test_kernels_that_claim_it_have_no_bank_conflicts() -> None:
    recorded = json.loads(RECORD.read_text())
    for kernel in ("row_norm_fwd, block", "row_norm_fwd, cluster", "row_norm_bwd, block"):
        assert recorded["row_norm"][kernel]["conflicts"] == 1
    for kernel in ("pixel_norm_fwd, staged", "pixel_norm_bwd, staged", "plane_resident_fwd"):
        assert recorded["column_norm"][kernel]["conflicts"] == 1
    for kernel, entry in recorded["cross_entropy"].items():
        assert entry["conflicts"] <= 1, kernel  # 0: no shared memory


def main() -> None:
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/test_simt_traffic.py --update")
    torch.set_num_threads(1)
    blocks = []
    for name in CASES:
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in measure(name).items()]
        blocks.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    RECORD.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
