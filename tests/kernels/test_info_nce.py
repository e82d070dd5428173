"""InfoNCE, whole and in chunks: by hand, by plain loops, and against each other."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.info_nce import info_nce

NONE = 10.0  # a margin that no cosine exceeds


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture(params=[4096, 1, 4], ids=["whole", "chunk1", "chunk4"])
def loss_of(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """The loss in one piece and in chunks; `relevant` as a matrix, which is easier to read."""

    def loss(queries, documents, positive, relevant, temperature, margin) -> Tensor:
        pairs = relevant.nonzero()
        return info_nce(
            queries, documents, positive, pairs, temperature, margin, chunk=request.param
        )

    return loss


def nothing(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.bool)


def test_info_nce_by_hand(loss_of):
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    # cosines (1, .6, 0) and (0, .8, 1), at temperature 1/2
    loss = loss_of(queries, documents, torch.tensor([0, 2]), nothing(2, 3), 0.5, 0.1)
    first = math.log(1 + math.exp(-0.8) + math.exp(-2))
    second = math.log(1 + math.exp(-0.4) + math.exp(-2))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-15)


@pytest.mark.parametrize("margin", [NONE, 0.1, 0.0])
def test_info_nce_is_its_formula(margin, loss_of):
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
    loss = loss_of(queries, documents, positive, relevant, temperature, margin)
    assert loss.item() == pytest.approx(expected, abs=1e-14)


def test_a_judged_document_is_no_negative(loss_of):
    queries, documents = unit(2, 4), unit(4, 4, seed=1)
    positive, relevant = torch.tensor([0, 1]), nothing(2, 4)
    relevant[0, 2] = True
    loss = loss_of(queries, documents, positive, relevant, 0.1, NONE)
    alone = loss_of(queries[:1], documents[[0, 1, 3]], torch.tensor([0]), nothing(1, 3), 0.1, NONE)
    other = loss_of(queries[1:], documents, torch.tensor([1]), nothing(1, 4), 0.1, NONE)
    assert loss.item() == pytest.approx((alone + other).item() / 2, abs=1e-14)


def test_the_margin_counts_from_the_positive_and_is_exclusive(loss_of):
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    documents = torch.tensor([[0.5, 0.0], [0.75, 0.0], [0.8, 0.0]], dtype=torch.float64)
    positive = torch.tensor([0])
    # 0.75 lies at the margin of 0.25 and stays, 0.8 lies above it
    loss = loss_of(queries, documents, positive, nothing(1, 3), 1.0, 0.25)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.25)), abs=1e-15)


def test_the_positive_is_never_left_out(loss_of):
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    documents = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    everything = torch.ones(1, 2, dtype=torch.bool)  # the positive itself is among the judged
    loss = loss_of(queries, documents, torch.tensor([0]), everything, 0.1, 0.0)
    assert loss.item() == 0  # alone, so certain
    # A negative margin puts even the positive's own score above the line.
    loss = loss_of(queries, documents, torch.tensor([0]), nothing(1, 2), 0.1, -1.0)
    assert loss.item() == 0


def test_gradient_of_info_nce(loss_of):
    queries, documents = unit(3, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    relevant = nothing(3, 6)
    relevant[1, 4] = True

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return loss_of(q, d, torch.tensor([0, 2, 5]), relevant, 0.5, 0.2)

    assert torch.autograd.gradcheck(loss, (queries, documents))


def test_what_is_left_out_gets_no_gradient(loss_of):
    queries, documents = unit(1, 4), unit(3, 4, seed=1).requires_grad_()
    relevant = nothing(1, 3)
    relevant[0, 1] = True
    loss_of(queries, documents, torch.tensor([0]), relevant, 0.5, NONE).backward()
    assert documents.grad is not None
    assert documents.grad[1].abs().max() == 0 < documents.grad[2].abs().max()


def batch(queries: int, documents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors with near duplicates, positives that repeat, and a few judged pairs."""
    q, d = unit(queries, 6), unit(documents, 6, seed=1)
    positive = torch.randint(documents, (queries,), generator=torch.Generator().manual_seed(2))
    positive[1::2] = positive[::2][: len(positive[1::2])]
    d[::5] = F.normalize(d[0] + 0.05 * d[::5], dim=-1)
    pairs = torch.stack((torch.arange(queries), (positive + 1) % documents), 1)
    return q, d, positive, torch.cat((pairs, torch.stack((torch.arange(queries), positive), 1)))


@pytest.mark.parametrize("chunk", [1, 3, 16, 49])
@pytest.mark.parametrize("margin", [NONE, 0.1, -0.5])
def test_chunks_are_the_whole(chunk: int, margin: float) -> None:
    """To 1e-12 in float64, gradients too; a chunk that does not divide the documents."""
    q, d, positive, pairs = batch(12, 50)
    found = []
    for size in (chunk, 50):
        own = [q.clone().requires_grad_(), d.clone().requires_grad_()]
        loss = info_nce(own[0], own[1], positive, pairs, 0.05, margin, chunk=size)
        found.append((loss, *torch.autograd.grad(loss, own)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_chunks_in_half_precision_score_in_fp32() -> None:
    q, d, positive, pairs = batch(12, 50)
    expected = info_nce(q.half().float(), d.half().float(), positive, pairs, 0.05, 0.1)
    found = info_nce(q.half(), d.half(), positive, pairs, 0.05, 0.1, chunk=7)
    torch.testing.assert_close(found, expected)


def test_chunks_give_the_same_bits_on_every_run() -> None:
    q, d, positive, pairs = batch(64, 300)
    q, d = q.float().requires_grad_(), d.float().requires_grad_()
    runs = [
        torch.autograd.grad(info_nce(q, d, positive, pairs, 0.05, 0.1, chunk=64), (q, d))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 50])
def test_a_card_says_what_the_cpu_says(chunk: int, dtype: torch.dtype) -> None:
    """Of the same rounded vectors, scores in fp32 and not in tf32; gradients in the dtype."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card does not multiply bfloat16")
    q, d, positive, pairs = batch(12, 50)
    found = []
    for device, own in (("cpu", torch.float64), ("cuda", dtype)):
        places = [t.to(dtype).to(device, own).requires_grad_() for t in (q, d)]
        indices = (positive.to(device), pairs.to(device))
        loss = info_nce(places[0], places[1], *indices, 0.05, 0.1, chunk=chunk)
        gradients = torch.autograd.grad(loss, places)
        found.append([t.double().cpu() for t in (loss, *gradients)])
    wide = dtype == torch.float32
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for mine, truth in zip(found[1][1:], found[0][1:], strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=(1e-5 if wide else 2e-2))


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor):
                self.values = max(self.values, t.numel())
        return made


def test_the_score_matrix_is_never_whole() -> None:
    q, d, positive, pairs = batch(64, 2048)
    q, d = q.requires_grad_(), d.requires_grad_()
    with Largest() as whole:
        info_nce(q, d, positive, pairs, 0.05, 0.1).backward()
    with Largest() as chunked:
        info_nce(q, d, positive, pairs, 0.05, 0.1, chunk=128).backward()
    assert whole.values == 64 * 2048
    assert chunked.values == 2048 * 6  # the gradient of the documents
