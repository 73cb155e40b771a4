"""The benchmark harness: its statistics, its byte counts, its checks, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness, run
from fastnorm import _bench, _bench_ops, _bench_report
from fastnorm._bench import FORWARD, OPS, TRAIN, Cell

pytestmark = pytest.mark.cpu("the harness, on a clock that stands in")

MB = 1 << 20


@pytest.fixture
def stand_in(monkeypatch):
    """torch in fastnorm's place, so that the harness is tested and not the kernels."""
    library = SimpleNamespace(layer_norm=F.layer_norm, dropout=F.dropout)
    monkeypatch.setattr(_bench_ops, "library", library)
    monkeypatch.setattr(_bench._build, "load", lambda: None)
    monkeypatch.setattr(_bench, "bandwidth", lambda device: {"copy": 1e10, "triad": 1e10})
    return library


# --- statistics -------------------------------------------------------------------------------


def test_summarize():
    summary = _bench.summarize([4.0, 1.0, 3.0, 2.0, 100.0])
    assert summary == {"median": 3.0, "q1": 2.0, "q3": 4.0, "best": 1.0, "rounds": 5}
    assert _bench.summarize([7.0])["q3"] == 7.0


def test_ratio_is_taken_within_rounds():
    # The machine slows down tenfold after the first round; fastnorm takes half the time throughout.
    assert _bench.paired_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
    with pytest.raises(ValueError):
        _bench.paired_ratio([1.0], [1.0, 2.0])


def test_contenders_take_turns():
    order: list[str] = []

    class CountingTimer(_bench.Timer):
        def calls(self, call):
            return 1

        def __call__(self, call, calls):
            call()
            return 1.0

    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples, _ = _bench.interleave(CountingTimer("cpu", host=True), calls, 0.0, 3)
    assert "".join(order) == "abcbcacab"
    assert all(len(times) == 3 for times in samples.values())


# --- minimal bytes ----------------------------------------------------------------------------


def test_row_norm_bytes():
    # 100 rows of 64 float32: x in, y out, two statistics a row, weight and bias.
    tensor = 100 * 64 * 4
    forward, backward = _bench_ops.row_norm_bytes(100, 64, 4)
    assert forward == 2 * tensor + 100 * 8 + 2 * 64 * 4
    assert backward == 3 * tensor + 100 * 8 + 3 * 64 * 4
    forward, backward = _bench_ops.row_norm_bytes(100, 64, 4, parameters=1, add=True)
    assert forward == 4 * tensor + 100 * 4 + 64 * 4
    assert backward == 4 * tensor + 100 * 4 + 2 * 64 * 4
    assert _bench_ops.row_norm_bytes(0, 64, 4, add=True, dropout=True)[1] == 3 * 64 * 4


@pytest.mark.parametrize(
    ("op", "layout", "cache", "tensors"),
    [
        ("batch_norm", "contiguous", 32 * MB, 5),  # one channel is 512 KB
        ("batch_norm", "contiguous", MB // 4, 8),
        ("batch_norm", "channels_last", 2 * MB, 8),  # the channels interleave: 4 MB in one block
        ("batch_norm_eval", "channels_last", 2 * MB, 5),
        ("group_norm", "contiguous", MB, 5),
        ("instance_norm", "contiguous", MB, 5),
        ("dropout", "contiguous", MB, 4),
        ("gelu_dropout", "contiguous", MB, 5),
        ("stochastic_depth", "contiguous", MB, 5),
    ],
)
def test_minimal_bytes_in_tensors(op, layout, cache, tensors):
    cell = Cell(op, (128, 8, 32, 32), "fp32", TRAIN, layout)
    assert _bench_ops.minimal_bytes(cell, cache) == tensors * cell.input_bytes


def test_residual_of_batch_norm_keeps_a_bit_per_element():
    cell = Cell("batch_norm_add_relu", (16, 8, 8, 8), "bf16")
    assert _bench_ops.minimal_bytes(cell, MB) == 7 * cell.input_bytes + 3 * cell.elements // 8


# --- cells ------------------------------------------------------------------------------------


def test_record_of_a_cell(stand_in):
    record = _bench.measure(Cell("layer_norm", (64, 32)), seconds=0.0)
    assert json.loads(json.dumps(record)) == record
    assert set(record["contenders"]) == {"torch", "fastnorm", "copy"}
    for times in record["contenders"].values():
        assert 0 < times["best"] <= times["q1"] <= times["median"] <= times["q3"]
        assert times["rounds"] >= 3
    expected = record["minimal_bytes"] / (2 * record["input_bytes"]) / record["copies"]
    assert record["copy_fraction"] == pytest.approx(expected)
    assert record["ratio_torch"] > 0 and record["ratio_compile"] is None
    assert not record["wrong"] and record["notes"] == []


def test_right_results_pass_where_torch_rounds(stand_in, monkeypatch):
    def in_float32(input, normalized_shape, weight, bias):
        args = input.float(), normalized_shape, weight.float(), bias.float()
        return F.layer_norm(*args).to(input.dtype)

    monkeypatch.setattr(stand_in, "layer_norm", in_float32)
    assert _bench.check(Cell("layer_norm", (2048, 64), "bf16"), "cpu") is None
    monkeypatch.setattr(_bench, "CHECKED_BYTES", 1)  # one row of them
    assert _bench.check(Cell("layer_norm", (2048, 64), "bf16"), "cpu") is None


@pytest.mark.parametrize("direction", [FORWARD, TRAIN])
def test_wrong_results_are_not_timed(stand_in, monkeypatch, direction):
    def wrong(input, normalized_shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps=0.1)

    monkeypatch.setattr(stand_in, "layer_norm", wrong)
    record = _bench.measure(Cell("layer_norm", (64, 32), direction=direction), seconds=0.0)
    assert record["wrong"] and record["contenders"] == {}
    assert "fastnorm: result 0 is off by" in record["notes"][0]


def test_wrong_gradient_shape_and_dtype_are_seen():
    x = torch.ones(4, 3)
    assert _bench.disagreement([x], [x.clone()], "fp32", False) is None
    assert "instead of 2" in _bench.disagreement([x], [x, x], "fp32", False)
    assert "float64" in _bench.disagreement([x.double()], [x], "fp32", False)
    assert "off by" in _bench.disagreement([x * 1.01], [x], "fp32", False)
    assert "off by nan" in _bench.disagreement([x * float("nan")], [x], "fp32", False)
    assert "not finite" in _bench.disagreement([x / 0], [x], "fp32", True)
    assert _bench.disagreement([2 * x], [x], "fp32", True) is None


def test_batch_norm_keeps_its_parameters_in_float32_on_cuda(stand_in, monkeypatch):
    cell = Cell("batch_norm_add_relu", (8, 16, 5, 5), "bf16")
    assert _bench_ops.parameter_dtype(cell, "cpu") == torch.bfloat16
    assert _bench_ops.parameter_dtype(cell, "cuda") == torch.float32
    assert _bench_ops.parameter_dtype(Cell("batch_norm", (8, 16), "fp64"), "cuda") == torch.float64
    assert _bench_ops.parameter_dtype(Cell("group_norm", (8, 16), "bf16"), "cuda") == torch.bfloat16

    def batch_norm(x, *args, activation, residual):
        return F.relu(F.batch_norm(x.float(), *args) + residual.float()).to(x.dtype)

    monkeypatch.setattr(stand_in, "batch_norm", batch_norm, raising=False)
    monkeypatch.setattr(_bench_ops, "parameter_dtype", lambda cell, device: torch.float32)
    assert _bench.check(cell, "cpu") is None
    record = _bench.measure(cell, seconds=0.0)
    assert not record["wrong"] and "fastnorm" in record["contenders"]


def test_a_missing_op_is_a_note(stand_in):
    record = _bench.measure(Cell("rms_norm", (8, 8)), seconds=0.0)
    assert record["contenders"] == {} and record["ratio_torch"] is None
    assert "fastnorm: AttributeError" in record["notes"][0]


def test_every_op_runs_by_torch_in_its_layouts():
    for name, op in OPS.items():
        images = op.reduces not in ("row", "none")
        cell = Cell(name, (2, 32, 3, 3) if images or "2d" in name else (4, 8))
        layouts = ("contiguous", "channels_last") if images else ("contiguous",)
        for layout in layouts:
            inputs = _bench_ops.make_inputs(Cell(name, cell.shape, layout=layout), "cpu")
            with torch.no_grad():
                outputs = op.torch(inputs)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            call = _bench.contender_call(
                cell, inputs, op.torch, [torch.ones_like(y) for y in outputs]
            )
            results = call()
            assert len(results) == len(outputs) + len(op.leaves)


PAGES = """
import itertools, resource, torch
from fastnorm import _bench

def faults(kind):
    with _bench.pages(kind, 2**28) as measured:
        counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(5):
            torch.ones(2**23)  # 32 MB, in pages of 4 KB or huge ones of 2 MB
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return measured, min(b - a for a, b in itertools.pairwise(counts))

measured, fresh = faults("fresh")
print(measured, fresh, faults("reused")[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux page faults")
def test_fresh_outputs_fault_and_reused_ones_do_not():
    # In a process of its own: what other tests have left free in the heap would be used again.
    root = Path(_bench.__file__).parents[1]
    command = [sys.executable, "-c", PAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    measured, fresh, reused = done.stdout.split()
    if measured == "default":
        pytest.skip("this malloc can't be told")
    assert int(fresh) >= 16 > int(reused)


# --- reports ----------------------------------------------------------------------------------


def fake_results():
    def cell(ratio, **fields):
        times = {"median": 1e-3, "q1": 1e-3, "q3": 2e-3, "best": 1e-3, "rounds": 3, "calls": 1}
        return {
            "op": "layer_norm", "shape": [4096, 1024], "dtype": "fp32", "direction": FORWARD,
            "layout": "contiguous", "pages": "reused", "device": "cpu", "clock": "host",
            "input_bytes": 16 * MB, "minimal_bytes": 32 * MB, "wrong": False, "notes": [],
            "contenders": {"torch": times, "fastnorm": times, "copy": times},
            "ratio_torch": ratio, "ratio_compile": None, "copies": 1.0, "copy_fraction": 1.0,
        } | fields  # fmt: skip

    facts = {
        "cpu": "cpu", "threads": 2, "simd": "AVX2", "caches": {"L2": MB}, "torch": "2", "date": "d",
        "fastnorm": "0", "runs": "kernel", "load_average": 0.5,
        "bandwidth": {"copy": 1e10, "triad": 1e10},
    }  # fmt: skip
    facts["THP_MEM_ALLOC_ENABLE"] = ""
    cells = [
        cell(4.0),
        cell(0.25, dtype="bf16", pages="fresh"),
        cell(2.0, op="rms_norm", direction=TRAIN),
    ]
    memory = {"name": "peak", "unit": "B", "torch": 3 * MB, "fastnorm": 2 * MB}
    return {"version": 1, "machine": facts, "cells": cells, "skipped": 2, "measurements": [memory]}


def test_losses_are_shown_and_counted():
    results = fake_results()
    assert [style for _, style in _bench_report.cell_rows(results)[1]] == ["green", "red", "green"]
    lines = _bench_report.closing_lines(results)
    assert "(here: not set)" in lines[0] and "2 cells not measured" in lines[1]
    assert lines[-1].startswith("3 cells: 2 faster than torch, 1 slower, geometric mean 1.26x")
    header, rows = _bench_report.summary_rows(results)
    assert [row[header.index("slower")] for row, _ in rows] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("extras", [True, False])
def test_saved_files(tmp_path, monkeypatch, capsys, extras):
    if not extras:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif not importlib.util.find_spec("matplotlib"):
        pytest.skip("needs matplotlib")
    results = fake_results()
    files = _bench_report.save(results, tmp_path / "new", "bench")
    assert [file.suffix for file in files] == [".json", ".txt"] + [".png"] * extras
    assert json.loads(files[0].read_text()) == results
    text = files[1].read_text()
    assert "0.25x" in text and "1 slower" in text and "1.50x" in text
    _bench_report.show(results)
    assert "0.25x" in capsys.readouterr().out
    with _bench_report.progress(2, "cells") as step:
        step("one")


def test_command(stand_in, monkeypatch, tmp_path, capsys):
    command = ["--op", "layer_norm", "--shape", "8x16", "--dtype", "fp32", "--seconds", "0.01"]
    assert _bench.main([*command, "--output", str(tmp_path)]) == 0
    assert "geometric mean" in capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [cell["direction"] for cell in results["cells"]] == [FORWARD, TRAIN]
    assert results["machine"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(stand_in, "layer_norm", lambda x, *_: 2 * x)
    assert _bench.main([*command, "--direction", FORWARD]) == 1
    for bad, message in (
        (["--shape", "8x0"], "expected a shape such as 4096x1024, got '8x0'"),
        (["--op", "group_norm", "--shape", "8x32"], "group_norm needs at least 3 dimensions"),
        (["--shape", "8x32", "--layout", "channels_last"], "needs 4 or 5 dimensions, got 2"),
    ):
        with pytest.raises(SystemExit):
            _bench.main(bad)
        assert message in capsys.readouterr().err


def test_scripts_have_every_mode():
    for module in run.MODULES:
        for device in ("cpu", "cuda"):
            for quick in (False, True):
                cells = harness.select(module, device, quick, sweep=False)
                assert all(isinstance(cell, Cell) for cell in cells)
                assert cells or hasattr(module, "measurements")
    sweep = [cell for m in run.MODULES for cell in harness.select(m, "cpu", False, True)]
    assert len(sweep) > 1000 and {cell.dtype for cell in sweep} == set(_bench.DTYPES)


def test_on_cuda_ops_take_turns_and_compilers_come_last(monkeypatch):
    order = []
    monkeypatch.setattr(_bench._build, "load_cuda", lambda: True)
    monkeypatch.setattr(_bench, "machine_facts", lambda device: {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def measure(cell, *_):
        order.append((cell.op, cell.shape, cell.compile))
        return {}

    monkeypatch.setattr(_bench, "measure", measure)
    cells = _bench.grid(["layer_norm"], [(2, 3)], ("fp32",), (TRAIN,), compile=True)
    cells += _bench.grid(["layer_norm", "rms_norm"], [(4, 8), (8, 8)], ("fp32",), (TRAIN,))
    seen = []
    results = _bench.run(cells, "cuda", checkpoint=seen.append)
    assert len(results["cells"]) == 5 and results["broken"] is None
    assert order == [
        ("rms_norm", (4, 8), False),
        ("layer_norm", (4, 8), False),
        ("rms_norm", (8, 8), False),
        ("layer_norm", (8, 8), False),
        ("layer_norm", (2, 3), True),
    ]

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    results = _bench.run(cells, "cuda")
    assert len(results["cells"]) == 1 and results["skipped"] == 4
    assert "rms_norm 4x8 fp32: CUDA error" in results["broken"]
