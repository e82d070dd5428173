"""What a trial is measured on: all queries against the pool, and fixed BM25 candidates."""

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.collections import Collection, require_split
from eval.machine import trim_heap
from eval.metrics import evaluate, ideal
from eval.rerank import over_heads, scores_by_heads, to_run
from eval.retrieval import Best, Ids, cut, search
from eval.sources import Qrels
from eval.stages import Stages
from model import parallel
from model.heads import truncate
from model.prefix import TextSet
from model.pseudo import ByPseudoQuery, PseudoQuery
from model.tokens import Tokenizer
from model.unimoer import UniMoER
from trials import Config

WINDOW = 100_000  # documents or pairs whose token ids and vectors are in memory at once
SCORES = 2**25  # of queries with documents of a window, held at once
Scores = dict[str, dict[str, float]]  # query id -> metric -> value
# Makes of token ids and a title the texts that a model reads, with prefix states or without.
StatesOf = Callable[[UniMoER], Callable[[list[list[int]], str], TextSet]]


def without_states(model: UniMoER) -> Callable[[list[list[int]], str], TextSet]:
    """The texts as they are: a `StatesOf` that keeps none."""
    return lambda ids, title: TextSet(ids)


class EvaluationSet:
    """One split, tokenized once (but for more than `WINDOW` documents) and shared by every trial of
    a process.

    Retrieval: every judged query against every document of the split's pool. Reranking:
    `reranking_queries` of them (chosen by each query id's own generator, so they do not depend on
    arm or seed) with BM25's own top `candidates`; nothing is forced in, so `ceiling` is what a
    perfect reranker would reach. Queries without a relevant document among them score 0 in any
    order: they count, but models need not score their pairs. What the collection excludes for a
    query is taken out of its rankings before they are cut, and its own instruction stands in the
    tokenizer's templates (`Prompts.instructed`) and in lists, not in a pseudo-query.

    tokenizer: None for what needs no model; `read_by` then makes the sets for models.
    """

    def __init__(
        self,
        collection: Collection,
        tokenizer: Tokenizer | None,
        config: Config,
        states: StatesOf,
    ):
        self.config = config
        judged = require_split(collection, config.split)
        self.qrels = {q: row for q, row in judged.items() if row}  # trec_eval skips the others
        self.relevant = collection.relevant_from.get(config.split, 1)
        self.documents = collection.pools[config.split]
        self.queries = list(self.qrels)
        order = sorted(self.queries, key=lambda query: random.Random(query).random())
        chosen = sorted(order[: config.reranking_queries or None])
        self.reranking_qrels = {query: self.qrels[query] for query in chosen}
        bm25 = collection.bm25(config.split)
        depth = max(config.retrieval_depth, config.candidates)
        self._excluded = {q: set(collection.excluded.get(q, ())) for q in self.queries}
        self._most = max(map(len, self._excluded.values()), default=0)
        asked = {q: collection.queries[q] for q in self.queries}
        self.bm25 = cut(bm25.search(asked, depth + self._most), self._excluded, depth)
        self.candidates = {
            query: dict(list(self.bm25[query].items())[: config.candidates]) for query in chosen
        }
        self.decisive = {q: found for q, found in self.candidates.items()
                       if any(self.qrels[q].get(d, 0) > 0 for d in found)}  # fmt: skip
        self.clusters = {q: collection.domain.get(q, q) for q in self.queries}
        self.collection, self._states = collection, states
        own = collection.instruction
        self._tokenizer = None if tokenizer is None else tokenizer.with_instruction(own)
        self._sets: dict[str, TextSet] = {}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (query, document) pairs that models score."""
        return [(q, d) for q, found in self.decisive.items() for d in found]

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "made without a tokenizer: call read_by first"
        return self._tokenizer

    def read_by(self, tokenizer: Tokenizer) -> "EvaluationSet":
        """The same queries, documents and candidates, for a model with another tokenizer."""
        other = copy.copy(self)
        other._tokenizer = tokenizer.with_instruction(self.collection.instruction)
        other._sets = {}
        return other

    def sample(self, count: int) -> "EvaluationSet":
        """A small set for looking into a model: `count` of the reranking queries.

        Retrieval is among the candidates and the relevant documents of all of them. All their
        pairs are scored.
        """
        chosen = sorted(self.candidates, key=lambda query: random.Random(query).random())[:count]
        part = copy.copy(self)
        part.queries = sorted(chosen)
        part.qrels = part.reranking_qrels = {q: self.qrels[q] for q in part.queries}
        part.candidates = part.decisive = {q: self.candidates[q] for q in part.queries}
        near = {d for q in part.queries for d in (*part.candidates[q], *part.qrels[q])}
        part.documents = [d for d in self.documents if d in near]
        part._sets = {}
        return part

    def _windows(self) -> list["EvaluationSet"]:
        """This set, or parts of whole queries with at most `WINDOW` pairs or one query each."""
        parts: list[list[str]] = [[]]
        count = 0
        for query, found in self.decisive.items():
            if parts[-1] and count + len(found) > WINDOW:
                parts.append([])
                count = 0
            parts[-1].append(query)
            count += len(found)
        if len(parts) == 1:
            return [self]
        made = []
        for queries in parts:
            part = copy.copy(self)
            part.decisive = {query: self.decisive[query] for query in queries}
            part._states, part._sets = without_states, {}
            made.append(part)
        return made

    def _by_window(
        self, score: Callable[["EvaluationSet"], Tensor], keep: Stages | None, name: str
    ) -> Tensor:
        """The scores (n, ...) of all pairs, of which `score` gives those of a part. keep: has them
        after each part, from which the same call goes on."""
        windows, found, first = self._windows(), [], 0
        if len(windows) == 1:
            return score(self)
        if keep and (before := keep.latest(name := self._of(name))):
            first, found = before[0], [torch.from_numpy(before[1])]
        for end, part in enumerate(windows[first:], first + 1):
            found = [torch.cat([*found, score(part)])]
            if keep:
                keep.advance(name, end, found[0].numpy())
            trim_heap()
        return found[0]

    def _of(self, name: str) -> str:
        """The name of a piece in `Stages` whose rows are told by their positions alone."""
        return f"{name}-{self.collection.order(self.config.split)}"

    def _set(self, task: str, model: UniMoER) -> TextSet:
        """The tokenized texts of a task, made when first needed; the model is not kept."""
        if task not in self._sets:
            c, tokenizer = self.collection, self.tokenizer
            spread = partial(parallel.spread, device=model.device)
            if task == "embedding":
                ids = tokenizer.queries([c.queries[q] for q in self.queries])
                ids += spread(tokenizer.documents, [c.corpus[d] for d in self.documents])
            else:
                ids = spread(tokenizer.pairs, [(c.queries[q], c.corpus[d]) for q, d in self.pairs])
            self._sets[task] = self._states(model)(ids, f"{self.config.split} {task}")
        return self._sets[task]

    def evaluate(self, qrels: Qrels, run: dict[str, dict[str, float]]) -> Scores:
        """Per-query metrics, relevant from the grade on that the split's authors say."""
        return evaluate(qrels, run, relevant=self.relevant)

    def bm25_scores(self) -> dict[str, Scores]:
        """BM25's own ranking, under both tasks."""
        retrieved = {
            q: dict(list(row.items())[: self.config.retrieval_depth])
            for q, row in self.bm25.items()
        }
        return {
            "embedding": self.evaluate(self.qrels, retrieved),
            "reranking": self.evaluate(self.reranking_qrels, self.candidates),
        }

    def ceiling(self) -> Scores:
        """The best that any reranking of these candidates can score."""
        return ideal(self.reranking_qrels, self.candidates, self.relevant)

    def retrieved(
        self,
        model: UniMoER,
        sizes: Sequence[int] = (),
        base: bool = False,
        progress: bool = False,
        keep: Stages | None = None,
    ) -> tuple[list[Scores], Tensor | None]:
        """Per-query metrics of full-corpus retrieval: by the vectors, then by the first values of
        them in each of `sizes`; and these vectors, as of `vectors`.

        More than `WINDOW` documents are tokenized, encoded and searched window by window, and
        their vectors are not kept: None. `keep` then has what was found after each window, from
        which the same call goes on.
        """
        options: dict[str, Any] = {"base": base, "progress": progress}
        if len(self.documents) <= WINDOW:
            vectors = self.vectors(model, **options)
            return [self.ranked(truncate(vectors, size)) for size in (None, *sizes)], vectors
        asked = self.tokenizer.queries([self.collection.queries[q] for q in self.queries])
        queries = model.embed_all(TextSet(asked), shared=True, **options)
        depth, rows = self.config.retrieval_depth, max(1, SCORES // WINDOW)
        ids, widths = Ids.of(self.documents), (None, *sizes)
        queries = queries.to(model.device)
        best = [Best(truncate(queries, w), ids, depth + self._most, rows) for w in widths]
        name, first = self._of("keys-of-base" if base else "keys"), 0
        if keep and (before := keep.latest(name)):
            first = before[0]
            for found, keys in zip(best, before[1], strict=True):
                found.keys, found.added = torch.from_numpy(keys).to(model.device), first
        for start in range(first, len(self.documents), WINDOW):
            self._search(model, start, best, widths, options)
            if keep:
                keys = torch.stack([found.keys for found in best])
                keep.advance(name, best[0].added, keys.cpu().numpy())
            trim_heap()
        return [  # one run at a time: each is a dict of queries x depth
            self.evaluate(self.qrels, cut(found.run(self.queries), self._excluded, depth))
            for found in best
        ], None

    def retrieved_once(
        self, model: UniMoER, keep: Stages, sizes: Sequence[int] = (), with_vectors: bool = False
    ) -> tuple[list[Scores], Tensor | None]:
        """`retrieved`, kept as "retrieval"; with its vectors, if they are wanted and there are any:
        a pseudo-query reranks with them."""
        made: Tensor | None = None

        def retrieve() -> list[Scores]:
            nonlocal made
            rows, made = self.retrieved(model, sizes, progress=True, keep=keep)
            if with_vectors and made is not None:
                keep.advance(self._of("vectors"), len(made), made.numpy())
            return rows

        rows = keep.kept("retrieval", retrieve)
        if with_vectors and made is None and (before := keep.latest(self._of("vectors"))):
            made = torch.from_numpy(before[1])
        return rows, made

    def _search(
        self, model: UniMoER, start: int, best: Sequence[Best], widths: Sequence[int | None],
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        """Encode the documents of a window and add them to what was found, at each width."""
        texts = [self.collection.corpus[d] for d in self.documents[start : start + WINDOW]]
        ids = parallel.spread(self.tokenizer.documents, texts, model.device)
        vectors = model.embed_all(TextSet(ids), shared=True, **options)
        for found, width in zip(best, widths, strict=True):
            found.add(truncate(vectors, width))

    def vectors(self, model: UniMoER, base: bool = False, progress: bool = False) -> Tensor:
        """(Q + M, D) unit vectors of the queries, then of the documents."""
        texts = self._set("embedding", model)
        return model.embed_all(texts, base=base, progress=progress, shared=True)

    def ranked(self, vectors: Tensor) -> Scores:
        """Per-query metrics of full-corpus retrieval by `vectors`, or by their first dimensions."""
        n, depth = len(self.queries), self.config.retrieval_depth
        run = search(vectors[:n], vectors[n:], self.queries, self.documents, depth + self._most)
        return self.evaluate(self.qrels, cut(run, self._excluded, depth))

    def retrieval(self, model: UniMoER, **options: Any) -> Scores:
        """Per-query metrics of full-corpus retrieval; options: of `retrieved`."""
        return self.retrieved(model, **options)[0][0]

    def pair_scores(
        self,
        model: UniMoER,
        shuffle: int | None = None,
        progress: bool = False,
        vectors: Tensor | None = None,
        asked: PseudoQuery | None = None,
    ) -> Tensor:
        """Scores (n,) of `pairs`.

        Args:
            shuffle: the number of a random order of each query's candidates, in which a listwise
                head reads them; None: BM25's. Other heads never see the order. A pseudo-query reads
                the same documents in any order, the first of BM25's.
            vectors: those of `vectors`, if they are at hand, for a pseudo-query.
            asked: rerank by this one, not by the model's head.
        """
        head = model.head if asked is None else ByPseudoQuery(model.tokenizer, asked)
        if not (model.config.listwise or asked):
            return model.score_all(self._set("reranking", model), progress=progress, shared=True)
        most = head.asked.read if isinstance(head, ByPseudoQuery) else None
        c, ids, places = self.collection, [], []
        for query, found in self.decisive.items():
            order = list(range(len(found)))
            if shuffle is not None:
                read = order[:most]
                random.Random(f"{query} {shuffle}").shuffle(read)
                order[:most] = read
            documents = list(found)
            ids.append([documents[i] for i in order])
            places += [len(places) + i for i in order]
        lists = [
            (c.queries[query], [c.corpus[d] for d in row])
            for query, row in zip(self.decisive, ids, strict=True)
        ]
        options: dict[str, Any] = {"progress": progress, "shared": True}
        if isinstance(head, ByPseudoQuery):
            if vectors is None:
                near = list(dict.fromkeys(d for row in ids for d in row))
                texts = TextSet(self.tokenizer.documents([c.corpus[d] for d in near]))
                rows, first = model.embed_all(texts, **options), 0
            else:
                near, rows, first = self.documents, vectors, len(self.queries)
            place = {d: first + i for i, d in enumerate(near)}
            of = [rows[[place[d] for d in row]] for row in ids]
            found = head.scores(partial(model.embed_all, **options), lists, of)
        else:
            found = model.score_lists(lists, instruction=c.instruction, **options)
        together = torch.cat([torch.zeros(0), *found])
        scores = torch.empty_like(together)
        scores[places] = together
        return scores

    def reranking(
        self,
        model: UniMoER,
        progress: bool = False,
        vectors: Tensor | None = None,
        asked: PseudoQuery | None = None,
        keep: Stages | None = None,
    ) -> Scores:
        """Per-query metrics of the reranked candidates, lists being read in BM25's order.

        More than `WINDOW` pairs are tokenized and scored window by window; `keep` then has the
        scores of those that are done. vectors, asked: as above.
        """

        def score(part: "EvaluationSet") -> Tensor:
            return part.pair_scores(model, progress=progress, vectors=vectors, asked=asked)

        scores = self._by_window(score, keep, "pair-scores")
        return self.evaluate(self.reranking_qrels, to_run(scores, self.pairs))

    def scores(
        self, model: UniMoER, tasks: Sequence[str], keep: Stages, sizes: Sequence[int] = (),
    ) -> tuple[dict[str, Scores], list[Scores]]:  # fmt: skip
        """Task -> per-query metrics; and those of retrieval by shorter vectors, as of `retrieved`.
        keep: has what an earlier call finished."""
        found: dict[str, Scores] = {}
        vectors: Tensor | None = None
        rest: list[Scores] = []
        again = model.config.rerank_head == "pseudo_query" and "reranking" in tasks
        if "embedding" in tasks:
            (found["embedding"], *rest), vectors = self.retrieved_once(
                model, keep, sizes, with_vectors=again
            )
        if "reranking" in tasks:
            rerank = partial(self.reranking, model, progress=True, vectors=vectors, keep=keep)
            found["reranking"] = keep.kept("reranking", rerank)
        return found, rest

    def untrained(
        self, model: UniMoER, progress: bool = False, keep: Stages | None = None
    ) -> dict[str, Scores]:
        """The bare base: its vectors as they are, and the mean of 20 random relevance heads. keep:
        as of `retrieved`."""

        def by_heads(part: "EvaluationSet") -> Tensor:
            return scores_by_heads(model, part._set("reranking", model), progress)

        def reranking() -> Scores:
            scores = self._by_window(by_heads, keep, "pair-scores-of-base")
            return over_heads(scores, self.pairs, self.reranking_qrels, self.relevant)

        def retrieval() -> Scores:
            return self.retrieval(model, base=True, progress=progress, keep=keep)

        kept = keep.kept if keep else lambda name, make: make()
        return {
            "embedding": kept("retrieval-of-base", retrieval),
            "reranking": kept("reranking-of-base", reranking),
        }
