"""The report's page: sections of HTML, figures and the browser of rollouts in one file that needs no network.

page.html is the frame, page.css the look (light, dark, phone, print), page.js the browser of rollouts. Whatever comes
from outside goes in escaped, and the page's own policy forbids it to load anything.
"""

import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import orjson

from stages.core.figures import INK, Figure

BROWSER = """
<div class="pick">
<label>Problem set<select id="set"></select></label>
<label>Problem<select id="problem"></select></label>
<label>Completions<select id="verdicts">
<option value="all">all</option><option value="correct">correct</option><option value="wrong">wrong</option>
</select></label>
</div>
<h3 id="chosen"></h3>
<div id="problem-text" tabindex="0"></div>
<p class="note">Answer: <b id="answer"></b></p>
<svg id="rates" role="img" aria-label="pass rate of this problem over RL steps"></svg>
<p class="note">Pass rate of this problem over RL steps; choose a point to see its completions.</p>
<div class="sides">
<div class="side"><div class="pick"><label>Left<select id="left"></select></label></div>
<div id="left-rollouts"></div></div>
<div class="side"><div class="pick"><label>Right<select id="right"></select></label></div>
<div id="right-rollouts"></div></div>
</div>
"""


def page(title: str, lead: str, sections: Mapping[str, str], rollouts: Sequence[Mapping[str, Any]]) -> str:
    """The whole page: `sections` (heading -> HTML) in order, `lead` as plain text, `rollouts` for the browser."""
    names = {heading: "section-" + re.sub(r"\W+", "-", heading.lower()) for heading in sections}
    contents = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for heading, name in names.items())
    bodies = [f'<section><h2 id="{names[h]}">{html.escape(h)}</h2>{body}</section>' for h, body in sections.items()]
    folder = files(__name__)
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        contents=contents,
        sections="\n".join(bodies),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        rollouts=embedded(rollouts),
    )


def embedded(records: Any) -> str:
    """JSON as it stands in the page: "</script>" in a completion ends nothing."""
    return orjson.dumps(records).decode().replace("<", "\\u003c")


def figures_html(figures: Sequence[Figure]) -> str:
    """Figures side by side, each with its caption and the number of the paper's figure that it answers to."""
    return f"<div class=figures>{''.join(_figure(figure) for figure in figures)}</div>"


def _figure(figure: Figure) -> str:
    number = f" (Figure {figure.number} of the paper.)" if figure.number else ""
    return f"<figure>{inline_svg(figure)}<figcaption>{html.escape(figure.caption + number)}</figcaption></figure>"


def inline_svg(figure: Figure) -> str:
    """The figure as an <svg> element: no prologue, no fixed size, ink in the colour of the page's text."""
    element = re.sub(r"^.*?(?=<svg)", "", figure.svg, flags=re.DOTALL)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(
        r'<g id="[^"]*"', "<g", element
    )  # group ids repeat from figure to figure and nothing refers to them
    title = f'<svg role="img" aria-label="{html.escape(figure.title)}"'
    return element.replace("<svg", title, 1).replace(INK, "currentColor")


def notes(lines: Sequence[str]) -> str:
    """Plain lines as a list of notes."""
    return "<ul class=note>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def text(line: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{html.escape(line)}</p>"


def folded(summary: str, body: str) -> str:
    """HTML that is shown on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"
