"""Report: the results table, the figures and one self-contained page from a directory of runs.

Reads what the other stages left under --runs: evaluations, logs, manifests, analyses. What is missing, or was made from
something that has changed since, is left out and named, so that a half-finished run can be viewed. A report replaces an
earlier one, but no other files: written.json among the figures lists those of the last report. metrics/ has the average
over the sets, a file a method, so that `dvc metrics show` is a table of these; results.json has all sets.
"""

import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson

from stages.core import outputs
from stages.core.errors import InputError
from stages.core.options import PATH, WITHOUT_EFFECT, OptionGroup, at_least
from stages.core.outputs import read_json
from stages.core.progress import warn
from stages.core.provenance import read_manifest
from stages.core.study import lineage

if TYPE_CHECKING:
    import pandas as pd

    from stages.core.study.figures import Figure
    from stages.report.study import Study
    from stages.report.summaries import Summary

MEANS = {"learning": "learned", "similarity": "alike", "forgetting": "forgotten"}
MEANS |= {"forgetting_of_halves": "forgotten, half of the samples"}
PAIRS_OF_CHECKPOINTS = {
    "": "all pairs",
    "_at_common_steps": "pairs at steps that both have",
    "_within_iterations": "pairs within an iteration",
    "_across_iterations": "pairs across a reset",
}
FIGURES, METRICS, WRITTEN = "figures", "metrics", "written.json"
BESIDE = ("results.md", "results.tsv", "results.json", "curves.tsv")  # the page
INDENTED = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `rloop report` takes."""

    runs: Annotated[
        list[Path],
        "directory of runs; default: the one that --evals lie in, or else runs; several, such as those of five seeds, "
        "give means over them",
        PATH,
    ] = field(default_factory=list)
    out: Annotated[
        Path | None,
        "page to write, with results.*, curves.tsv, metrics and figures beside it; default: report.html in --runs",
        PATH,
    ] = None
    evals: Annotated[list[Path], "evaluations to use instead of those in RUNS/eval; repeatable", PATH] = field(
        default_factory=list
    )
    table: Annotated[bool, "print the results table as Markdown and write nothing", WITHOUT_EFFECT] = False
    tsv: Annotated[bool, "print the results table with its intervals as TSV and write nothing", WITHOUT_EFFECT] = False
    valid: Annotated[str, "problem set that stands first and by which checkpoints are chosen"] = "valid"
    ks: Annotated[list[int], "the k of pass@k; repeatable; default: those of the evaluations", at_least(1)] = field(
        default_factory=list
    )
    max_problems: Annotated[int, "problems of each set in the browser of rollouts", at_least(0)] = 12
    max_samples: Annotated[int, "samples of each problem and policy in the browser of rollouts", at_least(0)] = 4
    seed: Annotated[int, "seed of the bootstrap"] = 0
    iterations: Annotated[str, "use only these iterations, as in '1 2 3'"] = lineage.ALL
    watch: Annotated[
        int,
        "write the page again every N seconds until Ctrl-C, and have it reload; 0 writes it once",
        at_least(0),
        WITHOUT_EFFECT,
    ] = 0

    def __post_init__(self) -> None:
        """Raise InputError for options that do not go with several directories of runs."""
        super().__post_init__()
        if len(self.runs) > 1 and self.evals:
            raise InputError("--evals: leave it out with several --runs; the evaluations are those in each")
        if len(self.runs) > 1 and not (self.out or self.table or self.tsv):
            raise InputError("--out: name the page to write about several --runs")
        if twice := next((path for path in self.runs if self.runs.count(path) > 1), None):
            raise InputError(f"--runs {twice}: named twice")


def run(options: Options) -> None:
    """Write the results table, the figures and a page that shows them, from a directory of runs.

    What does not descend from the base and the runs as they are now is left out, and named.

    With several --runs: means over them with intervals, from three on, differences within each, and what methods cost.

    Example: rloop report --runs loop --out loop/report.html
    """
    while True:
        _report(options)
        if not options.watch:
            return
        time.sleep(options.watch)


def _report(options: Options) -> None:
    from stages.report.study import read  # imports pandas

    is_printed = options.table or options.tsv
    directories: list[Path | None] = [*options.runs] or [None]
    needed = is_printed or len(directories) > 1
    studies = [read(runs, options.evals, options.valid, options.iterations, needed) for runs in directories]
    num_samples = min(study.num_samples for study in studies)
    wanted = options.ks or sorted({k for study in studies for k in study.ks})
    if beyond := [f"pass@{k}" for k in wanted if k > num_samples > 0]:
        fewest = min(studies, key=lambda study: study.num_samples)
        fewest.left_out.append(f"{', '.join(beyond)}: some problems have {num_samples} samples only")
    options = replace(options, ks=[k for k in wanted if k <= num_samples])
    page = options.out or studies[0].runs / "report.html"
    if is_printed:
        if sys.stdout is None:
            raise InputError("standard output is closed: --table and --tsv print to it")
        sys.stdout.write(_printed(studies, options))
    else:
        with outputs.locked(page, page.parent / FIGURES, page.parent / METRICS):
            _write(page, studies, options)
    for study in studies:
        under_way = [f"under way: {line}" for line in study.under_way()]
        for line in [*under_way, *(f"left out: {line}" for line in study.left_out), *study.unequal()]:
            warn(f"{study.runs}: {line}" if len(studies) > 1 else line)
    if not is_printed:
        print(f"rloop: wrote {page}", file=sys.stderr)


def _together(studies: Sequence["Study"], options: Options) -> tuple[dict[str, Any], dict[str, str], list["Figure"]]:
    """What several directories say together, and what they differ in."""
    from stages.report import seeds

    read = seeds.read(studies, options.ks, options.seed)
    for line in [*read.unequal, *read.left_out]:
        if not any(line.startswith(f"{study.runs}: ") for study in studies):  # those are said with their run
            warn(line)
    return seeds.content(read, options.ks, studies[0].num_samples, studies[0].resets)


def _printed(studies: Sequence["Study"], options: Options) -> str:
    from stages.report import summaries

    if len(studies) > 1:
        _, texts, _ = _together(studies, options)
        return texts["results.tsv" if options.tsv else "results.md"]
    summary = summaries.sum_up(studies[0], options.ks, options.seed)
    studies[0].left_out += summaries.unlike(summary.scores, summary.chosen)
    return summaries.tsv(summary.rows) if options.tsv else summaries.markdown(summary.rows, studies[0].valid)


def _write(page: Path, studies: Sequence["Study"], options: Options) -> None:
    from stages.core.study import figures
    from stages.report.page import render

    pictures = page.parent / FIGURES
    before = _refuse_strangers(pictures, [page, *(page.parent / name for name in BESIDE)])
    small: dict[str, Any] = {}
    if len(studies) > 1:
        content, texts, plotted = _together(studies, options)
    else:
        content, texts, small, plotted = _content(studies[0], options)
    texts[page.name] = render(content)
    by_file = {f"{figures.file_name(method)}.json": metrics for method, metrics in small.items()}
    with outputs.whole_dir(pictures, replacing=True) as beside:
        for figure in plotted:
            figures.save(figure, beside)
        names = sorted(path.name for path in beside.iterdir())
        files = sorted({*before, *(f"../{name}" for name in (*texts, *(f"{METRICS}/{file}" for file in by_file)))})
        outputs.write_json(beside / WRITTEN, {"stage": "report", "files": files, "figures": names})
    with outputs.whole_dir(page.parent / METRICS, replacing=True) as beside:
        for file, metrics in by_file.items():
            outputs.write_json(beside / file, metrics)
    for name, text in texts.items():
        with outputs.whole_file(page.parent / name) as beside:
            beside.write_text(text, encoding="utf-8")


def _refuse_strangers(pictures: Path, files: Collection[Path]) -> list[str]:
    """The files that reports wrote before; InputError if one that no report wrote would be replaced."""
    written = read_json(pictures / WRITTEN)
    own = {(pictures / name).resolve() for name in written.get("files", [])}
    for path in files:
        outputs.refuse_no_file(path)
        if path.exists() and path.resolve() not in own:
            raise InputError(f"{path} is there, and no report wrote it: name another --out, or remove it first")
    own |= {(pictures / name).resolve() for name in (WRITTEN, *written.get("figures", []))}
    for directory in (pictures, pictures.with_name(METRICS)):
        there = sorted(directory.iterdir()) if directory.is_dir() else []
        if stranger := next((path.name for path in there if path.resolve() not in own), ""):
            raise InputError(f"{directory} holds {stranger}, which no report wrote: name another --out")
    return list(written.get("files", []))


def _content(study: "Study", options: Options) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], list["Figure"]]:
    """What the page shows, the texts of the files beside it, each method's metrics for DVC, and all figures."""
    from stages.core.study import runs
    from stages.report import browser, curves, summaries
    from stages.report.study import listed

    summary, logs = summaries.sum_up(study, options.ks, options.seed), study.logs()
    rows, apart = summary.rows, summaries.differences(summary.scores, study.averages, summary.chosen, seed=options.seed)
    tidy = curves.tidy(summary.table, study.positions, study.temperatures)
    on_sets = tidy[~tidy["set"].isin([*study.averages])]
    order = [*(f"pass@{k}" for k in options.ks[-1:]), f"avg@{study.num_samples}"]
    of_pairs = apart.rename(columns={"policy": "method"})
    of_methods = of_pairs[~of_pairs["method"].str.endswith(f" − {runs.BASE}") & of_pairs["metric"].isin(order)]
    percent = summaries.compared(rows).assign(**{part: 100 * rows[part] for part in ("value", "low", "high")})
    first = [
        *curves.of_evaluations(tidy[tidy["set"].isin([*study.averages][:1])], study.resets, order),
        *(curves.frontier(percent, (order[-1], order[0]), "problems") if len(order) > 1 else ()),
    ]
    figures = _figures(study, options, on_sets, order, logs)
    pages = browser.build(study.evaluations, study.positions, summary.chosen, options.max_problems, options.max_samples)
    sections = {
        "Gains and losses": browser.gains(study.evaluations, summary.chosen),
        "Rollouts": pages,
        "Results": summaries.nested(rows),
        "Which differences are real": summaries.nested(of_pairs),
        **figures,
        "Forgetting in numbers": _means(study),
        "Compute": summaries.costs(logs).to_dict("records"),
        "Parameters": summaries.settings(study.settings()),
        "Not like for like": study.unequal(),
    }
    study.left_out += [*_missing(study, options, sections), *summaries.unlike(summary.scores, summary.chosen)]
    content = {
        "name": str(study.runs),
        "under_way": study.under_way(),
        "watch": options.watch,
        "temperatures": listed(study.temperatures.values()),
        "headline": summaries.headline(rows, apart, order) + summaries.decline(summary, study.valid),
        "whole": summaries.nested(summaries.averaged(rows[rows["metric"].isin(order)])),
        "apart": summaries.nested(summaries.compared(of_methods)) if len(of_methods) else {},
        "glance": (),
        "note": "",
        "first": first,
        "valid": study.valid,
        "peaks": summary.peaks,
        "select": summary.metric,
        "sections": sections | {"Left out": study.left_out},
    }
    texts = {
        "results.md": _results(study, summary),
        "results.tsv": summaries.tsv(rows),
        "results.json": orjson.dumps(summaries.for_dvc(rows), option=INDENTED).decode(),
        "curves.tsv": on_sets.to_csv(sep="\t", index=False, float_format="%.6g"),
    }
    small = {m: sets[name] for m, sets in summaries.for_dvc(summaries.overall(rows)).items() for name in sets}
    return content, texts, small, [*first, *chain(*figures.values())]


def _figures(
    study: "Study", options: Options, on_sets: "pd.DataFrame", order: list[str], logs: "pd.DataFrame"
) -> dict[str, list["Figure"]]:
    """The figures of each section."""
    from stages.report import curves

    return {
        "RLoop against RL over steps": [*curves.of_evaluations(on_sets, study.resets, order[::-1])],
        "Over iterations": [*curves.of_iterations(on_sets)],
        "Learning, forgetting and similarity": [*_analysis(study), *curves.of_divergence(on_sets, study.resets)],
        "Training": [*curves.overfitting(on_sets, logs, study.valid, order), *curves.of_logs(logs, study.resets)],
    }


def _results(study: "Study", summary: "Summary") -> str:
    """results.md: the table, where each method was best, what was left out and what is unequal."""
    from stages.report import summaries

    notes = [*(f"Left out: {line}.\n" for line in study.left_out), *(f"{line}\n" for line in study.unequal())]
    peaks = [summaries.markdown_of_peaks(summary, study.valid)] if summary.peaks else []
    table = summaries.markdown(summary.rows, study.valid) if len(summary.rows) else "No results.\n"
    return "\n".join([table, *peaks, *notes])


def _missing(study: "Study", options: Options, sections: Mapping[str, Any]) -> list[str]:
    """A line for each section that is empty, with the reason."""
    no_log = f"no log.tsv under {study.runs}"
    reasons = {"Learning, forgetting and similarity": f"nothing of analyze under {study.runs / 'analysis'}"}
    reasons |= {"Training": no_log, "Compute": no_log}
    if study.evaluations:
        reasons |= {"RLoop against RL over steps": "no run has two evaluated checkpoints"}
    if study.evaluations and options.max_problems and options.max_samples:
        reasons |= {"Rollouts": "the evaluations hold no rollouts.jsonl"}
    return [f"{title}: {reason}" for title, reason in reasons.items() if not sections[title]]


def _means(study: "Study") -> list[dict[str, Any]]:
    """What analyze says of each run in numbers (its means.py): a row a kind of pairs of checkpoints."""
    root = study.runs / "analysis"
    measured = {} if study.stale(root, {}) else read_json(root / "metrics.json")
    runs = {run: means for run, means in measured.items() if isinstance(means, dict) and "mean_forgetting" in means}
    where = (read_manifest(root / "manifest.json").get("parameters") or {}).get("set", "one set")
    rows: list[dict[str, Any]] = []
    for (run, means), (kind, words) in product(runs.items(), PAIRS_OF_CHECKPOINTS.items()):
        own = {name: means.get(f"mean_{name}{kind}", math.nan) for name in MEANS}
        if own["forgetting"] == own["forgetting"]:
            figures = {name_in_words: _in_percent(own[name]) for name, name_in_words in MEANS.items()}
            chance = math.nan if kind else means.get("floor_of_forgetting", math.nan)
            rows.append({f"on {where}": f"{run}, {words}"} | figures | {"of that by chance": _in_percent(chance)})
    return rows


def _in_percent(share: float) -> str:
    return "" if share != share else f"{100 * share:.1f}"


def _analysis(study: "Study") -> list["Figure"]:
    """The figures of analyze's outputs below RUNS/analysis; those of a nested output have its path in their names."""
    from stages.core.study import figures

    root = study.runs / "analysis"
    plotted: list[Figure] = []
    for directory in dict.fromkeys(path.parent for path in sorted(root.rglob("*.json"))):
        contents = [read_json(path) for path in sorted(directory.glob("*.json"))]
        stale = [study.stale(directory, content) for content in contents]
        study.left_out += [why for why in dict.fromkeys(stale) if why and why not in study.left_out]
        kept = [content for content, why in zip(contents, stale, strict=True) if not why]
        prefix = "".join(f"{figures.file_name(part)}_" for part in directory.relative_to(root).parts)
        plotted += [replace(figure, name=prefix + figure.name) for figure in figures.of_analysis(kept)]
    return sorted(plotted, key=lambda figure: figure.number or "9")
