"""What the benchmarks put out: a table, a JSON file, a plot. Needs nothing but Python; the plot needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdpd.utils.files import atomic_write_json, atomic_writer

Row = dict[str, Any]
DASH = "—"
BUSY = 0.1  # share of the CPU that other processes may take


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1.0:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first ones to the left, those of numbers to the right."""
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]

    def left(i: int) -> bool:
        return all(not row[i][:1].isdigit() and row[i] != DASH for row in rows) or i == 0

    aligned = [left(i) for i in range(len(headers))]
    lines = [
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(line, widths, aligned, strict=True)
        )
        for line in (headers, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def row_cells(row: Row, case_names: Sequence[str]) -> list[str]:
    """A row of the table: the case, the backend, times, ratios, share. What could not be measured is a dash."""
    case = [str(row["case"].get(name, DASH)) for name in case_names]
    seconds = row["seconds"]
    if seconds is None:
        return [*case, row["backend"], *[DASH] * 7]
    spread = f"{format_seconds(seconds['p20'])} – {format_seconds(seconds['p80'])}"
    against = [_ratio(row["against"].get(name)) for name in ("eager", "compile")]
    speed = DASH if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e9:.0f}"
    share = DASH if row["share"] is None else f"{row['share'] * 100:.0f} %"
    times = [format_seconds(seconds["median"]), spread, format_seconds(seconds["p99"])]
    return [*case, row["backend"], *times, *against, speed, share]


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def print_report(report: Mapping[str, Any]) -> None:
    """The table, then why anything is missing from it."""
    rows: list[Row] = report["rows"]
    case_names = list(dict.fromkeys(name for row in rows for name in row["case"]))
    headers = [*case_names, "backend", "median", "p20 – p80", "p99", "× eager", "× compile", "GFLOP/s", "of limit"]
    print(format_table(headers, [row_cells(row, case_names) for row in rows]) if rows else "nothing was measured")
    for precision, limit in report["limits"].items():
        if limit["flops_per_second"]:
            print(f"limit, {precision}: {limit['flops_per_second'] / 1e9:.0f} GFLOP/s ({limit['how']})")
        else:
            print(f"limit, {precision}: {DASH} ({limit['how']})")
    others = max((row["others"] for row in rows if row["others"] is not None), default=0.0)
    if others > BUSY:
        print(f"DON'T TRUST THESE FIGURES: other processes took up to {others * 100:.0f} % of the CPU meanwhile")
    compiled = [row["compile_seconds"] for row in rows if row["compile_seconds"] is not None]
    if compiled:
        print(f"torch.compile took {sum(compiled):.0f} s for {len(compiled)} cases, not counted above")
    for text in dict.fromkeys(_why(row) for row in rows if row["reason"] or row["note"]):
        print(text)
    for left in report["left_out"]:
        print(f"not started, the time was up: {left}")


def _why(row: Row) -> str:
    if row["reason"]:
        return f"{'FAILED' if row['failed'] else DASH} {row['backend']}: {row['reason']}"
    return f"note, {row['backend']}: {row['note']}"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The JSON file, whole or not at all."""
    atomic_write_json(path, report)


def plot_report(path: Path, report: Mapping[str, Any]) -> None:
    """Time against B, both logarithmic: a line a backend, the limit drawn through; one field each case of several B.

    Raises:
        RuntimeError: matplotlib is not here.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"a plot needs matplotlib: {error}") from None
    fields: dict[tuple[str, ...], list[Row]] = {}
    for row in report["rows"]:
        fields.setdefault(tuple(f"{k} {v}" for k, v in row["case"].items() if k != "B"), []).append(row)
    # A field of one B has no line to draw; the table has its figures.
    fields = {title: rows for title, rows in fields.items() if len({row["case"]["B"] for row in rows}) > 1} or fields
    columns = min(3, max(1, len(fields)))
    lines = -(-max(1, len(fields)) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, rows) in zip(grid, fields.items(), strict=False):
        _plot_field(axes, ", ".join(title), rows, report)
    for axes in grid[len(fields) :]:
        axes.set_visible(False)
    with atomic_writer(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _plot_field(axes: Any, title: str, rows: Sequence[Row], report: Mapping[str, Any]) -> None:
    for backend in dict.fromkeys(row["backend"] for row in rows):
        points = sorted(
            (row["case"]["B"], row["seconds"]) for row in rows if row["backend"] == backend and row["seconds"]
        )
        if points:
            batches = [batch for batch, _ in points]
            (line,) = axes.plot(batches, [s["median"] for _, s in points], marker="o", markersize=3, label=backend)
            low, high = ([s[name] for _, s in points] for name in ("p20", "p80"))
            axes.fill_between(batches, low, high, color=line.get_color(), alpha=0.2)
    limit = report["limits"].get(rows[0]["case"].get("precision", "fp32"), {}).get("flops_per_second")
    needed = sorted({(row["case"]["B"], row["flops"]) for row in rows if row["flops"]})
    if limit and needed:
        axes.plot([b for b, _ in needed], [f / limit for _, f in needed], "k--", marker="_", linewidth=1, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="B, states a call", ylabel="seconds a call", title=title)
    axes.grid(True, which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
