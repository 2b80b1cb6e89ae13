"""Finding the answer in a completion: the last closed box, or the last "Answer:" line. Linear in the completion."""

import re

from stages.core.grading.verifier.latex import MAX_LENGTH

MAX_BOXES = 64  # joined to one list
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_GAP = r"(?:[\s$]|\\(?:q?quad|[ ,;:]))*"
_BETWEEN_BOXES = re.compile(
    _GAP
    + r"(?:[,;/&|]|\\(?:lor|vee|land|wedge)(?![a-zA-Z])"
    + r"|(?:,\s*)?(?:\\text\s*\{\s*)?(?:and|or|vs\.?)(?:\s+(?:else|maybe|perhaps|possibly|also|rather))?(?:\s*\})?)"
    + _GAP
)
_JOINT = re.compile(r"\}" + _BETWEEN_BOXES.pattern + r"\Z")  # spares most completions the search of another box
_ANSWER_LINE = re.compile(
    r"^[ \t>*#_-]{0,9}(?:(?:the|my)[ \t]+)?(?:final[ \t]+)?answer[*_ \t]{0,9}[:：][*_ \t]{0,9}(.*)$", re.I | re.M
)
_BARE = re.compile(r"(?:####|\banswer\s+is:?|\banswer\s*[:=]|=)\s*(?P<rest>[^=]+)$", re.I)
_BARE_MATHS = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")


def extract(completion: str, bare: bool = False) -> str | None:
    """The text of the last closed box, else of the last "Answer:" line, else None.

    Boxes joined by nothing but a comma, "and" or "or" count as one list. What stands after the end of a thought
    (</think>) goes before the thought itself. With `bare`, the expression that ends the last line counts as well.
    """
    thought, mark, rest = completion.rpartition("</think>")
    finders = (boxed, _answer_line, _bare_expression) if bare else (boxed, _answer_line)
    for text in (rest, thought) if mark else (completion,):
        for finder in finders:
            if answer := finder(text):
                return answer
    return None


def boxed(text: str) -> str | None:
    """The content of the last closed box of a text, with those that it is joined to."""
    box = _last_box(text, len(text))
    if box is None:
        return None
    begin, inside, end = box
    contents = [text[inside:end]]
    while len(contents) < MAX_BOXES and _JOINT.search(text, max(0, begin - 40), begin):
        before = _last_box(text, begin, quick=True)
        if before is None or not _BETWEEN_BOXES.fullmatch(text, before[2] + 1, begin):
            break
        contents.insert(0, text[before[1] : before[2]])
        begin = before[0]
    return ", ".join(contents).strip() or None


def _last_box(text: str, stop: int, quick: bool = False) -> tuple[int, int, int] | None:
    """(where the last closed box before `stop` begins, where its content begins, where it ends)."""
    begin = max(text.rfind("\\boxed", 0, stop), text.rfind("\\fbox", 0, stop))
    if begin < 0:
        return None
    if (match := _BOX.match(text, begin, stop)) and (end := _closing(text, match.end(), min(stop, begin + 4096))):
        return begin, match.end(), end
    return None if quick else _last_of_all_boxes(text, stop)


def _closing(text: str, begin: int, stop: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, begin, stop):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _last_of_all_boxes(text: str, stop: int) -> tuple[int, int, int] | None:
    """As _last_box, in one pass over the text, since many boxes may stand open at its end."""
    boxes = {match.end() - 1: match.start() for match in _BOX.finditer(text, 0, stop)}
    opened: list[int] = []
    last = None
    for match in _BRACE.finditer(text, 0, stop):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            brace = opened.pop()
            if brace in boxes and (last is None or boxes[brace] > last[0]):
                last = (boxes[brace], brace + 1, match.start())
    return last


def _answer_line(text: str) -> str | None:
    lines = list(_ANSWER_LINE.finditer(text))
    if not lines:
        return None
    after = text[lines[-1].end() :]
    line = lines[-1].group(1).strip() or after.strip().partition("\n")[0].strip()
    return line or None


def _bare_expression(text: str) -> str | None:
    line = text.strip().rpartition("\n")[2][-MAX_LENGTH:].strip().rstrip(".")
    spans = list(_BARE_MATHS.finditer(line))
    if spans and not re.search(r"[a-zA-Z]{2}", line[spans[-1].end() :]):
        inside = next(filter(None, spans[-1].groups()))
        return inside.strip() or None
    if match := _BARE.search(line):
        return match.group("rest").strip() or None
    return line if line and not re.search(r"[a-zA-Z]{2,}\s+[a-zA-Z]{2,}", line) else None
