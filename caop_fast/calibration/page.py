"""One self-contained HTML page: no scripts, no outside resources, readable in light and dark and on a narrow screen.

Text is escaped unless it is `Html`, and only the functions here make `Html`, so a page built from them cannot carry
markup that came from a model, a file name or a command line.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caop_fast.calibration import plots
from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.files import write_atomic
from caop_fast.calibration.table import COLUMNS, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --line: #dde1e6; --back: #ffffff; --card: #f6f7f9;
  --good: #007a5a; --bad: #b3400a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --line: #343a42; --back: #15181c;
  --card: #1e2227; --good: #4fd0a5; --bad: #ff9a66; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p, ul, dl { max-width: 74ch; margin: .5rem 0; }
.lead { background: var(--card); border-left: 4px solid #0072b2; padding: .5rem 1rem; border-radius: 0 6px 6px 0; }
.lead p { font-size: 1.12rem; max-width: none; }
.note, figcaption, footer { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .2rem 0 .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; min-width: 50%; }
p.caption { font-weight: 600; font-size: .95rem; margin: 1.3rem 0 0; }
th, td { padding: .34rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
td:first-child { font-weight: 600; }
table.words td, table.words th { text-align: left; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.plots.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0 0 0 1.2rem; }
pre { background: var(--card); padding: .7rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .87rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 560px) { main { padding: 18px 14px 36px; } h1 { font-size: 1.4rem; }
  .lead p { font-size: 1.02rem; } th, td { padding: .3rem .5rem; } }
@media print { .scroll { overflow: visible; } }
"""


class Html(str):
    """Markup made by this module; every other str is text and is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A heading and the parts under it; a part that is plain text becomes a paragraph."""

    heading: str
    parts: Sequence[str]


def escape(text: object) -> Html:
    """Text as markup: escaped for elements and quoted attributes, control and direction marks made harmless."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text), quote=True))


def join(parts: Iterable[str]) -> Html:
    return Html("".join(map(escape, parts)))


def paragraph(text: str, *, note: bool = False) -> Html:
    """A paragraph; a percent sign stays on the line of its number."""
    text = escape(text).replace(" %", "\u00a0%")
    return Html(f'<p class="note">{text}</p>' if note else f"<p>{text}</p>")


def marked(text: object, mark: str) -> Html:
    """Text in the colour of a good or a bad thing. `mark` is "good", "bad" or "" (plain)."""
    if mark not in ("good", "bad", ""):
        raise ValueError(f"mark must be 'good', 'bad' or '', got {mark!r}")
    return Html(f'<span class="{mark}">{escape(text)}</span>') if mark else escape(text)


def dotted(name: str, color: str) -> Html:
    """A name with a dot in its colour (a hex colour such as #0072b2; anything else is a ValueError)."""
    digits = color.removeprefix("#")
    if len(color) != 7 or len(digits) != 6 or not set(digits.lower()) <= set("0123456789abcdef"):
        raise ValueError(f"color must be like #0072b2, got {color!r}")
    return Html(f'<span class="dot" style="background:{color}"></span>{escape(name)}')


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", words: bool = False) -> Html:
    """A table that scrolls sideways by itself on a narrow screen. `words`: cells hold text, so all align left."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    # beside the scrolled part, not in it: a caption would be cut on a narrow screen
    title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    kind = ' class="words"' if words else ""
    # tabindex lets a keyboard reach the scrolled part
    return Html(
        f'{title}<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def image(light: bytes, dark: bytes | None, *, alt: str, caption: str = "") -> Html:
    """An SVG or PNG picture inside the page, with a version for dark screens. `alt` says what it shows."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">' if dark else ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    picture = f'<picture>{source}<img src="{_data_uri(light)}" alt="{escape(alt)}"></picture>'
    return Html(f"<figure>{picture}{text}</figure>")


def _data_uri(data: bytes) -> str:
    kind = "image/png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "image/svg+xml"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def gallery(figures: Sequence[Html], *, wide: bool = False) -> Html:
    """Pictures side by side, as many as fit."""
    return Html(f'<div class="plots{" wide" if wide else ""}">{join(figures)}</div>')


def themed_image(draw: Callable[[str], Figure], *, alt: str, caption: str = "") -> Html:
    """A picture drawn once for light and once for dark screens: `draw` gets "light" or "dark" and returns a figure."""
    light, dark = (plots.to_svg(draw(theme)) for theme in ("light", "dark"))
    return image(light, dark, alt=alt, caption=caption)


def reliability_gallery(
    models: Sequence[ModelAnswers], colors: Mapping[str, str], *, n_bins: int = 10, edges: str = "official"
) -> Html:
    """A reliability diagram per model, each a picture of its own: a narrow screen shows them one below the other."""

    def picture(model: ModelAnswers) -> Html:
        def draw(theme: str) -> Figure:
            return plots.reliability_diagram([model], n_bins=n_bins, edges=edges, theme=theme, colors=colors)

        return themed_image(draw, alt=f"Reliability diagram of {model.name}: {plots.says_and_is_right(model)}")

    return gallery([picture(model) for model in models])


def stacked(*lines: str) -> Html:
    """Lines one below the other in a table cell, the first in the weight of the text, the others smaller."""
    first, *others = lines
    return Html(escape(first) + "".join(f'<br><span class="note">{escape(line)}</span>' for line in others))


def bullets(items: Sequence[str]) -> Html:
    return Html("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")


def code(text: str) -> Html:
    return Html(f"<pre><code>{escape(text)}</code></pre>")


def glossary(keys: Sequence[str]) -> Html:
    """What the columns mean, for readers who never saw them."""
    direction = {"low": " Lower is better.", "high": " Higher is better.", "zero": " Closest to zero is best.", "": ""}
    entries = (COLUMNS[key] for key in keys)
    return Html(
        "<dl>"
        + "".join(f"<dt>{escape(c.head)}</dt><dd>{escape(c.meaning + direction[c.better])}</dd>" for c in entries)
        + "</dl>"
    )


def render_page(*, title: str, lead: str | Sequence[str], sections: Sequence[Section], footer: str = "") -> str:
    """The page as text. `lead` is the answer in a sentence or two (or a paragraph per model): it stands first."""
    leads = [lead] if isinstance(lead, str) else lead
    body = "".join(
        f"<section><h2>{escape(section.heading)}</h2>"
        + "".join(part if isinstance(part, Html) else paragraph(part) for part in section.parts)
        + "</section>\n"
        for section in sections
    )
    # the policy makes a browser refuse scripts and outside resources even if some text slipped through
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<div class="lead">{join(map(paragraph, leads))}</div>\n{body}'
        + (f"<footer><p>{escape(footer)}</p></footer>\n" if footer else "")
        + "</main>\n</body>\n</html>\n"
    )


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str | Sequence[str],
    sections: Sequence[Section],
    footer: str = "",
) -> Path:
    """Write the page to `path` in one step (a reader never sees half of it) and return the path."""
    return write_atomic(path, render_page(title=title, lead=lead, sections=sections, footer=footer))
