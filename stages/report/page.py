"""The report's page, from page.html.j2: one file that needs no network.

page.css is the look (light, dark, phone, print), page.js the browser of rollouts. The template escapes whatever it is
given but figures and embedded records, which are made safe here, and the page's own policy forbids it to load anything.
"""

import re
from collections.abc import Mapping
from typing import Any

import jinja2
import orjson
from markupsafe import Markup, escape

from stages.core.study.figures import INK, Figure


def render(content: Mapping[str, Any]) -> str:
    """The whole page."""
    loader = jinja2.PackageLoader("stages", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": _plain, "svg": inline_svg, "embedded": embedded}
    return environment.get_template("page.html.j2").render(content) + "\n"


def embedded(records: Any) -> Markup:
    """JSON that is safe inside <script>: a "</script>" in a completion does not end it."""
    return Markup(orjson.dumps(records).decode().replace("<", "\\u003c"))


def inline_svg(figure: Figure) -> Markup:
    """The figure as an <svg> element: no prologue, no fixed size, ink in the colour of the page's text."""
    head, _, body = figure.svg.partition("</metadata>")
    view = re.findall(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # ids of groups repeat between figures; nothing refers to them
    return Markup(f'<svg role="img" aria-label="{escape(figure.title)}" {view}>{body.replace(INK, "currentColor")}')


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
