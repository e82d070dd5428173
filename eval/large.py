"""`python -m eval encode | search`: retrieval over a corpus that no memory holds.

encode: a saved model's vectors of a collection's documents (a BEIR folder, or a name that
eval/hub.py knows), or the first --dimensions of them, in shards on disk; goes on where it was
stopped. Under torchrun every rank encodes its share of the shards.
search: the judged queries of a split against all of them, exactly, within --memory; through FAISS
as well where --index asks for it. What the collection excludes for a query is taken out, and its
own instruction goes before the query. A JSON with per-query scores, and a table.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from eval import hub, metrics
from eval.collections import find, fingerprint
from eval.command import exit_status, require_one_process
from eval.provenance import made_by, prompts
from eval.provenance import stored as known
from eval.retrieval import Ids, cut, exact, overhead, plan, to_run
from eval.sources import Qrels, Sources, lacking, read_qrels, read_queries, read_splits
from eval.vectors import DTYPES, MANIFEST, WINDOW, Vectors, encode, read_manifest
from model import bases, parallel, saved
from model.files import whole, write_json
from model.heads import truncate
from model.unimoer import UniMoER
from model.weights import revision

COMMANDS = ("encode", "search")
METRICS = (metrics.MRR_10, *metrics.METRICS, "recall_1000")
AT_ONCE = 256  # queries whose rankings are held as dicts


@dataclass(frozen=True)
class Judged:
    """What is asked of a split, and what counts as found.

    Attributes:
        queries: those that are judged. excluded: of them alone; see `collections.Collection`.
        relevant: the grade from which a document counts as relevant.
        instruction: the collection's own for queries, or "".
        origin: where queries and judgments came from.
    """

    split: str
    queries: dict[str, str]
    qrels: Qrels
    excluded: dict[str, list[str]]
    relevant: int
    instruction: str
    origin: dict[str, str]

    def depth(self, k: int) -> int:
        """How many documents are searched for, so that k are left without the excluded."""
        return k + max(map(len, self.excluded.values()), default=0)


def run_encode(args: argparse.Namespace) -> None:
    rank, world = parallel.started()
    if "LOCAL_RANK" in os.environ:
        args.device = parallel.own_card(args.device)
    sources = _find(args.data)
    folder = _folder(args, sources.name)
    begun = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    stored = encode(
        UniMoER.from_pretrained(args.model, args.device), sources, folder,
        revision=revision(args.model), window=args.window or begun.get("window", WINDOW),
        dtype=args.dtype or begun.get("dtype", DTYPES[0]),
        dimension=args.dimensions, rank=rank, world=world, progress=rank == 0,
    )  # fmt: skip
    left = f", {len(missing)} still missing" if (missing := stored.missing()) else ""
    print(
        f"{folder}: {stored.documents:,} documents of {sources.name} in {stored.shards} shards of "
        f"{stored.dtype}{left}"
    )


def run_search(args: argparse.Namespace) -> None:
    require_one_process("search")
    if args.depth < 1 or args.relevant < 0:
        raise ValueError("--depth and --relevant: expected positive numbers")
    if args.lists < 0 or args.probes < 0:
        raise ValueError(
            f"--lists {args.lists} --probes {args.probes}: expected 1 or more, or 0 to choose"
        )
    sources = _find(args.data)
    judged = _judged(args, sources)
    stored = Vectors(_folder(args, sources.name))
    stored.require_all()
    for what, found, expected in (
        ("the checkpoint", stored.manifest["revision"], revision(args.model)),
        ("the data", stored.manifest["data"], sources.name),
    ):
        if found != expected:
            raise ValueError(
                f"{stored.folder} is of another model or data ({what}: {found!r} there, "
                f"{expected!r} now): give its --model and --data, or encode into another --vectors"
            )
    if args.dimensions not in (0, stored.dimension):
        raise ValueError(
            f"{stored.folder} holds vectors of {stored.dimension} dimensions, not of "
            f"{args.dimensions}: leave out --dimensions, or encode with it into another --vectors"
        )
    ids = stored.ids()
    sizes = (
        len(judged.qrels), len(ids), stored.dimension,
        min(judged.depth(args.depth), len(ids)), ids.itemsize, stored.window,
    )  # fmt: skip
    block = plan(args.memory * 1e9, *sizes)
    ids = Ids(ids)
    documents = {document for row in judged.qrels.values() for document in row}
    absent = ids.absent(sorted(documents))
    if absent and not (sources.published and not args.qrels):
        raise ValueError(
            f"{len(absent)} judged documents of {judged.split} are not among the encoded, such as "
            f"{absent[0]!r}: encode the corpus that was judged"
        )
    origin = {
        "model": args.name, "revision": stored.manifest["revision"],
        "base": stored.manifest["base"], "split": judged.split,
        "asked": {k: getattr(args, k) for k in ("depth", "index", "lists", "probes")}
        | {"relevant": judged.relevant},
        "data": {
            "name": sources.name, "documents": stored.documents,
            "source": judged.origin | lacking(sources.name, documents, set(absent)),
            "fingerprint": stored.manifest["fingerprint"],
            "judgments": fingerprint(
                {}, judged.queries, {judged.split: judged.qrels}, {}, judged.excluded
            ),
        },
        "vectors": {k: stored.manifest[k] for k in ("dtype", "dimension", "document_tokens")},
    }  # fmt: skip
    name = "-".join([
        sources.name.lower(), judged.split, *[f"{args.dimensions}d"] * bool(args.dimensions),
        *[args.index] * (args.index != "exact"),
    ])  # fmt: skip
    place = Path(args.out) / "search" / args.name / f"{name}.json"
    result = known(place, origin)
    if result is None or args.trec:
        result = origin | _measure(args, stored, ids, judged, block, overhead(*sizes))
        write_json(place, result)
    show(result)


def _judged(args: argparse.Namespace, sources: Sources) -> Judged:
    for option in ("queries", "qrels"):
        if getattr(args, option) and not Path(getattr(args, option)).is_file():
            raise ValueError(f"--{option} {getattr(args, option)}: there is no such file")
    given = sources
    if args.queries:
        own = sources.own_document
        given = Sources(sources.name, [], [Path(args.queries)], {}, {}, own_document=own)
    queries = read_queries(given)
    origin = {k: v for k, v in sources.provenance.items() if k != "path"}  # results name no folder
    splits: dict[str, Qrels] = {}
    if args.qrels:
        split, qrels = Path(args.qrels).stem, read_qrels(Path(args.qrels), queries.texts)
    else:
        split = args.split or hub.own_split(args.data)
        split = "dev" if split == "validation" else split  # as `read_splits` calls it
        splits, said = read_splits(sources.only(split), queries)
        qrels, origin = splits.get(split, {}), origin | said
    qrels = {query: row for query, row in qrels.items() if row}  # trec_eval skips the others
    if not qrels:
        named = ("dev" if name == "validation" else name for name in sources.qrels)
        has = ", ".join(dict.fromkeys([*named, *splits]))
        raise ValueError(
            f"{sources.name}: no judgments of {split} (it has {has}): choose one of these with "
            "--split, or give a file with --qrels"
        )
    usual = 1 if args.qrels else sources.relevant.get(split, 1)
    return Judged(
        split, {query: queries.texts[query] for query in qrels}, qrels,
        {query: out for query, out in queries.excluded.items() if query in qrels},
        args.relevant or usual, sources.instruction, origin,
    )  # fmt: skip


def _measure(
    args: argparse.Namespace, stored: Vectors, ids: Ids, judged: Judged, block: tuple[int, int],
    taken: int,
) -> dict:  # fmt: skip
    """Per-query scores of the exact search and of the index, its recall, and seconds. block: of
    `plan`; taken: of `overhead`."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - started

    with timed("queries"):
        model = UniMoER.from_pretrained(args.model, args.device)
        model.tokenizer = model.tokenizer.with_instruction(judged.instruction)
        read = prompts(model.config, judged.instruction, ["embedding"])
        asked = truncate(model.encode_query(list(judged.queries.values())), stored.dimension)
        del model  # its memory is the search's
    found: dict = {"prompts": read, "seconds": seconds, **made_by(args.device)}
    rankings: dict[str, Tensor] = {}
    k = judged.depth(args.depth)
    if args.index != "exact":  # first: it may not fit, and is gone before the exact search
        from eval import approximate  # FAISS is slow to import

        with timed("build"):
            index = approximate.build(stored, args.index, args.memory * 1e9, args.lists, taken)
        with timed(args.index):
            rankings[args.index] = approximate.search(index, asked, ids, k, args.probes)
        del index
    with timed("exact"):
        rankings["exact"] = exact(
            asked, stored, ids, k, block=block, device=args.device, progress=True
        )
    if args.index != "exact":
        depth = min(args.depth, rankings["exact"].shape[1])
        found["recall"] = {
            str(k): approximate.recall(rankings[args.index], rankings["exact"], k)
            for k in sorted({10, 100, depth})
            if k <= depth
        }
    with whole(Path(args.trec)) if args.trec else nullcontext() as file:
        found["scores"] = {
            who: scored(keys, ids, judged, args.depth, file if who == args.index else None)
            for who, keys in rankings.items()
        }
    found["mean"] = {
        who: {
            metric: metrics.mean(rows, metric)
            for metric in metrics.deep_enough(METRICS, args.depth)
        }
        for who, rows in found["scores"].items()
    }
    return found


def scored(
    keys: Tensor, ids: Ids, judged: Judged, depth: int, file: BinaryIO | None = None
) -> dict[str, dict[str, float]]:
    """Per-query metrics of rankings (Q, k), a few queries at a time.

    Args:
        depth: what is left of each.
        file: where to write them as a TREC run.
    """
    names = list(judged.queries)
    found = {}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        run = cut(to_run(keys[start : start + AT_ONCE], some, ids), judged.excluded, depth)
        qrels = {query: judged.qrels[query] for query in some}
        wanted = metrics.deep_enough(METRICS, depth)
        found |= metrics.evaluate(qrels, run, metrics=wanted, relevant=judged.relevant)
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
    shown = list(next(iter(result["mean"].values())))
    print(f"{'':8}" + "".join(f"{name:>19}" for name in shown))
    for who, means in result["mean"].items():
        print(f"{who:8}" + "".join(f"{means[metric]:19.4f}" for metric in shown))
    for k, share in result.get("recall", {}).items():
        print(f"of the exact {k} best {asked['index']} finds {100 * share:.2f} %")


def _find(data: str) -> Sources:
    if data == "stdlib":
        raise ValueError("stdlib has a corpus for each split, and is small: use `make eval`")
    return find(data, bases.cache_folder() / "data")


def folder_of(out: str, model: str, collection: str, dimensions: int = 0) -> Path:
    """Where `encode` puts the vectors of a collection by a saved model: whatever its results are
    called, the vectors are its own."""
    name = f"{saved.name_of(model)}-{revision(model)[:8]}"
    short = f"-{dimensions}d" if dimensions else ""
    return Path(out) / "vectors" / name / f"{collection.lower()}{short}"


def _folder(args: argparse.Namespace, collection: str) -> Path:
    if args.vectors:
        return Path(args.vectors)
    return folder_of(args.out, args.model, collection, args.dimensions)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="a folder written by save_pretrained")
    common.add_argument("--data", required=True, help="a BEIR folder, or a name such as msmarco, "
                        "scifact, bright/biology, miracl/sw, mmarco/es, mteb/CosQA")  # fmt: skip
    common.add_argument("--out", default="runs/eval", help="folder of the results")
    common.add_argument("--vectors", default="", help="their folder; default: under --out")
    common.add_argument("--dimensions", type=int, default=0, help="how many of the vectors' first "
                        "ones are kept and compared (Matryoshka); 0: all")  # fmt: skip
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("encode", parents=[common], help="the corpus, into shards on disk")
    one.add_argument("--window", type=int, default=0, help="documents of a shard: what is in "
                     f"memory at once; 0: as it was begun, or {WINDOW:,}")  # fmt: skip
    one.add_argument("--dtype", choices=DTYPES, help="of the vectors on disk; default: as it was "
                     f"begun, or {DTYPES[0]}")  # fmt: skip
    one = commands.add_parser("search", parents=[common], help="a split's queries in the shards")
    one.add_argument("--name", default="", help="of the model in results; default: its folder")
    one.add_argument("--split", default="", help="default: test, or what the benchmark measures; "
                     "msmarco: dev is dev.small, test TREC DL 2019")  # fmt: skip
    one.add_argument("--queries", default="", help="other queries: .jsonl, .parquet, or .tsv")
    one.add_argument("--qrels", default="", help="other judgments: BEIR's or TREC's format")
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
    if args.command == "search":
        args.name = args.name or saved.name_of(args.model)
    return exit_status(partial({"encode": run_encode, "search": run_search}[args.command], args))
