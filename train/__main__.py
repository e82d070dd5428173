"""`python -m train mine`: hard negatives of a collection's training queries, with BM25 or a model.

What is mined and how it lies on disk: `train/mining.py`. A trial takes it with
`python -m run run ... --set negatives=FOLDER`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from eval.collections import Collection, load
from eval.command import exit_status, require_one_process
from model import bases
from model.saved import name_of
from train.mining import LEXICAL, PICKS, Settings, mine


def command_mine(args: argparse.Namespace) -> None:
    require_one_process("mine")
    settings = Settings(
        depth=args.depth, ranks=tuple(args.ranks), margin=args.margin, negatives=args.negatives,
        pick=args.pick, fill=args.fill, queries=args.queries, part=args.part,
    )  # fmt: skip
    collection = load(args.data, bases.cache_folder() / "data")
    folder = Path(args.out or default_folder(collection, args.model))
    found = mine(
        folder, collection, settings, args.model, args.reranker, args.teacher, args.device
    )["mined"]
    print(
        f"{found['queries']} queries; {found['short']} have fewer than {settings.negatives} "
        f"negatives in ranks {settings.ranks[0]} to {settings.ranks[1]} below the limit, "
        f"{found['none']} have none" + (" (filled up from the pool)" if settings.fill else "")
    )
    print(f"mined: {folder}")


def default_folder(collection: Collection, model: str) -> Path:
    """runs/mined/scifact-bm25, runs/mined/scifact-joint-moe-seed0."""
    name = model if model == LEXICAL else name_of(model)
    return Path("runs") / "mined" / f"{collection.name.lower()}-{name}"


def parser() -> argparse.ArgumentParser:
    default = Settings()
    made = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("mine", help="hard negatives of a collection's training queries")
    sub.add_argument("--model", required=True, help="bm25, or a folder written by save_pretrained")
    sub.add_argument("--reranker", default="", help="such a folder, to score the candidates anew")
    sub.add_argument("--teacher", default="", help="such a folder, whose scores are distilled")
    sub.add_argument("--data", default="stdlib", help="stdlib, a BEIR name, msmarco or a folder")
    sub.add_argument("--out", default="", help="folder; default: runs/mined/<data>-<model>")
    sub.add_argument("--depth", type=int, default=default.depth, help="documents looked at")
    sub.add_argument("--ranks", type=int, nargs=2, default=list(default.ranks),
                     metavar=("FIRST", "LAST"), help="that may be negatives, from 1")  # fmt: skip
    sub.add_argument("--margin", type=float, default=default.margin,
                     help="share of the positive's score to stay below; 0: no limit")  # fmt: skip
    sub.add_argument("--negatives", type=int, default=default.negatives, help="of each query")
    sub.add_argument("--pick", choices=PICKS, default=default.pick)
    sub.add_argument("--fill", action="store_true",
                     help="fill up queries with too few from the whole pool")  # fmt: skip
    sub.add_argument("--queries", type=int, default=default.queries, help="0: all")
    sub.add_argument("--part", type=int, default=default.part, help="queries written at once")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return exit_status(partial({"mine": command_mine}[args.command], args))


if __name__ == "__main__":
    sys.exit(main())
