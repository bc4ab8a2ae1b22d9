"""The cases of a training step: published model shapes, prompts and rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.records import Record, Shape


@dataclass(frozen=True)
class Architecture:
    """A published Qwen3 configuration."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    eos: int
    pad: int


MODELS = {
    "Qwen3-0.6B": Architecture(
        hidden=1024, layers=28, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocab=151936, tied=True,
        eos=151645, pad=151643,
    ),
    "Qwen3-8B": Architecture(
        hidden=4096, layers=36, intermediate=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936, tied=False,
        eos=151645, pad=151643,
    ),
    "small": Architecture(  # not published: for tests
        hidden=32, layers=2, intermediate=48, heads=4, kv_heads=2, head_dim=8, vocab=211, tied=True, eos=1, pad=0
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """One step.

    Attributes:
        model: one of ``MODELS``.
        layers: how many the models are given.
        prompts, rollouts: prompts in a step, and rollouts of each.
        prompt_tokens, teacher_prompt_tokens: of the longest prompt; the shortest has three quarters of it.
        new_tokens: of each rollout, unless it ends before, which random weights hardly ever do.
        dtype: "float32" or "bfloat16", of weights, gradients and optimizer state.
        beta: of the divergence.
    """

    model: str
    layers: int
    prompts: int
    rollouts: int
    prompt_tokens: int
    teacher_prompt_tokens: int
    new_tokens: int
    dtype: str
    beta: float = 0.0

    @property
    def name(self) -> str:
        """Unique within the suite."""
        parts = [self.model, f"layers={self.layers}", f"rollouts={self.prompts}x{self.rollouts}x{self.new_tokens}"]
        parts += [f"prompts={self.prompt_tokens}/{self.teacher_prompt_tokens}", self.dtype]
        return " ".join([*parts, f"beta={self.beta:g}"] if self.beta else parts)

    @property
    def architecture(self) -> Architecture:
        return MODELS[self.model]

    def record(self, impl: str) -> Record:
        """The record of an implementation, nothing measured yet."""
        a = self.architecture
        shape = Shape(
            self.model,
            self.dtype,
            n=self.prompts * self.rollouts * self.new_tokens,
            v=a.vocab,
            h=a.hidden,
            beta=self.beta,
            head_trained=True,
        )
        extra = {
            "layers": self.layers,
            "layers_published": a.layers,
            "prompts": self.prompts,
            "rollouts": self.rollouts,
            "prompt_tokens": self.prompt_tokens,
            "teacher_prompt_tokens": self.teacher_prompt_tokens,
            "new_tokens": self.new_tokens,
        }
        return Record("step", self.name, impl, shape=shape, extra=extra)


TINY = StepCase("small", 2, 3, 2, 8, 16, 6, "float32")
QUICK = StepCase("Qwen3-0.6B", 1, 2, 4, 24, 48, 4, "float32")
CPU = StepCase("Qwen3-0.6B", 2, 4, 4, 64, 128, 16, "float32")
GPU = (
    StepCase("Qwen3-0.6B", 28, 4, 8, 256, 512, 128, "bfloat16"),
    StepCase("Qwen3-8B", 4, 4, 8, 256, 512, 128, "bfloat16"),
    StepCase("Qwen3-0.6B", 28, 16, 8, 128, 256, 128, "bfloat16"),
    StepCase("Qwen3-8B", 4, 8, 8, 256, 512, 128, "bfloat16"),
)
SELECTIONS = {"gpu": GPU, "cpu": (CPU,), "quick": (QUICK,), "tiny": (TINY,)}
