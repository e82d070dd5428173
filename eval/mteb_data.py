"""Retrieval tasks of mteb with all of their splits, the training one among them: DATA=mteb/CosQA.

mteb's own loader knows how each is laid out on the hub. What it gives is written once into a BEIR
folder of the cache, by task and revision, and read as any other.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.command import FULL
from eval.sources import Sources, folder
from model.files import locked, put

PREFIX = "mteb/"
TREC_DL = ("MSMARCO", "TRECDL2019", "TRECDL2020")  # test's grade 1: "related, but not relevant"
# Of languages that mteb has under several codes, the one of eval.mteb_adapter.LANGUAGES.
USUAL = {"cmn": "zho", "arb": "ara", "pes": "fas", "swh": "swa"}


def _task(data: str) -> tuple[Any, str]:
    """mteb's task, and the subset that is asked for or ""; raises as `find`."""
    try:
        import mteb
    except ImportError as error:
        raise ValueError(
            f"DATA={data} is read by mteb ({error}): `make setup` installs what tests and "
            "benchmarks need, mteb among it"
        ) from error
    name, _, subset = data.removeprefix(PREFIX).partition(":")
    try:
        return mteb.get_task(name), subset
    except KeyError as error:
        raise ValueError(f"DATA={data}: {error.args[0]}") from error


def own_split(data: str) -> str:
    """The split that mteb measures, test where it measures several; raises as `find`."""
    splits = _task(data)[0].metadata.eval_splits
    first = "test" if "test" in splits else splits[0]
    return "dev" if first == "validation" else first


def find(data: str, place: Path) -> Sources:
    """The folder of a task, fetched and written at first use.

    Args:
        data: "mteb/<task>", or "mteb/<task>:<subset>" of a task in several languages or domains.
        place: where the folders lie.
    Raises:
        ValueError: mteb is not installed; it has no such task or subset; the task is no retrieval,
            or loads its data in a way of its own; no network and nothing cached.
    """
    task, subset = _task(data)
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    from eval.mteb_adapter import LANGUAGES

    about = task.metadata
    name = about.name
    generic = isinstance(task, AbsTaskRetrieval) and about.type == "Retrieval" and all(
        getattr(type(task), way) is getattr(AbsTaskRetrieval, way)
        for way in ("load_data", "dataset_transform", "skip_first_result")
    )  # fmt: skip
    if not generic:
        raise ValueError(
            f"DATA={data} is a task of type {about.type} that is not laid out as mteb's retrieval "
            "is: it can be measured (make eval BENCH=mteb), not trained on"
        )
    languages: Mapping[str, list[str]] | list[str] = about.eval_langs
    if isinstance(languages, Mapping):
        if subset not in languages:
            raise ValueError(f"DATA={data}: expected mteb/{name}:<one of {', '.join(languages)}>")
        code = languages[subset][0]
    elif subset:
        raise ValueError(f"DATA={data}: {name} has no subsets, expected mteb/{name}")
    else:
        code = languages[0]
    known = {of.partition("-")[0]: short for short, of in LANGUAGES.items()}
    code = code.partition("-")[0]
    code = USUAL.get(code, code)
    repo, revision = about.dataset["path"], str(about.dataset["revision"])
    called = f"{name}-{subset}" if subset else name
    at = place / f"{called}-{revision[:12]}"
    with locked(place, name=f".{at.name}.lock"):
        if not at.is_dir():
            _write(at, repo, revision, subset)
    return replace(
        folder(at), name=f"mteb-{called.lower()}", provenance={repo: revision},
        published=True, language=known.get(code, code),
        relevant={"test": 2} if name in TREC_DL else {},
        own_document=task.ignore_identical_ids,
    )  # fmt: skip


def _write(at: Path, repo: str, revision: str, subset: str) -> None:
    """Whole or not at all. Splits that search corpora of their own get the union of them."""
    part = at.with_name(f".{at.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "qrels").mkdir(parents=True)
    kinds = ("corpus", "queries")
    known: dict[str, dict[str, int]] = {kind: {} for kind in kinds}  # id -> hash of what is written
    try:
        for split, found in _splits(repo, revision, subset):
            for kind in kinds:
                with open(part / f"{kind}.jsonl", "a", encoding="utf-8") as file:
                    for row in found[kind]:
                        line = {"_id": row["id"], "text": row["text"]}
                        if title := row.get("title"):
                            line["title"] = title
                        text = json.dumps(line)
                        if row["id"] not in known[kind]:
                            file.write(text + "\n")
                        if known[kind].setdefault(row["id"], hash(text)) != hash(text):
                            raise ValueError(
                                f"{repo}: id {row['id']!r} of its {kind} is another text in "
                                f"{split} than before: its splits cannot be in one collection"
                            )
            with open(part / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                for query, judged in found["relevant_docs"].items():
                    file.writelines(f"{query}\t{d}\t{grade}\n" for d, grade in judged.items())
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    put(part, at)


def _splits(repo: str, revision: str, subset: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, its corpus, queries and relevant_docs) of each that is judged."""
    from datasets import get_dataset_split_names
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    try:
        loader = RetrievalDatasetLoader(repo, revision, config=subset or None)
        plain = "default" if "default" in loader.dataset_configs else "qrels"
        judged = f"{subset}-qrels" if subset else plain
        for split in get_dataset_split_names(repo, judged, revision=revision):
            loader.split = split
            yield split, dict(loader.load())
    except Exception as error:  # the network's edge: its errors have no common class
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise ValueError(
            f"{repo} at {revision}: neither in the cache nor to be had from the hub, or not laid "
            f"out as mteb's are ({type(error).__name__}: {error}). Without a network, load it once "
            "on a machine that has one and bring HF_HOME over, or pass a BEIR folder: DATA=path"
        ) from error
