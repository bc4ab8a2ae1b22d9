"""One rank of ``test_linear_fsdp.py``: heads that FSDP2 shards; reports as JSON.

The mesh is 2 x 2. "fsdp" is a row of it, two ranks with one sharded copy; "hsdp" is all of it, two copies of two
shards. Both rows run the cases of "fsdp" with data of their own. One process on the tokens of all ranks is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from caop_fast import (
    linear_confidence_loss,
    linear_distillation_loss,
    linear_distillation_rows,
    linear_token_statistics,
    linear_topk_distillation_loss,
)
from helpers.ranks import report
from helpers.sharded_cases import IDS, VALUES

N, H, VOCAB = 7, 6, 29  # 15 and 14 rows
STEPS = 4
MODEL = Qwen3Config(
    vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, use_cache=False,
)  # fmt: skip
Heads = tuple[Any, Any]  # weight and bias


class Rank:
    """This rank's mesh of a kind, the ranks on it, and its own place among them."""

    def __init__(self, kind: str, whole: DeviceMesh) -> None:
        self.mesh = whole["shard"] if kind == "fsdp" else whole
        self.everyone = self.mesh.mesh.flatten().tolist()
        self.mine = dist.get_rank()

    def mean(self, of: Callable[[int], Any]) -> Any:
        """The mean of what ``of`` makes of each rank's data."""
        return sum(of(rank) for rank in self.everyone) / len(self.everyone)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head() -> nn.Linear:
    head = nn.Linear(H, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(normal(1, VOCAB, H) * 0.6)
        head.bias.copy_(normal(2, VOCAB))
    return head


def tokens(rank: int) -> Tensor:
    return normal(100 + rank, N, H).requires_grad_()


def loss_of(way: str, hidden: Tensor, head: Heads, rank: int, **options: Any) -> Tensor:
    """A loss on the tokens of ``rank``; "shared": the student's head is the teacher's, too."""
    weight, bias = head
    labels = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(rank))
    t_hidden = normal(200 + rank, N, H)
    teacher = (t_hidden, weight if way == "shared" else normal(3, VOCAB, H) * 0.6, labels)
    if way == "rows":
        found = linear_distillation_rows(hidden, weight, *teacher, student_bias=bias, beta=0.4, **options)
        return found.divergence.mean() + 0.3 * (found.student_logprob * labels).mean()
    if way == "tokens":
        found = linear_token_statistics(hidden, weight, labels, bias=bias, **options)
        return (found.entropy * labels).mean() - found.logprob.mean()
    if way == "topk":
        logprobs = normal(300 + rank, N, VOCAB).log_softmax(-1).topk(5)
        return linear_topk_distillation_loss(
            hidden, weight, logprobs.indices, logprobs.values, student_bias=bias, **options
        ).loss
    if way == "confidence":
        target = torch.linspace(0, 1, N) / (1 + rank)
        return linear_confidence_loss(hidden, weight, IDS, VALUES, target, bias=bias, **options).loss
    memory = "min" if way == "min" else "balanced"
    return linear_distillation_loss(
        hidden, weight, *teacher, student_bias=bias, beta=0.4, memory=memory, **options
    ).loss


def apart(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-12) -> list[str]:
    if got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        return []
    return [f"{name} is off by {(got - want).abs().max()}, of {want.abs().max()}"]


def gradients(way: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden states, weight and bias on one rank's tokens with a plain head."""
    head, hidden = make_head(), tokens(rank)
    loss = loss_of(way, hidden, (head.weight, head.bias), rank)
    loss.backward()
    return loss.detach(), hidden.grad, head.weight.grad, head.bias.grad


def gradients_placed(parameter: nn.Parameter, want: Tensor, name: str) -> list[str]:
    """The gradient of a distributed parameter lies as the parameter does, each rank's part and the whole."""
    grad = parameter.grad
    if not isinstance(grad, DTensor) or grad.placements != parameter.placements:
        return [f"gradient of {name} is {type(grad).__name__}, placed {getattr(grad, 'placements', None)}"]
    part = distribute_tensor(want, parameter.device_mesh, parameter.placements).to_local()
    return apart(f"gradient of {name}", grad.to_local(), part) + apart(f"whole {name}", grad.full_tensor(), want)


def passed_directly(way: str, at: Rank) -> dict[str, Any]:
    """A head that is an FSDP2 module of its own, its sharded parameters passed to the loss."""
    head, hidden = make_head(), tokens(at.mine)
    fully_shard(head, mesh=at.mesh)
    with CommDebugMode() as forward:
        loss = loss_of(way, hidden, (head.weight, head.bias), at.mine, chunk_size=2)
    with CommDebugMode() as backward:
        loss.backward()
    want, grad_hidden, *_ = gradients(way, at.mine)
    wrong = apart("loss", loss.detach(), want) + apart("gradient of hidden", hidden.grad, grad_hidden)
    means = [at.mean(lambda rank, i=i: gradients(way, rank)[i]) for i in (2, 3)]
    wrong += gradients_placed(head.weight, means[0], "weight") + gradients_placed(head.bias, means[1], "bias")
    first = head.weight.grad.to_local().clone()
    loss_of(way, hidden, (head.weight, head.bias), at.mine).backward()  # gradients accumulate
    wrong += apart("second gradient", head.weight.grad.to_local(), 2 * first)
    return {"trouble": wrong, "forward": told(forward), "backward": told(backward)}


def told(mode: CommDebugMode) -> dict[str, int]:
    """How often each collective was called."""
    return {str(op).rsplit(".", 1)[-1]: n for op, n in mode.get_comm_counts().items()}


class Inside(nn.Module):
    """A root module that computes the loss in its forward, where FSDP2 has its parameters whole."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, way: str, hidden: Tensor, rank: int) -> Tensor:
        return loss_of(way, hidden, (self.head.weight, self.head.bias), rank)


def as_fsdp_does(way: str, at: Rank) -> dict[str, Any]:
    """The same gradients as FSDP2's own, of the same loss in the root's forward."""
    root, head, wrong = Inside(make_head()), make_head(), []
    fully_shard(root, mesh=at.mesh)
    fully_shard(head, mesh=at.mesh)
    root(way, tokens(at.mine), at.mine).backward()
    loss_of(way, tokens(at.mine), (head.weight, head.bias), at.mine).backward()
    for name in ("weight", "bias"):
        ours, theirs = getattr(head, name).grad, getattr(root.head, name).grad
        if ours.placements != theirs.placements:
            wrong.append(f"{name} is placed {ours.placements}, not {theirs.placements}")
        wrong += apart(name, ours.to_local(), theirs.to_local())
    return {"trouble": wrong}


def frozen(at: Rank) -> dict[str, Any]:
    """A head that is not trained: gathered, and nothing comes back."""
    head, hidden = make_head().requires_grad_(False), tokens(at.mine)
    fully_shard(head, mesh=at.mesh)
    with CommDebugMode() as forward:
        loss = loss_of("balanced", hidden, (head.weight, None), at.mine)
    with CommDebugMode() as backward:
        loss.backward()
    plain = tokens(at.mine)
    loss_of("balanced", plain, (make_head().weight, None), at.mine).backward()
    wrong = apart("gradient of hidden", hidden.grad, plain.grad) + (
        ["a gradient"] if head.weight.grad is not None else []
    )
    return {"trouble": wrong, "forward": told(forward), "backward": told(backward)}


def without_gradients(at: Rank) -> dict[str, Any]:
    head = make_head()
    fully_shard(head, mesh=at.mesh)
    with torch.no_grad(), CommDebugMode() as forward:
        loss = loss_of("balanced", tokens(at.mine), (head.weight, head.bias), at.mine)
    wrong = apart("loss", loss, gradients("balanced", at.mine)[0]) + (["a graph"] if loss.requires_grad else [])
    return {"trouble": wrong, "forward": told(forward), "backward": {}}


def two_heads(at: Rank) -> dict[str, Any]:
    """A teacher whose head is sharded as well, and could be trained: it gets nothing."""
    head, teacher, hidden = make_head(), make_head(), tokens(at.mine)
    fully_shard(head, mesh=at.mesh)
    fully_shard(teacher, mesh=at.mesh)
    with CommDebugMode() as forward:
        loss = linear_distillation_loss(hidden, head.weight, normal(200 + at.mine, N, H), teacher.weight).loss
    with CommDebugMode() as backward:
        loss.backward()
    plain, other = make_head().weight, tokens(at.mine)
    want = linear_distillation_loss(other, plain, normal(200 + at.mine, N, H), make_head().weight).loss
    want.backward()
    wrong = apart("loss", loss.detach(), want.detach()) + apart("gradient of hidden", hidden.grad, other.grad)
    wrong += ["a gradient"] if teacher.weight.grad is not None else []
    return {"trouble": wrong, "forward": told(forward), "backward": told(backward)}


def replicated(at: Rank) -> dict[str, Any]:
    """A DTensor that every rank has whole, as data parallelism without shards leaves it."""
    weight = distribute_tensor(make_head().weight.detach(), at.mesh, [Replicate()] * at.mesh.ndim).requires_grad_()
    hidden = tokens(at.mine)
    loss_of("tokens", hidden, (weight, make_head().bias), at.mine).backward()
    want = at.mean(lambda rank: gradients("tokens", rank)[2])
    return {"trouble": apart("gradient", weight.grad.to_local(), want)}


def by_columns(at: Rank) -> dict[str, Any]:
    """Sharded along the features instead of the ids."""
    weight = distribute_tensor(make_head().weight.detach(), at.mesh, [*[Replicate()] * (at.mesh.ndim - 1), Shard(1)])
    weight.requires_grad_()
    loss_of("tokens", tokens(at.mine), (weight, make_head().bias), at.mine).backward()
    return {"trouble": gradients_placed(weight, at.mean(lambda rank: gradients("tokens", rank)[2]), "weight")}


class Student(nn.Module):
    """A small causal language model that computes the loss in its forward."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3Config(**{**MODEL.to_dict(), "tie_word_embeddings": tied})
        self.lm = Qwen3ForCausalLM(config)

    def forward(self, data: dict[str, Any]) -> Tensor:
        hidden = self.lm.model(input_ids=data["ids"]).last_hidden_state
        return distil(hidden, self.lm.lm_head.weight, data)


def distil(hidden: Tensor, weight: Any, data: dict[str, Any]) -> Tensor:
    teacher = (data["teacher_hidden"], normal(4, MODEL.vocab_size, H).float())
    return linear_distillation_loss(
        hidden, weight, *teacher, beta=0.4, weights=data["weights"], reduction=data["reduction"], chunk_size=5
    ).loss


def batch(step: int, rank: int, reduction: str) -> dict[str, Any]:
    """What a rank sees in a step. With "sum" the ranks have unlike numbers of tokens, some of weight 0."""
    rows = 2 + (rank if reduction == "sum" else 0)
    g = torch.Generator().manual_seed(10 * step + rank)
    weights = torch.ones(rows, 5)
    weights[0, 0] = 0 if reduction == "sum" else 1
    ids = torch.randint(0, MODEL.vocab_size, (rows, 5), generator=g)
    teacher_hidden = normal(1000 + 10 * step + rank, rows, 5, H).float()
    return {"ids": ids, "teacher_hidden": teacher_hidden, "weights": weights, "reduction": reduction}


def join(batches: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {k: torch.cat([b[k] for b in batches]) for k in ("ids", "teacher_hidden", "weights")}
    return {**joined, "reduction": batches[0]["reduction"]}


def trains(at: Rank, where: str, reduction: str, tied: bool, optimizer: str) -> dict[str, Any]:
    """Some steps on the ranks' own tokens end where one process on all tokens does."""
    ours, truth = Student(tied), Student(tied)
    root: nn.Module = ours
    for layer in ours.lm.model.layers:
        fully_shard(layer, mesh=at.mesh)
    if where == "outside":  # the head on its own, still sharded when the loss sees it
        fully_shard(ours.lm.lm_head, mesh=at.mesh)
        root = ours.lm.model
    fully_shard(root, mesh=at.mesh)
    make = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4), "sgd": lambda p: torch.optim.SGD(p, lr=2.0)}
    optimizers = [make[optimizer](model.parameters()) for model in (ours, truth)]
    start = truth.lm.lm_head.weight.detach().clone()
    for step in range(STEPS):
        batches = [batch(step, rank, reduction) for rank in at.everyone]
        everything, mine = join(batches), batch(step, at.mine, reduction)
        if reduction == "sum":  # FSDP2 averages over the ranks
            mine["weights"] = mine["weights"] * len(at.everyone) / everything["weights"].sum()
            everything["weights"] = everything["weights"] / everything["weights"].sum()
        if where == "outside":
            hidden = ours.lm.model(input_ids=mine["ids"]).last_hidden_state
            loss = distil(hidden, ours.lm.lm_head.weight, mine)
        else:
            loss = ours(mine)
        for value in (loss, truth(everything)):
            value.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    wrong, expected = [], dict(truth.named_parameters())
    for name, parameter in ours.named_parameters():
        wrong += apart(name, parameter.full_tensor(), expected[name].detach(), 2e-5)
    moved = (truth.lm.lm_head.weight.detach() - start).abs().max()
    return {"trouble": wrong + ([] if moved > 1e-2 else [f"the head moved by {moved} only"])}


def cases(rank: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for kind in ("fsdp", "hsdp"):
        at = Rank(kind, whole)
        for way in ("balanced", "min", "shared", "rows", "tokens", "topk", "confidence"):
            yield f"{kind}-direct-{way}", lambda way=way, at=at: passed_directly(way, at)
        for way in ("balanced", "min", "shared", "tokens"):
            yield f"{kind}-same-{way}", lambda way=way, at=at: as_fsdp_does(way, at)
        for case in (frozen, without_gradients, two_heads, by_columns, *([replicated] if kind == "fsdp" else [])):
            yield f"{kind}-{case.__name__}", lambda case=case, at=at: case(at)
        for where, reduction, tied, optimizer in (
            ("inside", "mean", False, "adamw"),
            ("inside", "sum", True, "sgd"),
            ("outside", "mean", False, "adamw"),
            ("outside", "sum", False, "sgd"),
        ):
            options = (where, reduction, tied, optimizer)
            yield f"{kind}-trains-{where}-{reduction}", lambda at=at, options=options: trains(at, *options)


if __name__ == "__main__":
    report(cases)
