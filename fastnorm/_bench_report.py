"""What the benchmark shows: progress bar, tables, summary, JSON and the plot.

rich and matplotlib are used where they are installed; without them the same text is printed plainly
and no picture is drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = tuple[list[str], str]  # the fields, and the style of the ratios among them
TEXT_COLUMNS = ("op", "shape", "dtype", "direction", "outputs", "measured", "cost of")
CALL_BYTES = 4 << 10
COLORS = {"fp32": "#2166ac", "bf16": "#e08214", "fp16": "#7b3294", "fp64": "#4d4d4d"}


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; call what it yields with each item's label as the item starts."""
    if importlib.util.find_spec("rich"):
        from rich import progress as rich_progress
        from rich.console import Console

        columns = (
            rich_progress.TextColumn(what),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.description}"),
        )
        console = Console(stderr=True)
        with rich_progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, completed=-1)
            yield lambda label: bar.update(task, advance=1, description=label, refresh=True)
        return
    done = 0

    def step(label: str) -> None:
        nonlocal done
        done += 1
        if done == 1 or done % max(1, total // 10) == 0:
            print(f"{what} {done}/{total} {label}", file=sys.stderr, flush=True)

    yield step


def format_bytes(count: float) -> str:
    units = ["B", "KB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if count >= 10 or count % 1 == 0 else f"{count:.1f} {units[0]}"


def format_time(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_shape(shape: Sequence[int], layout: str) -> str:
    return "x".join(map(str, shape)) + (" nhwc" if layout == "channels_last" else "")


def format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def ratio_style(ratio: float | None) -> str:
    return "" if ratio is None else "red" if ratio < 1 else "green"


def machine_line(facts: dict[str, Any]) -> str:
    """The machine, its software and the date in one line."""
    rates = facts["bandwidth"]
    if "gpu" in facts:
        gpu = facts["gpu"]
        chip = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    else:
        caches = " ".join(f"{name} {format_bytes(size)}" for name, size in facts["caches"].items())
        chip = f"{facts['cpu']}, {facts['threads']} threads, {facts['simd']}, {caches}"
    load = "" if facts["load_average"] is None else f", load {facts['load_average']:.1f}"
    return (
        f"{chip}, copy {rates['copy'] / 1e9:.0f} GB/s, triad {rates['triad'] / 1e9:.0f} GB/s, "
        f"torch {facts['torch']}, fastnorm {facts['fastnorm']}, {facts['date']}{load}"
    )


# --- tables -------------------------------------------------------------------------------------


def cell_rows(results: dict[str, Any]) -> tuple[list[str], list[Row]]:
    """A row per cell that was measured or wrong; red where fastnorm is slower than torch."""
    cells = [cell for cell in results["cells"] if cell["contenders"] or cell["wrong"]]
    present = {name for cell in cells for name in cell["contenders"]} | {"torch", "fastnorm"}
    names = [n for n in ("torch", "compile", "liger", "quack", "fastnorm") if n in present]
    header = ["op", "shape", "dtype", "direction", "input", "outputs", *names, "+-", "vs torch"]
    header += (["vs compile"] if "compile" in names else []) + ["copies", "of copy bw"]
    rows = []
    for cell in cells:
        times = cell["contenders"]
        row = [cell["op"], format_shape(cell["shape"], cell["layout"]), cell["dtype"]]
        row += [cell["direction"], format_bytes(cell["input_bytes"])]
        host_time = cell["device"] == "cuda" and cell["clock"] == "host"
        row.append("host time" if host_time else cell["pages"])
        row += [format_time(times[name]["median"]) if name in times else "-" for name in names]
        ours = times.get("fastnorm")
        row.append(f"{(ours['q3'] - ours['q1']) / 2 / ours['median']:.0%}" if ours else "-")
        row.append("WRONG" if cell["wrong"] else format_ratio(cell["ratio_torch"]))
        if "compile" in names:
            row.append(format_ratio(cell["ratio_compile"]))
        # Below a megabyte a call's fixed cost, not bandwidth, sets both sides of the fraction.
        if ours and cell["minimal_bytes"] >= 1 << 20:
            row += [f"{cell['copies']:.2f}", f"{cell['copy_fraction']:.0%}"]
        else:
            row += ["-", "-"]
        rows.append((row, "red" if cell["wrong"] else ratio_style(cell["ratio_torch"])))
    return header, rows


def summary_rows(results: dict[str, Any]) -> tuple[list[str], list[Row]]:
    """Geometric mean, worst cell and number of losses by op, dtype and direction, then overall.

    Cells of a few kilobytes, where only the cost of a call is measured, are groups of their own.
    """
    cells = [cell for cell in results["cells"] if cell["ratio_torch"] is not None]
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["input_bytes"] <= CALL_BYTES):
        inputs = "call" if cell["input_bytes"] <= CALL_BYTES else "data"
        key = (cell["op"], cell["dtype"], cell["direction"], inputs)
        groups.setdefault(key, []).append(cell)
    if len(groups) > 1:
        groups["all", "", "", ""] = cells
    compiled = any(cell["ratio_compile"] for cell in cells)
    header = ["op", "dtype", "direction", "cost of", "cells", "slower", "worst", "vs torch"]
    header += ["vs compile"] if compiled else []
    rows = []
    for key, group in groups.items():
        ratios = [cell["ratio_torch"] for cell in group]
        mean = statistics.geometric_mean(ratios)
        losses = sum(ratio < 1 for ratio in ratios)
        row = [*key, str(len(group)), str(losses), format_ratio(min(ratios)), format_ratio(mean)]
        if compiled:
            against = [cell["ratio_compile"] for cell in group if cell["ratio_compile"]]
            row.append(format_ratio(statistics.geometric_mean(against) if against else None))
        rows.append((row, ratio_style(mean)))
    return header, rows


def measurement_rows(results: dict[str, Any]) -> tuple[list[str], list[Row]]:
    """What is not a cell: import time, peak memory, modules; each by torch and by fastnorm."""
    formats = {"s": format_time, "B": format_bytes}
    rows = []
    for item in results["measurements"]:
        # A peak may be 0: a step that fits into what the heap had free.
        ratio = item["torch"] / item["fastnorm"] if item["fastnorm"] else None
        ratio = item.get("ratio", ratio)  # of interleaved pairs, where it was taken
        row = [item["name"], *(formats[item["unit"]](item[name]) for name in ("torch", "fastnorm"))]
        rows.append(([*row, format_ratio(ratio)], ratio_style(ratio)))
    return ["measured", "torch", "fastnorm", "vs torch"], rows


def closing_lines(results: dict[str, Any]) -> list[str]:
    """Why contenders are missing, what was skipped or wrong, and last the count of losses."""
    counts: dict[str, int] = {}
    for cell in results["cells"]:
        for note in cell["notes"]:
            counts[f"{cell['op']}: {note}"] = counts.get(f"{cell['op']}: {note}", 0) + 1
    lines = [f"note, {count} cells: {note}" for note, count in counts.items()]
    if any(cell["pages"] == "fresh" for cell in results["cells"]):
        setting = results["machine"]["THP_MEM_ALLOC_ENABLE"] or "not set"
        lines.append(
            "fresh outputs fault on every page; THP_MEM_ALLOC_ENABLE=1 has torch ask for huge ones "
            f"(here: {setting})"
        )
    if results["machine"]["runs"] != "kernel":
        lines.append("fastnorm ran plain PyTorch, not its kernels; fastnorm.status() says why")
    if results.get("broken"):
        lines.append(f"THE DEVICE FAILED, and the run ended there: {results['broken']}")
    if results["skipped"]:
        lines.append(f"{results['skipped']} cells not measured: the time given was over")
    wrong = sum(cell["wrong"] for cell in results["cells"])
    if wrong:
        lines.append(f"WRONG RESULTS in {wrong} cells, see the notes")
    ratios = [cell["ratio_torch"] for cell in results["cells"] if cell["ratio_torch"] is not None]
    if ratios:
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{len(ratios)} cells: {len(ratios) - slower} faster than torch, {slower} slower, "
            f"geometric mean {statistics.geometric_mean(ratios):.2f}x, worst {min(ratios):.2f}x"
        )
    return lines


def plain_table(header: list[str], rows: list[Row]) -> str:
    """The table as text, numbers to the right."""
    lines = [header] + [row for row, _ in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if name in TEXT_COLUMNS else text.rjust(width)
            for text, width, name in zip(line, widths, header, strict=True)
        ).rstrip()
        for line in lines
    )


def print_table(title: str, header: list[str], rows: list[Row]) -> None:
    """Prints with rich where it is installed and the output is a terminal, else as plain text."""
    if not (importlib.util.find_spec("rich") and sys.stdout.isatty()):
        print(f"{title}\n{plain_table(header, rows)}\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=True)
    for row, style in rows:
        table.add_row(
            *(
                Text(text, style=style if name == "vs torch" else "")
                for text, name in zip(row, header, strict=True)
            )
        )
    console = Console()
    console.print(table, crop=False)
    console.print()


def show(results: dict[str, Any]) -> None:
    """Prints the cells, other measurements and the summary, the most general last."""
    line = machine_line(results["machine"])
    header, rows = cell_rows(results)
    if rows:
        print_table(line, header, rows)
    else:
        print(f"{line}\n")
    if results["measurements"]:
        print_table("beside the cells", *measurement_rows(results))
    header, rows = summary_rows(results)
    if rows:
        print_table("summary: times faster, geometric means", header, rows)
    print("\n".join(closing_lines(results)))


def save(results: dict[str, Any], folder: str | os.PathLike[str], name: str) -> list[Path]:
    """Writes NAME.json, NAME.txt and, where matplotlib is installed, NAME.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.txt"]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    text = [machine_line(results["machine"])]
    for rows in (cell_rows, measurement_rows, summary_rows):
        header, lines = rows(results)
        text += ["", plain_table(header, lines)] if lines else []
    files[1].write_text("\n".join([*text, "", *closing_lines(results)]) + "\n")
    if importlib.util.find_spec("matplotlib") and any(c["ratio_torch"] for c in results["cells"]):
        files.append(folder / f"{name}.png")
        plot(results, files[-1])
    return files


# --- plot ---------------------------------------------------------------------------------------


def plot(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """A dot per cell, a bar per op and dtype: times faster, and share of the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    cells = [cell for cell in results["cells"] if cell["ratio_torch"]]
    ratios = [cell["ratio_torch"] for cell in cells]
    rows = list(dict.fromkeys((cell["op"], cell["direction"]) for cell in cells))
    dtypes = [dtype for dtype in COLORS if any(cell["dtype"] == dtype for cell in cells)]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(12, 1.9 + 0.42 * len(rows)),
        sharey=True,
        width_ratios=(3, 2),
        layout="constrained",
    )

    def dots(
        axes: Any, values: list[float], middle: Callable[..., float], y: float, color: str
    ) -> None:
        if values:
            axes.scatter(values, [y] * len(values), color=color, s=16, alpha=0.75, linewidths=0)
            axes.plot([middle(values)] * 2, [y - 0.14, y + 0.14], color=color, lw=3)

    for y, row in enumerate(rows):
        for i, dtype in enumerate(dtypes):
            chosen = [c for c in cells if (c["op"], c["direction"], c["dtype"]) == (*row, dtype)]
            large = [c["copy_fraction"] for c in chosen if c["minimal_bytes"] >= 1 << 20]
            level = y + (i - (len(dtypes) - 1) / 2) * 0.66 / len(dtypes)
            speedups = [c["ratio_torch"] for c in chosen]
            dots(left, speedups, statistics.geometric_mean, level, COLORS[dtype])
            dots(right, large, statistics.median, level, COLORS[dtype])

    left.set_xscale("log", base=2)
    left.set_xlim(min(0.8, min(ratios) * 0.9), max(2.2, max(ratios) * 1.15))
    left.axvspan(left.get_xlim()[0], 1, color="#b2182b", alpha=0.08, lw=0)
    left.axvline(1, color="#b2182b", lw=1)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_yticks(range(len(rows)), [f"{op}\n{way}" for op, way in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("times faster than eager torch (bar: geometric mean)")
    mean, slower = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
    title = f"{mean:.2f}x eager torch over {len(cells)} cells, {slower} slower"
    left.set_title(title, loc="left", fontsize=11)
    right.axvline(1, color="black", lw=1)
    right.set_xlim(0, max(1.1, right.get_xlim()[1]))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    right.set_xlabel("minimal bytes per second / copy bandwidth (bar: median)")
    right.set_title("share of the copy bandwidth", loc="left", fontsize=11)
    for axes in (left, right):
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for y in range(1, len(rows)):
            axes.axhline(y - 0.5, color="#eeeeee", lw=0.6, zorder=0)
    handles = [Line2D([], [], marker="o", ls="", color=COLORS[d], label=d) for d in dtypes]
    right.legend(handles=handles, loc="lower right", fontsize=8)
    figure.suptitle(machine_line(results["machine"]), fontsize=7, x=0.01, ha="left", color="#555")
    figure.savefig(path, dpi=150)
    plt.close(figure)
