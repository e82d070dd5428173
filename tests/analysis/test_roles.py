"""Experts are told by what a router gives them, whatever their names."""

import pytest

from analysis import roles

NAMES = ("embedding", "reranking", "shared")


def trial(embedding: list[float], reranking: list[float], experts=NAMES) -> dict:
    """Eight steps, of which the first six had it the other way round."""
    early = {"weights_embedding": reranking, "weights_reranking": embedding}
    late = {"weights_embedding": embedding, "weights_reranking": reranking}
    return {"config": {"experts": experts}, "curve": [early] * 6 + [late] * 2}


@pytest.mark.parametrize(
    ("embedding", "reranking", "expected"),
    [
        ([0.6, 0.2, 0.2], [0.2, 0.6, 0.2], ("embedding", "reranking", "other")),
        ([0.1, 0.5, 0.4], [0.4, 0.2, 0.4], ("reranking", "embedding", "other")),
        ([0.0, 0.4, 0.6], [0.0, 0.7, 0.3], ("other", "reranking", "embedding")),
    ],
)
def test_roles_follow_the_last_quarter_of_training(embedding, reranking, expected) -> None:
    told = {**roles.OWN, "other": "the other"}
    found = roles.of_trial(trial(embedding, reranking))
    assert found == {name: told[role] for name, role in zip(NAMES, expected, strict=True)}


def test_without_two_experts_or_weights_of_both_tasks_names_stay() -> None:
    one = {"config": {"experts": ("shared",)}, "curve": [{"weights_embedding": [1.0]}]}
    assert roles.of_trial(one) == {"shared": "shared"}
    alone = {"config": {"experts": NAMES}, "curve": [{"weights_embedding": [0.1, 0.1, 0.8]}]}
    assert roles.of_trial(alone) == {name: name for name in NAMES}
    four = trial([0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], (*NAMES, "fourth"))
    assert list(roles.of_trial(four).values()) == [*roles.OWN.values(), "shared", "fourth"]


def routed(embedding: list[float], reranking: list[float], experts=NAMES, **config) -> dict:
    made = trial(embedding, reranking, experts)
    return {**made, "config": {"router": "sparsegen", **made["config"], **config}}


@pytest.mark.parametrize(
    ("made", "names", "order"),
    [
        (routed([0.6, 0.2, 0.2], [0.2, 0.6, 0.2]), [*roles.OWN.values(), "the other"], [0, 1, 2]),
        # Another seed dealt the roles otherwise: the columns follow.
        (routed([0.0, 0.4, 0.6], [0.0, 0.7, 0.3]), [*roles.OWN.values(), "the other"], [2, 1, 0]),
        (routed([0.2, 0.8], [0.6, 0.4], NAMES[:2]), list(roles.OWN.values()), [1, 0]),
        (routed([0.0, 0.4, 0.6], [0.0, 0.7, 0.3], router="task"), list(NAMES), [0, 1, 2]),
        (routed([0.0, 0.4, 0.6], [0.0, 0.7, 0.3], router_frozen=True), list(NAMES), [0, 1, 2]),
    ],
    ids=["named", "dealt anew", "two", "by task", "frozen"],
)  # fmt: skip
def test_columns_are_in_the_order_of_the_roles(made: dict, names: list, order: list) -> None:
    assert roles.columns(made) == (names, order)
