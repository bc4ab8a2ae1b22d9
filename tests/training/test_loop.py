from __future__ import annotations

import copy
import json
import math
import os
import signal

import pytest
import torch

from caop_fast.training import TrainConfig, loop, train
from caop_fast.training.checkpoint import guard_interrupt, load_checkpoint, save_atomically
from caop_fast.training.loop import batch_indices, step_seed

# A fast teacher and a high learning rate, so that whatever a checkpoint forgets shows in the weights.
CONFIG = TrainConfig(
    arm="caop",
    steps=4,
    prompts_per_step=3,
    rollouts_per_prompt=4,
    max_new_tokens=10,
    log_every=3,
    warmup_steps=1,
    learning_rate=1e-2,
    ema_rate=0.5,
    seed=2,
)


def leaves(state, path=()):
    """``(path, value)`` of each tensor and plain value in nested dictionaries and lists."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, (*path, key))
    else:
        yield path, state


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(make_model, tokenizer, rows, method):
    runs = []
    for seed in (2, 2, 3):
        config = TrainConfig(**{**CONFIG.to_dict(), "adam_betas": (0.9, 0.95), "seed": seed})
        torch.manual_seed(seed * 17 + len(runs))  # the caller's random state must not matter
        runs.append(weights(train(make_model(), tokenizer, rows, method, config).student))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_run_goes_on_bit_for_bit(make_model, tokenizer, rows, method, tmp_path, stop_after):
    whole = train(make_model(), tokenizer, rows, method, CONFIG)

    def stop(step, loss):
        if step == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, rows, method, CONFIG, out=tmp_path, on_step=stop)
    steps = []
    resumed = train(make_model(9), tokenizer, rows, method, CONFIG, out=tmp_path, on_step=lambda s, _: steps.append(s))
    assert steps == list(range(stop_after + 1, 5))
    assert torch.equal(weights(whole.student), weights(resumed.student))
    assert whole.history == resumed.history
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


def test_ctrl_c_finishes_the_step_and_saves(make_model, tokenizer, rows, method, tmp_path):
    def press(step, loss):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, rows, method, CONFIG, out=tmp_path, on_step=press)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_a_folder_of_another_run_is_refused(make_model, tokenizer, rows, method, tmp_path):
    train(make_model(), tokenizer, rows, method, CONFIG, out=tmp_path)
    other = TrainConfig(**{**CONFIG.to_dict(), "adam_betas": (0.9, 0.95), "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"another configuration \(differs in \['learning_rate'\]\)"):
        train(make_model(), tokenizer, rows, method, other, out=tmp_path)


def test_a_folder_of_a_run_on_other_rows_is_refused(make_model, tokenizer, rows, method, tmp_path):
    train(make_model(), tokenizer, rows, method, CONFIG, out=tmp_path)
    with pytest.raises(ValueError, match="on other rows"):
        train(make_model(), tokenizer, rows[1:], method, CONFIG, out=tmp_path)


def test_dropout_is_part_of_the_seed(make_model, tokenizer, rows, method, tmp_path):
    runs = []
    for k in range(2):
        torch.manual_seed(100 + k)
        model = make_model(attention_dropout=0.3)
        torch.manual_seed(k)
        runs.append(weights(train(model, tokenizer, rows, method, CONFIG).student))
    assert torch.equal(*runs)


def test_sixteen_bit_parameters_are_refused(make_model, tokenizer, rows, method):
    with pytest.raises(TypeError, match=r"float32 parameters, got torch\.bfloat16"):
        train(make_model().bfloat16(), tokenizer, rows, method, CONFIG)


def test_too_few_rows(make_model, tokenizer, rows, method):
    with pytest.raises(ValueError, match="at least prompts_per_step=3 rows, got 2"):
        train(make_model(), tokenizer, rows[:2], method, CONFIG)


def test_every_row_comes_once_an_epoch_in_an_order_that_changes():
    epochs = [[i for step in range(e * 5, e * 5 + 5) for i in batch_indices(20, 4, step, seed=0)] for e in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert batch_indices(20, 4, 0, seed=0) != batch_indices(20, 4, 0, seed=1)


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)


def test_history_windows_cover_every_step(make_model, tokenizer, rows, method):
    history = train(make_model(), tokenizer, rows, method, CONFIG).history
    assert [h["step"] for h in history] == [3, 4]
    assert [h["n"] for h in history] == [3 * 3 * 4, 3 * 4]
    assert max(h["cut_share"] for h in history) > 0
    json.dumps(history, allow_nan=False)


def test_distillation_brings_the_student_to_its_teacher(make_model, tokenizer, rows, method):
    """With a frozen teacher the divergence on the student's own samples must fall."""
    config = TrainConfig(
        arm="opd",
        steps=120,
        prompts_per_step=5,
        rollouts_per_prompt=8,
        max_new_tokens=5,
        ema_rate=0.0,
        learning_rate=1e-2,
    )
    losses, student = [], make_model()
    with torch.no_grad():  # contexts must matter for the teacher to differ from the student
        for p in student.parameters():
            p.mul_(2.0 if p.ndim == 2 else 1.0)
    train(student, tokenizer, rows, method, config, on_step=lambda step, loss: losses.append(loss))
    assert sum(losses[-10:]) < 0.65 * sum(losses[:10])


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local"):
        save_atomically({"step": 2, "bad": lambda: None}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_the_second_ctrl_c_acts_at_once():
    with guard_interrupt() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            guard.check()


@pytest.fixture
def spoil():
    """Make one backward or one training forward of a student give a number that is not finite."""

    def spoil_gradient(student, at_step, number):
        calls = []

        def hook(gradient):
            calls.append(1)
            return gradient.index_fill(0, torch.tensor([0]), number) if len(calls) == at_step else gradient

        return student.model.layers[1].mlp.up_proj.weight.register_hook(hook)

    def spoil_forward(student, at_step, number):
        calls = []

        def hook(module, arguments, output):
            if torch.is_grad_enabled():  # neither the rollouts nor the teacher
                calls.append(1)
            return output * number if torch.is_grad_enabled() and len(calls) == 2 * at_step else output

        return student.model.norm.register_forward_hook(hook)  # called twice a step: for prompts and completions

    return {"gradient": spoil_gradient, "loss": spoil_forward}


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(make_model, tokenizer, rows, method, tmp_path, spoil, what, number):
    config = TrainConfig(**{**CONFIG.to_dict(), "adam_betas": (0.9, 0.95), "checkpoint_every": 1})
    whole = train(make_model(), tokenizer, rows, method, config)
    student, seen = make_model(), []
    hook = spoil[what](student, 3, number)
    with pytest.raises(FloatingPointError, match=r"step 3.*not finite") as error:
        train(student, tokenizer, rows, method, config, out=tmp_path, on_step=lambda s, _: seen.append(s))
    assert seen == [1, 2]
    assert ("layers.1.mlp.up_proj" if what == "gradient" else "embed_tokens") in str(error.value)
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == 2
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, saved["student"][name]), name
    assert all(p.grad is None for p in student.parameters())
    hook.remove()
    resumed = train(make_model(9), tokenizer, rows, method, config, out=tmp_path)  # teacher and optimizer, too
    assert torch.equal(weights(whole.student), weights(resumed.student))
    assert whole.history == resumed.history


def test_a_spoilt_step_leaves_teacher_optimizer_and_schedule_alone(make_model, tokenizer, rows, method, monkeypatch):
    """What a caller holds on to, not only what is on disk."""
    runs, states = [], []

    class Watched(loop._Run):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(self)

        def finish_step(self):
            super().finish_step()
            states.append(copy.deepcopy(self.state()))

    monkeypatch.setattr(loop, "_Run", Watched)
    student, calls = make_model(), []

    def hook(gradient):
        calls.append(1)
        return gradient * (math.nan if len(calls) == 3 else 1.0)

    student.lm_head.weight.register_hook(hook)
    with pytest.raises(FloatingPointError):
        train(student, tokenizer, rows, method, CONFIG)
    assert len(states) == 2
    before, after = dict(leaves(states[-1])), dict(leaves(runs[0].state()))
    assert before.keys() == after.keys()
    for path, value in before.items():
        same = torch.equal(value, after[path]) if isinstance(value, torch.Tensor) else repr(value) == repr(after[path])
        assert same, path
