"""The fixed micro-batches of a trial: one set of pairs for all arms, in the seed's order."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path

import torch
from torch import Tensor

from eval.collections import Collection, require_split
from model.config import LISTWISE
from model.listwise import Lists
from model.prefix import TextSet, TokenIds
from model.pseudo import PseudoQuery
from model.token_lists import TokenLists
from model.tokens import Tokenizer
from train.negatives import Mined, best_positive, bm25_negatives, read_mined
from trials import Config

DROPPED = 0.1  # share of a document's words that its altered copy lacks
# Tokenized texts -> the same with their frozen-prefix states, where those are used.
WithStates = Callable[[TokenIds, str], TextSet]
AT_ONCE = 10_000  # texts that are tokenized together


@dataclass(frozen=True)
class EmbeddingBatch:
    """queries (B), documents (M): places in the text set. positive (B,), relevant (P, 2): see
    `kernels.info_nce`. ids: of the queries, for messages. group (B, 1 + hard negatives): rows in
    `documents` of each query's own, the positive first. teacher: their logits, of that shape, in
    float32; None without a teacher."""

    queries: list[int]
    documents: list[int]
    positive: Tensor
    relevant: Tensor
    ids: list[str]
    group: Tensor
    teacher: Tensor | None = None


@dataclass(frozen=True)
class RerankingBatch:
    """pairs: places in the text set, groups of `size` with the positive first. teacher (groups,
    size): their logits in float32; None without a teacher."""

    pairs: list[int]
    size: int
    ids: list[str]
    teacher: Tensor | None = None


def training_queries(collection: Collection, count: int) -> list[str]:
    """The first `count` (0: all) training queries with a relevant document, in their fixed order.

    Raises:
        ValueError: there is no train split.
    """
    judged = require_split(collection, "train")
    usable = sorted(q for q, row in judged.items() if any(grade > 0 for grade in row.values()))
    return sorted(usable, key=lambda query: random.Random(query).random())[: count or None]


@dataclass(frozen=True)
class ListBatch:
    """texts: token ids of each query's list, then of each again with altered documents in another
    order, if that is wanted. A group has K documents, the right one first: place (B, K) says where
    in the query's list each of them stands, again (B, K) where in the second list; teacher (B, K):
    logits of the group, None without a teacher."""

    texts: list[list[int]]
    place: Tensor
    again: Tensor | None
    teacher: Tensor | None
    ids: list[str]


@dataclass(frozen=True)
class PseudoBatch:
    """texts: token ids of the queries (B), their pseudo-queries (B) and the documents (M), each
    once. positive, relevant, group (B, K): as of an `EmbeddingBatch`. grades (B, K) float32: the
    teacher's logits, or 1 for the right document and 0 for the others without a teacher."""

    texts: list[list[int]]
    positive: Tensor
    relevant: Tensor
    group: Tensor
    grades: Tensor
    ids: list[str]


def check_training(collection: Collection, config: Config) -> list[str]:
    """The training queries, in their fixed order.

    Raises:
        ValueError: there is no train split, or it has too few queries for a batch.
    """
    order = training_queries(collection, config.train_queries)
    needed = max(batch_sizes(config).values())
    if len(order) < needed:
        raise ValueError(
            f"{collection.name}: {len(order)} training queries with a relevant "
            f"document, but a batch takes {needed}: lower the batch or give more data"
        )
    return order


def batch_sizes(config: Config) -> dict[str, int]:
    """Queries of a micro-batch, by task of the config."""
    sizes = {"embedding": config.embedding_batch, "reranking": config.reranking_batch}
    return {task: sizes[task] for task in config.tasks}


class TrainingData:
    """Chosen queries, positives and negatives of both tasks, tokenized.

    `train_queries` of the training split, chosen by the query id's own generator, serve both
    tasks; each task takes as many of them, in that fixed order, as its steps use up, or as
    `data_steps` would. So the pairs that are trained on never depend on the arm or the seed; the
    seed orders them. (Where the steps end amid an epoch, as with more or fewer than `data_steps`,
    the seed also decides which of them come once more, or at all.)
    """

    def __init__(
        self, collection: Collection, tokenizer: Tokenizer, config: Config, states: WithStates
    ):
        self.config, self.corpus = config, collection.corpus
        order = check_training(collection, config)
        relevant = collection.relevant("train")
        self.relevant = {q: relevant[q] for q in order}
        # Of each task: whole batches, no more than the steps use.
        steps = config.data_steps or config.steps
        self.used = {
            task: order[: min(steps, len(order) // size) * size]
            for task, size in batch_sizes(config).items()
        }
        self.queries = max(self.used.values(), key=len)
        self._orders: dict[tuple[str, int, int], list[str]] = {}  # task, seed, epoch -> its queries
        self.positive = {q: best_positive(collection.qrels["train"][q]) for q in self.queries}
        mined = self._mined(collection)
        self.negatives, self.teacher = mined.negatives, mined.teacher
        if "embedding" in config.tasks:
            self._embedding_texts(collection, tokenizer, states)
        self.query_text, self.tokenizer = collection.queries, tokenizer
        if config.rerank_head == "interaction":
            self.template = Lists(tokenizer, config.list_tokens)
        elif "reranking" in config.tasks and config.rerank_head not in LISTWISE:
            self._reranking_texts(collection, tokenizer, states)

    def _mined(self, collection: Collection) -> Mined:
        """Negatives from BM25, or from a folder that was mined."""
        c = self.config
        count = max(c.hard_negatives, c.group_size - 1)
        if c.negatives != "bm25":
            folder, teacher = Path(c.negatives), bool(c.distill)
            return read_mined(
                folder, c.negatives_sha256, collection, self.positive, self.relevant, count, teacher
            )
        known = collection.negatives.setdefault((c.negatives_depth, count), {})
        asked = {q: collection.queries[q] for q in self.queries if q not in known}
        known |= bm25_negatives(
            collection.bm25("train"), asked, self.relevant, collection.corpus,
            collection.pools["train"], c.negatives_depth, count,
        )  # fmt: skip
        return Mined({q: known[q] for q in self.queries}, {})

    def _teacher(self, groups: list[tuple[str, list[str]]]) -> Tensor | None:
        """The teacher's logits of (query, its documents), (groups, size); None without one."""
        if not self.teacher:
            return None
        return torch.tensor([[self.teacher[q][d] for d in row] for q, row in groups])

    def _embedding_texts(self, collection: Collection, tokenizer: Tokenizer, states: WithStates):
        hard = self.config.hard_negatives
        queries = self.used["embedding"]
        wanted = [d for q in queries for d in [self.positive[q], *self.negatives[q][:hard]]]
        documents = list(dict.fromkeys(wanted))
        self.query_at = {q: i for i, q in enumerate(queries)}
        self.document_at = {d: len(queries) + i for i, d in enumerate(documents)}
        sides = (
            _tokenized(tokenizer.queries, (collection.queries[q] for q in queries)),
            _tokenized(tokenizer.documents, (collection.corpus[d] for d in documents)),
        )
        self.embedding_texts = states(TokenLists(chain(*sides)), "training texts")

    def _reranking_texts(self, collection: Collection, tokenizer: Tokenizer, states: WithStates):
        groups = self._groups(self.used["reranking"], self.config.group_size)
        sizes = [len(documents) for _, documents in groups]
        starts = accumulate(sizes, initial=0)
        self.group_at = {query: start for (query, _), start in zip(groups, starts, strict=False)}
        pairs = ((collection.queries[q], collection.corpus[d]) for q, own in groups for d in own)
        ids = TokenLists(_tokenized(tokenizer.pairs, pairs))
        self.reranking_texts = states(ids, "training pairs")

    def per_epoch(self, task: str) -> int:
        """Batches of a task in an epoch."""
        return len(self.used[task]) // getattr(self.config, f"{task}_batch")

    def _batch_queries(self, task: str, step: int, size: int, seed: int | None) -> list[str]:
        """The step's queries: each epoch is a permutation of its own."""
        epoch, at = divmod(step, len(self.used[task]) // size)
        key = (task, self._seed(seed), epoch)
        if key not in self._orders:  # one of each task is kept
            order = list(self.used[task])
            random.Random(f"{key[1]} {task} {epoch}").shuffle(order)
            self._orders = {k: v for k, v in self._orders.items() if k[0] != task} | {key: order}
        return self._orders[key][at * size : (at + 1) * size]

    def _seed(self, seed: int | None) -> int:
        return self.config.seed + self.config.seed_offset if seed is None else seed

    def embedding(self, step: int, seed: int | None = None) -> EmbeddingBatch:
        """The embedding micro-batch of a step; seed: of the order, if not the config's."""
        queries = self._batch_queries("embedding", step, self.config.embedding_batch, seed)
        groups = self._groups(queries, 1 + self.config.hard_negatives)
        documents, positive, relevant, group = self._offered(groups)
        return EmbeddingBatch(
            queries=[self.query_at[q] for q in queries],
            documents=[self.document_at[d] for d in documents],
            positive=positive,
            relevant=relevant,
            ids=queries,
            group=group,
            teacher=self._teacher(groups),
        )

    def _groups(self, queries: list[str], size: int) -> list[tuple[str, list[str]]]:
        """Each query with its positive, then negatives."""
        return [(q, [self.positive[q], *self.negatives[q][: size - 1]]) for q in queries]

    def _offered(
        self, groups: list[tuple[str, list[str]]]
    ) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """The documents of all groups; positive, relevant and group of an `EmbeddingBatch`."""
        # A document that serves two queries appears once: it is no negative of its own query.
        wanted = [own[0] for _, own in groups] + [d for _, own in groups for d in own[1:]]
        documents = list(dict.fromkeys(wanted))
        row = {d: i for i, d in enumerate(documents)}
        # By text, not by id: a copy under another id is as relevant.
        of_text: dict[str, list[int]] = {}
        for d, at in row.items():
            of_text.setdefault(self.corpus[d], []).append(at)
        pairs = sorted(
            (i, at)
            for i, (q, _) in enumerate(groups)
            for text in {self.corpus[d] for d in self.relevant[q]}
            for at in of_text.get(text, ())
        )
        rows = torch.tensor([[row[d] for d in own] for _, own in groups])
        return documents, rows[:, 0], torch.tensor(pairs), rows

    def reranking(self, step: int, seed: int | None = None) -> RerankingBatch:
        """The reranking micro-batch of a step."""
        queries = self._batch_queries("reranking", step, self.config.reranking_batch, seed)
        size = self.config.group_size
        groups = self._groups(queries, size)
        return RerankingBatch(
            pairs=[self.group_at[q] + i for q in queries for i in range(size)],
            size=size,
            ids=queries,
            teacher=self._teacher(groups),
        )

    def lists(self, step: int, seed: int | None = None) -> ListBatch:
        """The same micro-batch as lists, for an interaction head.

        The documents of a group come in an order that seed and step decide, and the list of altered
        documents in one of its own. There are no prefix states: the vectors at the marks are
        trained, so what enters the adapted layers changes.

        Raises:
            ValueError: a group does not fit into one text.
        """
        c = self.config
        queries = self._batch_queries("reranking", step, c.reranking_batch, seed)
        rng = random.Random(f"{self._seed(seed)} lists {step}")
        groups = self._groups(queries, c.group_size)
        texts, altered, place, again = [], [], [], []
        for query, members in groups:
            documents = [self.corpus[d] for d in members]
            first, second = (rng.sample(range(len(members)), len(members)) for _ in range(2))
            texts.append(self._list(query, [documents[i] for i in first]))
            place.append([first.index(i) for i in range(len(members))])
            if c.similarity_weight:
                altered.append(self._list(query, [alter(documents[i], rng) for i in second]))
                again.append([second.index(i) for i in range(len(members))])
        other = torch.tensor(again) if again else None
        return ListBatch(
            texts + altered, torch.tensor(place), other, self._teacher(groups), queries
        )

    def pseudo(self, step: int, seed: int | None = None) -> PseudoBatch:
        """The same micro-batch for an embedder that reranks by pseudo-queries.

        A pseudo-query reads the documents of its group in an order that seed and step decide, and
        has no prefix states, since it is another text in every epoch.
        """
        c, tokenizer = self.config, self.tokenizer
        queries = self._batch_queries("reranking", step, c.reranking_batch, seed)
        rng = random.Random(f"{self._seed(seed)} lists {step}")
        groups = self._groups(queries, c.group_size)
        documents, positive, relevant, group = self._offered(groups)
        grades = self._teacher(groups)
        if grades is None:
            grades = torch.zeros(group.shape)
            grades[:, 0] = 1
        lists = [
            (self.query_text[q], [self.corpus[d] for d in rng.sample(own, len(own))])
            for q, own in groups
        ]
        texts = tokenizer.queries([self.query_text[q] for q in queries])
        texts += PseudoQuery(tokens=c.list_tokens).ids(tokenizer, lists)
        texts += tokenizer.documents([self.corpus[d] for d in documents])
        return PseudoBatch(texts, positive, relevant, group, grades, queries)

    def _list(self, query: str, documents: list[str]) -> list[int]:
        blocks = self.template.blocks(self.query_text[query], documents, early=True)
        if len(blocks) > 1:
            raise ValueError(
                f"query {query!r}: its {len(documents)} documents take {len(blocks)} texts of "
                f"list_tokens={self.config.list_tokens}: raise it, or lower group_size or "
                "document_tokens"
            )
        return blocks[0].ids


def _tokenized(tokenize: Callable[[list], list[list[int]]], texts: Iterable) -> Iterator[list[int]]:
    """The ids of each text, of which few are in memory at once."""
    texts = iter(texts)
    while some := list(islice(texts, AT_ONCE)):
        yield from tokenize(some)


def alter(text: str, rng: random.Random) -> str:
    """The text without a tenth of its words, drawn at random; one word at least is kept."""
    words = text.split()
    kept = [word for word in words if rng.random() >= DROPPED]
    return " ".join(kept or words[:1])
