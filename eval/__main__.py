"""`python -m eval beir | mteb | rag | baselines | encode | search`: benchmarks and collections.

beir: full-corpus retrieval, and reranking of BM25's own top candidates, by our protocol, on the
collections of BEIR (`--data all`), BRIGHT, MIRACL and mMARCO, and on one's own.
mteb: tasks by name or a whole benchmark through `mteb`, or a collection as two tasks of mteb's;
results in mteb's own layout, which its leaderboard tools read.
rag: retrieve, rerank, generate, on nq, triviaqa, hotpotqa and folders with `answers.json`; one
model in all roles against two (the bare base generates) and three (an embedder and a reranker
too), each in a process of its own, for its peak memory's sake; the documents' vectors are those
of `encode`, which is run first where they are not there.
baselines: BM25, published models and saved ones beside each other; see its own --help.
encode, search: a corpus that no memory holds; see `python -m eval search --help`.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

import torch

from eval import baseline_table, hub, large, rag
from eval.answers import NORMALISERS
from eval.benchmarks import beir, evaluation_set, split_of
from eval.collections import load, require_split
from eval.command import job_status, require_one_process
from eval.machine import device_name
from eval.provenance import made_by, prompts, stored
from eval.stages import Stages, finish
from eval.vectors import Vectors
from model import bases, saved
from model.files import write_text
from model.generate import require_causal
from model.unimoer import UniMoER
from model.weights import revision

OF = {  # what not every benchmark has
    "dimensions": ("beir",), "untrained": ("beir",), "tasks": ("mteb",), "benchmark": ("mteb",),
    "candidates": ("beir", "mteb"), "sides": ("rag",), "specialists": ("rag",),
    "passages": ("rag",), "rule": ("rag",), "temperature": ("rag",), "top_k": ("rag",),
    "top_p": ("rag",), "seed": ("rag",), "depth": ("beir", "rag"),
}  # fmt: skip


def through_mteb(args: argparse.Namespace) -> None:
    """Tasks of mteb, or a collection as tasks; the results lie in --out/mteb."""
    from eval import mteb_adapter  # of the development set, and slow to import

    model = UniMoER.from_pretrained(args.model, args.device)
    version = revision(args.model)
    made = []
    for data in args.data:
        collection = load(data, bases.cache_folder() / "data")
        split = split_of(args, data)
        candidates = evaluation_set(model, collection, split, args).candidates
        made += mteb_adapter.tasks(collection, split, candidates)
    made += mteb_adapter.named([*args.tasks, *[args.benchmark] * bool(args.benchmark)])
    if not made:
        raise ValueError("nothing to evaluate: give --tasks, --benchmark or --data")
    place = Path(args.out) / "mteb"
    encoder = mteb_adapter.Encoder(model, f"unimoer/{args.name}", version)
    reranker = mteb_adapter.CrossEncoder(model, f"unimoer/{args.name}-reranker", version)
    # Leaderboards of embedders have reranking tasks too, which their vectors order.
    both = [(encoder, " by vectors"), (reranker, "")]
    for task in made:
        about = task.metadata
        for side, how in both if "Reranking" in about.type else [(encoder, "")]:
            score = mteb_adapter.main_score(side, task, place)
            print(f"{about.name}{how}: {score:.4f} ({about.main_score})")
    print(f"results: {place}")


def answer(args: argparse.Namespace) -> None:
    """Questions of each set or folder, once for each of the sides; a JSON each, and a table."""
    version, cache = revision(args.model), bases.cache_folder() / "data"
    require_causal(saved.read_config(Path(args.model))[0])  # before anything is encoded
    for data in args.data:
        split, public = split_of(args, data), data in hub.ANSWERS
        rule = args.rule or (data if public else "nq")
        settings = rag.Settings(
            args.depth, args.passages, rule=rule, temperature=args.temperature, top_k=args.top_k,
            top_p=args.top_p, seed=args.seed,
        )  # fmt: skip
        collection = load(data, cache)
        judged = {q: collection.queries[q] for q in sorted(require_split(collection, split))}
        gold, of = rag.published_answers(data, split, judged, cache) if public else ({}, {})
        order = sorted(gold or judged, key=lambda query: random.Random(query).random())
        asked = sorted(order[: args.queries or None])
        answers = {q: gold[q] for q in asked} if public else rag.read_answers(Path(data), asked)
        origin = {
            "revision": version,
            "asked": {**settings.asked(), "queries": args.queries},
            "data": collection.identity,
            "prompts": {**prompts(saved.read_config(Path(args.model))[0]), "generate": rag.PROMPT},
            "device": device_name(args.device),
            **({"answers": of} if public else {}),
        }  # fmt: skip
        specialists = [
            {"revision": revision(of), **prompts(saved.read_config(Path(of))[0])}
            for of in args.specialists
        ]
        found, ready = [], set()
        for side in args.sides:
            file = f"{collection.name.lower()}-{split}-{side}.json"
            place = Path(args.out) / "rag" / args.name / file
            mine = origin | {"specialists": (side == "three" and specialists) or None}
            of_three = side == "three" and args.specialists
            embedder = args.specialists[0] if of_three else args.model
            if not place.exists() and not args.alone:
                if embedder not in ready and rag.takes_vectors(side):
                    _encode(args, data, embedder)
                    ready.add(embedder)
                _alone(args, data, side)
            elif not place.exists():
                vectors = large.folder_of(args.out, embedder, collection.name)
                held = Vectors(vectors) if rag.takes_vectors(side) else None
                stages = Stages(place, mine)
                made = rag.measure(
                    args.model, side, collection, split, answers, settings, args.device, held,
                    stages, args.specialists,
                )  # fmt: skip
                origin_of = made_by(args.device, begun=stages.begun)
                finish(place, {"model": args.name, **origin_of, **mine, **made})
            found.append(stored(place, mine if side == "three" else origin))  # once of all sides
        if not args.alone:
            text = rag.table(found, f"{collection.name}, {split}, {args.name}")
            print(text)
            name = f"{collection.name.lower()}-{split}.txt"
            write_text(Path(args.out) / "rag" / args.name / name, text + "\n")


def _encode(args: argparse.Namespace, data: str, model: str) -> None:
    """The documents' vectors, in a process of its own, which leaves no memory taken."""
    _run("the encoding of the documents", [
        "encode", f"--model={model}", f"--data={data}", f"--out={args.out}",
        f"--device={args.device}",
    ])  # fmt: skip


def _alone(args: argparse.Namespace, data: str, side: str) -> None:
    """One side in a process of its own: the peak of memory is a process's."""
    words = ["rag", "--alone", "--data", data, "--sides", side]
    if args.specialists:
        words += ["--specialists", *args.specialists]
    for option in ("model", "name", "split", "depth", "passages", "rule", "temperature", "top-k",
                   "top-p", "seed", "queries", "out", "device"):  # fmt: skip
        words += [f"--{option}={getattr(args, option.replace('-', '_'))}"]
    _run(f"the side {side!r}", words)


def _run(what: str, words: list[str]) -> None:
    if subprocess.run([sys.executable, "-m", "eval", *words], check=False).returncode:
        raise ValueError(f"{what} ended with an error, see above")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    made.add_argument("bench", choices=("beir", "mteb", "rag"))
    made.add_argument("--model", required=True, help="a folder written by save_pretrained")
    made.add_argument("--name", default="", help="of the model in the results; default: its folder")
    made.add_argument("--data", nargs="*", default=[], help="stdlib, folders, names such as "
                      "scifact, bright/biology, miracl/sw, mmarco/es; beir: also all (BEIR's 18), "
                      "cqadupstack, bright, miracl, mmarco")  # fmt: skip
    made.add_argument("--dimensions", nargs="+", type=int, default=[], help="beir: retrieval by so "
                      "many of the vectors' first dimensions too, e.g. 64 128")  # fmt: skip
    made.add_argument("--untrained", action="store_true", help="beir: the bare base beside it, "
                      "its reranking the mean of 20 random heads; takes as long again")  # fmt: skip
    made.add_argument("--tasks", nargs="*", default=[], help="mteb: tasks by name")
    made.add_argument("--benchmark", default="", help="mteb: such as 'MTEB(eng, v2)'")
    made.add_argument("--split", default="", help="default: test, or what the benchmark measures")
    made.add_argument("--depth", type=int, default=0, help="documents retrieved for a query; "
                      "0: 1000, or 20 for rag")  # fmt: skip
    made.add_argument("--candidates", type=int, default=100, help="of BM25, that are reranked")
    made.add_argument("--queries", type=int, default=0, help="reranked, or asked by rag; 0: all")
    made.add_argument("--sides", nargs="+", choices=[*rag.SIDES, *rag.PARTS],
                      default=[*rag.SIDES, "no-rerank", "closed-book"],
                      help="rag: how many models play the three roles; or what stages are left out "
                      "(bm25: it retrieves, nothing reranks)")  # fmt: skip
    made.add_argument("--specialists", nargs=2, metavar=("EMBEDDER", "RERANKER"), default=[],
                      help="rag: the folders of two of the three models, instead of --model "
                      "thrice")  # fmt: skip
    made.add_argument("--passages", type=int, default=3, help="rag: documents the generator reads")
    made.add_argument("--rule", choices=["", *NORMALISERS], default="", help="rag: whose "
                      "normalisation of answers; default: the set's, nq for folders")  # fmt: skip
    made.add_argument("--temperature", type=float, default=0.0, help="rag: of sampled answers; "
                      "default: 0, greedy")  # fmt: skip
    made.add_argument(
        "--top-k", type=int, default=0, help="rag: sample from so many tokens; 0: all"
    )
    made.add_argument("--top-p", type=float, default=1.0, help="rag: or from so much probability")
    made.add_argument("--seed", type=int, default=0, help="rag: of the samples")
    made.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one of several
    made.add_argument("--out", default="runs/eval", help="folder of the results")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in large.COMMANDS:
        return large.main(words)
    if words and words[0] == "baselines":
        return baseline_table.main(words[1:])
    made = parser()
    args = made.parse_args(words)
    args.name = args.name or saved.name_of(args.model)

    def work() -> None:
        if args.bench != "mteb" and not args.data:
            raise ValueError("--data is missing: which collections?")
        for name, benches in OF.items():
            if args.bench not in benches and getattr(args, name) != made.get_default(name):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is of {' and '.join(benches)}, not of {args.bench}")
        if args.bench == "mteb" and not args.data:
            for name in ("split", "queries", "candidates"):
                if getattr(args, name) != made.get_default(name):
                    raise ValueError(f"--{name} is of --data: a task of mteb has its own")
        args.depth = args.depth or (20 if args.bench == "rag" else 1000)
        for name, least in (("depth", 1), ("candidates", 1), ("queries", 0), ("passages", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")
        if args.bench != "beir":
            require_one_process(args.bench)
        {"beir": beir, "mteb": through_mteb, "rag": answer}[args.bench](args)

    return job_status(work)


if __name__ == "__main__":
    sys.exit(main())
