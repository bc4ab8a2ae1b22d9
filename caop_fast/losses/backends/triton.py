"""The losses on the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import caop_kernels
from caop_fast.losses.batches import (
    BinSums,
    Columns,
    ConfidenceBatch,
    ConfidenceGrads,
    ConfidenceRows,
    DistillationBatch,
    DistillationGrads,
    DistillationRows,
    SavedDistillation,
    SavedTokens,
    SavedTopK,
    SoftBatch,
    SoftError,
    TokenBatch,
    TokenGrads,
    TokenRows,
    TopKBatch,
    TopKRows,
)
from caop_fast.losses.options import ConfidenceOptions, DivergenceOptions, TokenOptions, TopKOptions
from caop_fast.losses.outputs import RowStatistics
from caop_fast.losses.reference.divergence import choose_divergence
from caop_kernels.constants import SAVED_FIELDS


class TritonBackend:
    """Implements ``backends.base.Backend``."""

    name = "triton"
    reports_neg_inf = False
    token_saved_fields = SAVED_FIELDS
    saves_confidence = True

    def distillation_rows(
        self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype
    ) -> DistillationRows:
        """From one read of both models' logits; two for an interior divergence. The logits say the dtype."""
        student, teacher = unit_columns(batch.student), unit_columns(batch.teacher)
        beta = options.beta
        asked = ["student_entropy", "teacher_entropy"]
        if batch.labels is not None:
            asked += ["student_logprob", "teacher_logprob"]
        if not isinstance(beta, Tensor) and not options.interior:
            asked.append("forward_kl" if beta == 0 else "reverse_kl")
        found = caop_kernels.row_statistics(
            student,
            teacher,
            batch.labels,
            beta=beta if isinstance(beta, Tensor) else None,
            weights=batch.weights,
            vocab_size=vocab,
            statistics=asked,
            saved_statistics=True,
            **_scalars(options),
        )
        if isinstance(beta, Tensor):
            divergence = found.divergence
        elif options.interior:
            assert found.saved_statistics is not None
            divergence = caop_kernels.mixture_divergence(
                student,
                teacher,
                found.saved_statistics,
                beta=beta,
                n_cols=vocab,
                weights=batch.weights,
                **_scalars(options),
            )
        else:
            divergence = found.forward_kl if beta == 0 else found.reverse_kl
        return _rows(divergence, found)

    def distillation_rows_with_gradient(
        self,
        batch: DistillationBatch,
        options: DivergenceOptions,
        dtype: torch.dtype,
        grad_divergence: Tensor | None,
        out: Tensor,
    ) -> DistillationRows:
        vocab = batch.student.shape[1]
        found = self.distillation_rows(batch, options, vocab, dtype)
        if grad_divergence is not None:
            grads = DistillationGrads(grad_divergence, None, None)
            self.distillation_gradient(batch, options, Columns.whole(vocab), found.saved, grads, out)
        return found

    def distillation_gradient(
        self,
        batch: DistillationBatch,
        options: DivergenceOptions,
        columns: Columns,
        saved: SavedDistillation,
        grads: DistillationGrads,
        out: Tensor | None,
    ) -> Tensor:
        student, teacher, labels, weights = batch
        grad_divergence, grad_logprob, grad_entropy = (_packed(grad, saved.statistics.dtype) for grad in grads)
        coefficients = caop_kernels.distillation_coefficients(
            saved.statistics,
            n_cols=columns.total,
            labels=labels,
            beta=options.beta,
            temperature=options.temperature,
            student_entropy=saved.student_entropy,
            grad_divergence=grad_divergence,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy,
        )
        reads_teacher = grad_divergence is not None
        return _logit_gradient(
            student,
            unit_columns(teacher),
            coefficients,
            out,
            labels=columns.local(labels),
            weights=weights,
            vocab_size=columns.width,
            beta=options.beta if options.interior and reads_teacher else None,
            ratio=reads_teacher and (isinstance(options.beta, Tensor) or options.beta > 0),
            teacher=reads_teacher and (isinstance(options.beta, Tensor) or options.beta == 0),
            log=grad_entropy is not None,
            label=grad_logprob is not None,
            **_scalars(options),
        )

    def row_state(self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype) -> Tensor:
        student, teacher = unit_columns(batch.student), unit_columns(batch.teacher)
        state = caop_kernels.row_state(student, teacher, batch.labels, vocab_size=vocab, **_scalars(options))
        return state.to(dtype)

    def merge_states(self, states: Tensor) -> Tensor:
        return caop_kernels.merge_states(states)

    def finish_state(self, state: Tensor, labels: Tensor | None) -> RowStatistics:
        found = caop_kernels.finish_state(state, labels)
        return RowStatistics(*(getattr(found, name) for name in RowStatistics._fields))

    def finish_distillation(self, state: Tensor, labels: Tensor | None, options: DivergenceOptions) -> DistillationRows:
        found = caop_kernels.finish_state(state, labels)
        return _rows(choose_divergence(options.beta, found.forward_kl, found.reverse_kl), found)

    def finish_tokens(self, state: Tensor, labels: Tensor | None) -> TokenRows:
        return _token_rows(caop_kernels.finish_state(state, labels))

    def mixture_sums(
        self, student: Tensor, teacher: Tensor, options: DivergenceOptions, saved_statistics: Tensor
    ) -> Tensor:
        return caop_kernels.mixture_sums(
            unit_columns(student),
            unit_columns(teacher),
            saved_statistics,
            beta=options.mixture_beta,
            n_cols=student.shape[1],
            **_scalars(options),
        )

    def finish_mixture(self, sums: Tensor, saved_statistics: Tensor, options: DivergenceOptions) -> Tensor:
        return caop_kernels.finish_mixture(sums, saved_statistics, beta=options.mixture_beta)

    def token_rows(self, batch: TokenBatch, options: TokenOptions, vocab: int, dtype: torch.dtype) -> TokenRows:
        found = caop_kernels.row_statistics(
            unit_columns(batch.logits),
            None,
            batch.labels,
            weights=batch.weights,
            temperature=options.temperature,
            student_softcap=options.softcap,
            vocab_size=vocab,
            saved_statistics=True,
        )
        return _token_rows(found)

    def token_gradient(
        self,
        batch: TokenBatch,
        options: TokenOptions,
        columns: Columns,
        saved: SavedTokens,
        grads: TokenGrads,
        out: Tensor | None,
    ) -> Tensor:
        logits, labels, weights = batch
        grad_logprob, grad_entropy, grad_lse = (_packed(grad, saved.statistics.dtype) for grad in grads)
        coefficients = caop_kernels.distillation_coefficients(
            saved.statistics,
            n_cols=columns.total,
            labels=labels,
            temperature=options.temperature,
            student_entropy=saved.entropy,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy,
            grad_lse=grad_lse,
        )
        return _logit_gradient(
            logits,
            None,
            coefficients,
            out,
            labels=columns.local(labels),
            weights=weights,
            temperature=options.temperature,
            student_softcap=options.softcap,
            vocab_size=columns.width,
            log=grad_entropy is not None,
            label=grad_logprob is not None,
        )

    def topk_rows(self, batch: TopKBatch, options: TopKOptions, vocab: int, sorted_ids: Tensor) -> TopKRows:
        found = caop_kernels.topk_statistics(
            unit_columns(batch.student),
            batch.ids,
            batch.logprobs,
            batch.labels,
            sorted_ids=sorted_ids,
            weights=batch.weights,
            vocab_size=vocab,
            **_topk_options(options),
        )
        return TopKRows(*found)

    def topk_gradient(
        self,
        batch: TopKBatch,
        options: TopKOptions,
        vocab: int,
        saved: SavedTopK,
        grads: DistillationGrads,
        out: Tensor | None,
    ) -> Tensor:
        student = unit_columns(batch.student)
        overwrites = out is batch.student or (out is None and student is not batch.student)
        grad_divergence, grad_logprob, grad_entropy = (_packed(grad, saved.statistics.dtype) for grad in grads)
        found = caop_kernels.topk_statistics_gradient(
            student,
            batch.ids,
            batch.logprobs,
            batch.labels,
            saved.statistics,
            saved.student_entropy,
            weights=batch.weights,
            vocab_size=vocab,
            out=student if overwrites else out,
            grad_divergence=grad_divergence,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy,
            **_topk_options(options),
        )
        return found if out is None or found is out else out.copy_(found)

    def confidence_rows(self, batch: ConfidenceBatch, options: ConfidenceOptions, vocab: int) -> ConfidenceRows:
        loss, expected, variance, outside_mass, saved_statistics = caop_kernels.confidence_scores(
            unit_columns(batch.source),
            batch.ids,
            batch.values,
            batch.target,
            weights=batch.weights,
            vocab_size=vocab,
            **options._asdict(),
        )
        saved = None if batch.ids is None else saved_statistics
        return ConfidenceRows(loss, expected, variance, outside_mass, saved)

    def confidence_gradient(
        self,
        batch: ConfidenceBatch,
        options: ConfidenceOptions,
        vocab: int,
        saved_statistics: Tensor | None,
        grads: ConfidenceGrads,
        out: Tensor | None,
    ) -> Tensor:
        return caop_kernels.confidence_scores_gradient(
            unit_columns(batch.source),
            batch.ids,
            batch.values,
            batch.target,
            saved_statistics,
            weights=batch.weights,
            vocab_size=vocab,
            grad_loss=grads.loss,
            grad_expected=grads.expected,
            grad_variance=grads.variance,
            grad_outside=grads.outside_mass,
            out=out,
            **options._asdict(),
        )

    def bin_sums(self, confidence: Tensor, correct: Tensor, edges: Tensor) -> BinSums:
        count, confidences, corrects = caop_kernels.bin_sums(confidence, correct, edges)
        return BinSums(count.to(torch.int64), confidences.clone(), corrects.clone())

    def soft_error(self, batch: SoftBatch) -> SoftError:
        return SoftError(
            *caop_kernels.soft_calibration(
                batch.confidence,
                batch.correct,
                n_bins=batch.n_bins,
                temperature=batch.temperature,
                weights=batch.weights,
            )
        )

    def soft_gradient(self, batch: SoftBatch, signs: Tensor, grad_error: Tensor) -> Tensor:
        return caop_kernels.soft_calibration_gradient(
            batch.confidence,
            batch.correct,
            signs,
            grad_error,
            n_bins=batch.n_bins,
            temperature=batch.temperature,
            weights=batch.weights,
        )


def unit_columns(logits: Tensor) -> Tensor:
    """The logits with unit column stride, which the kernels read; copied only where they have another."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _packed(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if grad is None else grad.to(dtype).contiguous()


def _scalars(options: DivergenceOptions) -> dict[str, Any]:
    return {
        "temperature": options.temperature,
        "student_softcap": options.student_softcap,
        "teacher_softcap": options.teacher_softcap,
    }


def _topk_options(options: TopKOptions) -> dict[str, Any]:
    return {
        "tail": options.tail,
        "beta": options.beta,
        "temperature": options.temperature,
        "student_softcap": options.softcap,
    }


def _rows(divergence: Tensor | None, found: Any) -> DistillationRows:
    """The kernels' row statistics."""
    assert divergence is not None
    return DistillationRows(
        divergence,
        found.student_logprob,
        found.student_entropy,
        found.teacher_logprob,
        found.teacher_entropy,
        found.saved_statistics,
        None,
    )


def _token_rows(found: Any) -> TokenRows:
    """The student's part of the kernels' row statistics."""
    return TokenRows(found.student_logprob, found.student_entropy, found.student_lse, found.saved_statistics)


def _logit_gradient(
    logits: Tensor, teacher: Tensor | None, coefficients: Tensor, out: Tensor | None, /, **options: Any
) -> Tensor:
    """The gradient kernel, for logits of any column stride."""
    unit = unit_columns(logits)
    overwrites = out is logits
    found = caop_kernels.logit_gradient(unit, teacher, coefficients, out=unit if overwrites else out, **options)
    return logits.copy_(found) if overwrites and unit is not logits else found
