"""The fixed micro-batches of a trial: one set of pairs for all arms, in the seed's order."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.collections import Collection, require_split
from experiments import Config
from model.prefix import TextSet
from model.tokens import Tokenizer
from train.negatives import bm25_negatives

# Tokenized texts -> the same with their frozen-prefix states, where those are used.
WithStates = Callable[[list[list[int]], str], TextSet]


@dataclass(frozen=True)
class EmbeddingBatch:
    """queries (B), documents (M): places in the text set. positive (B,), relevant (B, M): see
    `losses.info_nce`. ids: of the queries, for messages."""

    queries: list[int]
    documents: list[int]
    positive: Tensor
    relevant: Tensor
    ids: list[str]


@dataclass(frozen=True)
class RerankingBatch:
    """pairs: places in the text set, groups of `size` with the positive first."""

    pairs: list[int]
    size: int
    ids: list[str]


class TrainingData:
    """Chosen queries, positives and negatives of both tasks, tokenized.

    `train_queries` of the training split, chosen by the query id's own generator, serve both
    tasks. Which pairs they make never depends on the arm or the seed; the seed orders them.
    """

    def __init__(
        self, collection: Collection, tokenizer: Tokenizer, config: Config, states: WithStates
    ):
        self.config, self.corpus = config, collection.corpus
        judged = require_split(collection, "train")
        self.relevant = {
            query: {d: grade for d, grade in row.items() if grade > 0}
            for query, row in judged.items()
        }
        usable = sorted(query for query, row in self.relevant.items() if row)
        order = sorted(usable, key=lambda query: random.Random(query).random())
        self.queries = order[: config.train_queries or None]
        needed = max(
            config.embedding_batch if "embedding" in config.tasks else 0,
            config.reranking_batch if "reranking" in config.tasks else 0,
        )
        if len(self.queries) < needed:
            raise ValueError(
                f"{collection.name}: {len(self.queries)} training queries with a relevant "
                f"document, but a batch takes {needed}: lower the batch or give more data"
            )
        # The best grade, then the smallest id: one positive per query.
        self.positive = {
            q: min(self.relevant[q], key=lambda d: (-self.relevant[q][d], d)) for q in self.queries
        }
        self.negatives = bm25_negatives(
            {q: collection.queries[q] for q in self.queries},
            self.relevant,
            collection.corpus,
            collection.pools["train"],
            config.negatives_depth,
            max(config.hard_negatives, config.group_size - 1),
        )
        if "embedding" in config.tasks:
            self._embedding_texts(collection, tokenizer, states)
        if "reranking" in config.tasks:
            self._reranking_texts(collection, tokenizer, states)

    def _embedding_texts(self, collection: Collection, tokenizer: Tokenizer, states: WithStates):
        hard = self.config.hard_negatives
        wanted = [d for q in self.queries for d in [self.positive[q], *self.negatives[q][:hard]]]
        documents = list(dict.fromkeys(wanted))
        ids = tokenizer.queries([collection.queries[q] for q in self.queries])
        self.query_at = {q: i for i, q in enumerate(self.queries)}
        self.document_at = {d: len(ids) + i for i, d in enumerate(documents)}
        ids += tokenizer.documents([collection.corpus[d] for d in documents])
        self.embedding_texts = states(ids, "training texts")

    def _reranking_texts(self, collection: Collection, tokenizer: Tokenizer, states: WithStates):
        negatives = self.config.group_size - 1
        pairs = []
        self.group_at: dict[str, int] = {}
        for query in self.queries:
            self.group_at[query] = len(pairs)
            for document in [self.positive[query], *self.negatives[query][:negatives]]:
                pairs.append((collection.queries[query], collection.corpus[document]))
        self.reranking_texts = states(tokenizer.pairs(pairs), "training pairs")

    def _batch_queries(self, task: str, step: int, size: int) -> list[str]:
        """The step's queries: each epoch is a permutation of its own, its remainder left out."""
        per_epoch = len(self.queries) // size
        epoch, at = divmod(step, per_epoch)
        seed = self.config.seed + self.config.seed_offset
        order = list(self.queries)
        random.Random(f"{seed} {task} {epoch}").shuffle(order)
        return order[at * size : (at + 1) * size]

    def embedding(self, step: int) -> EmbeddingBatch:
        """The embedding micro-batch of a step."""
        queries = self._batch_queries("embedding", step, self.config.embedding_batch)
        hard = [d for q in queries for d in self.negatives[q][: self.config.hard_negatives]]
        # A document that serves two queries appears once: it is no negative of its own query.
        documents = list(dict.fromkeys([self.positive[q] for q in queries] + hard))
        row = {d: i for i, d in enumerate(documents)}
        # By text, not by id: a copy under another id is as relevant.
        known = [{self.corpus[d] for d in self.relevant[q]} for q in queries]
        relevant = torch.tensor([[self.corpus[d] in texts for d in documents] for texts in known])
        return EmbeddingBatch(
            queries=[self.query_at[q] for q in queries],
            documents=[self.document_at[d] for d in documents],
            positive=torch.tensor([row[self.positive[q]] for q in queries]),
            relevant=relevant,
            ids=queries,
        )

    def reranking(self, step: int) -> RerankingBatch:
        """The reranking micro-batch of a step."""
        queries = self._batch_queries("reranking", step, self.config.reranking_batch)
        size = self.config.group_size
        return RerankingBatch(
            pairs=[self.group_at[q] + i for q in queries for i in range(size)],
            size=size,
            ids=queries,
        )
