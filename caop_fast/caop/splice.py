"""Token splice: write another confidence into a sampled completion and keep every other sampled token.

Decoding, editing the text and encoding it again would give tokens the student never sampled. Here only the ids that
spell the number change; a token that holds a digit *and* something else loses the digit and keeps the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from caop_fast.calibration.parse import parse_confidence
from caop_fast.caop.style import ConfidenceStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT = 24  # tokens; up to this length a linear scan from the end is faster than bisection
_WINDOWS = (32, 256, 2048)  # sizes, in tokens, of the windows at the end that are searched before the whole completion
_MARGIN = 8  # characters between the start of a window, whose first token may decode differently, and the number


class Spliced(NamedTuple):
    """A completion with another confidence.

    Attributes:
        ids: token ids; those outside the number are the sampled ones.
        value_mask: one bool per id, True exactly on the ids that spell the number.
        status: "replaced" (a number was there), "appended" (nothing was stated) or "truncated" (the completion has no
            end token, so it was cut by the length limit: ids unchanged, mask all False).
    """

    ids: list[int]
    value_mask: list[bool]
    status: str


def splice_confidence(
    ids: Sequence[int],
    value: float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: ConfidenceStyle,
    stop_ids: Collection[int] | None = None,
) -> Spliced:
    """Make a sampled completion state `value`, changing nothing but the ids of the number.

    The number of the last confidence statement is replaced, unit included ("85%" becomes "0.60"). A completion that
    states none gets ``style.separator`` and ``style.statement(value)`` before its end token, as does one whose
    statement would stay unreadable ("0.85 x 2") or whose number a closed vocabulary cannot split off ("1~" as one
    word); one that ends in a bare label gets the number only. Two things are
    verified for every splice: the decoded text differs from the sampled text in the number alone, and
    `parse_confidence` reads the value written.

    Args:
        ids: the completion as sampled [n], without the prompt: a list or a 1-D tensor or array of ints. What follows
            the first end token (padding) is kept as it is.
        value: confidence in [0, 1]; written as the nearest value of the style's grid.
        tokenizer: the one the completion was sampled with.
        style: how a confidence is written.
        stop_ids: ids that end a completion; default: the tokenizer's end token.

    Raises:
        ValueError: value outside [0, 1], ids not 1-D, no end token known, or a tokenizer that cannot spell the number.
    """
    number = style.number(value)
    sampled = _id_list(ids)
    stop = _first_stop(sampled, tokenizer, stop_ids)
    if stop is None:
        return Spliced(sampled, [False] * len(sampled), "truncated")
    body, ending = sampled[:stop], sampled[stop:]
    text = _decode(tokenizer, body)
    goal = style.nearest(value)
    span = _readable_span(text, number, goal)
    replaced = None if span is None else _replace(body, text, span, number, tokenizer)
    if replaced is None:
        new, mask, status = *_append(body, text, number, goal, tokenizer, style), "appended"
    else:
        new, mask, status = *replaced, "replaced"
    return Spliced(new + ending, mask + [False] * len(ending), status)


def locate_confidence(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int] | None = None
) -> list[int]:
    """Positions of the ids that spell the number of the last confidence statement; empty when none is stated.

    Args:
        ids: the completion as sampled [n], with or without its end token.
        tokenizer: the one it was sampled with.
        stop_ids: ids that end a completion (nothing after the first one is read); default: the tokenizer's end token.

    Returns:
        ascending, contiguous positions; a token at the border that also holds other characters counts.

    Raises:
        ValueError: ids not 1-D, or no end token known.
    """
    sampled = _id_list(ids)
    body = sampled[: _first_stop(sampled, tokenizer, stop_ids)]
    text = _decode(tokenizer, body)
    span = parse_confidence(text).span
    if span is None:
        return []
    first, last, _, _ = next(_covers(body, text, span, tokenizer))
    return list(range(first, last))


def candidate_ids(tokenizer: PreTrainedTokenizerBase, style: ConfidenceStyle) -> list[int]:
    """The token id of each value of ``style.values``, as the model writes it after the label.

    Returns:
        [C] distinct ids in the order of ``style.values``.

    Raises:
        ValueError: some value takes more than one token, so no single id stands for it.
    """
    label = _encode(tokenizer, style.label)
    encoded = [_encode(tokenizer, style.statement(v)) for v in style.values]
    found: list[int] = []
    for value, ids in zip(style.values, encoded, strict=True):
        number = style.number(value)
        # The label may merge with the space before the number; then all statements still share all but the last id.
        after_label = ids is not None and ids[:-1] in (label, (encoded[0] or [])[:-1])
        if not (ids and after_label and _decode(tokenizer, ids[-1:]).strip() == number):
            raise ValueError(
                f"tokenizer must write every confidence value as a single token after {style.label!r} for the direct "
                f"loss; {number!r} takes other tokens: {ids if ids is None else tokenizer.convert_ids_to_tokens(ids)}"
            )
        found.append(ids[-1])
    if len(set(found)) < len(found):
        raise ValueError(f"tokenizer must have a token of its own for every confidence value, got ids {found}")
    return found


def _replace(
    body: list[int], text: str, span: tuple[int, int], number: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]] | None:
    """The ids with `number` in place of `span`; None where a closed vocabulary cannot spell the text next to it."""
    wanted = text[: span[0]] + number + text[span[1] :]
    for first, last, begin, end in _covers(body, text, span, tokenizer):
        left, right = text[begin : span[0]], text[span[1] : end]
        for rest in _spellings(right, tokenizer):
            for written in _spellings(left + number, tokenizer):
                new = body[:first] + written + rest + body[last:]
                if _decode(tokenizer, new) == wanted:
                    return new, _mask(
                        new, wanted, (span[0], span[0] + len(number)), first, len(written), left, tokenizer
                    )
    return None


def _readable_span(text: str, number: str, goal: float) -> tuple[int, int] | None:
    """The characters to overwrite with `number` so that `text` then states `goal`; None where nothing does."""
    span = parse_confidence(text).span
    while span is not None:
        parsed = parse_confidence(text[: span[0]] + number + text[span[1] :])
        if parsed.value == goal:
            return span
        # A longer run such as "0.8 0.9 0.7" is reported two numbers at a time: extend the span to the next ones.
        grown = parsed.span[1] - span[0] - len(number) if parsed.span and parsed.span[0] == span[0] else 0
        span = (span[0], span[1] + grown) if grown > 0 else None
    return None


def _append(
    body: list[int], text: str, number: str, goal: float, tokenizer: PreTrainedTokenizerBase, style: ConfidenceStyle
) -> tuple[list[int], list[bool]]:
    spaced = not text or text[-1].isspace()
    additions = [("" if spaced else style.separator) + style.statement(goal)]
    if text.rstrip().endswith(style.label):
        additions.insert(0, ("" if spaced else " ") + number)
    for addition in additions:
        if parse_confidence(text + addition).value != goal:
            continue
        fits: tuple[list[int], str] | None = None
        for written in _spellings(addition, tokenizer):
            decoded = _decode(tokenizer, body + written)
            if decoded == text + addition:
                fits = written, decoded
                break
            # A word-level tokenizer has only one separator, so any white space between the two is accepted.
            if fits is None and decoded.startswith(text) and decoded[len(text) :].lstrip() == addition.lstrip():
                fits = written, decoded
        if fits is not None:
            written, decoded = fits
            new, span = body + written, (len(decoded) - len(number), len(decoded))
            return new, _mask(new, decoded, span, len(body), len(written), addition[: -len(number)], tokenizer)
    raise ValueError(f"tokenizer cannot write {additions[-1]!r} after {_excerpt(text)}")


def _mask(
    new: list[int],
    text: str,
    span: tuple[int, int],
    first: int,
    n_written: int,
    left: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[bool]:
    """True on those of the `n_written` ids from `first` on that spell the number; `left` is spelled before it."""
    mask = [False] * len(new)
    begin = first
    if n_written > 1 and left:
        begin = max(first, next(_covers(new, text, span, tokenizer))[0])
    mask[begin : first + n_written] = [True] * (first + n_written - begin)
    return mask


def _covers(
    ids: list[int], text: str, span: tuple[int, int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int, int, int]]:
    """The narrowest run of tokens that holds the characters of `span`: (first, last + 1, begin, end).

    `begin` <= span[0] and `end` >= span[1] are the run's own borders in `text`; they fall between whole characters,
    also where a tokenizer splits the bytes of one character over several tokens. Offsets come from decoding prefixes of
    a window at the end of the completion; if the text of a window does not match (its first tokens may decode
    differently without what precedes them), a wider one is tried. Later runs serve only where an earlier one fails.
    """
    n = len(ids)
    for size in [w for w in _WINDOWS if w < n] + [n]:
        start = n - size
        tail = text if start == 0 else _decode(tokenizer, ids[start:])
        origin = len(text) - len(tail)
        if start and (origin > span[0] - _MARGIN or not text.endswith(tail)):
            continue
        found = _cover_in_window(ids, text, span, tokenizer, start, origin)
        if found is not None:
            yield found


def _cover_in_window(
    ids: list[int], text: str, span: tuple[int, int], tokenizer: PreTrainedTokenizerBase, start: int, origin: int
) -> tuple[int, int, int, int] | None:
    n = len(ids)

    def offset(i: int) -> tuple[int, bool]:
        """End of ids[:i] in `text`, and whether it falls between whole characters."""
        if i == n:
            return len(text), True
        prefix = _decode(tokenizer, ids[start:i]) if i > start else ""
        return origin + len(prefix), text.startswith(prefix, origin)

    at, low = n, start
    if n - start > _SHORT:
        # A split character decodes to up to four replacement marks: offsets are monotone only up to that.
        while at - low > 1:
            middle = (low + at) // 2
            if offset(middle)[0] >= span[1] + 4:
                at = middle
            else:
                low = middle
        while not offset(at)[1]:
            at += 1
    last, end = n, len(text)
    for i in range(at, start - (start == 0), -1):
        position, whole = offset(i)
        if not whole:
            continue
        if position >= span[1]:
            last, end = i, position
        elif position <= span[0]:
            return i, last, position, end
    return None


def _spellings(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Encodings of `text` to put inside a sequence, the most usual first; the caller checks what they decode to.

    Tokenizers differ in what they do at the start of a text: some put a space there, some join words by spaces that are
    no characters of their own. Hence the text after an anchor, without its leading space, and character by character.
    """
    if not text:
        yield []
        return
    seen: list[list[int]] = []
    for anchor, piece in (("", text), (":", text), ("0", text), ("", text.lstrip())):
        base, whole = (_encode(tokenizer, anchor) if anchor else []), _encode(tokenizer, anchor + piece)
        if base is None or whole is None or whole[: len(base)] != base:
            continue
        if whole[len(base) :] not in seen:
            seen.append(whole[len(base) :])
            yield seen[-1]
    single = [next(_single(c, tokenizer), []) for c in text]
    if all(single):
        yield [i for ids in single for i in ids]


def _single(character: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for anchor in (":", "0", ""):
        base, whole = (_encode(tokenizer, anchor) if anchor else []), _encode(tokenizer, anchor + character)
        if base is not None and whole is not None and whole[: len(base)] == base and len(whole) > len(base):
            yield whole[len(base) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of `text`, or None where the tokenizer has a closed vocabulary that lacks it."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception:  # the Rust side raises a bare Exception for an unknown word
        return None


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # No clean-up: it would join " ." and " '" and shift every later offset.
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast(str, text)  # a batch would give a list


def _id_list(ids: Any) -> list[int]:
    try:
        return [index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise ValueError(f"ids must be one completion, a list or 1-D tensor of ints, got {ids!r}") from None


def _first_stop(ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] | None) -> int | None:
    if stop_ids is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("stop_ids must be given for a tokenizer without an end token (eos_token_id is None)")
        stop_ids = (tokenizer.eos_token_id,)
    elif not stop_ids:
        raise ValueError("stop_ids must hold at least one id")
    return next((position for position, token in enumerate(ids) if token in stop_ids), None)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else "..." + text[-77:])
