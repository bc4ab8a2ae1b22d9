"""The training loop and its parts: rollouts, prompt sharing, teacher weights, checkpoints, evaluation."""

from caop_fast.training.config import ARMS, TrainConfig
from caop_fast.training.evaluate import Evaluation, evaluate
from caop_fast.training.loop import TrainResult, train
from caop_fast.training.rollouts import Rollout, sample_rollouts
from caop_fast.training.step import Method, student_prompts
from caop_fast.training.teacher_weights import EmaTeacher

__all__ = [
    "ARMS",
    "EmaTeacher",
    "Evaluation",
    "Method",
    "Rollout",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "sample_rollouts",
    "student_prompts",
    "train",
]
