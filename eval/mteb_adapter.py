"""A saved model as `mteb` sees it, and a BEIR folder as tasks of its own.

`mteb` (2.26) pulls in transformers and is of the development set, so this module is imported inside
functions alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import mteb
import torch
from datasets import Dataset
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.results import TaskResult
from mteb.types import PromptType
from torch import Tensor

from eval.collections import Collection, require_split
from eval.command import FULL
from eval.provenance import made_by, prompts, warn_of_other_code
from model.files import read_json, write_json
from model.tokens import INSTRUCTION, Prompts
from model.unimoer import UniMoER

# ISO 639-1 -> mteb's name of a language and its script, of those that eval/hub.py has.
LANGUAGES = {
    "ar": "ara-Arab", "bn": "ben-Beng", "de": "deu-Latn", "en": "eng-Latn", "es": "spa-Latn",
    "fa": "fas-Arab", "fi": "fin-Latn", "fr": "fra-Latn", "hi": "hin-Deva", "id": "ind-Latn",
    "it": "ita-Latn", "ja": "jpn-Jpan", "ko": "kor-Hang", "nl": "nld-Latn", "pt": "por-Latn",
    "ru": "rus-Cyrl", "sw": "swa-Latn", "te": "tel-Telu", "th": "tha-Thai", "vi": "vie-Latn",
    "yo": "yor-Latn", "zh": "zho-Hans",
}  # fmt: skip


def meta(model: UniMoER, name: str, version: str, *, cross: bool) -> ModelMeta:
    """What mteb keeps beside the scores (`model_meta.json`): with base, lengths and the model's own
    prompts; those of each task lie under `made_by`."""
    weights = [*model.decoder.named_weights().values(), *model.trained().values()]
    c = model.config
    return ModelMeta(
        loader=None,
        loader_kwargs={
            "base": model.identity,
            "prompts": prompts(c, tasks=("reranking" if cross else "embedding",)),
            "document_tokens": c.document_tokens,
            "pooling": {"embedding": c.embedding_pooling, "reranking": c.reranking_pooling},
        },
        name=name, revision=version, release_date=None, languages=None,
        n_parameters=sum(p.numel() for p in weights), memory_usage_mb=None,
        max_tokens=c.document_tokens, embed_dim=model.decoder.config.hidden_size,
        license=None, open_weights=True, public_training_code=None,
        public_training_data=None, framework=["PyTorch"], use_instructions=False,
        similarity_fn_name=None if cross else ScoringFunction.COSINE, training_datasets=None,
        model_type=["cross-encoder" if cross else "dense"],
    )  # fmt: skip


def instruction(templates: Prompts, name: str, task: TaskMetadata) -> str:
    """The task's own, if the template (query, document or pair) has a place for one; else "": the
    template stands as it is."""
    if INSTRUCTION not in getattr(templates, name):
        return ""
    own = task.prompt
    side = "document" if name == "document" else "query"
    return (own.get(side) if isinstance(own, dict) else own) or ""


def texts_of(inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The texts of mteb's batches, in their order."""
    return [text for batch in inputs for text in batch["text"]]


class Encoder:
    """The embedding side: mteb's EncoderProtocol.

    Queries take the query's template; documents, and the texts of tasks without sides (similarity,
    clustering, classification), the document's; either with the task's own instruction, where it
    has a place for one and the task has one.
    """

    templates = {"query", "document"}

    def __init__(self, model: UniMoER, name: str, version: str):
        self.model = model
        self.mteb_model_meta = meta(model, name, version, cross=False)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(n, D) unit vectors, fp32."""
        task = "query" if prompt_type == PromptType.query else "document"
        asked = instruction(self.model.config.prompts, task, task_metadata)
        bar = kwargs.get("show_progress_bar")
        return self.model.encode(texts_of(inputs), task=task, instruction=asked, progress=bar)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine (n, m)."""
        first, second = (torch.as_tensor(e).float() for e in (embeddings1, embeddings2))
        return _unit(first) @ _unit(second).t()

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine of corresponding rows (n,)."""
        first, second = (torch.as_tensor(e).float() for e in (embeddings1, embeddings2))
        return (_unit(first) * _unit(second)).sum(-1)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x if x.dim() > 1 else x[None], dim=-1)


class CrossEncoder:
    """The reranking side: mteb's CrossEncoderProtocol. The pair's template has the task's own
    instruction, as above; lists have none."""

    templates = {"pair"}

    def __init__(self, model: UniMoER, name: str, version: str):
        self.model = model
        self.mteb_model_meta = meta(model, name, version, cross=True)

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(n,) raw scores of relevance: in fp32 the sigmoid of logits ties where it saturates."""
        pairs = list(zip(texts_of(inputs1), texts_of(inputs2), strict=True))
        config = self.model.config
        asked = "" if config.listwise else instruction(config.prompts, "pair", task_metadata)
        bar = bool(kwargs.get("show_progress_bar"))
        return self.model.score_pairs(pairs, instruction=asked, progress=bar)


def prompts_of(side: Encoder | CrossEncoder, task: TaskMetadata) -> dict[str, str]:
    """The prompts of a task, by name: the side's own, with the task's instruction where it goes."""
    own, found = side.model.config.prompts, side.mteb_model_meta.loader_kwargs["prompts"]
    for name in side.templates & found.keys():
        if text := instruction(own, name, task):
            found = found | {name: replace(own, instruction=text).filled(name)}
    return found


def named(names: Iterable[str]) -> list[Any]:
    """Tasks by the names of tasks and of whole benchmarks ("MTEB(eng, v2)"), each once.

    Raises:
        ValueError: mteb knows no such task or benchmark, one of them is not of text alone, or a
            task is meant twice, with other languages or splits.
    """
    found: dict[str, Any] = {}
    for name in names:
        try:
            made = mteb.get_benchmark(name).tasks
        except KeyError as first:
            try:
                made = [mteb.get_task(name)]
            except KeyError as error:  # each with the names that are near
                near = f"{first.args[0]} {error.args[0]}"
                raise ValueError(f"mteb knows no such task or benchmark: {near}") from error
        for task in made:
            about = task.metadata
            if other := set(about.modalities) - {"text"}:
                raise ValueError(f"{about.name} is of {', '.join(sorted(other))}: expected text")
            twin = found.setdefault(about.name, task)
            if any(getattr(twin, k) != getattr(task, k) for k in ("hf_subsets", "eval_splits")):
                raise ValueError(
                    f"{about.name} is meant twice, with other languages or splits: name the "
                    "benchmark or the task"
                )
    return list(found.values())


def main_score(side: Encoder | CrossEncoder, task: Any, folder: Path) -> float:
    """A task's main score by one side, over the splits and languages that the task asks for.

    By default mteb keeps a stored result whatever the revision of the data that it was made on;
    here another revision of the data is measured anew, as are another revision of the model and
    other prompts, which lie beside the result, in `made_by`. What sums up other tasks, such as
    CQADupstackRetrieval, is summed up again each time. Of other code a result is taken, and that is
    said.

    Args:
        folder: of the results, in mteb's own layout.
    Raises:
        ValueError: its data cannot be had, or mteb could not evaluate it.
    """
    cache = mteb.ResultCache(folder)
    place = cache.get_task_result_path(task.metadata.name, side.mteb_model_meta)
    if isinstance(task, AbsTaskAggregate):
        for part in task.tasks:
            main_score(side, part, folder)
        place.unlink(missing_ok=True)
    else:
        _settle(place, side, task.metadata)
    try:
        found = mteb.evaluate(cast(Any, side), task, cache=cache, encode_kwargs={"batch_size": 32})
    except OSError as problem:  # the hub's errors and those of `datasets` are of this class
        if problem.errno in FULL:
            raise
        raise ValueError(
            f"{task.metadata.name}: its data are neither in the cache nor to be had from the hub "
            f"({type(problem).__name__}: {problem}). Without a network, evaluate it once on a "
            "machine that has one and bring HF_HOME over. The tasks that are finished are kept"
        ) from problem
    if not found.task_results:
        why = found.exceptions[0].exception if found.exceptions else "without a word why"
        raise ValueError(f"{task.metadata.name}: mteb did not evaluate it ({why})")
    # As it is stored, which rounds; and of the languages that are asked for: it may hold more.
    result = TaskResult.from_disk(place).validate_and_filter_scores(task)
    return float(result.get_score(splits=list(task.eval_splits)))


def _settle(place: Path, side: Encoder | CrossEncoder, task: TaskMetadata) -> None:
    """Take the stored result away if it is of other data or prompts, and warn if it is of other
    code. Where there is none, put down what makes it: now, for mteb stores it part by part."""
    origin, told = place.parent / "made_by" / place.name, prompts_of(side, task)
    if place.exists():
        # A result of which nothing is said is older than the instructions of tasks.
        own = {"prompts": side.mteb_model_meta.loader_kwargs["prompts"]}
        made = read_json(origin, "remove it") if origin.exists() else own
        data = read_json(place, "remove it, it is made again")["dataset_revision"]
        if (data, made["prompts"]) == (task.revision, told):
            return warn_of_other_code(place, made)
        place.unlink()
    write_json(origin, {"prompts": told, **made_by(str(side.model.device))})


def tasks(
    collection: Collection, split: str, candidates: Mapping[str, Iterable[str]] | None = None
) -> list[AbsTaskRetrieval]:
    """A collection as a retrieval task and, with candidates, a reranking task.

    Args:
        candidates: query id -> ids of the documents that are to be ordered.
    Raises:
        ValueError: there is no such split, or mteb's evaluator would not keep to the collection's
            rules.
    """
    if collection.excluded or collection.instruction:
        raise ValueError(
            f"{collection.name} excludes documents by query or has its own instruction, which mteb "
            "would pass over: use BENCH=beir, or mteb's own task of it"
        )
    judged = require_split(collection, split)
    documents = collection.pools[split]
    corpus = Dataset.from_dict({"id": documents, "text": [collection.corpus[d] for d in documents]})
    made = [_task(collection, split, "Retrieval", collection.name, judged, corpus, None)]
    if candidates is not None:
        ranked = {query: list(found) for query, found in candidates.items()}
        chosen = {query: judged[query] for query in ranked}
        name = f"{collection.name}-reranking"
        made.append(_task(collection, split, "Reranking", name, chosen, corpus, ranked))
    return made


def _task(
    collection: Collection,
    split: str,
    kind: Literal["Retrieval", "Reranking"],
    name: str,
    judged: Mapping[str, Mapping[str, int]],
    corpus: Dataset,
    ranked: dict[str, list[str]] | None,
) -> AbsTaskRetrieval:
    if collection.language not in LANGUAGES:
        raise ValueError(
            f"{collection.name} is in {collection.language!r}, which has no name here for mteb: "
            "use BENCH=beir, or mteb's own task of it (TASKS=)"
        )
    queries = list(judged)
    # mteb reads a stored result of the same revision, so other candidates have another one.
    version = hashlib.sha256(
        json.dumps([collection.fingerprint, split, ranked]).encode()
    ).hexdigest()
    data = {
        "corpus": corpus,
        "queries": Dataset.from_dict(
            {"id": queries, "text": [collection.queries[q] for q in queries]}
        ),
        "relevant_docs": {query: dict(row) for query, row in judged.items()},
        "top_ranked": ranked,
    }
    metadata = TaskMetadata(
        name=name, description=f"{collection.name}, {split} split, from files of one's own",
        type=kind, category="t2t", eval_splits=[split],
        eval_langs=[LANGUAGES[collection.language]], main_score="ndcg_at_10",
        dataset={"path": collection.name, "revision": version},
    )  # fmt: skip

    class Local(AbsTaskRetrieval):
        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset, self.data_loaded = {"default": {split: data}}, True  # type: ignore[assignment]

    Local.metadata = metadata
    return Local()
