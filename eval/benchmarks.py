"""`python -m eval beir`: retrieval and reranking by our protocol, on one collection or on many."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval import hub, metrics
from eval.collections import Collection, load, missing, require_known
from eval.metrics import METRICS, MRR_10, deep_enough
from eval.protocol import EvaluationSet, Scores, without_states
from eval.provenance import made_by, prompts, stored
from eval.stages import Stages, finish
from model import bases, parallel
from model.files import write_text
from model.unimoer import UniMoER
from model.weights import revision
from trials import Config

ALONE = "collections"  # the title of what is named alone
TITLES = {"embedding": "retrieval", "reranking": "reranking"}


@dataclass(frozen=True)
class Table:
    """rows: name -> the collections whose mean it is (of most names: itself)."""

    title: str
    rows: dict[str, tuple[str, ...]]


def tables(data: Sequence[str]) -> list[Table]:
    """What is asked: each group is a table of its own, what is named alone is one together."""
    alone = {name: (name,) for name in data if name not in hub.GROUPS}
    made = [Table(ALONE, alone)] if alone else []
    for group in dict.fromkeys(name for name in data if name in hub.GROUPS):
        rows = {name: hub.GROUPS.get(name, (name,)) for name in hub.GROUPS[group]}
        made.append(Table("beir" if group == "all" else group, rows))
    return made


def each(
    data: Sequence[str], cache: Path, trained: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Collections, each once, a group by name replaced by what is in it (`hub.GROUPS`, CQADupStack
    of "all" by its forums).

    Returns:
        These; and of the groups what is left out -> why: it cannot be had, or is one of `trained`.
    """
    found: list[str] = []
    absent: dict[str, str] = {}
    for name in data:
        for row in hub.GROUPS.get(name, (name,)):
            why = "the models are trained on it" if row in trained else missing(row, cache)
            if name in hub.GROUPS and why:
                absent[row] = why
            else:
                found += hub.GROUPS.get(row, (row,))
    return list(dict.fromkeys(found)), absent


def joined(names: Sequence[str]) -> str:
    """Collections as part of a file's name, `scifact+fiqa`: another choice is another file."""
    text = "+".join(Path(name).name.lower() if Path(name).is_dir() else name for name in names)
    text, mark = text.replace("/", "-"), hashlib.sha256(text.encode()).hexdigest()[:8]
    return text if len(text) <= 100 else f"{text[:80]}+{mark}"


def split_of(args: argparse.Namespace, data: str) -> str:
    """The split that is measured: --split, or the one that the benchmark's authors measure."""
    return args.split or hub.own_split(data)


def evaluation_set(
    model: UniMoER, collection: Collection, split: str, args: argparse.Namespace
) -> EvaluationSet:
    config = Config(
        split=split, retrieval_depth=args.depth, candidates=args.candidates,
        reranking_queries=args.queries,
    )  # fmt: skip
    return EvaluationSet(collection, model.tokenizer, config, without_states)


def beir(args: argparse.Namespace) -> None:
    """Each collection: a JSON with per-query scores, and a table. Several: a summary of them, one
    for each group and one for what is named alone. The processes of a job share the texts."""
    args.device = parallel.join(args.device)
    cache = bases.cache_folder() / "data"
    asked = tables(args.data)
    for name in args.data:
        require_known(name)
    model = UniMoER.from_pretrained(args.model, args.device)
    width = model.decoder.config.hidden_size
    args.dimensions = list(dict.fromkeys(args.dimensions))
    if wrong := [size for size in args.dimensions if not 1 <= size <= width]:
        raise ValueError(f"--dimensions {wrong[0]}: expected 1 to {width}, which the model has")
    for table in asked:
        found: dict[str, list[dict] | str] = {}
        for name, members in table.rows.items():
            if table.title == "beir" and (why := missing(name, cache)):
                found[name] = why
                continue
            found[name] = [measure(model, member, args, cache) for member in members]
        if len(found) > 1:
            text = summary(table.title, found)
            of = table.title if table.title != ALONE else joined(list(table.rows))
            place = Path(args.out) / "beir" / args.name / f"summary-{of}.md"
            if parallel.rank() == 0:
                write_text(place, text + "\n")
            print(f"{text}\nwritten to {place}")


def measure(model: UniMoER, data: str, args: argparse.Namespace, cache: Path) -> dict:
    """The result of one collection, measured or, where that has been done, read; it is shown.

    Raises:
        ValueError: the stored result is of another model, data or setting.
    """
    collection = load(data, cache)
    split = split_of(args, data)
    place = Path(args.out) / "beir" / args.name / f"{collection.name.lower()}-{split}.json"
    asked = {k: getattr(args, k) for k in ("depth", "candidates", "queries")}
    if args.dimensions:
        asked["dimensions"] = args.dimensions
    if args.untrained:
        asked["untrained"] = True
    mark = revision(args.model)
    read = prompts(model.config, collection.instruction)
    if args.untrained:  # its random heads read pairs, whatever the model's own head does
        asking = model.tokenizer.with_instruction(collection.instruction)
        read["pair"] = asking.prompts.filled("pair")
    of = {"data.fingerprint": collection.fingerprint, "revision": mark, "asked": asked}
    of |= {"prompts": read}
    if (result := stored(place, of)) is None:
        evaluation = evaluation_set(model, collection, split, args)
        stages = Stages(place, {
            "revision": mark, "data": collection.fingerprint, "split": split,
            "asked": asked, "prompts": read, "device": torch.device(args.device).type,
        })  # fmt: skip
        scores, rest = evaluation.scores(model, list(TITLES), stages, args.dimensions)
        shorter = dict(zip(map(str, args.dimensions), rest, strict=True))
        result = {
            "model": args.name, "revision": mark, "base": model.identity,
            "prompts": read, "split": split, "asked": asked, "data": collection.identity,
            "bm25": evaluation.bm25_scores(), "scores": scores, "dimensions": shorter,
            "ceiling": {"reranking": evaluation.ceiling()},
            **made_by(args.device, begun=stages.begun),
        }  # fmt: skip
        if args.untrained:
            result["untrained"] = evaluation.untrained(model, progress=True, keep=stages)
        finish(place, result)
    show(result)
    return result


def rows_of(result: dict) -> dict[str, Scores]:
    """A result's scores by what they are of: "retrieval, BM25", "retrieval, 64 dimensions"."""
    rows = {}
    for task, title in TITLES.items():
        for who, of in (("BM25", result["bm25"]), ("untrained base", result.get("untrained", {})),
                        ("model", result["scores"]), ("ceiling", result["ceiling"])):  # fmt: skip
            if task in of:
                rows[f"{title}, {who}"] = of[task]
        if task == "embedding":
            for size, scores in result.get("dimensions", {}).items():
                rows[f"{title}, {size} dimensions"] = scores
    return rows


def show(result: dict) -> None:
    """A table of one collection's means, without what its rankings are too short to tell."""
    print(f"{result['data']['name']}, {result['split']}, {result['model']}")
    depths = {"retrieval": result["asked"]["depth"], "reranking": result["asked"]["candidates"]}
    shown = deep_enough((*METRICS, MRR_10), max(depths.values()))
    print(f"{'':28}" + "".join(f"{name:>19}" for name in shown))
    for name, scores in rows_of(result).items():
        told = deep_enough(shown, depths[name.partition(",")[0]])
        cells = (f"{metrics.mean(scores, m):.4f}" if m in told else "-" for m in shown)
        print(f"{name:28}" + "".join(f"{cell:>19}" for cell in cells))


def summary(title: str, found: dict[str, list[dict] | str]) -> str:
    """Each row (of several results: their mean), and the mean of the measured rows.

    Each by its `metrics.headline`, which a row names where they are not all of one.

    Args:
        found: row -> its results, or why there is none.
    """
    means: dict[str, list[float]] = {}
    columns: list[str] = []
    measured: dict[str, str] = {}
    for name, results in found.items():
        if isinstance(results, str):
            continue
        metric = metrics.headline(results[0]["data"]["name"], results[0]["split"])
        measured[name] = metrics.NAMES[metric]
        each = [
            {what: metrics.mean(scores, metric) for what, scores in rows_of(result).items()}
            for result in results
        ]
        columns = list(each[0])
        means[name] = [sum(row[c] for row in each) / len(each) for c in columns]
    names = sorted({*measured.values()}, reverse=True)  # nDCG@10 first
    lines = [
        f"| {title}, {' or '.join(names)} | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for name, results in found.items():
        if isinstance(results, str):
            lines.append(f"| {name} | missing: {results} |{' |' * (len(columns) - 1)}")
            continue
        label = results[0]["data"]["name"]
        if len(results) > 1:
            label = f"{name} (mean of {len(results)})"
        if len(names) > 1:
            label += f", {measured[name]}"
        lines.append(f"| {label} | {' | '.join(f'{value:.4f}' for value in means[name])} |")
    mean = [sum(column) / len(means) for column in zip(*means.values(), strict=True)]
    cells = " | ".join(f"{value:.4f}" for value in mean)
    lines.append(f"| **mean of {len(means)} of {len(found)}** | {cells} |")
    return "\n".join(lines)
