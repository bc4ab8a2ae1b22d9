from __future__ import annotations

import pytest
import torch

from caop_fast.caop import Verdict
from caop_fast.training import TrainConfig
from caop_fast.training.model import backbone
from caop_fast.training.plan import plan_tokens
from caop_fast.training.reading import ValueGrid
from caop_fast.training.rollouts import Rollout
from caop_fast.training.step import (
    Group,
    Sampled,
    accumulate_gradients,
    build_groups,
    sample_and_verify,
    student_prompts,
)


@pytest.fixture
def rollout(ids, tokenizer):
    def make(text: str, prompt_index: int = 0) -> Rollout:
        tokens = ids(text)
        ended = tokens[-1] == tokenizer.eos_token_id
        return Rollout(prompt_index, tokens, ended, tokenizer.decode(tokens, skip_special_tokens=True))

    return make


class TestPlan:
    def plan(self, rollouts, rate, tokenizer, method, arm):
        return plan_tokens(rollouts, [rate] * len(rollouts), tokenizer, arm=arm, style=method.style, stop_ids=[2])

    @pytest.mark.parametrize("arm", ["opd", "caop", "direct", "masked"])
    def test_what_each_arm_trains_on(self, rollout, ids, tokenizer, method, arm):
        sampled = rollout("X Y Confidence: 0.90 <eos>")
        (plan,) = self.plan([sampled], 0.25, tokenizer, method, arm)
        spliced = arm in ("caop", "direct")
        assert plan.ids == ids(f"X Y Confidence: {'0.25' if spliced else '0.90'} <eos>")
        assert plan.value_mask == [False, False, False, True, False]
        on_value = 0.0 if arm in ("direct", "masked") else 1.0
        assert plan.weights == [1.0, 1.0, 1.0, on_value, 1.0]
        assert plan.target == (0.25 if arm == "direct" else None)

    @pytest.mark.parametrize("arm", ["caop", "direct"])
    def test_only_the_value_differs_from_the_sampled_ids(self, rollout, tokenizer, method, arm):
        sampled = rollout("Confidence: 0.10 X Confidence: 0.90 Y <eos>")
        (plan,) = self.plan([sampled], 0.6, tokenizer, method, arm)
        changed = [a != b for a, b in zip(plan.ids, sampled.ids, strict=True)]
        assert changed == plan.value_mask
        assert sum(changed) == 1

    @pytest.mark.parametrize("arm", ["opd", "caop", "direct", "masked"])
    def test_a_cut_completion_has_no_weight_and_no_target(self, rollout, tokenizer, method, arm):
        sampled = rollout("X Y Confidence: 0.90")
        (plan,) = self.plan([sampled], 1.0, tokenizer, method, arm)
        assert plan.ids == sampled.ids
        assert plan.weights == [0.0] * 4
        assert plan.target is None
        assert not any(plan.value_mask)

    def test_any_of_several_end_tokens_ends_a_completion(self, ids, tokenizer, method):
        tokens = ids("X Confidence: 0.90 d")
        sampled = Rollout(0, tokens, True, tokenizer.decode(tokens[:-1]))
        for arm in ("opd", "caop"):
            (plan,) = plan_tokens([sampled], [0.5], tokenizer, arm=arm, style=method.style, stop_ids=[2, tokens[-1]])
            assert plan.value_mask == [False, False, True, False]
            assert plan.ids[-1] == tokens[-1]

    def test_an_answer_without_statement_gets_one_where_the_arm_teaches_it(self, rollout, ids, tokenizer, method):
        sampled = rollout("X Y <eos>")
        assert self.plan([sampled], 0.5, tokenizer, method, "caop")[0].ids == ids("X Y Confidence: 0.50 <eos>")
        opd = self.plan([sampled], 0.5, tokenizer, method, "opd")[0]
        assert opd.ids == sampled.ids
        assert opd.weights == [1.0, 1.0, 1.0]


def test_a_groups_success_rate_is_the_verifiers_mean(model, tokenizer, rows, method):
    config = TrainConfig(prompts_per_step=3, rollouts_per_prompt=7, max_new_tokens=3)
    prompts = student_prompts(rows[:3], tokenizer, 16)
    marks: dict[str, list[float]] = {}

    def verifier(response, row):
        mark = float(len(response) % 3 == 0)
        marks.setdefault(row["id"], []).append(mark)
        return Verdict(mark, None, "")

    marking = type(method)(verifier, method.context, method.style)
    sampled = sample_and_verify(model, tokenizer, rows[:3], prompts, marking, config, seed=0)
    assert sampled.rates == [sum(marks[r["id"]]) / 7 for r in rows[:3]]
    assert 0 < sum(sampled.rates) < 3


def make_groups(rows, tokenizer, method, config, rollout):
    texts = [
        ["X Confidence: 0.90 <eos>", "Y Y Confidence: 0.20 <eos>", "Z Z Z"],
        ["Y X Confidence: 0.50 <eos>", "<eos>", "X Confidence: 1.00 <eos>"],
    ]
    rollouts = [rollout(t, i) for i, group in enumerate(texts) for t in group]
    verdicts = [method.verifier(r.text, rows[r.prompt_index]) for r in rollouts]
    prompts = student_prompts(rows[:2], tokenizer, 16)
    return build_groups(Sampled(rollouts, verdicts, [1 / 3, 0.5], [2]), rows[:2], prompts, tokenizer, method, config)


def test_the_teacher_sees_the_solution_and_the_student_never_does(tokenizer, method, ids, make_model, monkeypatch):
    secret = tokenizer.convert_tokens_to_ids("secret")
    rows = [{"id": i, "prompt": "a b", "answer": ["secret"], "demonstration": "secret"} for i in range(2)]
    config = TrainConfig(arm="caop", prompts_per_step=2, rollouts_per_prompt=2, max_new_tokens=4)
    student, teacher = make_model(0), make_model(1)
    with torch.no_grad():  # the student must not sample the word by chance
        student.model.norm.weight.zero_()
        student.model.embed_tokens.weight[secret] = 0
    seen = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        backbone(model).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
    prompts = student_prompts(rows, tokenizer, 16)
    sampled = sample_and_verify(student, tokenizer, rows, prompts, method, config, seed=0)
    sampled.rollouts[:] = [
        Rollout(r.prompt_index, [t if t != secret else 5 for t in r.ids], r.ended, r.text) for r in sampled.rollouts
    ]
    student_calls = len(seen["student"])
    groups = build_groups(sampled, rows, prompts, tokenizer, method, config)
    accumulate_gradients(student, teacher, groups, tokenizer, ValueGrid.of(tokenizer, method.style, "cpu"), config)
    assert student_calls > 0
    assert len(seen["student"]) > student_calls
    assert not any((x == secret).any() for x in seen["student"][student_calls:])
    assert not any(secret in p for p in prompts)
    assert any((x == secret).any() for x in seen["teacher"])


@pytest.mark.parametrize("arm", ["opd", "caop", "direct", "masked"])
def test_the_note_states_the_success_rate_in_caop_only(rows, tokenizer, method, rollout, ids, arm):
    groups = make_groups(rows, tokenizer, method, TrainConfig(arm=arm), rollout)
    note = " <note> 0.50" if arm == "caop" else ""
    assert groups[1].teacher_prompt == ids(f"<bos> b c <example> Y X{note} <answer>")
    assert groups[1].student_prompt == ids("<bos> b c <answer>")


def straightforward_loss(student, teacher, groups, tokenizer, style, config):
    """The oracle: every sequence alone, full logits, torch's own kl_div and cross entropy, in the models' float64."""
    candidates = torch.tensor([tokenizer.convert_tokens_to_ids(style.number(v)) for v in style.values])
    values = torch.tensor(style.values, dtype=torch.float64)
    divergence, total, direct, n_direct = 0.0, 0.0, 0.0, 0
    for group in groups:
        for plan in group.plans:
            logp = []
            for model, prompt in ((student, group.student_prompt), (teacher, group.teacher_prompt)):
                logits = model(torch.tensor([prompt + plan.ids])).logits[0, len(prompt) - 1 : -1]
                logp.append(torch.log_softmax(logits.double() / config.temperature, -1))
            ls, lt = logp[0], logp[1].detach()
            for j, weight in enumerate(plan.weights):
                beta = config.confidence_beta if plan.value_mask[j] else config.answer_beta
                a, b = (ls[j], lt[j]) if beta == 0 else (lt[j], ls[j])
                divergence += weight * torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum")
                total += any(plan.weights)
                if plan.target is not None and plan.value_mask[j]:
                    inside = ls[j][candidates]
                    q = torch.softmax(inside, 0)
                    direct += (q * (values - plan.target) ** 2).sum() - torch.logsumexp(inside, 0)
                    n_direct += 1
    return divergence / total + (config.direct_weight * direct / n_direct if n_direct else 0.0)


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("arm", ["opd", "caop", "direct", "masked"])
def test_loss_and_gradient_equal_the_straightforward_ones(
    make_model, rows, tokenizer, method, rollout, arm, share_prompt, micro
):
    config = TrainConfig(arm=arm, temperature=1.3, share_prompt=share_prompt, micro_batch_prompts=micro)
    student, teacher = make_model(0), make_model(1)
    groups = make_groups(rows, tokenizer, method, config, rollout)
    expected = straightforward_loss(student, teacher, groups, tokenizer, method.style, config)
    expected.backward()
    reference = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    output = accumulate_gradients(
        student, teacher, groups, tokenizer, ValueGrid.of(tokenizer, method.style, "cpu"), config
    )
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, r in zip(student.parameters(), reference, strict=True):
        assert (p.grad - r).norm() <= 2e-4 * r.norm()
    assert all(p.grad is None for p in teacher.parameters())


def test_what_a_step_reads_off_the_value(make_model, rows, tokenizer, method, rollout):
    config = TrainConfig(arm="opd")
    student, teacher = make_model(0), make_model(1)
    groups: list[Group] = make_groups(rows, tokenizer, method, config, rollout)
    output = accumulate_gradients(
        student, teacher, groups, tokenizer, ValueGrid.of(tokenizer, method.style, "cpu"), config
    )
    candidates = torch.tensor([tokenizer.convert_tokens_to_ids(method.style.number(v)) for v in method.style.values])
    plans = [(g, p) for g in groups for p in g.plans]
    for i, (group, plan) in enumerate(plans):
        if not any(plan.value_mask):
            assert output.expected[i].isnan()
            assert output.confidence_entropy[i].isnan()
            continue
        logits = student(torch.tensor([group.student_prompt + plan.ids])).logits[0, len(group.student_prompt) - 1 :]
        row = logits[plan.value_mask.index(True)].double()
        q = torch.softmax(row[candidates], 0)
        assert output.expected[i] == pytest.approx((q * torch.tensor(method.style.values)).sum().item(), abs=1e-5)
        entropy = torch.distributions.Categorical(logits=row).entropy().item()
        assert output.confidence_entropy[i] == pytest.approx(entropy, abs=1e-5)


def test_a_step_of_cut_completions_only_changes_nothing(model, make_model, rows, tokenizer, method, rollout):
    config = TrainConfig(arm="caop")
    cut = [rollout("X Y", 0), rollout("Z", 1)]
    sampled = Sampled(cut, [method.verifier(r.text, rows[r.prompt_index]) for r in cut], [0.0, 0.0], [2])
    groups = build_groups(sampled, rows[:2], student_prompts(rows[:2], tokenizer, 16), tokenizer, method, config)
    output = accumulate_gradients(
        model, make_model(1), groups, tokenizer, ValueGrid.of(tokenizer, method.style, "cpu"), config
    )
    assert output.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_prompt_over_its_budget_is_an_error_that_names_the_row(rows, tokenizer):
    with pytest.raises(ValueError, match="row2"):
        student_prompts(rows, tokenizer, 4)
