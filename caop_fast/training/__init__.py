"""The training loop and its parts: rollouts, prompt sharing, teacher weights, checkpoints, evaluation."""

from .config import ARMS, TrainConfig
from .evaluate import Evaluation, evaluate
from .loop import TrainResult, train
from .rollouts import Rollout, sample_rollouts
from .step import Method, student_prompts
from .teacher import EmaTeacher

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
