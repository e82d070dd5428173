"""One micro-batch of a task: its texts through the model, in parts if need be, and its loss.

A loss over a whole micro-batch (in-batch negatives, load balance) needs the vectors of all texts
but the activations of few: GradCache (arXiv 2101.06983) runs the parts without a graph, takes the
gradient of the loss by their outputs, and runs each part again to carry it on. Over several
processes the same holds with the part that each process has: all of them see the outputs of all,
each carries on the gradient of its own, and the sum of what they find is the gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.info_nce import info_nce
from model import parallel
from model.heads import truncate
from model.packed import Packed, Part
from model.prefix import TextSet, cut
from model.unimoer import UniMoER
from train import losses
from train.batches import TrainingData
from trials import Config


@dataclass(frozen=True)
class Work:
    """A micro-batch that is to be done.

    read: a batch -> one row for each text, and the routing weights by layer. indices: of the texts
    in the set. loss: their rows, in that order -> scalar. ids: of the queries, for messages.
    """

    task: str
    read: Callable[[UniMoER, Packed, Tensor | None], tuple[Tensor, list[Tensor]]]
    texts: TextSet
    indices: list[int]
    loss: Callable[[Tensor], Tensor]
    ids: list[str]

    @property
    def tokens(self) -> int:
        """Of all its texts, in all processes."""
        return sum(self.texts.lengths[i] for i in self.indices)

    def __post_init__(self):
        if len(self.indices) < parallel.world():
            raise ValueError(
                f"the {self.task} micro-batch has {len(self.indices)} texts for "
                f"{parallel.world()} processes: raise {self.task}_batch, or start fewer"
            )


def embedding(data: TrainingData, step: int, seed: int | None = None) -> Work:
    """InfoNCE of the step's queries and documents. seed: of the order, if not the config's.

    With `matryoshka` it is the mean of InfoNCE of the whole vectors and of their first values, cut
    at each of these widths and brought to length 1 again (arXiv 2205.13147, equation 1, with equal
    weights); false negatives are told by the scores of the same width.

    With a teacher, `distill_weight` times the distillation over each query's positive and hard
    negatives is added; the student's logits are the whole vectors' cosines over the temperature, as
    in InfoNCE.
    """
    rows, c = data.embedding(step, seed), data.config
    queries = len(rows.queries)

    def loss(vectors: Tensor) -> Tensor:
        asked, found = vectors[:queries], vectors[queries:]
        positive, relevant = rows.positive.to(vectors.device), rows.relevant.to(vectors.device)
        options = positive, relevant, c.temperature, c.false_negative_margin
        terms = [
            info_nce(truncate(asked, width), truncate(found, width), *options)
            for width in (None, *c.matryoshka)
        ]
        total = torch.stack(terms).mean()
        if rows.teacher is not None:
            student = (asked @ found.t()).gather(1, rows.group.to(vectors.device)) / c.temperature
            total = total + c.distill_weight * _distilled(student, rows.teacher, c)
        return total

    indices = rows.queries + rows.documents
    return Work("embedding", UniMoER.embed, data.embedding_texts, indices, loss, rows.ids)


def reranking(data: TrainingData, step: int, seed: int | None = None) -> Work:
    """Listwise or pointwise loss of the step's pairs; seed and teacher as above, the student's
    logits being the head's."""
    listwise = {"interaction": lists, "pseudo_query": pseudo}.get(data.config.rerank_head)
    if listwise:
        return listwise(data, step, seed)
    rows, c = data.reranking(step, seed), data.config

    def loss(scores: Tensor) -> Tensor:
        scores = scores.view(-1, rows.size)
        total = losses.RERANKING[c.reranking_loss](scores)
        if rows.teacher is not None:
            total = total + c.distill_weight * _distilled(scores, rows.teacher, c)
        return total

    return Work("reranking", UniMoER.score, data.reranking_texts, rows.pairs, loss, rows.ids)


def lists(data: TrainingData, step: int, seed: int | None = None) -> Work:
    """rank + a dispersive + b dual + c similarity of the step's lists (jina-reranker-v3,
    arXiv 2509.25085, eq. 1), each list being one text; seed and teacher as above, the student's
    logits being the cosines over the temperature."""
    rows, c = data.lists(step, seed), data.config

    def loss(marked: Tensor) -> Tensor:
        vectors, t = F.normalize(marked, dim=-1), c.list_temperature  # (texts, K + 2, W)
        first, second = vectors[: len(rows.ids)], vectors[len(rows.ids) :, 1:-1]
        early, query, place = first[:, 0], first[:, -1], rows.place.to(marked.device)
        documents = torch.take_along_dim(first[:, 1:-1], place[..., None], 1)  # the right one first
        total = losses.contrast(query, documents, t)
        total = total + c.dispersive_weight * losses.dispersive(documents, t)
        total = total + c.dual_weight * losses.contrast(early, documents, t)
        if rows.again is not None:
            altered = torch.take_along_dim(second, rows.again.to(marked.device)[..., None], 1)
            total = total + c.similarity_weight * losses.similarity(documents, altered, t)
        if rows.teacher is not None:
            student = torch.einsum("bw,bkw->bk", query, documents) / t
            total = total + c.distill_weight * _distilled(student, rows.teacher, c)
        return total

    return Work(
        "reranking", _marked, TextSet(rows.texts), list(range(len(rows.texts))), loss, rows.ids
    )


def pseudo(data: TrainingData, step: int, seed: int | None = None) -> Work:
    """InfoNCE + weight * RankNet(scale * cosine) of the step's lists, all of whose texts are
    embedded, as E2Rank is trained (arXiv 2510.22733); seed as above.

    InfoNCE asks the query for the right document, as the embedding task does. RankNet orders a list
    by its cosines with the pseudo-query (`model.pseudo`): by the teacher's scores where there are
    some, which are no term of their own here, else the right document before the others.
    """
    rows, c = data.pseudo(step, seed), data.config
    count = len(rows.ids)

    def loss(vectors: Tensor) -> Tensor:
        queries, asked, documents = vectors.split([count, count, len(vectors) - 2 * count])
        positive, relevant = rows.positive.to(vectors.device), rows.relevant.to(vectors.device)
        options = positive, relevant, c.temperature, c.false_negative_margin
        cosines = (asked @ documents.t()).gather(1, rows.group.to(vectors.device))
        ordered = losses.ranknet(c.ranknet_scale * cosines, rows.grades.to(vectors))
        return info_nce(queries, documents, *options) + c.ranknet_weight * ordered

    indices = list(range(len(rows.texts)))
    return Work("reranking", UniMoER.embed, TextSet(rows.texts), indices, loss, rows.ids)


def _marked(
    model: UniMoER, batch: Packed, states: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(B, K + 2, W): in training all lists have as many marks."""
    vectors, routing = model.marked(batch, states)
    return vectors.unflatten(0, (len(batch.lengths), -1)), routing


def _distilled(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    return losses.distillation(
        student, teacher.to(student), config.distill, config.distill_temperature
    )


WORK = {"embedding": embedding, "reranking": reranking}


def task_loss(
    task: str, model: UniMoER, data: TrainingData, step: int, seed: int | None = None
) -> Tensor:
    """The loss of a task's micro-batch of a step, with its graph."""
    work = WORK[task](data, step, seed)
    return work.loss(run(model, work).rows)


@dataclass(frozen=True)
class Made:
    """What the model made of a micro-batch.

    rows: vectors (n, D), scores (n,) or marks (n, K + 2, W), in the order of the work's indices.
    routing: weights (n, E) of each routed layer, or of all tokens where they are routed, in some
    order. given: the same before experts were dropped; without dropping, `routing`. penalties: of
    the routers that have one, (n,). carry: finishes a backward pass that has reached these.
    """

    rows: Tensor
    routing: list[Tensor]
    given: list[Tensor]
    penalties: list[Tensor]
    carry: Callable[[], None]


def run(model: UniMoER, work: Work, cached_tokens: int = 0) -> Made:
    """The whole micro-batch through the model, this process's share of it with gradients.

    Every text draws the router noise and the dropout that it would draw in one piece, so only
    rounding tells how many parts or processes there were.

    Args:
        cached_tokens: GradCache, in parts of at most so many tokens (or one text); 0: one part.
    """
    device, world, rank = model.device, parallel.world(), parallel.rank()
    lengths = [work.texts.lengths[i] for i in work.indices]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in order]
    # By turns, so that every process has nearly as many tokens as the others.
    shares = [list(range(r, len(order), world)) for r in range(world)]
    parts = _alike([_parts(share, sizes, cached_tokens) for share in shares])[rank]
    random, cached = _RandomState(device), len(parts) > 1

    def forward(number: int) -> list[Tensor]:
        """Of one part: rows, routing weights, penalties, weights before experts were dropped."""
        part = parts[number] or shares[rank][:1]
        chosen = [work.indices[order[i]] for i in part]
        batch, states = work.texts.batch(chosen, device, model.dtype)
        if cached or world > 1:
            batch = replace(batch, part=Part.of(sizes, part, device))
            random.restore()
        made, routing = work.read(model, batch, states)
        routers = model.routers().values()
        penalties = [r.penalty for r in routers if r.penalty is not None]
        given = [r.given for r in routers if model.training and r.given is not None]
        outputs = [made, *routing, *penalties, *given]
        return outputs if parts[number] else [output[:0] for output in outputs]

    with torch.set_grad_enabled(not cached):
        found = [forward(number) for number in range(len(parts))]
    routers = model.routers().values()
    before = sum(model.training and r.given is not None for r in routers)
    layers = len(found[0]) - 1 - before - sum(r.penalty is not None for r in routers)
    mine = [torch.cat(of) if cached else of[0] for of in zip(*found, strict=True)]
    if cached:
        mine = [output.requires_grad_() for output in mine]

    def carry() -> None:
        """Run each part again, now with a graph, and send its share of the gradients through."""
        if not cached or all(output.grad is None for output in mine):
            return
        at = [0] * len(mine)
        for number in range(len(parts)):
            outputs, grads = [], []
            for k, output in enumerate(forward(number)):
                grad = mine[k].grad
                if grad is not None and output.requires_grad:
                    outputs.append(output)
                    grads.append(grad[at[k] : at[k] + len(output)])
                at[k] += len(output)
            torch.autograd.backward(outputs, grads)
        for output in mine:
            output.grad = None

    # In texts, or in tokens where these are routed.
    texts = [len(share) for share in shares]
    router = model.config.router
    per_token = router is not None and router.per_token
    rows = [sum(sizes[i] for i in share) for share in shares] if per_token else texts
    whole = [_all(output, rows if k else texts) for k, output in enumerate(mine)]
    back = torch.empty(len(order), dtype=torch.int64)
    back[[order[i] for share in shares for i in share]] = torch.arange(len(order))
    routing, rest = whole[1 : 1 + layers], whole[1 + layers :]
    penalties, given = rest[: len(rest) - before], rest[len(rest) - before :]
    return Made(whole[0][back.to(device)], routing, given or routing, penalties, carry)


def _parts(share: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """A share in parts of at most `budget` tokens, or one text; 0: in one part."""
    return cut(share, sizes, budget) if budget else [share]


def _alike(parts: list[list[list[int]]]) -> list[list[list[int]]]:
    """The parts of every process, split further until all have as many: shards of the base
    (`model.sharding`) need the same number of passes everywhere."""
    most = max(len(of) for of in parts)
    for of in parts:
        while len(of) < most:
            at = max(range(len(of)), key=lambda i: len(of[i]))
            longest = of.pop(at)
            half = len(longest) // 2
            # A share may lack the last text of others': an empty part is a pass for nothing.
            of[at:at] = [longest[:half], longest[half:]] if half else [longest, longest[:0]]
    return parts


def _all(mine: Tensor, counts: list[int]) -> Tensor:
    """The rows of every process, by rank, with gradients for those of this one."""
    if len(counts) == 1:
        return mine
    found = parallel.gather(mine, counts)
    found[parallel.rank()] = mine
    return torch.cat(found)


class _RandomState:
    """The random numbers of a micro-batch: each part draws what all of them would draw together."""

    def __init__(self, device: torch.device):
        self.device = device
        self.state = torch.get_rng_state()
        self.on_card = None
        if device.type == "cuda":
            self.on_card = torch.cuda.get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self.state)
        if self.on_card is not None:
            torch.cuda.set_rng_state(self.on_card, self.device)
