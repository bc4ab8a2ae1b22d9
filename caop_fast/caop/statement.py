"""The answer without its confidence statement, through the span that `parse_confidence` reports."""

from __future__ import annotations

import re

from caop_fast.calibration.parse import ParsedConfidence, parse_confidence

_WORD = re.compile("confidence", re.IGNORECASE | re.ASCII)
# A list bullet on the statement's own line, then what is glued to the word: a tag's "<", a quote, emphasis.
_LEAD = re.compile(r"(?:(?:(?<=\n)|(?<![\s\S]))[ \t]{0,8}[-•>#*+]{1,6}[ \t]{1,4})?(?:<\s{0,3}|[\"'“‘*_`]{1,6})?\Z")
_CLOSING_TAG = re.compile(r"\s{0,8}<\s{0,3}/\s{0,3}confidence[\w-]{0,8}\s{0,3}>", re.IGNORECASE)
_CLOSERS = {"}": "{", ")": "(", "]": "[", "”": "“", "’": "‘"}
_BARE_LABEL = re.compile(
    r"(?<![\w-])[*_`]{0,3}confidence(?:\s{1,3}(?:level|score))?[*_`\s]{0,4}[:=：][*_`\s]{0,8}\Z", re.I
)


def answer_text(response: str) -> str:
    """The completion without its last confidence statement, ends trimmed.

    Only that statement's own characters go (label, number, the markup and brackets around them, the comma that joined
    it to a JSON object); the text before and after it stays, so no answer is ever deleted, wherever the statement
    was written. A label at the very end whose number is missing goes as well; a statement in words ("Confidence: high")
    stays, because what follows such a label may be the answer.
    """
    parsed = parse_confidence(response)
    if parsed.status == "no_number":
        return _drop_bare_label(response)
    if parsed.span is None:
        return response.strip()
    start, end = _statement_span(response, parsed)
    before, after = response[:start], response[end:]
    head, tail = before.rstrip(), after.lstrip()
    if parsed.rule == "json":
        if head.endswith(","):
            head = head[:-1].rstrip()
        elif tail.startswith(","):
            tail = tail[1:].lstrip()
        return f"{head}{tail}".strip()
    if not head or not tail:
        return (head or tail).strip()
    gap = before[len(head) :] + after[: len(after) - len(tail)]
    joint = "\n" if "\n" in gap else " " if gap else ""
    return f"{head}{joint}{tail}".strip()


def _drop_bare_label(response: str) -> str:
    text = response.rstrip()
    found = _BARE_LABEL.search(text, max(0, len(text) - 80))
    return (text[: found.start()] if found else text).strip()


def _statement_span(text: str, parsed: ParsedConfidence) -> tuple[int, int]:
    """The whole statement around the number at ``parsed.span``: label, markup, closing tag, a sentence's full stop."""
    assert parsed.span is not None
    number_start, end = parsed.span
    word = number_start
    for match in _WORD.finditer(text, 0, number_start):
        word = match.start()
    lead = _LEAD.search(text, max(0, word - 24), word)
    start = lead.start() if lead else word
    before = text[start:number_start]
    if start and text[start - 1] in "([" and text[end : end + 1] == {"(": ")", "[": "]"}[text[start - 1]]:
        return start - 1, end + 1
    # Only what the statement opened is closed with it: the brace after a JSON member belongs to the object.
    for _ in range(12):
        c = text[end : end + 1]
        if not c:
            break
        if c in "*_`" or (c in _CLOSERS and before.count(_CLOSERS[c]) > before.count(c)):
            pass
        elif not (c in "\"'$" and before.count(c) % 2):
            break
        before += c
        end += 1
    if tag := _CLOSING_TAG.match(text, end):
        end = tag.end()
    if text[end : end + 1] in (".", ";") and not text[end + 1 : end + 2].strip():
        end += 1
    return start, end
