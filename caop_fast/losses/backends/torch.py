"""The losses in plain PyTorch: the definitions in ``reference/`` over blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from caop_fast.losses import checks
from caop_fast.losses.backends.masked_rows import UnmaskedRows
from caop_fast.losses.backends.row_blocks import row_blocks, take
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
from caop_fast.losses.reference import bins, confidence, divergence, states, tokens, topk

STATE_ARRAYS = 4  # states are made in float64 and of more arrays than anything else: blocks are smaller


class TorchBackend:
    """Implements ``backends.base.Backend``."""

    name = "torch"
    reports_neg_inf = True
    token_saved_fields = 2
    saves_confidence = False

    def distillation_rows(
        self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype
    ) -> DistillationRows:
        unmasked = UnmaskedRows.of(batch.weights, batch.student.shape[0])
        found, has_neg_inf = [], False
        for rows in unmasked.blocks(vocab, batch.student.device):
            opened = divergence.open_statistics(
                batch.student[rows, :vocab],
                batch.teacher[rows, :vocab],
                take(batch.labels, rows),
                options.rows(rows),
                dtype,
                consume=isinstance(rows, Tensor),  # an index makes a copy, which is ours
            )
            found.append(opened.statistics)
            has_neg_inf |= opened.has_neg_inf
        return _joined(found, unmasked, has_neg_inf)

    def distillation_rows_with_gradient(
        self,
        batch: DistillationBatch,
        options: DivergenceOptions,
        dtype: torch.dtype,
        grad_divergence: Tensor | None,
        out: Tensor,
    ) -> DistillationRows:
        """Statistics and gradient from the same exponentials. Overwrites both models' logits in any case."""
        student, teacher = batch.student, batch.teacher
        n_rows, vocab = student.shape
        found, any_neg_inf = [], False
        for rows in row_blocks(n_rows, vocab, student.device, None):
            chosen, labels = options.rows(rows), take(batch.labels, rows)
            opened = divergence.open_statistics(
                student[rows],
                teacher[rows],
                labels,
                chosen,
                dtype,
                consume=True,
                slope=grad_divergence is not None and options.student_softcap is not None,
            )
            found.append(opened.statistics)
            any_neg_inf |= opened.has_neg_inf
            if grad_divergence is None:
                continue
            grad = grad_divergence[rows].view(-1, 1) / options.temperature
            coefficients = divergence.coefficients(opened.statistics, chosen, labels, vocab, grad_divergence=grad)
            if coefficients is None:
                continue
            gradient = divergence.logit_gradient(
                opened.block, opened.statistics, coefficients, labels, chosen, has_neg_inf=opened.has_neg_inf
            )
            if gradient.data_ptr() != out[rows].data_ptr():
                out[rows] = gradient
        return _joined(found, UnmaskedRows(n_rows, None, None), any_neg_inf)  # the caller masks

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
        dtype = saved.statistics.dtype
        upstream = [_column(grad, dtype, options.temperature) for grad in grads]
        gradient = _gradient_like(student, out)
        local = columns.local(labels)
        unmasked = UnmaskedRows.of(weights, student.shape[0])
        # On an accelerator looking would make the host wait; without the flag (columns of a state) each block is asked.
        known_neg_inf = None if saved.has_neg_inf is None else student.device.type != "cpu" or bool(saved.has_neg_inf)
        for rows in unmasked.blocks(columns.width, student.device):
            known = _known_statistics(saved, rows)
            chosen = options.rows(rows)
            block, *_ = divergence.open_block(
                student[rows, : columns.width],
                teacher[rows, : columns.width],
                chosen,
                dtype,
                known=known,
                consume=isinstance(rows, Tensor),
                slope=options.student_softcap is not None,
            )
            given = (take(grad, rows) for grad in upstream)
            names = ("grad_divergence", "grad_logprob", "grad_entropy")
            found = divergence.coefficients(
                known, chosen, take(labels, rows), columns.total, **dict(zip(names, given, strict=True))
            )
            if found is None:
                gradient[rows, : columns.width] = 0
                continue
            has_neg_inf = divergence.contains_neg_inf(block) if known_neg_inf is None else known_neg_inf
            part = divergence.logit_gradient(block, known, found, take(local, rows), chosen, has_neg_inf=has_neg_inf)
            gradient[rows, : columns.width] = part.to(gradient.dtype)
        return _blank(gradient, columns.width, unmasked, weights)

    def row_state(self, batch: DistillationBatch, options: DivergenceOptions, vocab: int, dtype: torch.dtype) -> Tensor:
        student, teacher, labels, _ = batch
        blocks = [
            states.row_state(student[rows, :vocab], teacher[rows, :vocab], take(labels, rows), options, dtype)
            for rows in row_blocks(student.shape[0], STATE_ARRAYS * max(vocab, 1), student.device, None)
        ]
        return torch.cat(blocks, dim=1)

    def merge_states(self, states_: Tensor) -> Tensor:
        return states.merge_states(states_)

    def finish_state(self, state: Tensor, labels: Tensor | None) -> RowStatistics:
        return states.finish_state(state, labels)

    def finish_distillation(self, state: Tensor, labels: Tensor | None, options: DivergenceOptions) -> DistillationRows:
        found = states.finish_state(state, labels)
        return DistillationRows(
            divergence.choose_divergence(options.beta, found.forward_kl, found.reverse_kl),
            found.student_logprob,
            found.student_entropy,
            found.teacher_logprob,
            found.teacher_entropy,
            states.saved_statistics(state),
            None,
        )

    def finish_tokens(self, state: Tensor, labels: Tensor | None) -> TokenRows:
        found = states.finish_state(state, labels)
        saved = states.saved_statistics(state)[[0, 2]]
        return TokenRows(found.student_logprob, found.student_entropy, found.student_lse, saved)

    def mixture_sums(
        self, student: Tensor, teacher: Tensor, options: DivergenceOptions, saved_statistics: Tensor
    ) -> Tensor:
        sums = []
        for rows in row_blocks(student.shape[0], student.shape[1], student.device, None):
            saved = SavedDistillation(saved_statistics, saved_statistics[0], None)  # the entropy is not read
            known = _known_statistics(saved, rows)
            block, *_ = divergence.open_block(
                student[rows], teacher[rows], options, saved_statistics.dtype, known=known
            )
            sums.append(divergence.mixture_sums(block, known.log_ratio, options).squeeze(-1))
        return torch.cat(sums, 1).unsqueeze(0)

    def finish_mixture(self, sums: Tensor, saved_statistics: Tensor, options: DivergenceOptions) -> Tensor:
        found, mean_ratio = divergence.finish_mixture(sums.sum(0), saved_statistics[2:4], options)
        saved_statistics[5] = mean_ratio
        return found

    def token_rows(self, batch: TokenBatch, options: TokenOptions, vocab: int, dtype: torch.dtype) -> TokenRows:
        logits, labels, weights = batch
        unmasked = UnmaskedRows.of(weights, logits.shape[0])
        blocks = [
            tokens.token_statistics(
                logits[rows, :vocab], take(labels, rows), options, dtype, consume=isinstance(rows, Tensor)
            )
            for rows in unmasked.blocks(vocab, logits.device)
        ]
        join = unmasked.join
        return TokenRows(
            unmasked.join_optional(block.logprob for block in blocks),
            join(block.entropy for block in blocks),
            join(block.lse for block in blocks),
            torch.stack([join(block.shift for block in blocks), join(block.total for block in blocks)]),
        )

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
        upstream = [_column(grad, saved.statistics.dtype) for grad in grads]
        gradient = _gradient_like(logits, out)
        local = columns.local(labels)
        unmasked = UnmaskedRows.of(weights, logits.shape[0])
        for rows in unmasked.blocks(columns.width, logits.device):
            shift, total = (column[rows].view(-1, 1) for column in saved.statistics)
            part = tokens.token_gradient(
                logits[rows, : columns.width],
                options,
                tokens.KnownTokens(shift, total, saved.entropy[rows].view(-1, 1)),
                tokens.BlockLabels(take(labels, rows), take(local, rows), columns.total),
                TokenGrads(*(take(grad, rows) for grad in upstream)),
                consume=isinstance(rows, Tensor),
            )
            gradient[rows, : columns.width] = part.to(gradient.dtype)
        return _blank(gradient, columns.width, unmasked, weights)

    def topk_rows(self, batch: TopKBatch, options: TopKOptions, vocab: int, sorted_ids: Tensor) -> TopKRows:
        student, ids, logprobs, labels, weights = batch
        dtype = checks.statistics_dtype((student, logprobs))
        n_rows = student.shape[0]
        unmasked = UnmaskedRows.of(weights, n_rows)
        found: list[topk.Statistics] = []
        totals: list[Tensor] = []
        for rows in unmasked.blocks(vocab, student.device):
            listed = topk.list_teacher(ids[rows], logprobs[rows], vocab, dtype)
            block, chosen = student[rows, :vocab], options.rows(rows)
            opened = topk.open_rows(block, listed, chosen, dtype)
            bad = topk.bad_lists(sorted_ids[rows], vocab)
            statistics, saved = topk.row_statistics(opened, block, listed, bad, take(labels, rows), chosen)
            found.append(statistics)
            totals.append(torch.cat(saved, -1))
        return TopKRows(
            unmasked.join(block.divergence for block in found),
            unmasked.join_optional(block.student_logprob for block in found),
            unmasked.join(block.student_entropy for block in found),
            unmasked.join_optional(block.teacher_logprob for block in found),
            unmasked.join(block.teacher_entropy for block in found),
            torch.stack([unmasked.scatter(column) for column in torch.cat(totals).t()]),
        )

    def topk_gradient(
        self,
        batch: TopKBatch,
        options: TopKOptions,
        vocab: int,
        saved: SavedTopK,
        grads: DistillationGrads,
        out: Tensor | None,
    ) -> Tensor:
        student, ids, logprobs, labels, weights = batch
        dtype = saved.statistics.dtype
        upstream = [_column(grad, dtype, options.temperature) for grad in grads]
        gradient = _gradient_like(student, out)
        unmasked = UnmaskedRows.of(weights, student.shape[0])
        for rows in unmasked.blocks(vocab, student.device):
            listed = topk.list_teacher(ids[rows], logprobs[rows], vocab, dtype)
            chosen = options.rows(rows)
            opened = topk.open_rows(student[rows, :vocab], listed, chosen, dtype, slope=options.softcap is not None)
            grad_divergence, grad_logprob, grad_entropy = (take(grad, rows) for grad in upstream)
            part = topk.logit_gradient(
                opened,
                topk.SavedStatistics(*saved.statistics[:, rows].unsqueeze(-1)),
                saved.student_entropy[rows].view(-1, 1),
                listed,
                take(labels, rows),
                chosen,
                grad_divergence=grad_divergence,
                grad_logprob=grad_logprob,
                grad_entropy=grad_entropy,
            )
            gradient[rows, :vocab] = part.to(gradient.dtype)
        return _blank(gradient, vocab, unmasked, weights)

    def confidence_rows(self, batch: ConfidenceBatch, options: ConfidenceOptions, vocab: int) -> ConfidenceRows:
        source, ids, values, target, weights = batch
        dtype = checks.statistics_dtype((source,))
        unmasked = UnmaskedRows.of(weights, source.shape[0])
        found = []
        for rows in unmasked.blocks(vocab, source.device):
            if ids is None:
                log_p = source[rows].to(dtype)
            else:
                log_p = confidence.candidate_log_p(confidence.open_rows(source[rows, :vocab], options, dtype), ids)
            found.append(confidence.scores(log_p, values, target[rows], options))
        loss, expected, variance, outside_mass = (unmasked.join(parts) for parts in zip(*found, strict=True))
        return ConfidenceRows(loss, expected, variance, outside_mass, None)

    def confidence_gradient(
        self,
        batch: ConfidenceBatch,
        options: ConfidenceOptions,
        vocab: int,
        saved_statistics: Tensor | None,
        grads: ConfidenceGrads,
        out: Tensor | None,
    ) -> Tensor:
        source, ids, values, target, weights = batch
        dtype = values.dtype
        gradient = _gradient_like(source, out)
        unmasked = UnmaskedRows.of(weights, source.shape[0])
        for rows in unmasked.blocks(vocab, source.device):
            upstream = ConfidenceGrads(*(take(grad, rows) for grad in grads))
            if ids is None:
                part = confidence.logprob_gradient(source[rows].to(dtype), values, target[rows], options, upstream)
            else:
                opened = confidence.open_rows(source[rows, :vocab], options, dtype, slope=options.softcap is not None)
                part = confidence.logit_gradient(opened, ids, values, target[rows], options, upstream)
            gradient[rows, :vocab] = part.to(gradient.dtype)
        return _blank(gradient, vocab, unmasked, weights)

    def bin_sums(self, confidence: Tensor, correct: Tensor, edges: Tensor) -> BinSums:
        n_bins = edges.numel() - 1
        sums = edges.new_zeros(3, n_bins)
        for rows in row_blocks(confidence.shape[0], n_bins, confidence.device, None):
            sums += bins.bin_sums(confidence[rows].double(), correct[rows].double(), edges)
        count, confidences, corrects = sums
        return BinSums(count.to(torch.int64), confidences.clone(), corrects.clone())

    def soft_error(self, batch: SoftBatch) -> SoftError:
        dtype = checks.statistics_dtype((batch.confidence,))
        sums = batch.confidence.new_zeros(batch.n_bins + 1, dtype=dtype)
        for _, cleaned in _cleaned_blocks(batch, dtype):
            sums += bins.soft_sums(cleaned, batch.n_bins, batch.temperature)
        return SoftError(*bins.soft_error(sums))

    def soft_gradient(self, batch: SoftBatch, signs: Tensor, grad_error: Tensor) -> Tensor:
        out = torch.empty_like(batch.confidence, memory_format=torch.contiguous_format)
        for rows, cleaned in _cleaned_blocks(batch, signs.dtype):
            gradient = grad_error * bins.soft_gradient(cleaned, signs, batch.temperature)
            out[rows] = torch.where(cleaned.weight == 0, 0.0, gradient).to(out.dtype)
        return out


def _joined(blocks: list[divergence.RowStatistics], unmasked: UnmaskedRows, has_neg_inf: bool) -> DistillationRows:
    """Statistics of blocks of rows in one."""
    join = unmasked.join
    log_ratio = join(block.log_ratio for block in blocks)
    mean_ratio = unmasked.join_optional(block.mean_ratio for block in blocks)
    saved = (
        join(block.student_shift for block in blocks),
        join(block.teacher_shift for block in blocks),
        join(block.student_total for block in blocks),
        join(block.teacher_total for block in blocks),
        log_ratio,
        torch.zeros_like(log_ratio) if mean_ratio is None else mean_ratio,
    )
    return DistillationRows(
        join(block.divergence for block in blocks),
        unmasked.join_optional(block.student_logprob for block in blocks),
        join(block.student_entropy for block in blocks),
        unmasked.join_optional(block.teacher_logprob for block in blocks),
        join(block.teacher_entropy for block in blocks),
        torch.stack(saved),
        torch.full((1,), has_neg_inf, dtype=torch.bool, device=log_ratio.device),
    )


def _known_statistics(saved: SavedDistillation, rows: slice | Tensor) -> divergence.RowStatistics:
    """The statistics a gradient reads, [R, 1] each, as ``_joined`` saved them."""
    student_shift, teacher_shift, student_total, teacher_total, log_ratio, mean_ratio = (
        column[rows].view(-1, 1) for column in saved.statistics
    )
    entropy = saved.student_entropy[rows].view(-1, 1)
    return divergence.RowStatistics(
        student_shift=student_shift,
        teacher_shift=teacher_shift,
        student_total=student_total,
        teacher_total=teacher_total,
        log_ratio=log_ratio,
        divergence=mean_ratio,  # not read
        mean_ratio=mean_ratio,
        student_entropy=entropy,
        teacher_entropy=entropy,  # not read
        student_logprob=None,
        teacher_logprob=None,
    )


def _column(grad: Tensor | None, dtype: torch.dtype, divisor: float = 1.0) -> Tensor | None:
    """An upstream gradient [N] as a column [N, 1] in ``dtype``, divided."""
    return None if grad is None else grad.to(dtype).reshape(-1, 1) / divisor


def _gradient_like(logits: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out


def _blank(gradient: Tensor, width: int, unmasked: UnmaskedRows, weights: Tensor | None) -> Tensor:
    """Zero gradient past the columns compared, and in rows of weight 0."""
    gradient[:, width:] = 0
    if unmasked.mask is not None:
        gradient.masked_fill_(unmasked.mask.view(-1, 1), 0)
    elif unmasked.kept is not None and weights is not None:
        gradient.index_fill_(0, (weights == 0).nonzero().view(-1), 0)
    return gradient


def _cleaned_blocks(batch: SoftBatch, dtype: torch.dtype) -> Iterator[tuple[slice | Tensor, bins.CleanedRows]]:
    confidence, correct, weights, n_bins, _ = batch
    for rows in row_blocks(confidence.shape[0], n_bins, confidence.device, None):
        yield rows, bins.clean(confidence[rows], correct[rows], take(weights, rows), dtype)
