"""`python -m eval encode | search`: retrieval over a corpus that no memory holds.

encode: a saved model's vectors of a BEIR folder's or hub set's documents, in shards on disk; goes
on where it was stopped. Under torchrun every rank encodes its share of the shards.
search: the judged queries of a split against all of them, exactly, within --memory; through FAISS
as well where --index asks for it. A JSON with per-query scores, and a table.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from eval import beir, metrics
from eval.collections import fingerprint
from eval.files import whole, write_json
from eval.machine import device_name
from eval.retrieval import Ids, exact, plan, to_run
from eval.vectors import DTYPES, WINDOW, Vectors, encode
from model import bases
from model.unimoer import UniMoER
from model.weights import revision

COMMANDS = ("encode", "search")
METRICS = (metrics.MRR_10, *metrics.METRICS, "recall_1000")
AT_ONCE = 256  # queries whose rankings are held as dicts


def run_encode(args: argparse.Namespace) -> None:
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    files = _find(args.data)
    folder = _folder(args, files.name)
    stored = encode(
        UniMoER.from_pretrained(args.model, args.device), files, folder,
        revision=revision(args.model), window=args.window, dtype=args.dtype,
        rank=rank, world=world, progress=rank == 0,
    )  # fmt: skip
    left = f", {len(missing)} still missing" if (missing := stored.missing()) else ""
    print(
        f"{folder}: {stored.documents:,} documents of {files.name} in {stored.shards} shards of "
        f"{stored.dtype}{left}"
    )


def run_search(args: argparse.Namespace) -> None:
    files = _find(args.data)
    split, queries, qrels, source = _judged(args, files)
    given = args.data == "msmarco" and split == "test" and not args.qrels
    relevant = args.relevant or (2 if given else 1)  # its test split is TREC DL 2019
    stored = Vectors(_folder(args, files.name))
    stored.require_all()
    for what, found, expected in (
        ("the checkpoint", stored.manifest["revision"], revision(args.model)),
        ("the data", stored.manifest["data"], files.name),
    ):
        if found != expected:
            raise ValueError(
                f"{stored.folder} is of another model or data ({what}: {found!r} there, "
                f"{expected!r} now): give its --model and --data, or encode into another --vectors"
            )
    ids = stored.ids()
    block = plan(
        args.memory * 1e9, len(qrels), len(ids), stored.dimension, min(args.depth, len(ids)),
        ids.itemsize, stored.window,
    )  # fmt: skip
    ids = Ids(ids)
    if absent := ids.absent(sorted({document for row in qrels.values() for document in row})):
        raise ValueError(
            f"{len(absent)} judged documents of {split} are not among the encoded, such as "
            f"{absent[0]!r}: encode the corpus that was judged"
        )
    origin = {
        "model": args.name, "revision": stored.manifest["revision"],
        "base": stored.manifest["base"], "split": split,
        "asked": {k: getattr(args, k) for k in ("depth", "index", "lists", "probes")}
        | {"relevant": relevant},
        "data": {
            "name": files.name, "documents": stored.documents, "source": source,
            "fingerprint": stored.manifest["fingerprint"],
            "judgments": fingerprint({}, queries, {split: qrels}, {}),
        },
        "vectors": {k: stored.manifest[k] for k in ("dtype", "dimension", "document_tokens")},
    }  # fmt: skip
    name = f"{files.name.lower()}-{split}" + ("" if args.index == "exact" else f"-{args.index}")
    place = Path(args.out) / "search" / args.name / f"{name}.json"
    result = json.loads(place.read_text()) if place.exists() else None
    if result is not None and {k: result[k] for k in origin} != origin:
        raise ValueError(
            f"{place} is of another model, data or setting: move it away, or give another --name"
        )
    if result is None or args.trec:
        result = origin | _measure(args, stored, ids, queries, qrels, relevant, block)
        write_json(place, result)
    show(result)


def _judged(args, files: beir.Files) -> tuple[str, dict[str, str], beir.Qrels, dict[str, str]]:
    """The split's name, its judged queries, their judgments, and where these came from."""
    for option in ("queries", "qrels"):
        if getattr(args, option) and not Path(getattr(args, option)).is_file():
            raise ValueError(f"--{option} {getattr(args, option)}: there is no such file")
    queries, _ = beir.read_queries([Path(args.queries)] if args.queries else files.queries)
    source = {k: v for k, v in files.provenance.items() if k != "path"}  # results name no folder
    if args.qrels:
        split, qrels = Path(args.qrels).stem, beir.read_qrels(Path(args.qrels), queries)
    else:
        split = args.split
        splits, origin = beir.judgments(files.only(split), queries)
        qrels, source = splits.get(split, {}), source | origin
    if not qrels:
        raise ValueError(
            f"{files.name}: no judgments of {split} (it has {', '.join(files.qrels)}): choose one "
            "of these with --split, or give a file with --qrels"
        )
    return split, {query: queries[query] for query in qrels}, qrels, source


def _measure(
    args: argparse.Namespace,
    stored: Vectors,
    ids: Ids,
    queries: Mapping[str, str],
    qrels: beir.Qrels,
    relevant: int,
    block: tuple[int, int],
) -> dict:
    """Per-query scores of the exact search and of the index, its recall, and seconds."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - started

    with timed("queries"):
        model = UniMoER.from_pretrained(args.model, args.device)
        prompts = vars(model.config.prompts)
        asked = model.encode_query(list(queries.values()))
        del model  # its memory is the search's
    found: dict = {"prompts": prompts, "device": device_name(args.device), "seconds": seconds}
    rankings: dict[str, Tensor] = {}
    if args.index != "exact":  # first: it may not fit, and is gone before the exact search
        from eval import approximate  # FAISS is slow to import

        with timed("build"):
            index = approximate.build(stored, args.index, args.memory * 1e9, args.lists)
        with timed(args.index):
            rankings[args.index] = approximate.search(index, asked, ids, args.depth, args.probes)
        del index
    with timed("exact"):
        rankings["exact"] = exact(
            asked, stored, ids, args.depth, block=block, device=args.device, progress=True
        )
    if args.index != "exact":
        depth = rankings["exact"].shape[1]
        found["recall"] = {
            str(k): approximate.recall(rankings[args.index], rankings["exact"], k)
            for k in sorted({10, 100, depth})
            if k <= depth
        }
    names = list(queries)
    with whole(Path(args.trec)) if args.trec else nullcontext() as file:
        found["scores"] = {
            who: scored(keys, names, ids, qrels, relevant, file if who == args.index else None)
            for who, keys in rankings.items()
        }
    found["mean"] = {
        who: {metric: metrics.mean(rows, metric) for metric in METRICS}
        for who, rows in found["scores"].items()
    }
    return found


def scored(
    keys: Tensor,
    names: Sequence[str],
    ids: Ids,
    qrels: beir.Qrels,
    relevant: int = 1,
    file: BinaryIO | None = None,
) -> dict[str, dict[str, float]]:
    """Per-query metrics of rankings (Q, k), a few queries at a time.

    Args:
        file: where to write them as a TREC run.
    """
    found = {}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        run = to_run(keys[start : start + AT_ONCE], some, ids)
        judged = {query: qrels[query] for query in some}
        found |= metrics.evaluate(judged, run, metrics=METRICS, relevant=relevant)
        if file is not None:
            for query, row in run.items():
                ranked = enumerate(row.items(), 1)
                lines = [f"{query} Q0 {d} {at} {score!r} unimoer\n" for at, (d, score) in ranked]
                file.write("".join(lines).encode())
    return found


def show(result: dict) -> None:
    """A table of the means."""
    data, asked = result["data"], result["asked"]
    print(
        f"{data['name']}, {result['split']}, {result['model']}: {data['documents']:,} documents, "
        f"relevant from grade {asked['relevant']}"
    )
    print(f"{'':8}" + "".join(f"{name:>19}" for name in METRICS))
    for who, means in result["mean"].items():
        print(f"{who:8}" + "".join(f"{means[metric]:19.4f}" for metric in METRICS))
    for k, share in result.get("recall", {}).items():
        print(f"of the exact {k} best {asked['index']} finds {100 * share:.2f} %")


def _find(data: str) -> beir.Files:
    if data == "stdlib":
        raise ValueError("stdlib has a corpus for each split, and is small: use `make eval`")
    return beir.find(data, bases.cache_folder() / "data")


def _folder(args: argparse.Namespace, data: str) -> Path:
    return Path(args.vectors or f"{args.out}/vectors/{args.name}/{data.lower()}")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="a folder written by save_pretrained")
    common.add_argument("--name", default="", help="of the model in results; default: its folder")
    common.add_argument("--data", required=True, help="a BEIR name, msmarco, or a BEIR folder")
    common.add_argument("--out", default="runs/eval", help="folder of the results")
    common.add_argument("--vectors", default="", help="their folder; default: under --out")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("encode", parents=[common], help="the corpus, into shards on disk")
    one.add_argument("--window", type=int, default=WINDOW, help="documents of a shard: what is in "
                     "memory at once")  # fmt: skip
    one.add_argument("--dtype", choices=DTYPES, default="float16", help="of the vectors on disk")
    one = commands.add_parser("search", parents=[common], help="a split's queries in the shards")
    one.add_argument("--split", default="test", help="msmarco: dev is dev.small, test TREC DL 2019")
    one.add_argument("--queries", default="", help="other queries: .jsonl, .parquet, or .tsv")
    one.add_argument("--qrels", default="", help="other judgments: BEIR's or trec_eval's format")
    one.add_argument("--relevant", type=int, default=0, help="from this grade on a document counts "
                     "where grades do not; 0: 2 for TREC DL (msmarco, test), else 1")  # fmt: skip
    one.add_argument("--depth", type=int, default=1000, help="documents found for a query")
    one.add_argument("--memory", type=float, default=4.0, help="GB that the search may take")
    one.add_argument("--index", choices=("exact", "flat", "ivf"), default="exact",
                     help="flat, ivf: through FAISS, beside the exact search")  # fmt: skip
    one.add_argument("--lists", type=int, default=0, help="of ivf; 0: 4 sqrt(documents)")
    one.add_argument("--probes", type=int, default=0, help="lists looked at; 0: a sixteenth")
    one.add_argument("--trec", default="", help="write the rankings here, as a TREC run")
    return made


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    folder = Path(args.model).resolve()
    args.name = args.name or f"{folder.parent.name}-{folder.stem}"
    try:
        if args.command == "search" and (args.depth < 1 or args.relevant < 0):
            raise ValueError("--depth and --relevant: expected positive numbers")
        {"encode": run_encode, "search": run_search}[args.command](args)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0
