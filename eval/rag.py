"""Retrieve, rerank, generate: one question after the other, and what each stage costs.

The three jobs are roles of models: one UniMoER does all three (its generator is the bare base, and
where it stops at an early layer, the rest of the base is held beside it); or a bare base of its own
generates beside it; or there are three, embedder, reranker and bare base.
Where these have the same weights, answers agree and memory does not.

What a stage is good for is seen where it is left out: the one model without reranking, or without
any document; or BM25's documents in place of both.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import hub
from eval.answers import NORMALISERS, exact_match, f1, squad
from eval.collections import Collection
from eval.machine import peak_bytes
from eval.metrics import interval
from eval.retrieval import Ids, to_keys, to_run
from eval.sources import rows, strings_of, text_of
from eval.stages import Stages
from eval.vectors import Vectors
from model import saved
from model.files import read_json
from model.generate import Generator, require_sampling
from model.unimoer import UniMoER
from model.weights import revision

# Two examples show a bare model that an answer is a few words on the same line.
PROMPT = (
    "Answer each question in a few words.\n\n"
    "Question: who wrote the play hamlet\nAnswer: William Shakespeare\n\n"
    "Question: how many days are there in a leap year\nAnswer: 366\n\n"
    "{passages}\n\nQuestion: {question}\nAnswer:"
)
SIDES = ("one", "two", "three")  # models for the three roles
STAGES = ("retrieve", "rerank", "generate")
PARTS = {  # the stages that are left of "one"
    "no-rerank": ("retrieve", "generate"),
    "closed-book": ("generate",),
    "bm25": ("retrieve", "generate"),  # with BM25 in place of the embedder
}


@dataclass(frozen=True)
class Settings:
    """depth: documents retrieved, which are reranked. passages: of these, that the generator reads,
    each cut to `passage_tokens`. rule: whose normalisation, a key of `NORMALISERS`. temperature,
    top_k, top_p: as of `Generator.generate`. seed: of the draws, which are each question's own."""

    depth: int = 20
    passages: int = 3
    passage_tokens: int = 96
    new_tokens: int = 16
    rule: str = "nq"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.rule not in NORMALISERS:
            raise ValueError(f"rule must be one of {list(NORMALISERS)}, got {self.rule!r}")
        if not 1 <= self.passages <= self.depth:
            raise ValueError(
                f"passages must lie between 1 and depth={self.depth}, got {self.passages}"
            )
        require_sampling(self.temperature, self.top_k, self.top_p)
        if not self.temperature and (self.top_k, self.top_p, self.seed) != (0, 1.0, 0):
            raise ValueError(
                "top_k, top_p and seed are of sampled answers: give a temperature above 0 too"
            )

    def asked(self) -> dict[str, Any]:
        """What decides the answers: no way of drawing where nothing is drawn."""
        drawn = ("temperature", "top_k", "top_p", "seed")
        return {k: v for k, v in asdict(self).items() if self.temperature or k not in drawn}


def read_answers(folder: Path, queries: Sequence[str]) -> dict[str, list[str]]:
    """query id -> gold answers, from `answers.json` beside a BEIR folder's files.

    Raises:
        ValueError: the file is missing or malformed, or a query has no answer in it.
    """
    path = Path(folder) / "answers.json"
    found = read_json(path, "give gold answers there, {query id: [answer, ...]}")
    for query in queries:
        gold = found.get(query)
        if not (isinstance(gold, list) and gold and all(isinstance(text, str) for text in gold)):
            raise ValueError(f"{path}: query {query!r} has {gold!r}, expected a list of answers")
    return {query: found[query] for query in queries}


def published_answers(
    data: str, split: str, queries: Mapping[str, str], cache: Path | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """query id -> gold answers, of those questions of one of `hub.ANSWERS` that have any.

    Args:
        split: of the questions. queries: query id -> text.
    Returns:
        The answers; and where they come from, and how many questions have none.
    Raises:
        ValueError: the answers are another split's, a row is malformed, or no question has one.
    """
    of = hub.ANSWERS[data]
    if split != of.split:
        raise ValueError(
            f"{data} has answers to its {of.split} questions alone ({of.repo}), got split {split!r}"
        )
    file, commit = hub.find_answers(data, cache)
    known: dict[str, list[str]] = {}
    for where, row in rows(file):
        key, answer = text_of(where, row, of.key), row.get(of.answer)
        answers = [answer] if isinstance(answer, str) else strings_of(where, row, of.answer)
        known.setdefault(squad(key) if of.by_text else key, []).extend(answers)
    found = {q: known.get(squad(text) if of.by_text else q) for q, text in queries.items()}
    gold = {query: list(dict.fromkeys(answers)) for query, answers in found.items() if answers}
    if not gold:
        raise ValueError(
            f"{file}: none of the {len(queries)} {split} questions of {data} has an answer there, "
            f"such as {min(queries)!r}: the two do not belong together"
        )
    return gold, {of.repo: commit, "questions without an answer": str(len(queries) - len(gold))}


def takes_vectors(side: str) -> bool:
    """Whether a side retrieves by vectors: not the one without documents, nor BM25's."""
    return side != "bm25" and "retrieve" in PARTS.get(side, STAGES)


class Pipeline:
    """The models of the three roles, and what its side retrieves with: in memory the embedder's
    vectors of all documents, or BM25's index.

    Args:
        stored: the vectors; None on a side that takes none (`takes_vectors`).
        side: of `SIDES` or `PARTS`, which says what stages there are.
    Raises:
        ValueError: vectors are missing, or are of another number of documents.
    """

    def __init__(
        self, models: Sequence[UniMoER], collection: Collection, split: str,
        stored: Vectors | None, s: Settings, side: str = "one",
    ):  # fmt: skip
        self.stages = PARTS.get(side, STAGES)
        self.embedder, self.reranker = models[:2]
        self.generator, self.tokenizer = Generator(models[2]), models[2].tokenizer
        self.collection, self.settings = collection, s
        self.bm25 = collection.bm25(split) if side == "bm25" else None
        if stored is not None:
            self._load(stored)
        fast = self.tokenizer.fast
        lines = {i for i in range(fast.get_vocab_size()) if "\n" in fast.decode([i])}
        self.stop: set[int] = lines | {self.tokenizer.end_id}

    def _load(self, stored: Vectors) -> None:
        stored.require_all()
        if stored.documents != len(self.collection.corpus):
            raise ValueError(
                f"{stored.folder} holds vectors of {stored.documents:,} documents, expected "
                f"{len(self.collection.corpus):,}: remove it, they are encoded again"
            )
        self.vectors = torch.empty(stored.documents, stored.dimension)
        for shard in range(stored.shards):
            rows = self.vectors[shard * stored.window :][: stored.size(shard)]
            np.copyto(rows.numpy(), stored.shard(shard))
        self.ids = Ids(stored.ids())
        self.places = self.ids.places(slice(None))

    def ask(self, query: str) -> tuple[str, list[str], dict[str, float]]:
        """The answer to one question, the documents that were read, and seconds by stage."""
        s, text, clock = self.settings, self.collection.queries[query], [time.perf_counter()]
        read: list[str] = []
        if "retrieve" in self.stages:
            read = self.retrieve(query, text)
            clock.append(time.perf_counter())
        if "rerank" in self.stages:
            documents = [self.collection.corpus[d] for d in read]
            read = [read[i] for i, _ in self.reranker.rank(text, documents, s.passages)]
            clock.append(time.perf_counter())
        read = read[: s.passages]
        # Of its own, so that a question draws alike whichever were asked before it.
        seed = random.Random(f"{s.seed} {query}").getrandbits(62)
        [ids] = self.generator.generate(
            [self.prompt(text, read)], s.new_tokens, stop=self.stop,
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=seed,
        )  # fmt: skip
        clock.append(time.perf_counter())
        answer = self.tokenizer.fast.decode([i for i in ids if i not in self.stop])
        took = np.diff(clock).tolist()
        return answer.strip(), read, dict(zip(self.stages, took, strict=True))

    def retrieve(self, query: str, text: str) -> list[str]:
        """The ids of the `depth` nearest documents, best first; of BM25 perhaps fewer."""
        if self.bm25 is not None:
            return list(self.bm25.search({query: text}, self.settings.depth)[query])
        vector = self.embedder.encode_query([text])
        keys = to_keys(vector @ self.vectors.t(), self.places)
        best = keys.topk(min(self.settings.depth, len(self.ids)), dim=1).values
        return list(to_run(best, [query], self.ids)[query])

    def prompt(self, question: str, documents: Sequence[str]) -> list[int]:
        """Token ids of the passages, each cut, and the question."""
        fast, passages = self.tokenizer.fast, []
        for document in documents:
            ids = fast.encode(self.collection.corpus[document], add_special_tokens=False).ids
            passages.append(fast.decode(ids[: self.settings.passage_tokens]))
        form = PROMPT if passages else PROMPT.replace("{passages}\n\n", "")
        text = form.format(passages="\n\n".join(passages), question=question)
        ids = fast.encode(text, add_special_tokens=False).ids
        return [*self.tokenizer.lead(), *ids]


def resident_bytes(models: Sequence[UniMoER], generator: Generator) -> int:
    """Of parameters and buffers of all different models, and of what the generator adds."""
    tensors = [*generator.added, *(t for m in models for t in (*m.parameters(), *m.buffers()))]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def players(folder: str, side: str, specialists: Sequence[str], device: str) -> list[UniMoER]:
    """The models of a side by role: embedder, reranker, generator.

    Args:
        folder: the model that plays every role but a generator of its own, which is its bare base.
        specialists: embedder and reranker that take its place where there are three models; ().
    """
    first, second = specialists if specialists and side == "three" else (folder, folder)
    embedder = UniMoER.from_pretrained(first, device).compact()
    if side == "one" or side in PARTS:
        return [embedder] * 3
    config = saved.read_config(Path(folder))[0]
    bare = replace(config, layers=None, lora=None, router=None, rerank_head="linear")
    generator = UniMoER(bare, device).compact()
    if side == "two":
        return [embedder, embedder, generator]
    return [embedder, UniMoER.from_pretrained(second, device).compact(), generator]


def measure(
    folder: str, side: str, collection: Collection, split: str, answers: dict[str, list[str]],
    settings: Settings, device: str, stored: Vectors | None, stages: Stages,
    specialists: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every question of `answers` with the models of a side; means, latencies, memory.

    Args:
        stored: as of `Pipeline`, by the side's embedder. stages: have the questions that an
            earlier call answered.
    Raises:
        ValueError: they are another model's, or as of `Pipeline`.
    """
    embedder = specialists[0] if specialists and side == "three" else folder
    if stored is not None and stored.manifest["revision"] != (mine := revision(embedder)):
        raise ValueError(
            f"{stored.folder} holds vectors of the model {stored.manifest['revision']}, expected "
            f"those of {embedder}, {mine}: remove it, they are encoded again"
        )
    models = players(folder, side, specialists, device)
    pipeline = Pipeline(models, collection, split, stored, settings, side)
    normalise, earlier = NORMALISERS[settings.rule], stages.rows("questions")
    rows = {row["query"]: row["row"] for row in earlier}
    peak = max((row["peak_bytes"] for row in earlier), default=0)
    left = [query for query in answers if query not in rows]
    for query in left[:1]:
        pipeline.ask(query)  # untimed: what is compiled and allocated once is no latency
    for query in left:
        gold = answers[query]
        answer, read, seconds = pipeline.ask(query)
        relevant = collection.qrels[split].get(query, {})
        rows[query] = {
            "answer": answer, "gold": gold, "read": read, "seconds": seconds,
            "exact_match": exact_match(answer, gold, normalise),
            "f1": f1(answer, gold, normalise, settings.rule == "hotpotqa"),
            "found": float(any(relevant.get(d, 0) > 0 for d in read)),
        }  # fmt: skip
        row = {"query": query, "row": rows[query], "peak_bytes": peak_bytes(device)}
        stages.append("questions", row)
    took = {stage: [row["seconds"][stage] for row in rows.values()] for stage in pipeline.stages}
    took["together"] = [sum(row["seconds"].values()) for row in rows.values()]
    return {
        "side": side, "models": len({id(model) for model in models}),
        **{key: float(np.mean([row[key] for row in rows.values()]))
           for key in ("exact_match", "f1", "found")},
        "latency": {stage: {"median": float(np.median(values)),
                            "p95": float(np.quantile(values, 0.95))}
                    for stage, values in took.items()},
        "resident_bytes": resident_bytes(models, pipeline.generator),
        "peak_bytes": max(peak, peak_bytes(device)),
        "documents": len(collection.corpus),
        "vectors": stored and {k: stored.manifest[k] for k in ("dtype", "document_tokens")},
        "questions": rows,
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]], title: str) -> str:
    """A line for each side: answers with their 95 % intervals over questions, latencies in ms
    (median, p95), memory in GB. Below it: whether one, two and three models of the same weights
    answer alike, and the paired differences to three specialists and to what lacks a stage."""
    stages = "".join(f"{stage:>18}" for stage in (*STAGES, "together"))
    head = f"{'models':<12}{'EM':>14}{'F1':>14}{'found':>7}{stages}{'resident':>10}{'peak':>8}"
    lines = [title, head]
    for row in found:
        cells = [f"{row['side']:<12}"]
        for key in ("exact_match", "f1"):
            low, high = interval([of[key] for of in row["questions"].values()])
            cells.append(f"{row[key]:.3f} ± {(high - low) / 2:.3f}".rjust(14))
        reads = "retrieve" in PARTS.get(row["side"], STAGES)
        cells.append(f"{row['found']:7.3f}" if reads else f"{'-':>7}")
        for stage in (*STAGES, "together"):
            took = row["latency"].get(stage, {})
            shown = ", ".join(f"{1000 * took[key]:.0f}" for key in ("median", "p95") if took)
            cells.append((f"{shown} ms" if took else "-").rjust(18))
        cells += [f"{row['resident_bytes'] / 1e9:10.3f}", f"{row['peak_bytes'] / 1e9:8.3f}"]
        lines.append("".join(cells))
    questions = {row["side"]: row["questions"] for row in found}
    # The parts are of the one model: what is made of specialists is no whole of theirs.
    wholes = [row["questions"] for side in SIDES for row in found if row["side"] == side
              and not row.get("specialists")]  # fmt: skip
    same = [{q: row["answer"] for q, row in of.items()} for of in wholes]
    if len(same) > 1:
        lines.append(f"the sides give the same answers: {'yes' if same[1:] == same[:-1] else 'no'}")
    whole = next(iter(wholes), {})
    others = {row["side"]: "three specialists" for row in found if row.get("specialists")}
    others |= {part: part for part in PARTS if part in questions}
    for part, name_of in others.items() if whole else ():
        said = []
        for key, name in (("exact_match", "EM"), ("f1", "F1")):
            pairs = [whole[q][key] - row[key] for q, row in questions[part].items()]
            low, high = interval(pairs)
            said.append(f"{np.mean(pairs):+.3f} [{low:+.3f}, {high:+.3f}] {name}")
        lines.append(f"all stages against {name_of}: {', '.join(said)}")
    return "\n".join(lines)
