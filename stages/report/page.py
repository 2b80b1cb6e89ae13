"""The report's page, from page.html.j2: one file that needs no network.

page.css is the look (light, dark, phone, print), page.js the browser of rollouts. The template escapes whatever it is
given but figures and embedded records, which are made safe here, and the page's own policy forbids it to load anything.
"""

import html
import math
import re
from importlib.resources import files
from typing import Any

import jinja2
import orjson
from markupsafe import Markup

from stages.core.figures import INK, Figure


def render(**content: Any) -> str:
    """The whole page."""
    folder = files(__package__)
    look = {name: Markup((folder / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points, "plain": _plain, "svg": inline_svg}
    environment.filters |= {"embedded": lambda records: Markup(embedded(records))}
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(**look, **content) + "\n"


def embedded(records: Any) -> str:
    """JSON that is safe inside <script>: a "</script>" in a completion does not end it."""
    return orjson.dumps(records).decode().replace("<", "\\u003c")


def inline_svg(figure: Figure) -> Markup:
    """The figure as an <svg> element: no prologue, no fixed size, ink in the colour of the page's text."""
    element = re.sub(r"^.*?(?=<svg)", "", figure.svg, flags=re.DOTALL)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    for size in ("width", "height"):
        element = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # ids of groups repeat between figures; nothing refers to them
    title = f'<svg role="img" aria-label="{html.escape(figure.title)}"'
    return Markup(element.replace("<svg", title, 1).replace(INK, "currentColor"))


def _percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def _points(fraction: float) -> str:
    number = round(100 * fraction, 1)
    return f"{'−' if number < 0 else '+' if number > 0 else ''}{abs(number):.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
