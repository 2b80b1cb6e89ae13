"""String match: the last line of a completion is the answer, or one of the other answers that a CSV file allows.

rloop prepare --source examples/rewards/capitals.csv --problem-column question --answer-column capital \
  --keep-column also --out capitals.jsonl
rloop rl --problems capitals.jsonl ... --reward examples/rewards/csv_match.py:reward
"""

import unicodedata
from typing import Any


def reward(completions: list[str], answer: list[str], also: list[str | None], **columns: Any) -> list[float]:
    """1 for a last line that is the answer or one of `also`, which has | between them; else 0."""
    return [
        float(_plain(_last_line(completion)) in map(_plain, [right, *(others or "").split("|")]))
        for completion, right, others in zip(completions, answer, also, strict=True)
    ]


def _last_line(completion: str) -> str:
    """The last line that is not blank; "-" if there is none, which is no answer."""
    return next((line for line in reversed(completion.splitlines()) if line.strip()), "-")


def _plain(text: str) -> str:
    """Without accents, case, punctuation at the ends and doubled spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split()).strip(" .!\"'")
