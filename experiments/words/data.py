"""The data of the experiment: public sets in one shape, and the examples of the warm start.

    python data.py sources --out DIR [--data DIR]
    python data.py examples --warm DIR --template FILE --out FILE

Sources are files in --data, `{"id", "problem", "answer"}` a line and in gsm8k_train_rationales.jsonl `rationale` too,
or the same sets on the hub. Examples are prompts in the template that RL and evaluation use, and completions that end
in \\boxed{}.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import told
from base import in_one_line

from stages.core import jsonl, outputs
from stages.core.drawing import templates
from stages.core.errors import InputError
from stages.prepare import sources

RATIONALES = "gsm8k_train_rationales"
POOL = ("asdiv", "mawps_single")  # train and valid are drawn from these together
NUM_TOLD = NUM_RATIONALES = 2000  # solutions that the warm start learns from; of the rationales the shortest
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


def gather(directory: Path | None, out: Path) -> None:
    """Write every source to `out`, whole or not at all: those of the directory or the hub, and those that are told."""
    if directory:
        refuse_missing(directory)
    with outputs.whole_dir(out) as beside:
        for name in ORIGINS:
            rows = _of_file(directory / f"{name}.jsonl") if directory else _of_hub(name)
            jsonl.write(beside / f"{name}.jsonl", rows)
        jsonl.write(beside / "pool.jsonl", (row for name in POOL for row in _of_file(beside / f"{name}.jsonl")))
        jsonl.write(beside / "told.jsonl", told.problems(NUM_TOLD, WARM_TOLD_SEED))
        jsonl.write(beside / "told_pool.jsonl", told.problems(NUM_TOLD, RL_TOLD_SEED))


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


def write_examples(directory: Path, template: Path, out: Path) -> None:
    """The examples of the warm start: the shortest rationales, and what is told."""
    render = templates.load(str(template)).render
    solved = sorted(_of_file(directory / f"{RATIONALES}.jsonl"), key=lambda row: (len(row["rationale"]), row["id"]))
    chosen = [*solved[:NUM_RATIONALES], *_of_file(directory / "told.jsonl")]
    jsonl.write(out, (example(problem, render(problem["problem"])) for problem in chosen))


def example(problem: Mapping[str, str], prompt: str) -> dict[str, Any]:
    """The record that rft learns from."""
    completion = f" {problem['rationale']}\n\\boxed{{{problem['answer']}}}"
    return {"problem_id": problem["id"], "prompt": prompt, "completion": completion, "pass_rate": 0.0}


@in_one_line
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sources", "examples"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="of sources: directory of the sets; default: the hub")
    parser.add_argument("--warm", type=Path, help="of examples: directory of the problems with rationales")
    parser.add_argument("--template", type=Path, help="of examples: the prompt")
    options = parser.parse_args()
    if options.what == "sources":
        gather(options.data, options.out)
    else:
        write_examples(options.warm, options.template, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
