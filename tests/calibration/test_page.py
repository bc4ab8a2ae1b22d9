"""The page: one file that loads nothing, runs nothing, and shows what a model wrote as text."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from caop_fast.calibration import page, plots
from caop_fast.calibration.answers import ModelAnswers, Unread
from caop_fast.calibration.audit import audit
from caop_fast.calibration.report import audit_page
from caop_fast.calibration.table import COLUMNS, format_table, format_value, metric_rows, printable
from helpers.audits import answered

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00\ud800"


class Checker(HTMLParser):
    """Collects tags and attributes; checks that every opened element is closed in order."""

    VOID = frozenset({"meta", "img", "br", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def check(text: str) -> Checker:
    text.encode("utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & set(checker.tags)
    for name, value in checker.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("src", "srcset", "href", "action"):
            assert value.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")), value[:40]
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    return checker


def every_part(evil: str) -> str:
    return page.render_page(
        title=evil,
        lead=[evil, evil],
        sections=[
            page.Section(
                evil,
                [
                    evil,
                    page.paragraph(evil, note=True),
                    page.table([evil, evil], [[evil, page.marked(evil, "bad")]], caption=evil),
                    page.table([evil], [[page.stacked(evil, evil)]], words=True),
                    page.bullets([evil, page.dotted(evil, "#0072b2")]),
                    page.code(evil),
                    page.gallery([page.image(b"<svg/>", b"<svg/>", alt=evil, caption=evil)], wide=True),
                    page.glossary(list(COLUMNS)),
                ],
            )
        ],
        footer=evil,
    )


def test_hostile_text_stays_text_in_every_part() -> None:
    checker = check(every_part(EVIL))
    assert checker.tags.count("img") == 1  # the one of `image`
    assert checker.text.count("alert(1)") == 2 * 20  # twice in each of the 20 places
    assert "\u202e" not in checker.text
    assert "\x00" not in checker.text


def test_a_markup_string_that_was_joined_with_text_is_escaped_again() -> None:
    assert page.escape("x" + page.Html("<b>")) == "x&lt;b&gt;"
    assert page.join(["<", page.Html("<b>")]) == "&lt;<b>"
    assert page.escape(page.escape("&")) == "&amp;"


@pytest.mark.parametrize("color", ["red", "#12345", "#12345g", '#000000"onload="x', "javascript:alert(1)"])
def test_colours_are_checked(color: str) -> None:
    with pytest.raises(ValueError, match="color"):
        page.dotted("a", color)


def test_image_is_inside_the_page_and_has_a_dark_version() -> None:
    png = b"\x89PNG\r\n\x1a\nxyz"
    text = page.image(png, b"<svg>dark</svg>", alt="what")
    assert f"data:image/png;base64,{base64.b64encode(png).decode()}" in text
    assert f"data:image/svg+xml;base64,{base64.b64encode(b'<svg>dark</svg>').decode()}" in text
    assert 'alt="what"' in text
    assert "prefers-color-scheme: dark" in text
    assert "<source" not in page.image(png, None, alt="x")


def test_page_works_small_dark_and_without_scripts() -> None:
    text = page.render_page(title="t", lead="l", sections=[])
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text


def test_write_page_returns_the_path_and_keeps_unicode(tmp_path) -> None:
    path = page.write_page(
        tmp_path / "p.html", title="Zürich 東京", lead="l", sections=[page.Section("h", ["“quoted”"])]
    )
    assert path.read_text(encoding="utf-8").count("Zürich 東京") == 2


def report_of_hostile_models() -> tuple[dict, list[ModelAnswers]]:
    rng = np.random.default_rng(0)
    models = [
        answered(
            name,
            (rng.random(40) < 0.5).astype(float),
            np.where(rng.random(40) < 0.2, np.nan, np.round(rng.random(40), 1)),
            [f"q{i}" for i in range(40)],
            statuses={"ok": 30, EVIL: 10},
            unread=(Unread(EVIL, "missing", EVIL),),
        )
        for name in (EVIL, "b")
    ]
    return audit(models, n_resamples=20), models


def test_audit_page_with_hostile_names_and_answers() -> None:
    pytest.importorskip("matplotlib")
    report, models = report_of_hostile_models()
    checker = check(audit_page(report, models))
    assert checker.tags.count("img") == 3  # two reliability diagrams and the risk-coverage plot
    for text in ("difference from", "ECE floor", "could not be read", "Brier skill"):
        assert text in checker.text


def test_audit_page_without_matplotlib_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report, models = report_of_hostile_models()
    checker = check(audit_page(report, models))
    assert "pip install caop-fast[audit]" in checker.text
    assert "img" not in checker.tags
    with pytest.raises(ImportError, match=r"pip install caop-fast\[audit\]"):
        plots.reliability_diagram(models)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "share", "–"),
        (0, "count", "0"),
        (12345, "count", "12,345"),
        (0.0, "percent", "0.0 %"),
        (0.4295, "percent", "43.0 %"),
        (-0.0004, "signed", "0.000"),
        (-0.0006, "signed", "-0.001"),
        (0.57, "signed", "+0.570"),
        (2.0, "nats", "2.00"),
    ],
)
def test_format_value(value, form, text) -> None:
    assert format_value(value, form) == text


def test_format_value_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="form must be"):
        format_value(1.0, "pounds")


def test_format_table_lines_up_wide_and_hostile_cells() -> None:
    text = format_table(["", "n"], [["東京", "1"], ["e\u0301", "10,000"], ["a\nb\x1b[2J", "7"]], title="t")
    lines = text.split("\n")
    assert lines[0] == "t"
    assert len(lines) == 6
    assert "\x1b" not in text
    assert lines[2].endswith("------")
    # the wide name takes four columns on screen with two characters, the accent none
    assert lines[3] == "東京" + " " * (len("a b?[2J") - 4) + "  " + "     1"
    assert lines[4].endswith("10,000")
    with pytest.raises(ValueError, match="1 cells"):
        format_table(["a", "b"], [["x"]])


def test_printable_keeps_scripts_and_drops_what_steers() -> None:
    assert printable("שלום Ωμέγα 東京 é") == "שלום Ωμέγα 東京 é"
    assert printable("a\x1b\x07\u202e\u2066\ud800\u2028b\t\nc") == "a" + "\ufffd" * 6 + "b  c"


def test_metric_rows_show_a_dash_for_what_is_missing() -> None:
    heads, rows = metric_rows(["a", "b"], [{"ece": 0.5}, None], ["ece", "spr"])
    assert heads == ["", "ECE", "SPR"]
    assert rows == [["a", "0.500", "–"], ["b", "–", "–"]]
