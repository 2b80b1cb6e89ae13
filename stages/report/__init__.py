"""Report: the results table, the figures and one self-contained page from a directory of runs.

Reads what the other stages left under --runs: evaluations, logs, manifests, analyses. What is not there, or does not
descend from what is there now, is left out and named, so that a run half done can be looked at. All outputs are
derived, so a later report replaces an earlier one, but nothing that no report wrote: written.json among the figures
names the files that the last one did.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.core import lineage, outputs
from stages.core.errors import InputError
from stages.core.metrics import KS
from stages.core.options import Options, at_least
from stages.core.outputs import read_json
from stages.core.progress import warn
from stages.core.runs import (
    BASE,
    RL,
    RLOOP,
    Evaluation,
    Place,
    evals_below,
    find_evals,
    num_steps,
    places,
    read_evals,
    root_of,
)
from stages.report import tables
from stages.report.tables import RLOOP_ENDPOINT

if TYPE_CHECKING:
    from stages.core.figures import Figure

PAIRS = ((BASE, RL), (BASE, RLOOP), (RL, RLOOP), (RL, RLOOP_ENDPOINT))
WRITTEN = "written.json"
RESULTS_TEXT = "Percent, with 95 % bootstrap intervals over problems."
REAL_TEXT = (
    "Percentage points, paired problem by problem, with 95 % bootstrap intervals over problems. Green and red: the "
    "interval excludes zero. Grey: it does not, and the difference may be chance. An interval tells about other "
    "problems of the same kind, not about another run with another seed."
)
COMPUTE_TEXT = (
    "From the logs: tokens drawn in rollouts, tokens that updates ran over, and wall-clock seconds of the steps, whole "
    "and by phase. Starting a command, loading and saving are in none of them."
)
MATRIX_KEYS = {"name", "run", "number", "definition", "labels", "values"}


@dataclass(frozen=True, kw_only=True)
class Paths(Options):
    """What is written beside the page; each defaults to a name next to it."""

    results_md: Annotated[str, "results table as Markdown; default: results.md beside --out"] = ""
    results_tsv: Annotated[str, "results table with intervals; default: results.tsv beside --out"] = ""
    results_json: Annotated[str, "results table for `dvc metrics`; default: results.json beside --out"] = ""
    curves: Annotated[str, "metrics over steps, a tidy table; default: curves.tsv beside --out"] = ""
    figures: Annotated[str, "directory of figures; default: figures beside --out"] = ""


@dataclass(frozen=True, kw_only=True)
class Choices(Options):
    """What is shown."""

    valid: Annotated[str, "problem set that stands first and by which checkpoints are chosen"] = "valid"
    ks: Annotated[list[int], "the k of pass@k (repeatable)", at_least(1)] = field(default_factory=lambda: list(KS))
    max_problems: Annotated[int, "problems of each set in the browser of rollouts", at_least(0)] = 12
    max_samples: Annotated[int, "samples of each problem and policy in the browser of rollouts", at_least(0)] = 4
    seed: Annotated[int, "seed of the bootstrap"] = 0
    iterations: Annotated[str, "the iterations that count, as in '1 2 3'; the rest is left out"] = lineage.ALL


@dataclass
class Found:
    """What the report is made from; `left_out` grows by a line for everything that is not shown."""

    runs: Path
    line: lineage.Line
    evaluations: dict[str, Evaluation]
    places: list[Place]
    num_samples: int
    left_out: list[str]


def run(
    paths: Paths,
    choices: Choices,
    runs: Annotated[str, "directory of runs; default: the one that --evals lie in, or else runs"] = "",
    out: Annotated[str, "page to write; default: report.html in --runs"] = "",
    evals: Annotated[list[str], "evaluations to use instead of those in RUNS/eval (repeatable)"] = [],  # noqa: B006
    table: Annotated[bool, "print the results table as Markdown and write nothing"] = False,
    tsv: Annotated[bool, "print the results table with its intervals as TSV and write nothing"] = False,
) -> None:
    """Write the results table, the figures and a page that shows them, from a directory of runs.

    What does not descend from the base and the runs as they are now is left out, and named.

    Example: rloop report --runs runs --out runs/report.html
    """
    printing = table or tsv
    found = _find(runs, evals, choices, needed=printing)
    choices = _possible(choices, found)
    rows = tables.results_rows(found.evaluations, tables.methods(found.places), choices.ks, choices.seed)
    if printing:
        sys.stdout.write(tables.tsv(tables.records(rows)) if tsv else tables.markdown(rows))
        _say(found)
        return
    page = Path(out or found.runs / "report.html")
    with outputs.locked(page, paths.figures or page.parent / "figures"):
        _write(page, paths, choices, found, rows)
    _say(found)
    print(f"rloop: wrote {page}", file=sys.stderr)


def _say(found: Found) -> None:
    for line in [*(f"left out: {line}" for line in found.left_out), *_unequal(found)]:
        warn(line)


def _runs(named: str, evals: Sequence[str]) -> Path:
    """The directory of runs; for evaluations that lie in none, the directory beside them."""
    if named or not evals:
        return Path(named or "runs")
    return root_of(find_evals(evals)) or Path(evals[0]).parent


def _find(named: str, evals: Sequence[str], choices: Choices, needed: bool) -> Found:
    """Read evaluations; without any, an InputError where they are `needed`, and else a line in `left_out`."""
    runs, valid = _runs(named, evals), choices.valid
    if not evals and not runs.is_dir():
        raise InputError(f"{runs}: no such directory; name a directory of runs")
    missing: list[str] = []
    directories: list[Path] = []
    if evals or needed or evals_below(runs / "eval"):
        directories = find_evals(evals or [runs / "eval"])
    else:
        missing.append(f"{runs / 'eval'} holds no results.jsonl: no results table, no metrics over steps, no rollouts")
    line = lineage.Line(runs if runs.is_dir() else None, directories, lineage.chosen(choices.iterations))
    evaluations = read_evals(directories, line.keeps)
    left_out = [*missing, *line.left_out]
    evaluations = {name: evaluations[name] for name in sorted(evaluations, key=lambda name: (name != valid, name))}
    if evaluations and valid not in evaluations:
        others = ", ".join(evaluations)
        left_out.append(f"all by the validation set: no evaluation of {valid} (--valid), only of {others}")
    policies = dict.fromkeys(policy for evaluation in evaluations.values() for policy in evaluation.results)
    num_samples = tables.smallest_num_samples(evaluations)
    return Found(runs, line, evaluations, places(policies, runs, line.bases), num_samples, left_out)


def _possible(choices: Choices, found: Found) -> Choices:
    """The choices without those k that some problem has too few samples for, which are named as left out."""
    beyond = [f"pass@{k}" for k in choices.ks if k > found.num_samples] if found.evaluations else []
    if beyond:
        found.left_out.append(f"{', '.join(beyond)}: some problems have {found.num_samples} samples only")
    return replace(choices, ks=[k for k in choices.ks if k <= found.num_samples])


def _write(page: Path, paths: Paths, choices: Choices, found: Found, rows: Sequence[tables.Row]) -> None:
    from stages.core import figures  # matplotlib comes in here
    from stages.report import browser, curves
    from stages.report import page as pages

    pictures = Path(paths.figures or page.parent / "figures")
    curves_tsv = Path(paths.curves or page.parent / "curves.tsv")
    results_md = Path(paths.results_md or page.parent / "results.md")
    results_tsv = Path(paths.results_tsv or page.parent / "results.tsv")
    results_json = Path(paths.results_json or page.parent / "results.json")
    files = [page, curves_tsv, results_md, results_tsv, results_json]
    _refuse_strangers(pictures, files)
    tidy = curves.rows(found.evaluations, found.places, choices.ks, found.num_samples, choices.seed)
    drawn = _draw(found, choices, tidy)
    rollouts = browser.build(found.evaluations, found.places, choices.max_problems, choices.max_samples)
    sections = _results(found, choices, rows, tidy)
    sections |= {heading: pages.figures_html(of_section) for heading, of_section in drawn.items() if of_section}
    sections |= _compute(found) | _rollouts(found, choices, rollouts) | _parameters(found)
    if unequal := _unequal(found):
        sections["Not like for like"] = pages.notes(unequal)
    if found.left_out:
        sections["Left out"] = pages.notes(found.left_out)

    _write_figures(pictures, [figure for of_section in drawn.values() for figure in of_section], files)
    with outputs.whole_file(curves_tsv) as beside:
        figures.write_tsv(beside, tidy)
    notes = [*(f"Left out: {line}." for line in found.left_out), *_unequal(found)]
    markdown = tables.markdown(rows) if rows else "No results.\n"
    _write_text(results_md, markdown + "".join(f"\n{note}\n" for note in notes))
    _write_text(results_tsv, tables.tsv(tables.records(rows)))
    outputs.write_json(results_json, tables.nested(rows))
    lead = "Iterative policy initialization against RL alone: results, dynamics, compute and rollouts."
    _write_text(page, pages.page(f"RLoop: {found.runs}", lead, sections, rollouts))


def _wanted(found: Found, choices: Choices) -> list[str]:
    """The two metrics that are drawn: accuracy, and pass@k at the largest k."""
    return [f"avg@{found.num_samples}", *(f"pass@{k}" for k in choices.ks[-1:])]


def _draw(found: Found, choices: Choices, tidy: Sequence[dict[str, Any]]) -> dict[str, list["Figure"]]:
    """All figures by the heading that they stand under."""
    from stages.report import curves

    wanted = _wanted(found, choices)
    logs = curves.logs(found.runs, found.line.iterations(), found.line.stands)
    resets = sorted({place.step for place in found.places if place.fine_tuned})
    over_steps = curves.of_evaluations(tidy, resets, wanted)
    if found.evaluations and not over_steps:
        found.left_out.append("metrics over steps: no run has two evaluated checkpoints")
    if not logs:
        found.left_out.append(f"training curves: no log.tsv under {found.runs}")
    analysis = _analysis(found)
    return {
        "RLoop against RL over steps": over_steps,
        "Over iterations": curves.of_iterations(tidy),
        "Learning, forgetting and similarity": analysis,
        "Training": curves.overfitting(tidy, logs, choices.valid, wanted) + curves.of_logs(logs, resets),
    }


def _analysis(found: Found) -> list["Figure"]:
    """The figures of analyze's outputs below RUNS/analysis; those of an output further down bear its path."""
    from stages.core import figures

    root = found.runs / "analysis"
    drawn: list[Figure] = []
    for directory in dict.fromkeys(path.parent for path in sorted(root.rglob("*.json"))):
        matrices = []
        prefix = "".join(f"{figures.file_name(part)}_" for part in directory.relative_to(root).parts)
        of_directory: list[Figure] = []
        for path in sorted(directory.glob("*.json")):
            content = read_json(path)
            if stale := _stale(found, directory, content):
                found.left_out += [stale] if stale not in found.left_out else []
            elif content.keys() >= MATRIX_KEYS:
                matrices.append(content)
            elif path.name == "similarity_by_step.json" and isinstance(content.get("steps"), list):
                of_directory.append(figures.of_similarity(content["steps"]))
        of_directory += figures.of_matrices(matrices)
        drawn += [replace(figure, name=prefix + figure.name) for figure in of_directory]
    if not drawn:
        found.left_out.append(f"learning, forgetting and similarity: nothing of analyze under {root}")
    return sorted(drawn, key=lambda figure: figure.number)


def _stale(found: Found, directory: Path, content: Mapping[str, Any]) -> str:
    """Why a file of an analysis is not shown: it was made from evaluations that are others now, or tells of such."""
    inputs = read_json(directory / "manifest.json").get("inputs") or {}
    for path, digest in inputs.items():
        if found.line.changed(path, digest):
            return f"{directory}: analyzed another {path} than the one that is there now: analyze again"
    policies = [*content.get("policies", ()), *(row.get("policy", "") for row in content.get("steps", ()))]
    named = (policy for several in policies for policy in several.split(" | "))
    return next((fault for policy in named if (fault := found.line.fault_of_policy(policy))), "")


def _unequal(found: Found) -> list[str]:
    """What keeps the figures from being like for like: settings of evaluations, numbers of steps."""
    homes = dict.fromkeys(home for evaluation in found.evaluations.values() for home in evaluation.homes.values())
    return [*found.line.unequal(homes), *_unequal_steps(found)]


def _unequal_steps(found: Found) -> list[str]:
    """A warning where RL alone has more or fewer steps than the iterations together."""
    of_rloop = sum(num_steps(found.runs / str(iteration) / "rl") for iteration in found.line.iterations())
    of_rl = num_steps(found.runs / "vanilla" / "rl") if found.line.stands(found.runs / "vanilla" / "rl") else 0
    if not of_rl or not of_rloop or of_rl == of_rloop:
        return []
    return [f"{RL} has {of_rl} steps and {RLOOP} {of_rloop}: to compare them give {RL} --steps {of_rloop}"]


def _results(
    found: Found, choices: Choices, rows: Sequence[tables.Row], tidy: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """The results table, the same for checkpoints chosen on the validation set, and the differences."""
    from stages.report import page as pages

    if not rows:
        return {}
    chosen = tables.methods(found.places)
    if not {RL, RLOOP} <= chosen.keys():
        found.left_out.append(f"{RLOOP} against {RL}: not both were evaluated")
    found.left_out += tables.incomparable(found.evaluations, chosen)
    body = pages.text(RESULTS_TEXT) + tables.results_html(rows) + _chosen_on_valid(found, choices, tidy)
    sections = {"Results": body}
    compared = tables.differences(found.evaluations, chosen, PAIRS, choices.ks, choices.seed)
    if compared:
        sections["Which differences are real"] = pages.text(REAL_TEXT) + tables.differences_html(compared)
    return sections


def _chosen_on_valid(found: Found, choices: Choices, tidy: Sequence[dict[str, Any]]) -> str:
    """Results of each method's best checkpoint by the validation set, as the paper selects; "" without that set."""
    from stages.report import curves
    from stages.report import page as pages

    order = _wanted(found, choices)[::-1]
    labels = {place.policy: place.label for place in found.places}
    best = curves.best_on(tidy, choices.valid, order)
    if not best:
        return ""
    chosen = {f"{method}, step {labels[policy]}": policy for method, policy in best.items()}
    rows = tables.results_rows(found.evaluations, chosen, choices.ks, choices.seed)
    text = f"The policy on the way of each method that is best on {choices.valid} by {', then '.join(order)}."
    return "<h3>Chosen on the validation set</h3>" + pages.text(text) + tables.results_html(rows)


def _compute(found: Found) -> dict[str, str]:
    from stages.report import ledger
    from stages.report import page as pages

    lines = ledger.ledger(found.runs, found.line.iterations(), found.line.stands)
    if not lines:
        found.left_out.append(f"compute: no log.tsv under {found.runs}")
        return {}
    return {"Compute": pages.text(COMPUTE_TEXT) + tables.plain_html(lines)}


def _rollouts(found: Found, choices: Choices, rollouts: Sequence[dict[str, Any]]) -> dict[str, str]:
    from stages.report import page as pages

    if not rollouts:
        if found.evaluations and choices.max_problems and choices.max_samples:
            found.left_out.append("rollouts: the evaluations hold no rollouts.jsonl")
        return {}
    text = "The problems of each set on which the policies differ most, and some of every policy's completions of them."
    return {"Rollouts": pages.text(text) + pages.BROWSER}


def _parameters(found: Found) -> dict[str, str]:
    from stages.report import ledger
    from stages.report import page as pages

    made = {"rl": "rl/manifest.json", "examples.jsonl": "examples.manifest.json", "policy": "policy/manifest.json"}
    paths = [
        path
        for name, manifest in made.items()
        for path in sorted(found.runs.glob(f"*/{manifest}"))
        if found.line.stands(found.runs / path.relative_to(found.runs).parts[0] / name)
    ]
    paths += sorted((found.runs / "analysis").rglob("manifest.json"))
    homes = {home for evaluation in found.evaluations.values() for home in evaluation.homes.values()}
    of_evals = sorted((found.runs / "eval").rglob("manifest.json"))
    paths += [path for path in of_evals if any(home.is_relative_to(path.parent) for home in homes)]
    settings = ledger.parameters(paths, found.runs)
    folded = [pages.folded(stage, tables.plain_html(of_stage)) for stage, of_stage in settings.items()]
    return {"Parameters": "".join(folded)} if folded else {}


def _refuse_strangers(pictures: Path, files: Sequence[Path]) -> None:
    """Raise InputError where something stands in the way that no report wrote."""
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


def _write_figures(directory: Path, drawn: Sequence["Figure"], files: Sequence[Path]) -> None:
    """Replace the directory of figures as a whole; `files` are those that are written beside it."""
    from stages.core import figures

    before = read_json(directory / WRITTEN).get("files", [])
    with outputs.whole_dir(directory, replacing=True) as beside:
        for figure in drawn:
            figures.save(figure, beside)
        names = sorted(path.name for path in beside.iterdir())
        relative = sorted({*before, *(os.path.relpath(path, directory) for path in files)})
        outputs.write_json(beside / WRITTEN, {"stage": "report", "files": relative, "figures": names})


def _write_text(path: str | Path, text: str) -> None:
    with outputs.whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
