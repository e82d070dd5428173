"""`python -m eval baselines`: BM25, published models and saved ones of our own, side by side.

Each row retrieves from the full corpus and reranks the same candidates, BM25's own top; scores are
kept by query in --out/baselines/ROW/, and what was measured is not measured again. A published
model that is not on this machine is a row that says which it needs; one that --rows names is
fetched from the hub if it can be.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch

from eval import baselines, metrics
from eval.baselines import BM25, Row, Source
from eval.benchmarks import TITLES, joined, split_of
from eval.collections import Collection, load
from eval.command import job_status
from eval.protocol import EvaluationSet, without_states
from eval.provenance import made_by, prompts, stored
from eval.stages import Stages, finish
from model import bases, parallel
from model.config import DTYPES
from model.files import write_text
from model.pseudo import PseudoQuery
from model.saved import read_config
from model.weights import revision
from trials import Config

Found = dict[str, dict | list[str]]  # row -> its result, or the models that it needs
# What makes a row that has to be trained; its model is then given by --models.
TRAINING = (
    "`python -m run run trained_baselines --scale full --base {base} --data DATA --arms "
    "base-lora`, DATA having a train split"
)


def command(args: argparse.Namespace) -> None:
    """A table of each collection, and of several their mean; all of them in a summary. The
    processes of a job share the texts."""
    args.device = parallel.join(args.device)
    if odd := [text for text in args.local if not all(text.partition("="))]:
        raise ValueError(f"--local {odd[0]}: expected ID=FOLDER")
    rows = asked_rows(args)
    published = {s.base for row in baselines.published() for s in row.sources()
                 if not isinstance(s, Path)}  # fmt: skip
    for name in (text.partition("=")[0] for text in args.local):
        if name not in published:
            raise ValueError(f"--local {name}: expected one of {', '.join(sorted(published))}")
    found: dict[str, Found] = {}
    for data in args.data:
        collection = load(data, bases.cache_folder() / "data")
        split = split_of(args, data)
        title = f"{collection.name}, {split}"
        found[title] = measure_all(rows, collection, split, args)
        print(f"{table(title, rows, found[title])}\n")
    parts = [table(title, rows, of) for title, of in found.items()]
    if len(found) > 1:
        parts.append(mean_table(rows, list(found.values())))
        print(f"{parts[-1]}\n")
    place = Path(args.out) / "baselines" / f"summary-{joined(args.data)}.md"
    if parallel.rank() == 0:
        write_text(place, "\n\n".join(parts) + "\n")
    print(f"written to {place}")


def asked_rows(args: argparse.Namespace) -> list[Row]:
    """The rows of --rows and --models; BM25, which made the candidates, is always the first.

    Raises:
        ValueError: a row that there is not, or two of one name.
    """
    known = {row.name: row for row in baselines.published(args.instruction)}
    if unknown := [name for name in args.rows if name not in known]:
        raise ValueError(f"--rows {unknown[0]}: expected some of {', '.join(known)}")
    names = dict.fromkeys([BM25, *(args.rows or known)])
    rows = [baselines.adapt(known[name], args.dtype, args.document_tokens) for name in names]
    trained = [read_config(f)[1] for f in map(Path, args.models) if baselines.embeds_as_base(f)]
    local = dict(text.partition("=")[::2] for text in args.local)

    def is_there(row: Row) -> bool:
        """Whether a model that is trained on its base is among --models."""
        place = local.get(row.trains) or (baselines.at_hand(row.trains) if trained else None)
        known = place and bases.identity(bases.resolve(str(place)))["fingerprint"]
        return any(of["fingerprint"] == known or of["name"] == row.trains for of in trained)

    rows = [row for row in rows if not (row.trains and is_there(row))]
    for folder in map(Path, args.models):
        rows.append(baselines.ours(folder))
        if args.pseudo_query and read_config(folder)[0].rerank_head != "pseudo_query":
            rows.append(baselines.ours(folder, PseudoQuery()))
    rows += baselines.bare([*map(Path, args.models)]) if args.untrained else []
    all_names = [row.name for row in rows]
    if twice := [name for name in all_names if all_names.count(name) > 1]:
        raise ValueError(
            f"--models: two are called {twice[0]}, after their folders: measure them with another "
            "--out each"
        )
    return rows


def measure_all(
    rows: Sequence[Row], collection: Collection, split: str, args: argparse.Namespace
) -> Found:
    """Each row's result on one collection, measured or read."""
    config = Config(
        split=split, retrieval_depth=args.depth, candidates=args.candidates,
        reranking_queries=args.queries,
    )  # fmt: skip

    @cache
    def evaluation() -> EvaluationSet:
        return EvaluationSet(collection, None, config, without_states)

    return {row.name: _one(row, collection, split, evaluation, args) for row in rows}


def _one(
    row: Row,
    collection: Collection,
    split: str,
    evaluation: Callable[[], EvaluationSet],
    args: argparse.Namespace,
) -> dict | list[str]:
    """A row's result, or the models that it needs.

    Raises:
        ValueError: the stored result is of another model, data or setting.
    """
    place = Path(args.out) / "baselines" / row.name / f"{collection.name.lower()}-{split}.json"
    asked = {k: getattr(args, k) for k in ("depth", "candidates", "queries")}
    asked |= {"models": [_named(source) for source in row.sources()]}
    asked["pseudo_query"] = asdict(row.pseudo_query) if row.pseudo_query else None
    at = _places(row, args, fetch=row.name in args.rows and not place.exists())
    prints = [bases.identity(at[s])["fingerprint"] for s in row.sources() if s in at]
    of = {"data.fingerprint": collection.fingerprint, "asked": asked}
    if (result := stored(place, of, "--out")) is not None:
        known = [model["base"]["fingerprint"] for model in result["models"]]
        if not set(prints) <= set(known):
            raise ValueError(
                f"{place} is of other weights ({known} there, {prints} now): move it away, or give "
                "another --out"
            )
        return result
    if row.trains:
        return [f"{row.trains} and training: {TRAINING.format(base=row.trains)}"]
    if needs := [s.base for s in row.sources() if not isinstance(s, Path) and s not in at]:
        return needs
    bm25 = row.name == BM25
    stages = Stages(place, {"data": collection.fingerprint, "asked": asked, "bases": prints,
                            "instruction": collection.instruction,
                            "device": torch.device(args.device).type})  # fmt: skip
    result = {
        "row": row.name, "what": row.what, "split": split, "asked": asked,
        "data": collection.identity, **made_by(args.device, begun=stages.begun),
        **(_bm25(evaluation()) if bm25 else measure(row, at, evaluation(), args.device, stages)),
    }  # fmt: skip
    finish(place, result)
    return result


def _named(source: Source) -> dict:
    """What a result says of a model that is asked for: its config, or a saved one's hash."""
    if isinstance(source, Path):
        return {"saved": revision(source)}
    return {**asdict(source), "prompts": source.prompts.texts()}


def _places(row: Row, args: argparse.Namespace, fetch: bool) -> dict[Source, Path]:
    """Where the published models of a row lie, those that can be had; fetch: from the hub too."""
    local = dict(text.partition("=")[::2] for text in args.local)
    found = {}
    for source in row.sources():
        if isinstance(source, Path):
            continue
        if source.base in local:
            found[source] = bases.resolve(local[source.base])
        elif folder := baselines.at_hand(source.base):
            found[source] = folder
        elif fetch:
            try:
                found[source] = bases.resolve(source.base)
            except ValueError as problem:  # the network's edge: the row says what it needs
                print(f"{row.name}: {problem}", file=sys.stderr)
    return found


def _bm25(evaluation: EvaluationSet) -> dict:
    return {
        "models": [], "parameters": 0, "scores": evaluation.bm25_scores(),
        "ceiling": {"reranking": evaluation.ceiling()},
    }  # fmt: skip


def measure(
    row: Row, at: dict[Source, Path], evaluation: EvaluationSet, device: str, stages: Stages
) -> dict:
    """A row's scores by query, and what its models are; they are in memory one after the other.

    Args:
        at: the folders of published models. stages: have what an earlier call finished.
    """
    scores, models, held, model, vectors = {}, [], None, None, None
    sides = {"embedding": row.embedder, "reranking": row.reranker}
    for task, source in sides.items():
        if source is None:
            continue
        if model is None or source != held:
            model = None  # free it before the next is loaded
            placed = source if isinstance(source, Path) else replace(source, base=str(at[source]))
            model, held = baselines.load(placed, device), source
            part = evaluation.read_by(model.tokenizer)
            head = source == row.reranker and row.pseudo_query is None
            reads = [name for name, by in sides.items() if by == source]
            # Random heads read pairs, whatever the head of the saved model does.
            config = replace(model.config, rerank_head="linear") if row.untrained else model.config
            instruction = evaluation.collection.instruction
            models.append({
                "base": model.identity,
                "prompts": prompts(config, instruction, reads, row.pseudo_query),
                "parameters": baselines.parameters(model, head, base=row.untrained),
            })  # fmt: skip
        if row.untrained:
            scores = part.untrained(model, progress=True, keep=stages)
            break
        if row.pseudo_query:
            assert row.embedder == source, "a pseudo-query is held against retrieval's vectors"
        if task == "embedding":
            (scores[task],), vectors = part.retrieved_once(
                model, stages, with_vectors=bool(row.pseudo_query)
            )
        else:
            asked = {"vectors": vectors, "asked": row.pseudo_query} if row.pseudo_query else {}
            scores[task] = stages.kept(
                task, lambda p=part, m=model, a=asked: p.reranking(m, True, keep=stages, **a)
            )
    return {
        "models": models, "parameters": sum(m["parameters"] for m in models), "scores": scores,
    }  # fmt: skip


# Tables ----------------------------------------------------------------------------------------


def _line(row: Row, cells: Sequence[str]) -> str:
    return f"| {row.name} | {row.what} | {' | '.join(cells)} |"


def _metric(result: dict) -> str:
    return metrics.headline(result["data"]["name"], result["split"])


def _head(title: str, bm25: Sequence[dict]) -> list[str]:
    """bm25: a result of each collection."""
    names = sorted({metrics.NAMES[_metric(result)] for result in bm25}, reverse=True)
    return [
        f"| {title}: {' or '.join(names)} | what | {' | '.join(TITLES.values())} | parameters |",
        "| --- | --- | ---: | ---: | ---: |",
    ]


def _value(result: dict, task: str) -> float | None:
    scores = result["scores"].get(task)
    return None if scores is None else metrics.mean(scores, _metric(result))


def _cells(values: Sequence[float | None], parameters: int) -> list[str]:
    shown = ["-" if value is None else f"{value:.4f}" for value in values]
    return [*shown, f"{parameters:,}" if parameters else "-"]


def _needs(models: Sequence[str]) -> list[str]:
    return [f"needs {' and '.join(models)}", "", ""]


def table(title: str, rows: Sequence[Row], found: Found) -> str:
    """One collection: a line for each row, and the ceiling of the candidates."""
    bm25 = found[BM25]
    assert isinstance(bm25, dict)
    lines = _head(title, [bm25])
    for row in rows:
        result = found[row.name]
        if isinstance(result, list):
            lines.append(_line(row, _needs(result)))
        else:
            values = [_value(result, task) for task in TITLES]
            lines.append(_line(row, _cells(values, result["parameters"])))
    ceiling = metrics.mean(bm25["ceiling"]["reranking"], _metric(bm25))
    lines.append(f"| ceiling | BM25's candidates in the best order | - | {ceiling:.4f} | - |")
    return "\n".join(lines)


def mean_table(rows: Sequence[Row], found: Sequence[Found]) -> str:
    """Several collections: the mean of each row that all of them have."""
    bm25 = [result for of in found if isinstance(result := of[BM25], dict)]
    lines = _head(f"mean of {len(found)} collections", bm25)
    for row in rows:
        results = [of[row.name] for of in found]
        have = [result for result in results if isinstance(result, dict)]
        if len(have) < len(results):
            models = dict.fromkeys(m for r in results if isinstance(r, list) for m in r)
            lines.append(_line(row, _needs(list(models))))
            continue
        columns = [[_value(result, task) for result in have] for task in TITLES]
        means = [None if None in c else sum(v for v in c if v is not None) / len(c)
                 for c in columns]  # fmt: skip
        lines.append(_line(row, _cells(means, have[0]["parameters"])))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    card = torch.cuda.is_available()
    made = argparse.ArgumentParser(prog="python -m eval baselines", description=__doc__)
    made.add_argument("--data", nargs="+", required=True,
                      help="stdlib, folders, names such as scifact, bright/biology")  # fmt: skip
    made.add_argument("--rows", nargs="*", default=[],
                      help="which published ones, fetched if need be; default: all, none fetched: "
                      + ", ".join(row.name for row in baselines.published()))  # fmt: skip
    made.add_argument("--models", nargs="*", default=[], metavar="FOLDER",
                      help="written by save_pretrained")  # fmt: skip
    made.add_argument("--pseudo-query", action="store_true", help="each of --models a second time, "
                      "reranking with E2Rank's pseudo-query")  # fmt: skip
    made.add_argument("--untrained", action="store_true", help="the bare base of --models beside "
                      "them, one row for all that read alike")  # fmt: skip
    made.add_argument("--local", nargs="*", default=[], metavar="ID=FOLDER",
                      help="where a published model lies")  # fmt: skip
    made.add_argument("--instruction", default=baselines.TASK,
                      help="of the Qwen3 prompts, where the collection has none of its own; "
                      "default: %(default)r")  # fmt: skip
    made.add_argument("--document-tokens", type=int, default=0, help="cut documents of published "
                      "models at so many; 0: where their authors do")  # fmt: skip
    made.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16" if card else "float32",
                      help="of published models; default here: %(default)s")  # fmt: skip
    made.add_argument("--split", default="", help="default: test, or what the benchmark measures")
    made.add_argument("--depth", type=int, default=1000, help="documents retrieved for a query")
    made.add_argument("--candidates", type=int, default=100, help="of BM25, that are reranked")
    made.add_argument("--queries", type=int, default=0, help="that are reranked; 0: all")
    made.add_argument("--out", default="runs/eval", help="folder of the results")
    made.add_argument("--device", default="cuda" if card else "cpu")
    return made


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    return job_status(partial(command, args))
