"""train/losses.py: each loss against a case worked out by hand, and against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train import losses

NONE = 10.0  # a margin that no cosine exceeds


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def nothing(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.bool)


def test_info_nce_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    # cosines (1, .6, 0) and (0, .8, 1), at temperature 1/2
    loss = losses.info_nce(queries, documents, torch.tensor([0, 2]), nothing(2, 3), 0.5, 0.1)
    first = math.log(1 + math.exp(-0.8) + math.exp(-2))
    second = math.log(1 + math.exp(-0.4) + math.exp(-2))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-15)


@pytest.mark.parametrize("margin", [NONE, 0.1, 0.0])
def test_info_nce_is_its_formula(margin):
    queries, documents = unit(5, 4), unit(9, 4, seed=1)
    positive = torch.tensor([3, 0, 8, 5, 3])
    relevant = nothing(5, 9)
    relevant[0, 3] = relevant[0, 4] = relevant[2, 0] = True
    temperature, expected, left_out = 0.3, 0.0, 0
    for i in range(5):
        own = float(queries[i] @ documents[positive[i]])
        total = 0.0
        for j in range(9):
            score = float(queries[i] @ documents[j])
            if j != positive[i] and (relevant[i, j] or score > own + margin):
                left_out += 1
                continue
            total += math.exp((score - own) / temperature)
        expected += math.log(total) / 5
    assert left_out > 2 or margin == NONE  # the margin does something here
    loss = losses.info_nce(queries, documents, positive, relevant, temperature, margin)
    assert loss.item() == pytest.approx(expected, abs=1e-14)


def test_a_judged_document_is_no_negative():
    queries, documents = unit(2, 4), unit(4, 4, seed=1)
    positive, relevant = torch.tensor([0, 1]), nothing(2, 4)
    relevant[0, 2] = True
    loss = losses.info_nce(queries, documents, positive, relevant, 0.1, NONE)
    alone = losses.info_nce(
        queries[:1], documents[[0, 1, 3]], torch.tensor([0]), nothing(1, 3), 0.1, NONE
    )
    other = losses.info_nce(queries[1:], documents, torch.tensor([1]), nothing(1, 4), 0.1, NONE)
    assert loss.item() == pytest.approx((alone + other).item() / 2, abs=1e-14)


def test_the_margin_counts_from_the_positive_and_is_exclusive():
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    documents = torch.tensor([[0.5, 0.0], [0.75, 0.0], [0.8, 0.0]], dtype=torch.float64)
    positive = torch.tensor([0])
    # 0.75 lies at the margin of 0.25 and stays, 0.8 lies above it
    loss = losses.info_nce(queries, documents, positive, nothing(1, 3), 1.0, 0.25)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.25)), abs=1e-15)


def test_the_positive_is_never_left_out():
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    documents = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    everything = torch.ones(1, 2, dtype=torch.bool)  # the positive itself is among the judged
    loss = losses.info_nce(queries, documents, torch.tensor([0]), everything, 0.1, 0.0)
    assert loss.item() == 0  # alone, so certain
    # A negative margin puts even the positive's own score above the line.
    loss = losses.info_nce(queries, documents, torch.tensor([0]), nothing(1, 2), 0.1, -1.0)
    assert loss.item() == 0


def test_gradient_of_info_nce():
    queries, documents = unit(3, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    relevant = nothing(3, 6)
    relevant[1, 4] = True

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return losses.info_nce(q, d, torch.tensor([0, 2, 5]), relevant, 0.5, 0.2)

    assert torch.autograd.gradcheck(loss, (queries, documents))


def test_what_is_left_out_gets_no_gradient():
    queries, documents = unit(1, 4), unit(3, 4, seed=1).requires_grad_()
    relevant = nothing(1, 3)
    relevant[0, 1] = True
    losses.info_nce(queries, documents, torch.tensor([0]), relevant, 0.5, NONE).backward()
    assert documents.grad is not None
    assert documents.grad[1].abs().max() == 0 < documents.grad[2].abs().max()


def test_listwise_by_hand():
    scores = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, 0.0, math.log(2)]], dtype=torch.float64)
    expected = (math.log(5 / 3) + math.log(4)) / 2
    assert losses.listwise(scores).item() == pytest.approx(expected, abs=1e-15)
    shifted = scores + torch.tensor([[5.0], [-3.0]], dtype=torch.float64)
    assert losses.listwise(shifted).item() == pytest.approx(expected, abs=1e-14)


def test_bce_by_hand_weighs_the_positive_as_its_negatives():
    scores = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = (2 * softplus(-2.0) + softplus(-1.0) + softplus(0.5)) / 3
    assert losses.bce(scores).item() == pytest.approx(expected, abs=1e-15)
    # At 0 all pairs pull equally: one positive balances its three negatives.
    scores = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    losses.bce(scores).backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(2, dtype=torch.float64))
    assert losses.bce(scores).item() == pytest.approx(1.5 * math.log(2), abs=1e-15)


@pytest.mark.parametrize("kind", ["listwise", "bce"])
def test_gradient_of_the_reranking_losses(kind):
    scores = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(losses.RERANKING[kind], scores.requires_grad_())


@pytest.mark.parametrize("kind", ["mean", "argmax", "support"])
def test_balance_is_1_when_balanced_and_e_when_collapsed(kind):
    balanced = torch.eye(3, dtype=torch.float64)
    collapsed = balanced[[1, 1, 1]]
    assert losses.balance([balanced], kind).item() == pytest.approx(1)
    assert losses.balance([collapsed], kind).item() == pytest.approx(3)
    # the mean over layers
    assert losses.balance([balanced, collapsed], kind).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", 3 * (0.8 * 0.8 + 0.2 * 0.2)),
        ("argmax", 3 * 0.8),  # f = (1, 0, 0)
        ("support", 3 * (0.75 * 0.8 + 0.25 * 0.2)),  # the first text uses two, half each
    ],
)
def test_balance_by_hand(kind, expected):
    weights = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert losses.balance([weights], kind).item() == pytest.approx(expected, abs=1e-15)


def test_balance_allows_routing_by_task():
    """Over the mixed batch two tasks with an expert each are balanced; within a task, collapsed."""
    embedding, reranking = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    assert losses.balance([torch.cat((embedding, reranking))], "mean").item() == 1
    assert losses.balance([embedding], "mean").item() == 2


def test_balance_pushes_towards_balance():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    losses.balance([logits.softmax(-1)], "mean").backward()
    assert logits.grad is not None and logits.grad[0, 0] > 0 > logits.grad[0, 2]


def test_an_unknown_kind_of_balance():
    with pytest.raises(ValueError, match="mean, argmax or support, got 'max'"):
        losses.balance([torch.eye(2)], "max")
