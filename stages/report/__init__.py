"""Report: the results table, the figures and one self-contained page from a directory of runs.

Reads what the other stages left under --runs: evaluations, logs, manifests, analyses. What is missing, or was made from
something that has changed since, is left out and named, so that a half-finished run can be viewed. A report replaces an
earlier one, but no other files: written.json among the figures lists those of the last report.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson

from stages.core import lineage, outputs, tabular
from stages.core.errors import InputError
from stages.core.metrics import KS
from stages.core.options import PLACE, WITHOUT_EFFECT, OptionGroup, at_least
from stages.core.outputs import read_json
from stages.core.progress import warn
from stages.core.runs import RL, RLOOP

if TYPE_CHECKING:
    import pandas as pd

    from stages.core.figures import Figure
    from stages.report.study import Study

WRITTEN = "written.json"
SECTIONS = ("over_all", "over_steps", "iterations", "analysis", "training")  # those of figures
MATRIX_KEYS = {"name", "run", "number", "definition", "labels", "values"}


@dataclass(frozen=True, kw_only=True)
class Paths(OptionGroup):
    """What is written beside the page; each defaults to a name next to it."""

    results_md: Annotated[str, "results table as Markdown; default: results.md beside --out", PLACE] = ""
    results_tsv: Annotated[str, "results table with intervals; default: results.tsv beside --out", PLACE] = ""
    results_json: Annotated[str, "results table for `dvc metrics`; default: results.json beside --out", PLACE] = ""
    curves: Annotated[str, "metrics over steps, a tidy table; default: curves.tsv beside --out", PLACE] = ""
    figures: Annotated[str, "directory of figures; default: figures beside --out", PLACE] = ""


@dataclass(frozen=True, kw_only=True)
class Choices(OptionGroup):
    """What is shown."""

    valid: Annotated[str, "problem set that stands first and by which checkpoints are chosen"] = "valid"
    ks: Annotated[list[int], "the k of pass@k (repeatable)", at_least(1)] = field(default_factory=lambda: list(KS))
    max_problems: Annotated[int, "problems of each set in the browser of rollouts", at_least(0)] = 12
    max_samples: Annotated[int, "samples of each problem and policy in the browser of rollouts", at_least(0)] = 4
    seed: Annotated[int, "seed of the bootstrap"] = 0
    iterations: Annotated[str, "the iterations that count, as in '1 2 3'; the rest is left out"] = lineage.ALL


def run(
    paths: Paths,
    choices: Choices,
    runs: Annotated[str, "directory of runs; default: the one that --evals lie in, or else runs", PLACE] = "",
    out: Annotated[str, "page to write; default: report.html in --runs", PLACE] = "",
    evals: Annotated[list[str], "evaluations to use instead of those in RUNS/eval (repeatable)", PLACE] = [],  # noqa: B006
    table: Annotated[bool, "print the results table as Markdown and write nothing", WITHOUT_EFFECT] = False,
    tsv: Annotated[bool, "print the results table with its intervals as TSV and write nothing", WITHOUT_EFFECT] = False,
) -> None:
    """Write the results table, the figures and a page that shows them, from a directory of runs.

    What does not descend from the base and the runs as they are now is left out, and named.

    Example: rloop report --runs loop --out loop/report.html
    """
    from stages.report import summaries  # imports pandas
    from stages.report.study import read

    printing = table or tsv
    study = read(runs, evals, choices.valid, choices.iterations, needed=printing)
    beyond = [f"pass@{k}" for k in choices.ks if k > study.num_samples] if study.evaluations else []
    if beyond:
        study.left_out.append(f"{', '.join(beyond)}: some problems have {study.num_samples} samples only")
    choices = replace(choices, ks=[k for k in choices.ks if k <= study.num_samples])
    if printing:
        summary = summaries.summarise(study.scores(choices.ks), choices.seed)
        rows = summaries.results(summary, summaries.methods(study.places))
        sys.stdout.write(summaries.tsv(rows) if tsv else summaries.markdown(rows))
        _say(study)
        return
    page = Path(out or study.runs / "report.html")
    with outputs.locked(page, paths.figures or page.parent / "figures"):
        _write(page, paths, choices, study)
    _say(study)
    print(f"rloop: wrote {page}", file=sys.stderr)


def _say(study: "Study") -> None:
    for line in [*(f"left out: {line}" for line in study.left_out), *study.unequal()]:
        warn(line)


def _write(page: Path, paths: Paths, choices: Choices, study: "Study") -> None:
    from stages.report import page as pages

    pictures = Path(paths.figures or page.parent / "figures")
    names = {"curves": "curves.tsv"} | {f"results_{end}": f"results.{end}" for end in ("md", "tsv", "json")}
    files = {name: Path(getattr(paths, name) or page.parent / usual) for name, usual in names.items()}
    _refuse_strangers(pictures, [page, *files.values()])
    content, texts = _content(study, choices)
    figures = [figure for section in SECTIONS for figure in content[section]]
    _write_figures(pictures, figures, [page, *files.values()])
    with outputs.whole_file(files["curves"]) as beside:
        tabular.write_tsv(beside, content.pop("curves"))
    for name, text in texts.items():
        _write_text(files[name], text)
    _write_text(page, pages.render(name=str(study.runs), unequal=study.unequal(), left_out=study.left_out, **content))


def _content(study: "Study", choices: Choices) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page shows, and the texts of the files beside it."""
    from stages.report import browser, curves, summaries

    scores, logs = study.scores(choices.ks), study.logs()
    summary, chosen = summaries.summarise(scores, choices.seed), summaries.methods(study.places)
    rows = summaries.results(summary, chosen)
    compared = summaries.differences(scores, chosen, seed=choices.seed)
    tidy = curves.tidy(summary, study.places)
    on_sets = tidy[tidy["set"] != summaries.AVERAGE]
    wanted = [f"avg@{study.num_samples}", *(f"pass@{k}" for k in choices.ks[-1:])]
    resets = sorted({place.step for place in study.places if place.fine_tuned})
    order = wanted[::-1]
    labels = {place.policy: place.label for place in study.places}
    best = curves.best_on(on_sets, choices.valid, order)
    selected = summaries.results(summary, {f"{method}, step {labels[p]}": p for method, p in best.items()})
    over_steps = curves.of_evaluations(on_sets, resets, wanted)
    content: dict[str, Any] = {
        "headline": summaries.headline(rows, compared, order),
        "whole": summaries.nested(summaries.overall(rows)),
        "over_all": curves.of_evaluations(tidy[tidy["set"] == summaries.AVERAGE], resets, order),
        "results": summaries.nested(rows),
        "selected": summaries.nested(selected),
        "valid": choices.valid,
        "order": order,
        "differences": summaries.nested(compared.assign(pair=compared["second"] + " − " + compared["first"]), "pair"),
        "over_steps": over_steps,
        "curves": on_sets.to_dict("records"),
        "iterations": curves.of_iterations(on_sets),
        "analysis": _analysis(study),
        "training": curves.overfitting(on_sets, logs, choices.valid, wanted) + curves.of_logs(logs, resets),
        "costs": summaries.costs(logs).to_dict("records"),
        "rollouts": browser.build(study.evaluations, study.places, choices.max_problems, choices.max_samples),
        "settings": summaries.settings(study.settings()),
    }
    study.left_out += _missing(study, choices, content, logs.empty, summaries.incomparable(scores, chosen))
    return content, _texts(study, rows)


def _texts(study: "Study", rows: "pd.DataFrame") -> dict[str, str]:
    from stages.report import summaries

    notes = [*(f"Left out: {line}." for line in study.left_out), *study.unequal()]
    table = summaries.markdown(rows) if len(rows) else "No results.\n"
    return {
        "results_md": table + "".join(f"\n{note}\n" for note in notes),
        "results_tsv": summaries.tsv(rows),
        "results_json": orjson.dumps(
            summaries.for_dvc(rows), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        ).decode(),
    }


def _missing(
    study: "Study", choices: Choices, content: Mapping[str, Any], no_logs: bool, incomparable: list[str]
) -> list[str]:
    """A line for each part of the page that is empty, with the reason."""
    methods = {place.method for place in study.places}
    missing = {
        "metrics over steps: no run has two evaluated checkpoints": study.evaluations and not content["over_steps"],
        f"training curves: no log.tsv under {study.runs}": no_logs,
        f"learning, forgetting and similarity: nothing of analyze under {study.runs / 'analysis'}": not content[
            "analysis"
        ],
        "RLoop against RL: not both were evaluated": study.evaluations and not {RL, RLOOP} <= methods,
        f"compute: no log.tsv under {study.runs}": not content["costs"],
        "rollouts: the evaluations hold no rollouts.jsonl": study.evaluations
        and choices.max_problems
        and choices.max_samples
        and not content["rollouts"],
    }
    return [line for line, is_so in missing.items() if is_so] + incomparable


def _analysis(study: "Study") -> list["Figure"]:
    """The figures of analyze's outputs below RUNS/analysis; those of a nested output have its path in their names."""
    from stages.core import figures

    root = study.runs / "analysis"
    plotted: list[Figure] = []
    for directory in dict.fromkeys(path.parent for path in sorted(root.rglob("*.json"))):
        contents = {path.name: read_json(path) for path in sorted(directory.glob("*.json"))}
        stale = dict.fromkeys(why for content in contents.values() if (why := study.stale(directory, content)))
        study.left_out += [why for why in stale if why not in study.left_out]
        kept = {name: content for name, content in contents.items() if not study.stale(directory, content)}
        steps = kept.get("similarity_by_step.json", {}).get("steps")
        of_directory = [figures.of_similarity(steps)] if isinstance(steps, list) else []
        of_directory += figures.of_matrices([each for each in kept.values() if each.keys() >= MATRIX_KEYS])
        prefix = "".join(f"{figures.file_name(part)}_" for part in directory.relative_to(root).parts)
        plotted += [replace(figure, name=prefix + figure.name) for figure in of_directory]
    return sorted(plotted, key=lambda figure: figure.number)


def _refuse_strangers(pictures: Path, files: Sequence[Path]) -> None:
    """Raise InputError if a file that no report wrote would be replaced."""
    written = read_json(pictures / WRITTEN)
    own = {(pictures / name).resolve() for name in written.get("files", [])}
    for path in files:
        outputs.refuse_no_file(path)
        if path.exists() and path.resolve() not in own:
            raise InputError(f"{path} is there, and no report wrote it: name another, or remove it first")
    if pictures.is_dir():
        names = {WRITTEN, f".{files[0].name}.lock", *written.get("figures", [])}
        if strangers := sorted(path.name for path in pictures.iterdir() if path.name not in names):
            raise InputError(f"{pictures} holds {strangers[0]}, which no report wrote: name another --figures")


def _write_figures(directory: Path, plotted: Sequence["Figure"], files: Sequence[Path]) -> None:
    """Replace the directory of figures as a whole; `files` are those that are written beside it."""
    from stages.core import figures

    before = read_json(directory / WRITTEN).get("files", [])
    with outputs.whole_dir(directory, replacing=True) as beside:
        for figure in plotted:
            figures.save(figure, beside)
        names = sorted(path.name for path in beside.iterdir())
        relative = sorted({*before, *(os.path.relpath(path, directory) for path in files)})
        outputs.write_json(beside / WRITTEN, {"stage": "report", "files": relative, "figures": names})


def _write_text(path: str | Path, text: str) -> None:
    with outputs.whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
