"""Finding the answer in a completion: the last box, or a final line that names it. Linear in the completion.

What counts, and why, is told in docs/rewards.md, form by form.
"""

import re
from typing import NamedTuple

from stages.core.grading.verifier.latex import MAX_LENGTH

MAX_BOXES = 64  # joined to one list
MAX_BETWEEN = 60  # characters between two boxes that are joined
MAX_LOOKED_AT = 160  # characters behind a box
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:(?P<brace>\{)|(?P<token>\\[a-zA-Z]+|[^\s{}\\])(?=[.,;!]?(?:\s|\$|\\[)\]]|\Z)))"
)
_CUT_OFF = re.compile(r"\\(?:b|bo|box|boxe|boxed|f|fb|fbo|fbox)\s*\Z")
_GAP = r"(?:[\s$*]|\\(?:q?quad|[ ,;:()\[\]]))*"
_WORD_OR = r"(?:\\text\s*\{\s*)?(?:and|or|vs\.?)(?:\s+(?:else|maybe|perhaps|possibly|also|rather))?(?:\s*\})?"
_BETWEEN_BOXES = re.compile(rf"{_GAP}(?:[,;/&|]|\\(?:lor|vee|land|wedge)(?![a-zA-Z])|(?:,\s*)?{_WORD_OR}){_GAP}")
# A sign before the box, or maths behind it in the same formula: then what stands there is not what is in the box.
_SIGNS_BEFORE = ("-", "−", "+", "/", "^", "√", "\\pm", "\\mp", "\\sqrt")
_DENIALS_BEFORE = ("\\ne", "\\neq", "\\not=", "\\not =", "≠", " not", "isn't")
_MATHS_AFTER = re.compile(
    r"\s*[-+/]\s*[\d\\]|[-+/]\(|[-+/]?[a-zA-Z](?![a-zA-Z])|\d|\s*\\(?:frac|sqrt|pi|pm|cdot|times|div)(?![a-zA-Z])|\^(?!\{?\\circ)|_"
)
_HEDGE = re.compile(
    rf"{_GAP}(?:\(?\s*\?|(?:[,(—–-]|\.\.\.)?\s*(?:\\text\s*\{{\s*)?(?:but\s+)?(?:or\s+not|maybe|perhaps|possibly|probably|wait"
    r"|hmm+|oops|i\s+guess|(?:i'?m\s+|i\s+am\s+)?(?:not\s+sure|unsure)|not\s+(?:right|correct|it)|wrong|incorrect"
    r"|(?:(?:it|that|this|which)\s+)?(?:is|was|are|'s)\s+(?:wrong|incorrect|not|false))(?![a-zA-Z]))",
    re.I,
)
_OR = re.compile(
    rf"{_GAP},?\s*(?:\\text\s*\{{\s*)?or(?:\s*\}})?(?![a-zA-Z])\s*(?:maybe\s)?(?P<other>(?:[^\n.;]|\.\d){{1,80}})"
)
_SAME = re.compile(
    r",?\s*(?:equivalently|approximately|about|roughly|simply|in|just|also|as|written|\\approx|≈)(?![a-zA-Z])", re.I
)
_BEFORE_ANSWER = r"^(?:[^\w\n\\$]|_){0,12}(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:(?:the|my)[ \t]+)?"
_FINAL_LINE = re.compile(
    rf"{_BEFORE_ANSWER}(?:(?:final[ \t]+)?answer[*_ \t]{{0,9}}[:：]|final[ \t]+answer[ \t]+is)[*_: \t]{{0,9}}"
    r"(?P<rest>.*)$"
    r"|^[ \t]{0,9}(?:#|\*\*).{0,6}?(?<![a-z])final[ \t]+answer[*_ \t]{0,9}$"
    r"|^[ \t]{0,9}####[ \t]+(?P<marked>[^\n#]+)\Z",
    re.I | re.M,
)
_AGAIN = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s+is:?\s+", re.I)
_HOPE = re.compile(r"I\s+hope\s+(?:it|this)\s+is\s+correct\.?\Z", re.I)
_NO_ANSWER_YET = frozenset(["", r"\[", "$$", r"\(", "---", "**"])
_BARE = re.compile(r"(?:\banswer\s+is:?|\banswer\s*[:=]|=)\s*(?P<rest>[^=]+)$", re.I)
_BARE_MATHS = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")


class _NoAnswer(Exception):
    """There is a box, but it is none that counts."""


class _Box(NamedTuple):
    begin: int
    inside: int
    end: int  # of what is inside
    behind: int


def extract(completion: str, bare: bool = False, prompt: str = "") -> str | None:
    """The text of the answer: of the last box, else of a final line that names it, else None.

    What stands behind a thought (</think>) goes before the thought itself. A thought that never ends, whether it began
    here or in the prompt, holds no answer. With `bare`, the expression that ends the last line counts, too.
    """
    texts: tuple[str, ...] = (completion,)
    if "think>" in completion:
        thought, mark, rest = completion.rpartition("</think>")
        if "<think>" in rest:
            return None
        texts = (rest, thought) if mark else texts
    if prompt and len(texts) == 1 and prompt.rfind("<think>") > prompt.rfind("</think>"):
        return None
    try:
        for text in texts:
            for finder in (boxed, _final_line, _bare_expression) if bare else (boxed, _final_line):
                if answer := finder(text):
                    return answer
    except _NoAnswer:
        pass
    return None


def boxed(text: str) -> str | None:
    """What is in the last of the outermost boxes of a text, and in those that it is joined to; None without boxes.

    Raises _NoAnswer for a last box that is cut off, hedged, or part of a larger formula.
    """
    if "\\" not in text:
        return None
    boxes = _boxes(text)
    if _CUT_OFF.search(text, max(0, len(text) - 9)):
        raise _NoAnswer
    if not boxes:
        return None
    first = len(boxes) - 1
    while (
        first
        and len(boxes) - first < MAX_BOXES
        and boxes[first].begin - boxes[first - 1].behind <= MAX_BETWEEN
        and _BETWEEN_BOXES.fullmatch(text, boxes[first - 1].behind, boxes[first].begin)
    ):
        first -= 1
    contents = [text[box.inside : box.end] for box in boxes[first:]]
    before = text[max(0, boxes[first].begin - 12) : boxes[first].begin].rstrip("${")
    after = text[boxes[-1].behind : boxes[-1].behind + MAX_LOOKED_AT]
    if before.endswith(_SIGNS_BEFORE) or (" " + before.rstrip("$ ")).endswith(_DENIALS_BEFORE):
        raise _NoAnswer
    if after.strip("$. \n"):
        if _MATHS_AFTER.match(after) or _HEDGE.match(after):
            raise _NoAnswer
        if (other := _OR.match(after)) and not _SAME.match(other.group("other")):
            contents.append(other.group("other"))
    return ", ".join(contents).strip() or None


def _boxes(text: str) -> list[_Box]:
    """The outermost boxes in their order, but none before one that is not closed, nor up to a blank line behind it.

    Raises _NoAnswer if none is left.
    """
    boxes: list[_Box] = []
    closings: dict[int, int] | None = None
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if match.group("token"):
            boxes.append(_Box(match.start(), match.start("token"), position, position))
            continue
        if closings is None:
            end = _closing(text, position)
            closings = _all_closings(text) if end is None else None
        else:
            end = closings.get(position)
        if end is not None:
            boxes.append(_Box(match.start(), position, end, end + 1))
            position = end + 1
        elif (position := text.find("\n\n", position)) < 0 or text.find("boxed", position) < 0:
            raise _NoAnswer
        else:
            boxes.clear()
    return boxes


def _closing(text: str, begin: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _all_closings(text: str) -> dict[int, int]:
    """Where each brace that is closed is: by where what it holds begins."""
    opened: list[int] = []
    closings = {}
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            opened.append(match.end())
        elif match.group() == "}" and opened:
            closings[opened.pop()] = match.start()
    return closings


def _final_line(text: str) -> str | None:
    text = text.rstrip()
    lines = list(_FINAL_LINE.finditer(text))
    if not lines:
        return None
    line = _HOPE.sub("", (lines[-1].group("rest") or lines[-1].group("marked") or "")).strip()
    if not line.strip("*$ "):
        below = (part.strip() for part in text[lines[-1].end() :].splitlines())
        line = next((part for part in below if part not in _NO_ANSWER_YET), "")
    return _AGAIN.sub("", line, count=1) or None


def _bare_expression(text: str) -> str | None:
    line = text.strip().rpartition("\n")[2][-MAX_LENGTH:].strip().rstrip(".")
    spans = list(_BARE_MATHS.finditer(line))
    if spans and not re.search(r"[a-zA-Z]{2}", line[spans[-1].end() :]):
        inside = next(filter(None, spans[-1].groups()))
        return inside.strip() or None
    if match := _BARE.search(line):
        return match.group("rest").strip() or None
    return line if line and not re.search(r"[a-zA-Z]{2,}\s+[a-zA-Z]{2,}", line) else None
