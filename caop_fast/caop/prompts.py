"""The instruction that asks a chat model for its confidence statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from caop_fast.caop.style import ConfidenceStyle


def confidence_instruction(style: ConfidenceStyle) -> str:
    """The instruction: where the statement goes, its exact form, and what its number means."""
    return (
        "After your answer, end with one separate line that gives the probability that this answer is correct. "
        f'Write "{style.label}", a space, and a number from {style.number(0)} (certainly wrong) to {style.number(1)} '
        f"(certainly right) in steps of {style.number(style.step)}; write nothing after it. Of all the answers to "
        "which you give the same number, that share should turn out to be right."
    )


def ask_for_confidence(
    messages: Sequence[Mapping[str, Any]], *, style: ConfidenceStyle, place: Literal["system", "user"] = "user"
) -> list[dict[str, Any]]:
    """A copy of the conversation with `confidence_instruction` at the end of one message's text.

    Args:
        messages: chat messages; each has a role and a content.
        style: the form that is asked for, and later parsed.
        place: "user" (the last user turn) or "system" (the first message, made where there is none).

    Raises:
        ValueError: another `place`, or no user turn.
        TypeError: the message to extend is not text.
    """
    copied = [dict(m) for m in messages]
    if place == "system":
        if not copied or copied[0]["role"] != "system":
            return [{"role": "system", "content": confidence_instruction(style)}, *copied]
        target = copied[0]
    elif place == "user":
        users = [m for m in copied if m["role"] == "user"]
        if not users:
            raise ValueError("messages must hold at least one user turn")
        target = users[-1]
    else:
        raise ValueError(f"place must be 'system' or 'user', got {place!r}")
    if not isinstance(target["content"], str):
        raise TypeError(f"the {place} message must be text, got {type(target['content']).__name__}")
    target["content"] = f"{target['content']}\n\n{confidence_instruction(style)}"
    return copied
