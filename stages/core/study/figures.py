"""Figures: lines over steps and matrices, each saved as PNG and SVG with its data beside it as .tsv.

Build a Figure with `lines` or `of_matrices`, then `save` it. Same data, same bytes: pyplot and its global state are not
used. A figure is one panel, small enough for a phone; the report sets them side by side. This module imports
matplotlib and pandas, so only import it to plot.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stages.core import tabular
from stages.core.records import Curve, Matrix, Similarity
from stages.core.study.runs import drawn_at

INK = "#20242a"  # text and axes; inside a page it becomes the colour of the page's text, so that dark pages work
COLOURS = {"Base": "#7d838c", "RL": "#d9483b", "RLoop": "#2f74d8", "training pass rate": "#7d838c"}
MORE_COLOURS = ("#e08a1e", "#2a9d76", "#8f5fc6", "#b0578d", "#4b9fbf", "#8a7a3d")
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # keep a $ in the name of a set or a run as it is
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MARKS = {"": ("o", 5.5), "last RL endpoint": ("s", 5.0), "chosen": ("*", 10.0)}  # by what stands for a method
OWN_SCALE = ("similarity", "differential_forgetting")  # the other matrices are shares of problems
MAX_DRAWN = 1e100
MAX_NAME = 24
MAX_MARKED = 40  # a line with more points than this has no marks
MAX_WRITTEN = 12  # a matrix with more rows than this shows colours only, and every second or third label


@dataclass(frozen=True)
class Figure:
    """A plotted figure: `name` is its file name, `number` the figure of the paper that it reproduces ("" for none)."""

    name: str
    title: str
    caption: str
    data: Sequence[Mapping[str, Any]] = field(repr=False)
    number: str
    svg: str = field(repr=False)
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Panel:
    """The axes of lines. `resets` are the steps at which RLoop starts anew, shown as dotted verticals.

    `top` is the largest value of all panels that are read side by side: they run from 0 to there.
    """

    y_label: str
    x_label: str = "RL steps"
    resets: Iterable[float] = ()
    number: str = ""
    log_scale: bool = False
    top: float | None = None


def lines(name: str, title: str, caption: str, table: pd.DataFrame, style: Panel) -> Figure:
    """A line for each `series` of a table with the columns series, x, y, and low, high, after_rft if they are known.

    low and high are an interval; points after RFT are hollow.
    """
    series = [(str(label), rows) for label, rows in table.groupby("series", sort=False)]
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 3.1))
        axes = canvas.add_axes((0.165, 0.15, 0.805, 0.67))
        for step in style.resets:
            axes.axvline(step, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        for index, (label, rows) in enumerate(series):
            _plot(axes, label, rows, COLOURS.get(label) or MORE_COLOURS[index % len(MORE_COLOURS)])
        axes.set(xlabel=style.x_label, ylabel=style.y_label, yscale="log" if style.log_scale else "linear")
        axes.set_title(title, pad=22 if len(series) > 1 else 6)
        if style.top is not None:
            axes.set_ylim(0, 1.04 * style.top or 1)
        elif not style.log_scale and not (table["y"] < 0).any():
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # the margin shows no share or length below zero
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(
                loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=4, fontsize=8, columnspacing=1, handlelength=1.2
            )
    named = table.rename(columns={"x": style.x_label, "y": style.y_label})
    data = [row for label in named["series"].unique() for row in named[named["series"] == label].to_dict("records")]
    return _render(Figure(name, title, caption, data, style.number, "", b""), canvas)


def _plot(axes: Axes, label: str, rows: pd.DataFrame, colour: str) -> None:
    x, y = _drawable(rows["x"]), _drawable(rows["y"])
    axes.plot(x, y, color=colour, linewidth=1.6, label=_short(label))
    if "low" in rows and rows["low"].notna().any():
        axes.fill_between(x, _drawable(rows["low"]), _drawable(rows["high"]), color=colour, alpha=0.15, linewidth=0)
    if len(rows) <= MAX_MARKED:
        hollow = rows["after_rft"].to_numpy(dtype=bool) if "after_rft" in rows else np.zeros(len(rows), dtype=bool)
        axes.plot(x[~hollow], y[~hollow], "o", color=colour, markersize=3.5)
        axes.plot(x[hollow], y[hollow], "D", color=colour, markersize=5, markerfacecolor="none")


def points(name: str, title: str, caption: str, table: pd.DataFrame, labels: tuple[str, str]) -> Figure:
    """A mark for each row of a table with the columns series, x, y, ahead, and an interval of each if known.

    x_low, x_high, y_low and y_high are the intervals; a line joins those `ahead`; `labels` names the axes.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 3.7))
        axes = canvas.add_axes((0.13, 0.13, 0.84, 0.66))
        first = table[table["ahead"]].sort_values("x")
        axes.plot(first["x"], first["y"], color=INK, alpha=0.5, linewidth=0.9, linestyle="--")
        turns, drawn = iter(MORE_COLOURS * len(table)), []
        for row in table.to_dict("records"):
            method, _, kind = row["series"].partition(", ")
            colour = COLOURS.get(method) or next(turns)
            for ends in ({"x": ("x_low", "x_high"), "y": ("y", "y")}, {"x": ("x", "x"), "y": ("y_low", "y_high")}):
                axes.plot(*([row[end] for end in ends[axis]] for axis in "xy"), color=colour, alpha=0.3, linewidth=1)
            mark, size = MARKS.get(kind, MARKS[""])
            drawn.append((row["x"], row["y"]))
            size *= 0.55 ** (drawn.count(drawn[-1]) - 1)  # that of an equal one shows around it
            axes.plot(row["x"], row["y"], mark, color=colour, markersize=size, label=_short(row["series"]))
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title, pad=34)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=3, fontsize=7.5, columnspacing=1)
        axes.margins(0.12)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    named = table.rename(
        columns={
            axis + end: label + end for axis, label in zip("xy", labels, strict=True) for end in ("", "_low", "_high")
        }
    )
    return _render(Figure(name, title, caption, named.to_dict("records"), "", "", b""), canvas)


def _short(name: str) -> str:
    """A name as a legend has room for it."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _drawable(values: "pd.Series[Any]") -> NDArray[Any]:
    """As floats, with a gap for what is on no scale: matplotlib's ticks overflow near the largest float."""
    floats = values.to_numpy(dtype=float)
    return np.where(np.abs(floats) < MAX_DRAWN, floats, np.nan)


def of_analysis(records: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The figures of what analyze writes: matrices, curves and similarity by step; other records have none."""
    records = list(records)
    matrices: Any = [record for record in records if record.keys() >= Matrix.__required_keys__]
    curves: Any = [record for record in records if record.keys() >= Curve.__required_keys__]
    similar = [record for record in records if isinstance(record.get("steps"), list)]  # no run of this name
    of_steps = [of_similarity(record["steps"], record.get("temperature", "")) for record in similar]
    return of_matrices(matrices) + list(map(of_curve, curves)) + of_steps


def of_curve(record: Curve) -> Figure:
    """Lines of shares."""
    title = f"{record['name'].replace('_', ' ').capitalize()} on {record['set']}"
    panel = Panel("share", x_label=record["x_label"], top=1)
    caption = f"{title}: {record['definition']}{drawn_at(record.get('temperature', ''))}."
    return lines(file_name(record["name"]), title, caption, pd.DataFrame(record["rows"]), panel)


def of_matrices(records: Sequence[Matrix]) -> list[Figure]:
    """Matrices as colours.

    Those of one unit share their colours, so that a darker cell is a smaller value in every run. What is learnt or
    forgotten is shown above the diagonal only: the rest repeats the other one.
    """
    shown = [_shown(record) for record in records]
    largest = pd.Series([float(np.ma.filled(np.abs(values), 0).max()) for values in shown])
    scales = [record["name"] if record["name"] in OWN_SCALE else "" for record in records]
    bounds = largest.groupby(scales).transform("max").replace(0, 1)
    return list(map(_matrix, records, shown, bounds))


def _shown(record: Matrix) -> Any:
    values = np.asarray(record["values"], dtype=float)
    hidden = np.tril(np.ones_like(values, dtype=bool), -1 if record["name"] == "forgetting_of_halves" else 0)
    return np.ma.masked_array(values, hidden & (record["name"] != "similarity"))


def _matrix(record: Matrix, shown: Any, bound: float) -> Figure:
    """A matrix of checkpoints by checkpoints (row i, column j) as colours up to `bound`, around zero if signed."""
    kind, labels, is_signed = record["name"], record["labels"], record["name"] == "differential_forgetting"
    limits: dict[str, Any] = {"cmap": "RdBu" if is_signed else "viridis", "vmin": -bound if is_signed else 0}
    unit = "Jaccard similarity" if kind == "similarity" else "share of problems"
    title = f"{kind.replace('_', ' ').capitalize()}{', ' + record['run'] if record['run'] else ''}"
    title += f" on {record['set']}"
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 3.9))
        axes = canvas.add_axes((0.15, 0.21, 0.64, 0.72))
        mesh = axes.pcolormesh(shown, vmax=bound, **limits)
        canvas.colorbar(mesh, cax=canvas.add_axes((0.82, 0.28, 0.025, 0.56)), ticks=MaxNLocator(5)).set_label(unit)
        _label(axes, labels)
        if len(labels) <= MAX_WRITTEN:
            _write_values(axes, shown, mesh)
        axes.set(title=title, xlabel="step j", ylabel="step i", aspect="equal")
        axes.invert_yaxis()
    name = "_".join(file_name(part) for part in (kind, record["run"]) if part)
    rows = zip(labels, shown.data.tolist(), strict=True)
    data = [{"step": label} | dict(zip(labels, row, strict=True)) for label, row in rows]
    caption = f"{title}: {record['definition']}{drawn_at(record.get('temperature', ''))}."
    return _render(Figure(name, title, caption, data, record["number"], "", b""), canvas)


def file_name(text: str) -> str:
    """`text` as part of a file name: characters that a shell or a file system may not accept become _."""
    return re.sub(r"[^\w.+-]+", "_", text)


def of_similarity(steps: Sequence[Similarity], temperature: str = "") -> Figure:
    """Similarity within each checkpoint over steps, a line a run, from analyze's similarity_by_step."""
    table = pd.DataFrame(steps).rename(columns={"run": "series", "step": "x", "within": "y"})
    caption = (
        "Mean Jaccard similarity of bigrams between the completions of one checkpoint (each with itself included, "
        f"as in the paper's Appendix A{drawn_at(temperature)}); lower is more diverse. Diamonds: fine-tuned start "
        "policies."
    )
    title = "Similarity within a checkpoint"
    figure = lines("similarity_by_step", title, caption, table, Panel("Jaccard similarity", number="5b"))
    return replace(figure, data=steps)


def _label(axes: Axes, labels: Sequence[str]) -> None:
    every = 1 + (len(labels) - 1) // 16
    ticks = [index + 0.5 for index in range(0, len(labels), every)]
    axes.set_xticks(ticks, labels[::every], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(ticks, labels[::every], fontsize=8)


def _write_values(axes: Axes, shown: Any, mesh: Any) -> None:
    for (row, column), value in np.ndenumerate(shown):
        if np.ma.is_masked(shown[row, column]):
            continue
        red, green, blue, _ = mesh.cmap(mesh.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        colour = "#ffffff" if dark else "#101010"
        text = f"{value:.2f}".replace("0.", ".", 1)
        size = min(10, 90 / len(shown))
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _render(figure: Figure, canvas: Canvas) -> Figure:
    """The figure with its pictures: a PNG on white, and an SVG whose ids are its own, so that a page can hold many."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": figure.name}):
        canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return replace(figure, png=png.getvalue(), svg=svg.getvalue())


def save(figure: Figure, directory: Path) -> None:
    """Write `name`.png, `name`.svg and `name`.tsv into `directory`."""
    (directory / f"{figure.name}.png").write_bytes(figure.png)
    (directory / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    tabular.write_tsv(directory / f"{figure.name}.tsv", figure.data)
