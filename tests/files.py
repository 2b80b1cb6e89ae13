"""docs/files.md, made from the declarations of records, columns and metrics: python -m tests.files > docs/files.md"""

import ast
import inspect
import re
from typing import get_type_hints

import stages
from stages.core import records
from stages.core.records import LogRow, columns
from stages.core.study.metrics import METRICS

KINDS = ("Problem", "Message", "Rollout", "Example", "Result", "Divergence", "Matrix", "Curve", "Point", "Similarity")
WRITTEN = {
    "prepare, toy": "`<set>.jsonl` of Problem; toy adds a checkpoint directory `policy/`",
    "rl": "`rollouts/step_000001.jsonl` of Rollout; `checkpoints/step_000050/`; `log.tsv`, a line a step; "
    "`metrics.json`; `state/`, what resuming needs, gone at the end",
    "sample": "a file of Rollout",
    "filter": "a file of Example, or of Problem with its `pass_rate`",
    "rft, merge": "a checkpoint directory; rft adds `log.tsv`, a line an optimizer step, and `metrics.json`",
    "eval, regrade": "of each set `rollouts.jsonl` of Rollout, `results.jsonl` of Result and `metrics.json`; if asked "
    "for, `greedy.jsonl` of Rollout at temperature 0 and `kl.jsonl` of Divergence",
    "analyze": "Matrix, Curve and Similarity, with their figures",
    "report": "`report.html`, `results.md`, `results.tsv`, `results.json`, `curves.tsv`, `metrics/`, `figures/`",
}
BEGIN = """# Files: what each stage writes

Made by `python -m tests.files > docs/files.md` from the declarations in the code; a test holds the two together.

```
{stages}
```

Records are JSON, one object a line. Unknown keys travel along; a field that is missing or of another type is an
error that names file and line. Everything appears whole or not at all, but for rl's directory, which grows and can be
resumed.

| stage | what it writes |
|---|---|
{written}

Each output has a manifest (`manifest.json` in a directory, `FILE.manifest.json` beside FILE.jsonl): `stage`,
`parameters` (the options as used, and what they stand for), `inputs` and `stamps` (the digest of each file that was
read, and a digest of its sizes and times of change), `versions`, `counts` and `seconds`.
"""


def typed(hint: object) -> str:
    """A type as the page shows it."""
    text = re.sub(
        r"(typing|stages\.core\.records)\.|NoneType", lambda m: "None" if m[0] == "NoneType" else "", str(hint)
    )
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    return text.replace("Literal", "one of ").replace("|", "\\|")


def comments(kind: type) -> dict[str, str]:
    """What stands behind each field in the source."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.lineno - 1].partition("  # ")[2] for node in fields}


def record(name: str) -> str:
    """The section of a record: its docstring, and its fields in a table."""
    kind = getattr(records, name)
    hints, said = get_type_hints(kind), comments(kind)
    needed = {field: "" if field in kind.__required_keys__ else "optional" for field in said}
    rows = [f"| `{field}` | {typed(hints[field])} | {needed[field]} | {said[field]} |" for field in said]
    text = re.sub(r"^(\{.*?\})$", r"```\n\1\n```", inspect.getdoc(kind), flags=re.M | re.S)
    return "\n".join([f"## {name}", text, "", "| field | type | | |", "|---|---|---|---|", *rows])


def log_table() -> str:
    """The columns of rl's log.tsv."""
    rows = [f"| `{name}` | {one.meaning} | {one.unit} | {one.total} |" for name, one in columns(LogRow).items()]
    head = ["| column | meaning | unit | in metrics.json |", "|---|---|---|---|"]
    return "\n".join(["## log.tsv of rl", inspect.getdoc(LogRow), "", *head, *rows])


def metric_table() -> str:
    """The metrics that eval computes."""
    rows = [f"| `{one.name}{'@k' if one.has_k else ''}` | {one.unit} | {', '.join(one.needs)} |" for one in METRICS]
    head = ["| metric | unit | from these fields of Result |", "|---|---|---|"]
    text = "eval's metrics.json has them of each policy, with a 95 % interval, and the differences between policies."
    return "\n".join(["## Metrics", text, "", *head, *rows])


def page() -> str:
    """All of docs/files.md."""
    table = stages.__doc__.partition("\n\n")[2].strip()
    written = "\n".join(f"| {stage} | {what} |" for stage, what in WRITTEN.items())
    parts = [BEGIN.format(stages=table, written=written), *map(record, KINDS), log_table(), metric_table()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
