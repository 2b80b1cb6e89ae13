"""Figures: lines over steps and matrices, each saved as PNG and SVG with its data beside it as .tsv.

Build a Figure with `lines` or `matrix`, then `save` it. Same data, same bytes: pyplot and its global state are not
used. A figure is one panel, small enough for a phone; the report sets them side by side. This module imports
matplotlib, so only import it to plot.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stages.core import tabular

INK = "#20242a"  # text and axes; inside a page it becomes the colour of the page's text, so that dark pages work
COLOURS = {"Base": "#7d838c", "RL": "#d9483b", "RLoop": "#2f74d8"}
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
MAX_DRAWN = 1e100
MAX_WRITTEN = 12  # a matrix with more rows than this shows colours only, and every second or third label


@dataclass(frozen=True)
class Series:
    """One line: `y` over `x`, with its interval if it has one, and a hollow mark at the points named in `hollow`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    hollow: Sequence[bool] = ()
    colour: str = ""


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


def lines(
    name: str,
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "RL steps",
    resets: Iterable[float] = (),
    number: str = "",
    log_scale: bool = False,
    top: float | None = None,
) -> Figure:
    """Lines over steps; `resets` are the steps at which RLoop starts anew, shown as dotted verticals.

    `top` is the largest value of all panels that are read side by side: their scales run from 0 to there.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 3.1))
        axes = canvas.add_axes((0.165, 0.15, 0.805, 0.67))
        for step in resets:
            axes.axvline(step, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        for index, line in enumerate(series):
            _plot(axes, line, line.colour or COLOURS.get(line.label) or MORE_COLOURS[index % len(MORE_COLOURS)])
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_scale else "linear")
        axes.set_title(title, pad=22 if len(series) > 1 else 6)
        if top is not None:
            axes.set_ylim(0, 1.04 * top or 1)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=4, columnspacing=1)
    data = [row for line in series for row in _rows(line, x_label, y_label)]
    return _render(Figure(name, title, caption, data, number, "", b""), canvas)


def _plot(axes: Axes, line: Series, colour: str) -> None:
    few = len(line.x) <= 40
    x, y = _drawable(line.x), _drawable(line.y)
    axes.plot(x, y, color=colour, linewidth=1.6, label=line.label)
    if len(line.low):
        axes.fill_between(x, _drawable(line.low), _drawable(line.high), color=colour, alpha=0.15, linewidth=0)
    if few:
        hollow = np.array(line.hollow if len(line.hollow) else [False] * len(line.x), dtype=bool)
        axes.plot(x[~hollow], y[~hollow], "o", color=colour, markersize=3.5)
        axes.plot(x[hollow], y[hollow], "D", color=colour, markersize=5, markerfacecolor="none")


def _drawable(values: Sequence[float]) -> NDArray[Any]:
    """As floats, with a gap for what is on no scale: matplotlib's ticks overflow near the largest float."""
    found = np.asarray(values, dtype=float)
    return np.where(np.abs(found) < MAX_DRAWN, found, np.nan)


def _rows(line: Series, x_label: str, y_label: str) -> list[dict[str, Any]]:
    rows = []
    for index, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        row = {"series": line.label, x_label: x, y_label: y}
        if len(line.low):
            row |= {"low": line.low[index], "high": line.high[index]}
        if len(line.hollow):
            row |= {"after_rft": int(line.hollow[index])}
        rows.append(row)
    return rows


def matrix(
    name: str,
    title: str,
    caption: str,
    labels: Sequence[str],
    values: NDArray[Any],
    *,
    unit: str = "share of problems",
    above_diagonal: bool = False,
    signed: bool = False,
    bound: float = 1.0,
    number: str = "",
) -> Figure:
    """A matrix of checkpoints by checkpoints (row i, column j) as colours; `signed` centres them on zero.

    `above_diagonal` shows i < j only: the rest of a learning or forgetting matrix repeats the other one. `bound` is
    the value of the last colour.
    """
    shown = _shown(values, above_diagonal)
    limits: dict[str, Any] = {"cmap": "RdBu" if signed else "viridis", "vmin": -bound if signed else 0, "vmax": bound}
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(4.6, 3.9))
        axes = canvas.add_axes((0.15, 0.21, 0.64, 0.72))
        mesh = axes.pcolormesh(shown, **limits)
        canvas.colorbar(mesh, cax=canvas.add_axes((0.82, 0.28, 0.025, 0.56)), ticks=MaxNLocator(5)).set_label(unit)
        _label(axes, labels)
        if len(labels) <= MAX_WRITTEN:
            _write_values(axes, shown, mesh)
        axes.set(title=title, xlabel="step j", ylabel="step i", aspect="equal")
        axes.invert_yaxis()
    data = [
        {"step": label} | dict(zip(labels, row.tolist(), strict=True))
        for label, row in zip(labels, values, strict=True)
    ]
    return _render(Figure(name, title, caption, data, number, "", b""), canvas)


def _shown(values: NDArray[Any], above_diagonal: bool) -> Any:
    return np.ma.masked_array(values, np.tril(np.ones_like(values, dtype=bool)) if above_diagonal else False)


def of_matrices(records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Matrices as analyze writes them: {"name", "set", "run", "number", "definition", "labels", "values"}.

    All of one name share their colours, so that a darker cell is a smaller value in every run.
    """
    bounds: dict[str, float] = {}
    for each in records:
        shown = np.abs(_shown(np.asarray(each["values"], dtype=float), each["name"] != "similarity"))
        bounds[each["name"]] = max(bounds.get(each["name"], 0), float(shown.max()) if shown.count() else 0)
    return [_of_matrix(each, bounds[each["name"]] or 1.0) for each in records]


def _of_matrix(record: Mapping[str, Any], bound: float) -> Figure:
    kind = record["name"]
    title = f"{kind.replace('_', ' ').capitalize()}{', ' + record['run'] if record['run'] else ''}"
    on_set = f" on {record['set']}" if record.get("set") else ""
    return matrix(
        "_".join(file_name(part) for part in (kind, record["run"]) if part),
        title + on_set,
        f"{title}{on_set}: {record['definition']}.",
        record["labels"],
        np.asarray(record["values"], dtype=float),
        unit="Jaccard similarity" if kind == "similarity" else "share of problems",
        above_diagonal=kind != "similarity",
        signed=kind == "differential_forgetting",
        bound=bound,
        number=record["number"],
    )


def file_name(text: str) -> str:
    """`text` as part of a file name: characters that a shell or a file system may not accept become _."""
    return re.sub(r"[^\w.+-]+", "_", text)


def of_similarity(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """Similarity within each checkpoint over steps, a line a run, from analyze's similarity_by_step."""
    series = []
    for run in dict.fromkeys(row["run"] for row in steps):
        rows = [row for row in steps if row["run"] == run]
        columns = {name: [row[name] for row in rows] for name in ("step", "within", "after_rft")}
        series.append(Series(run, columns["step"], columns["within"], hollow=columns["after_rft"]))
    caption = (
        "Mean Jaccard similarity of bigrams between the completions of one checkpoint (each with itself included, "
        "as in the paper's Appendix A); lower is more diverse. Diamonds: fine-tuned start policies."
    )
    title = "Similarity within a checkpoint"
    figure = lines("similarity_by_step", title, caption, series, y_label="Jaccard similarity", number="5b")
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
