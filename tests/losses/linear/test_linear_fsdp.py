"""The linear losses with heads that FSDP2 shards, against one process that sees the tokens of all ranks.

``fsdp_runs.py`` runs all cases in one go, on four ranks; the tests look at what each rank found. "fsdp" is a mesh of
two ranks, "hsdp" one of 2 x 2: two copies of two shards.
"""

from __future__ import annotations

import pytest

from helpers.ranks import Found, healthy, run

WAYS = ("balanced", "min", "shared", "rows", "tokens", "topk", "confidence")
KINDS = ("fsdp", "hsdp")
TRAINING = ("inside-mean", "inside-sum", "outside-mean", "outside-sum")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("helpers.fsdp_runs", 4, tmp_path_factory.mktemp("fsdp"))


def exchanged(found: Found, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of the forward and of the backward, the same on all ranks; HSDP's sums over copies left out."""
    ranks = healthy(found, name)
    assert all((rank["forward"], rank["backward"]) == (ranks[0]["forward"], ranks[0]["backward"]) for rank in ranks)
    forward, backward = ranks[0]["forward"], dict(ranks[0]["backward"])
    copies = backward.pop("all_reduce", 0)
    assert copies == (backward.get("reduce_scatter_tensor", 0) if name.startswith("hsdp") else 0)
    return forward, backward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_head_passed_to_the_loss(found, kind, way):
    """Weight and bias are gathered once each, whatever the chunks and heads, and their gradients averaged once."""
    assert exchanged(found, f"{kind}-direct-{way}") == ({"all_gather_into_tensor": 2}, {"reduce_scatter_tensor": 2})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS[:3], "tokens"])
def test_the_gradients_are_those_of_fsdp2(found, kind, way):
    healthy(found, f"{kind}-same-{way}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("case", "gathers", "scatters"), [("frozen", 1, 0), ("without_gradients", 2, 0), ("two_heads", 2, 1)]
)
def test_what_is_not_trained_gets_nothing(found, kind, case, gathers, scatters):
    expected = {"reduce_scatter_tensor": scatters} if scatters else {}
    assert exchanged(found, f"{kind}-{case}") == ({"all_gather_into_tensor": gathers}, expected)


@pytest.mark.parametrize("case", ["fsdp-replicated", "fsdp-by_columns", "hsdp-by_columns"])
def test_other_placements(found, case):
    healthy(found, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TRAINING)
def test_training_ends_where_one_process_does(found, kind, case):
    """The loss in the root's forward, and on a head that is an FSDP2 module of its own; tied embeddings with "sum"."""
    healthy(found, f"{kind}-trains-{case}")
