"""The experiment's data: public sets in one shape, split into sets of which none holds a problem of another.

Sources are files in a directory, `{"id", "problem", "answer"}` a line and in gsm8k_train_rationales.jsonl `rationale`
too, or the same sets on the hub. The splits are commands of `rloop prepare`; the examples of the warm start are
prompts by the template that RL and evaluation use, and completions that end in \\boxed{}.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import told

from stages.core import jsonl, outputs
from stages.core.drawing import templates
from stages.core.errors import InputError
from stages.prepare import sources

RATIONALES = "gsm8k_train_rationales"
TESTS = ("asdiv", "mawps_single", "gsm8k_test")
SETS = ("valid", *TESTS)
RL_TOLD_SEED, WARM_TOLD_SEED = 1, 0  # so that no problem told to the warm start is asked again
MARK = re.compile(r"<<[^>]*>>")  # GSM8K's calculator


class Origin(NamedTuple):
    """A set on the hub."""

    hub_id: str
    config: str
    splits: tuple[str, ...]


ORIGINS = {
    "asdiv": Origin("EleutherAI/asdiv", "asdiv", ("validation",)),
    "mawps_single": Origin("MU-NLPC/Calc-mawps", "", ("train", "validation", "test")),
    "gsm8k_test": Origin("openai/gsm8k", "main", ("test",)),
    RATIONALES: Origin("openai/gsm8k", "main", ("train",)),
}


def refuse_missing(directory: Path) -> None:
    """Raise InputError if the directory lacks a file."""
    missing = [f"{name}.jsonl" for name in ORIGINS if not (directory / f"{name}.jsonl").is_file()]
    if missing:
        wanted = ", ".join(f"{name}.jsonl" for name in ORIGINS)
        raise InputError(
            f"--data {directory}: lacks {', '.join(missing)}: name a directory that holds {wanted}, or leave --data "
            "out to read the same sets from the hub"
        )


def gather(directory: Path | None, out: Path, num_told: Mapping[str, int]) -> None:
    """Write every source to `out`, whole or not at all: those of the directory or the hub, and those that are told."""
    with outputs.whole_dir(out) as beside:
        for name in ORIGINS:
            rows = _of_file(directory / f"{name}.jsonl") if directory else _of_hub(name)
            jsonl.write(beside / f"{name}.jsonl", rows)
        jsonl.write(beside / "told.jsonl", told.problems(num_told["warm_start"], WARM_TOLD_SEED))
        jsonl.write(beside / "told_pool.jsonl", told.problems(num_told["pool"], RL_TOLD_SEED))


def _of_file(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in jsonl.read(path))


def _of_hub(name: str) -> Iterator[dict[str, Any]]:
    origin = ORIGINS[name]
    for split in origin.splits:
        source = sources.find(origin.hub_id, config=origin.config, split=split)
        try:
            for number, (_, row) in enumerate(sources.rows(source)):
                yield {"id": f"{name}-{split}-{number}", **of_hub_row(name, row)}
        except InputError as error:
            reason = str(error).partition(";")[0]
            raise InputError(f"{reason}: give the sets as files with --data DIR") from None


def of_hub_row(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a hub set as a problem; asdiv's "9 (apples)" is 9, Calc-mawps' "1_000" is 1000."""
    if name == "asdiv":
        return {"problem": f"{row['body']} {row['question']}", "answer": row["answer"].partition(" (")[0]}
    if name == "mawps_single":
        return {"problem": row["question"], "answer": row["result"].replace("_", "")}
    solution, _, answer = MARK.sub("", row["answer"]).rpartition("####")
    return {"problem": row["question"], "answer": answer.strip().replace(",", ""), "rationale": solution.strip()}


def join(files: Iterable[Path], out: Path) -> None:
    """Write the lines of several files into one."""
    jsonl.write(out, (row for file in files for row in _of_file(file)))


def preparations(settings: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(file to make, arguments of rloop), in order: each set is decontaminated of those before it.

    `sources/pool.jsonl` is read by the first and the last of the sets.
    """
    before: list[str] = []
    limits = {"valid": settings["valid"], **dict.fromkeys(TESTS, settings["test"]), "train": settings["train"]}
    for name, limit in limits.items():
        source = f"sources/{name if name in TESTS else 'pool'}.jsonl"
        place = "train.jsonl" if name == "train" else f"sets/{name}.jsonl"
        yield place, _prepare(source, place, before, ["--limit", str(limit), "--seed", str(settings["seed"])])
        before.append(place)
    for name in (RATIONALES, "told"):
        place = f"warm/{name}.jsonl"
        yield place, _prepare(f"sources/{name}.jsonl", place, before, ["--keep-column", "rationale"])


def _prepare(source: str, out: str, others: list[str], more: list[str]) -> list[str]:
    apart = [word for other in others for word in ("--decontaminate", other)]
    return ["prepare", "--source", source, "--out", out, "--drop-unparseable", *more, *apart]


def write_examples(directory: Path, settings: Mapping[str, Any], template: Path, out: Path) -> None:
    """The examples of the warm start: the shortest rationales, and what is told."""
    render = templates.load(str(template)).render
    solved = sorted(_of_file(directory / f"{RATIONALES}.jsonl"), key=lambda row: (len(row["rationale"]), row["id"]))
    chosen = [*solved[: settings["rationales"]], *_of_file(directory / "told.jsonl")]
    jsonl.write(out, (example(problem, render(problem["problem"])) for problem in chosen))


def example(problem: Mapping[str, str], prompt: str) -> dict[str, Any]:
    """The record that rft learns from."""
    completion = f" {problem['rationale']}\n\\boxed{{{problem['answer']}}}"
    return {"problem_id": problem["id"], "prompt": prompt, "completion": completion, "pass_rate": 0.0}
