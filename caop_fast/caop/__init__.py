"""The method, apart from any training loop: confidence prompts, verifiers, token splice, teacher contexts.

Importing this needs neither torch nor transformers; tokenizers are passed in.
"""

from __future__ import annotations

from caop_fast.caop.prompts import ask_for_confidence, confidence_instruction
from caop_fast.caop.splice import Spliced, candidate_ids, locate_confidence, splice_confidence
from caop_fast.caop.statement import answer_text
from caop_fast.caop.style import ConfidenceStyle
from caop_fast.caop.teacher_context import (
    DEFAULT_NOTE,
    DEFAULT_TEMPLATE,
    TeacherContext,
    encode_prompt,
    student_messages,
)
from caop_fast.caop.tools import ToolCalls
from caop_fast.caop.verifiers import MultipleChoice, OneOf, Verdict, Verifier, normalise_text, success_rates

__all__ = [
    "DEFAULT_NOTE",
    "DEFAULT_TEMPLATE",
    "ConfidenceStyle",
    "MultipleChoice",
    "OneOf",
    "Spliced",
    "TeacherContext",
    "ToolCalls",
    "Verdict",
    "Verifier",
    "answer_text",
    "ask_for_confidence",
    "candidate_ids",
    "confidence_instruction",
    "encode_prompt",
    "locate_confidence",
    "normalise_text",
    "splice_confidence",
    "student_messages",
    "success_rates",
]
