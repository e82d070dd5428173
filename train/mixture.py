"""Training on several collections: whole micro-batches of one at a time (DATA=fiqa+msmarco)."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from eval.collections import Collection
from model.config import LISTWISE
from model.prefix import TextSet
from model.token_lists import TokenLists
from model.tokens import Tokenizer
from train.batches import (
    EmbeddingBatch,
    ListBatch,
    PseudoBatch,
    RerankingBatch,
    TrainingData,
    WithStates,
    check_training,
)
from trials import Config, parts


def shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """p_i = n_i^(1/T) / sum_j n_j^(1/T) (T5, arXiv 1910.10683, section 3.5.2).

    T = 1 is in proportion to size, larger T nears equal shares. n_i counts the training queries,
    at most the config's `train_queries`, which is that section's limit K.
    """
    raised = [size ** (1 / temperature) for size in sizes]
    return [value / sum(raised) for value in raised]


def quotas(steps: int, wanted: Sequence[float]) -> list[int]:
    """Whole numbers of steps in these shares, that sum to `steps`: by largest remainder."""
    exact = [steps * share for share in wanted]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: steps - sum(counts)]:
        counts[i] += 1
    return counts


def training_steps(collections: Sequence[Collection], config: Config) -> list[int]:
    """How many of the steps, or of `data_steps`, are of each collection.

    Raises:
        ValueError: a collection has no train split, too few queries for a batch, no step at all,
            or the name of another.
    """
    sizes = [len(check_training(collection, config)) for collection in collections]
    steps = config.data_steps or config.steps
    counts = quotas(steps, shares(sizes, config.mixture_temperature))
    names = [collection.name for collection in collections]
    if len(set(names)) < len(names):
        raise ValueError(f"data={config.data}: collections of a mixture need different names")
    for name, size, count in zip(names, sizes, counts, strict=True):
        if steps and not count:
            raise ValueError(
                f"{name}: its {size} queries get none of {steps} steps beside {names}: "
                "raise mixture_temperature or steps, or leave it out"
            )
    return counts


@lru_cache(maxsize=4)
def _order(counts: tuple[int, ...], seed: int, epoch: int) -> list[int]:
    """Which collection each step of an epoch takes."""
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    random.Random(f"{seed} mixture {epoch}").shuffle(order)
    return order


class Mixture(TrainingData):
    """`TrainingData` of several collections; `parts` holds that of each.

    A step's micro-batches, of both tasks, are of one collection, so in-batch negatives are too. How
    many steps each gets is fixed (`training_steps`), which ones the seed decides: every step has
    the same chance of being of collection i, p_i but for rounding to whole steps, and what is
    trained on depends on neither arm nor seed, as with one collection. Query ids in batches carry
    the collection's name.
    """

    def __init__(
        self,
        collections: Sequence[Collection],
        tokenizer: Tokenizer,
        config: Config,
        states: WithStates,
    ):
        self.config = config
        self.names = [collection.name for collection in collections]
        self.steps = tuple(training_steps(collections, config))
        self.parts = [
            TrainingData(collection, tokenizer, own, lambda ids, title: TextSet(ids))
            for collection, own in zip(collections, self._configs(), strict=True)
        ]
        self.starts: dict[str, list[int]] = {}
        if "embedding" in config.tasks:
            sets = [part.embedding_texts for part in self.parts]
            self.embedding_texts = self._joined("embedding", sets, "training texts", states)
        if "reranking" in config.tasks and config.rerank_head not in LISTWISE:
            sets = [part.reranking_texts for part in self.parts]
            self.reranking_texts = self._joined("reranking", sets, "training pairs", states)

    def _configs(self) -> list[Config]:
        """Of each collection: its steps and its negatives."""
        c, count = self.config, len(self.names)
        folders, marks = parts(c.negatives), c.negatives_sha256.split("+")
        if c.negatives == "bm25":
            folders, marks = ["bm25"] * count, [""] * count
        if len(folders) != count:
            raise ValueError(
                f"negatives={c.negatives} names {len(folders)} for {count} collections "
                f"({', '.join(self.names)}): join one of each by +, bm25 or a mined folder"
            )
        marks = marks if len(marks) == count else [""] * count
        return [
            replace(c, steps=steps, data_steps=0, negatives=folder, negatives_sha256=mark)
            for steps, folder, mark in zip(self.steps, folders, marks, strict=True)
        ]

    def _joined(self, task: str, sets: list[TextSet], title: str, states: WithStates) -> TextSet:
        self.starts[task] = [0, *accumulate(len(texts.ids) for texts in sets)]
        return states(TokenLists(ids for texts in sets for ids in texts.ids), title)

    def place(self, step: int, seed: int | None = None) -> tuple[int, int]:
        """Which collection a step takes, and which of its own steps that is."""
        seed = self.config.seed + self.config.seed_offset if seed is None else seed
        epoch, at = divmod(step, sum(self.steps))
        order = _order(self.steps, seed, epoch)
        part = order[at]
        return part, epoch * self.steps[part] + order[:at].count(part)

    def per_epoch(self, task: str) -> int:
        """Batches of a task in which no collection has begun anew: those of the smallest."""
        return min(part.per_epoch(task) for part in self.parts)

    def embedding(self, step: int, seed: int | None = None) -> EmbeddingBatch:
        part, at = self.place(step, seed)
        batch, start = self.parts[part].embedding(at, seed), self.starts["embedding"][part]
        return replace(
            batch,
            queries=[start + i for i in batch.queries],
            documents=[start + i for i in batch.documents],
            ids=self._named(part, batch.ids),
        )

    def reranking(self, step: int, seed: int | None = None) -> RerankingBatch:
        part, at = self.place(step, seed)
        batch, start = self.parts[part].reranking(at, seed), self.starts["reranking"][part]
        return replace(
            batch,
            pairs=[start + i for i in batch.pairs],
            ids=self._named(part, batch.ids),
        )

    def lists(self, step: int, seed: int | None = None) -> ListBatch:
        part, at = self.place(step, seed)
        batch = self.parts[part].lists(at, seed)
        return replace(batch, ids=self._named(part, batch.ids))

    def pseudo(self, step: int, seed: int | None = None) -> PseudoBatch:
        part, at = self.place(step, seed)
        batch = self.parts[part].pseudo(at, seed)
        return replace(batch, ids=self._named(part, batch.ids))

    def _named(self, part: int, queries: list[str]) -> list[str]:
        return [f"{self.names[part]}:{query}" for query in queries]


def training_data(
    collections: Sequence[Collection], tokenizer: Tokenizer, config: Config, states: WithStates
) -> TrainingData:
    """Of one collection or of a mixture of several."""
    if len(collections) == 1:
        return TrainingData(collections[0], tokenizer, config, states)
    return Mixture(collections, tokenizer, config, states)
