"""Prompts of teacher and student from the same row.

The teacher is the student's own model given a privileged context: a reference solution, and a note with the confidence
to state. That text goes into the *last user turn* of the conversation and nowhere else; the student's messages are made
without it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from caop_fast.calibration.parse import parse_confidence, replace_confidence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

DEFAULT_TEMPLATE = """{prompt}

A correct solution of this task is given below for your guidance.

<reference_solution>
{demonstration}
</reference_solution>

{note}

Now solve the task yourself, in your own words and in the requested form."""

DEFAULT_NOTE = """Measured over several attempts without this help, the probability that you solve this task is \
{confidence}. State exactly this estimate at the end of your answer: Confidence: {confidence}"""


def student_messages(row: Mapping[str, Any]) -> list[Message]:
    """The conversation that the deployed model sees: ``row["prompt"]`` and, where given, ``row["system"]``.

    No other field of the row is read.

    Args:
        row: "prompt" is a string (one user turn) or a list of chat messages; "system", optional, a system text.

    Returns:
        a new list of messages; changing it does not change the row.

    Raises:
        ValueError: no prompt, an empty conversation, or a system text beside a system message.
        TypeError: a message that is not a mapping with a role and a content.
    """
    if "prompt" not in row:
        raise ValueError(f"row must have the field 'prompt', got {sorted(map(str, row))}{_of(row)}")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence):
        for message in prompt:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise TypeError(f"prompt must hold messages with 'role' and 'content', got {message!r}{_of(row)}")
        messages = [copy.deepcopy(dict(message)) for message in prompt]
    else:
        raise TypeError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}{_of(row)}")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"prompt must hold at least one user turn{_of(row)}")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be a string or None, got {type(system).__name__}{_of(row)}")
    if system:
        if any(m["role"] == "system" for m in messages):
            raise ValueError(f"system is given, but prompt has a system message of its own{_of(row)}; keep one of them")
        messages.insert(0, {"role": "system", "content": system})
    return messages


@dataclass(frozen=True)
class TeacherContext:
    """How the teacher's prompt is made from a row.

    Args:
        template: the new text of the last user turn, with the fields ``{prompt}`` (that turn's own text, required),
            ``{demonstration}`` and ``{note}``; a literal brace is written twice.
        note: the text of ``{note}`` when a confidence is given, with the field ``{confidence}``.
        max_tokens: the budget of `encode`, in tokens; the teacher's own, apart from the student's. None: no limit.
    """

    template: str = DEFAULT_TEMPLATE
    note: str = DEFAULT_NOTE
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_fields("template", self.template, {"prompt", "demonstration", "note"}, required="prompt")
        _check_fields("note", self.note, {"confidence"}, required="confidence")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {self.max_tokens!r}")

    def messages(self, row: Mapping[str, Any], *, confidence: str | None = None) -> list[Message]:
        """The teacher's conversation: the student's, with the last user turn rewritten through the template.

        Every other message is kept as it is: a system message, earlier turns, an assistant prefix after that turn.

        Args:
            row: as for `student_messages`, with the privileged "demonstration" if the template shows one.
            confidence: the number to state, as written (``0.60``). It fills the note, and every confidence statement
                in the demonstration is changed to it, so that the teacher reads one number only. None: no note (the
                white space before ``{note}`` goes too), and the demonstration is shown unchanged.

        Raises:
            ValueError: the template shows a demonstration and the row has none, or `confidence` is no
                confidence or has no ``{note}`` to stand in.
            TypeError: the demonstration or the last user turn is not text.
        """
        messages = student_messages(row)
        demonstration = ""
        if _has_field(self.template, "demonstration"):
            given = row.get("demonstration")
            if given is None:
                raise ValueError(f"row must have the field 'demonstration' that the template shows{_of(row)}")
            if not isinstance(given, str):
                raise TypeError(f"demonstration must be a string, got {type(given).__name__}{_of(row)}")
            demonstration = given
        template, note = self.template, ""
        if confidence is None:
            template = re.sub(r"\s*(?<!\{)\{note\}", "", template)
        else:
            if not isinstance(confidence, str):
                raise TypeError(f"confidence must be the number as text, e.g. '0.60', got {confidence!r}")
            if parse_confidence(f"Confidence: {confidence}").value is None:
                raise ValueError(f"confidence must be a number in [0, 1] as text, e.g. '0.60', got {confidence!r}")
            if not _has_field(template, "note"):
                raise ValueError("template must have the field {note} to state a confidence")
            note = self.note.format(confidence=confidence)
            demonstration = replace_confidence(demonstration, confidence, every=True)
        turn = next(m for m in reversed(messages) if m["role"] == "user")
        if not isinstance(turn["content"], str):
            raise TypeError(f"the last user turn must be text, got {type(turn['content']).__name__}{_of(row)}")
        # format() fills each field once: braces inside the user's or the reference's text are never read as fields.
        turn["content"] = template.format(prompt=turn["content"], demonstration=demonstration, note=note)
        return messages

    def encode(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, confidence: str | None = None
    ) -> list[int]:
        """`messages` as token ids, within this context's own `max_tokens`."""
        return encode_prompt(
            self.messages(row, confidence=confidence), tokenizer, max_tokens=self.max_tokens, row_id=row.get("id")
        )


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    row_id: object,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's token ids through the tokenizer's chat template, up to where the model's answer begins.

    A conversation that ends in an assistant message is continued there (a prefix to complete); any other gets the
    template's generation prompt.

    Args:
        messages: chat messages with a role and a content.
        tokenizer: one with a chat template.
        max_tokens: the longest prompt allowed; None for no limit. Nothing is ever cut.
        row_id: names the row in the error.
        template_kwargs: variables for the chat template, e.g. ``{"enable_thinking": False}``.

    Raises:
        ValueError: no chat template, or the prompt is longer than `max_tokens`: names the row, its length, the budget.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer must have a chat template (tokenizer.chat_template is empty)")
    if not messages:
        raise ValueError(f"messages must not be empty (row {row_id!r})")
    continued = messages[-1]["role"] == "assistant"
    encoded: Any = tokenizer.apply_chat_template(  # its declared type covers every combination of options
        [dict(m) for m in messages],
        tokenize=True,
        return_dict=False,  # transformers 5 returns a mapping by default, 4 the ids
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **(template_kwargs or {}),
    )
    ids = [int(i) for i in encoded]
    if max_tokens is not None and len(ids) > max_tokens:
        raise ValueError(
            f"the prompt of row {row_id!r} has {len(ids)} tokens, more than its budget max_tokens={max_tokens}; "
            "raise the budget or drop the row (prompts are never cut)"
        )
    return ids


def _has_field(template: str, name: str) -> bool:
    return any(field == name for _, field, _, _ in Formatter().parse(template))


def _check_fields(argument: str, template: str, known: set[str], *, required: str) -> None:
    """Only plain ``{name}`` fields: format()'s attributes, indices, conversions and specs stay out."""
    if not isinstance(template, str):
        raise TypeError(f"{argument} must be a string, got {type(template).__name__}")
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{argument} must write a literal brace twice: {error}") from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in known or spec or conversion):
            raise ValueError(
                f"{argument} must use only {', '.join(f'{{{k}}}' for k in sorted(known))}, got {{{field}}}; "
                "a literal brace is written twice"
            )
    if not any(field == required for _, field, _, _ in parts):
        raise ValueError(f"{argument} must have the field {{{required}}}, got {template!r}")


def _of(row: Mapping[str, Any]) -> str:
    return f" (row {row['id']!r})" if "id" in row else ""
