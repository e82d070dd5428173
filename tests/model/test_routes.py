"""Routers of the comparison: Tsallis, entmax-1.5, similarity, a frozen one at random."""

import math

import pytest
import torch

from kernels.entmax import entmax15
from model.router import (
    SIMILARITY,
    TSALLIS_THRESHOLD,
    Router,
    RouterConfig,
    route_tsallis,
    tsallis_entropy,
)

EXPERTS = ("embedding", "reranking", "shared")
PAIR = EXPERTS[:2]


def router(config: RouterConfig, experts: tuple[str, ...] = EXPERTS, features: int = 8) -> Router:
    torch.manual_seed(0)
    return Router(features, experts, config).eval()


def test_tsallis_entropy_has_its_closed_values() -> None:
    """ln_q of the count for uniform p, 0 for one-hot; the paper's most, for 8 experts, is 1.877."""
    for experts, most in ((3, 1.040), (8, 1.877)):
        found = tsallis_entropy(torch.full((1, experts), 1 / experts, dtype=torch.float64)).item()
        assert found == pytest.approx((1 - experts ** (1 - 1.1)) / 0.1, abs=1e-12)
        assert found == pytest.approx(most, abs=5e-4)
    assert tsallis_entropy(torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)


def test_tsallis_is_soft_where_undecided_and_cuts_where_sure() -> None:
    made = router(RouterConfig("tsallis"))
    tasks = torch.zeros(1, dtype=torch.int64)

    def routed(*p: float) -> list[float]:
        return route_tsallis(made, torch.tensor([p]).log(), tasks)[0].tolist()

    assert routed(0.4, 0.35, 0.25) == pytest.approx([0.4, 0.35, 0.25])
    assert routed(0.03, 0.94, 0.03) == pytest.approx([0, 1, 0])  # the first alone exceeds 0.75
    p = torch.tensor([[0.74, 0.005, 0.255]])
    most = tsallis_entropy(torch.full((1, 3), 1 / 3)).item()
    assert tsallis_entropy(p).item() > TSALLIS_THRESHOLD * most  # still undecided
    assert routed(*p[0].tolist()) == pytest.approx(p[0].tolist())
    penalty = made.penalty
    assert penalty is not None and penalty.item() == pytest.approx(
        tsallis_entropy(p).item(), rel=1e-4
    )


def test_tsallis_gradient_is_that_of_the_renormalised_softmax() -> None:
    made = router(RouterConfig("tsallis"))
    u = torch.tensor([[6.0, 1.0, 0.5, 5.9], [0.3, 0.1, 0.2, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: route_tsallis(made, x, torch.zeros(2, dtype=torch.int64)), (u.requires_grad_(),)
    )


def test_entmax_of_nan_is_nan() -> None:
    """So that the step fails with the batch's name, not with an index."""
    u = torch.tensor([[1.0, 2.0, 0.5], [float("nan"), 0.0, 1.0]])
    p = entmax15(u)
    assert p[0].sum() == pytest.approx(1) and p[1].isnan().any()


def test_entmax_router() -> None:
    made = router(RouterConfig("entmax15"))
    x = torch.randn(5, 8)
    assert torch.equal(made(x, torch.zeros(5, dtype=torch.int64)), entmax15(made.logits(x)))


def pilots(made: Router, rows: list[list[list[float]]]) -> Router:
    with torch.no_grad():
        made.pilots.copy_(torch.tensor(rows))
    return made


@pytest.mark.parametrize("kind", SIMILARITY)
def test_similarity_readings_differ_as_published(kind: str) -> None:
    """One very close pilot beats by its maximum, two fairly close ones by their mean."""
    made = pilots(
        router(RouterConfig(kind, pilots=2), PAIR, 2),
        [[[1.0, 0.0], [-1.0, 0.2]], [[0.8, 0.6], [0.8, -0.6]]],
    )
    weights = made(torch.tensor([[5.0, 0.0]]), torch.zeros(1, dtype=torch.int64))
    assert weights.tolist() == ([[0, 1]] if kind == "similarity-mean" else [[1, 0]])


def test_similarity_does_not_look_at_the_task_nor_at_the_length() -> None:
    made = pilots(router(RouterConfig("similarity-max", pilots=1), PAIR, 2), [[[1, 0]], [[0, 1]]])
    x = torch.tensor([[3.0, 1.0], [0.3, 0.1], [0.1, 3.0]])
    for task in (0, 1):
        weights = made(x, torch.full((3,), task))
        assert weights.argmax(1).tolist() == [0, 0, 1] and (weights.sum(1) == 1).all()


def test_similarity_without_pilots_says_so() -> None:
    with pytest.raises(ValueError, match="no pilots yet"):
        router(RouterConfig("similarity-max"), PAIR)(torch.ones(1, 8), torch.zeros(1).long())


def test_frozen_router_is_random_and_has_nothing_to_train() -> None:
    made = router(RouterConfig("sparsegen", frozen=True, init_std=1.0))
    assert not any(p.requires_grad for p in made.parameters())
    weights = made(torch.randn(200, 8), torch.zeros(200, dtype=torch.int64))
    assert weights.std(0).min() > 0.1  # texts are sent to different experts


@pytest.mark.parametrize(
    ("config", "experts", "message"),
    [
        ({"kind": "similarity-max", "per_token": True}, PAIR, "cannot route per token"),
        ({"kind": "similarity-max"}, EXPERTS, "leave the others out"),
        ({"kind": "similarity-mean"}, ("a", "b"), "needs experts named"),
        ({"pilots": 0}, EXPERTS, "pilots must be"),
        ({"init_std": -math.inf}, EXPERTS, "standard deviations"),
    ],
)
def test_bad_configs(config: dict, experts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(RouterConfig(**config), experts)
