"""train/losses.py: each loss against a case worked out by hand, and against plain loops."""

import math

import pytest
import torch

from train import losses


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


def test_distill_kl_by_hand():
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = losses.distill_kl(student, teacher, 1.0).item()
    assert found == pytest.approx((first + second) / 2, abs=1e-15)
    assert losses.distill_kl(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * found)
    shift = torch.tensor([[7.0], [-2.0]], dtype=torch.float64)
    assert losses.distill_kl(student + shift, teacher - shift, 1.0).item() == pytest.approx(found)
    assert losses.distill_kl(teacher + shift, teacher, 3.0).item() == pytest.approx(0, abs=1e-15)


def test_the_gradient_of_kl_keeps_its_size_at_any_temperature():
    """Hinton et al., equation 4: for high T it is (z - v) / size, the T^2 included, if both have
    mean 0."""
    student = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-2.0, 1.0, 1.0]], dtype=torch.float64)
    losses.distill_kl(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 3, rtol=1e-3, atol=0)


def test_margin_mse_by_hand():
    student = torch.tensor([[2.0, 1.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[5.0, 3.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    # margins 1, 1.5, -1, 0 against 2, 1, 0, 0
    assert losses.margin_mse(student, teacher).item() == (1 + 0.25 + 1 + 0) / 4
    assert losses.margin_mse(student + 3, teacher).item() == losses.margin_mse(student, teacher)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_gradient_of_distillation(kind):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda s: losses.distillation(s, teacher, kind, 2.0), student.requires_grad_()
    )


def test_an_unknown_kind_of_distillation():
    with pytest.raises(ValueError, match="distill must be kl or margin_mse, got 'mse'"):
        losses.distillation(torch.zeros(1, 2), torch.zeros(1, 2), "mse", 1.0)


# Lists that are read as one text -----------------------------------------------------------------


def unit(*angles: float) -> torch.Tensor:
    """Vectors of the plane at these angles, in degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack((radians.cos(), radians.sin()), -1)


def test_contrast_by_hand():
    """Cosines 1/2, 0, 1, then 0, 1/2, 1, and a temperature of 1/2; the positive is the first."""
    documents = torch.stack((unit(60, 90, 0), unit(90, 60, 0)))
    queries = unit(0, 0)
    total = 1 + math.e + math.e**2
    expected = (math.log(total) - 1 + math.log(total)) / 2
    found = losses.contrast(queries, documents, 0.5)
    assert found.item() == pytest.approx(expected, abs=1e-14)


def test_dispersive_by_hand():
    """Three documents, so K - 1 = 2 negatives; pairs at 60, 90 and 30 degrees."""
    pairs = (0.5, 0.0, math.sqrt(3) / 2)
    first = math.log(sum(math.exp(s / 0.5) for s in pairs) / 2)
    collapsed = math.log(3 * math.exp(1 / 0.5) / 2)
    documents = torch.stack((unit(0, 60, 90), unit(10, 10, 10)))
    found = losses.dispersive(documents, 0.5)
    assert found.item() == pytest.approx((first + collapsed) / 2, abs=1e-14)
    order = documents[:, [2, 0, 1]]  # which of them is the positive does not matter
    assert losses.dispersive(order, 0.5).item() == pytest.approx(found.item(), abs=1e-14)
    pair = losses.dispersive(unit(0, 60)[None], 0.5)
    assert pair.item() == pytest.approx(1.0, abs=1e-14)  # log(exp(.5 / .5) / 1)


def test_similarity_by_hand():
    """The first document's copy is at 60 degrees, the others' are the documents themselves."""
    documents, altered = unit(0, 90, 180)[None], unit(60, 90, 180)[None]
    # With the others: 0 and -1; -0 and 0; -1 and 0. With its own: 1/2, 1, 1.
    expected = sum(
        math.log(sum(math.exp(s / 0.5) for s in (own, *others))) - own / 0.5
        for own, others in ((0.5, (0, -1)), (1.0, (0, 0)), (1.0, (-1, 0)))
    )
    found = losses.similarity(documents, altered, 0.5)
    assert found.item() == pytest.approx(expected / 3, abs=1e-14)


def test_the_losses_of_lists_push_the_right_way():
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    altered = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    queries = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    inputs = [x.requires_grad_() for x in (documents, altered, queries)]

    def total(documents, altered, queries):
        d, a, q = (torch.nn.functional.normalize(x, dim=-1) for x in (documents, altered, queries))
        parts = (
            losses.contrast(q, d, 0.3),
            losses.dispersive(d, 0.3),
            losses.similarity(d, a, 0.3),
        )
        return torch.stack(parts)

    assert torch.autograd.gradcheck(total, inputs)
    before = total(*inputs)
    optimizer = torch.optim.SGD(inputs, lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        total(*inputs).sum().backward()
        optimizer.step()
    assert (total(*inputs) < before).all()


def test_ranknet_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    grades = torch.tensor([[2, 1, 0], [1, 1, 0]])
    # 1 over 2, 1 over 3, 2 over 3; in the second list the first two are not ordered.
    behind = [3.0 - 1.0, 2.0 - 1.0, 2.0 - 3.0, 0.0 - 0.5, 0.0 - 0.0]
    expected = sum(math.log1p(math.exp(x)) for x in behind) / 5
    assert losses.ranknet(scores, grades).item() == pytest.approx(expected, abs=1e-15)
    assert losses.ranknet(scores, 7.5 * grades - 3).item() == pytest.approx(expected, abs=1e-15)
    alike = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    nothing = losses.ranknet(alike, torch.ones(2, 3))
    nothing.backward()
    assert nothing.item() == 0 and torch.equal(alike.grad, torch.zeros_like(alike))  # pyright: ignore


def test_gradient_of_ranknet():
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    grades = torch.tensor([[0.3, 0.1, 0.2], [1.0, 3.0, 3.0]])
    assert torch.autograd.gradcheck(lambda x: losses.ranknet(x, grades), scores)
