"""`python -m bench`: what this machine can show, as tables and one JSON file.

On a CPU: encoding, reranking and training beside the known libraries, the bordered weight beside
addmm, two models beside one, corpora and BM25's index of growing size. On a card: two models beside
one, the whole model in four designs, and every kernel beside its twins, in the real shapes with
random weights; then the libraries too.

A record that time or a kill left unfinished is gone on with by the next call, where code, versions
and machine are the same. `--only` and other data leave the record of everything alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import corpus, designs, encoding, index, ops, reranking, serving, timing, training
from bench.serving import PAIR
from bench.shapes import SHAPES
from bench.tables import TABLES, render
from model import bases
from model.config import DTYPES
from model.files import read_json, write_text
from model.processor import resolve_dtype
from train.trial import Workbench

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DATA = "stdlib"
LARGE = ("qwen3-1.7b", "qwen3-4b", "mistral-7b")
Part = tuple[str, str, Callable[[], list[dict]]]  # section, what it measures, how


def parts(bench: Workbench, base: str, rounds: int) -> list[Part]:
    """What is measured, in order of value."""
    device = bench.device
    pairs = 40 if device == "cpu" else 640
    # A card's own of the two 16-bit types: a T4 has no bfloat16.
    dtypes = ("float32", "bfloat16" if device == "cpu" else resolve_dtype("auto", device))
    given: dict[str, Any] = {"rounds": rounds, "dtypes": dtypes}
    libraries: list[Part] = [
        ("encoding", "encoding", partial(encoding.run, bench, base, **given)),
        ("reranking", "reranking", partial(reranking.run, bench, base, count=pairs, **given)),
        ("training", "training", partial(training.run, bench, base, **given)),
    ]
    if device == "cpu":
        shape = SHAPES["smollm2-135m"]
        # As many tokens as a micro-batch of the study's CPU scale has.
        layer = ("smollm2-135m", shape, 2048, dtypes, 20 * rounds)
        bordered = partial(ops.bordered_rows, *layer)
        elementwise = partial(ops.elementwise_rows, *layer)
        serve = partial(
            serving.measure, "smollm2-135m", device, torch.float32, rounds, tokens=1024, reranked=10
        )
        # Bytes are what a larger shape shows here, its speed is no news.
        larger = partial(
            serving.measure, "qwen3-0.6b", device, torch.bfloat16, rounds,
            tokens=PAIR, reranked=1, index=1000,
        )  # fmt: skip
        return [
            *libraries,
            ("bordered", "bordered", bordered),
            ("elementwise", "elementwise", elementwise),
            ("serving", "smollm2-135m", serve),
            ("serving", "qwen3-0.6b", larger),
            ("corpus", "1,000 to 100,000 texts", partial(corpus.run, bench, base)),
            ("index", "100,000 and 300,000 documents", index.run),
        ]
    own: torch.dtype = DTYPES[resolve_dtype("auto", device)]
    small = "qwen3-0.6b"

    def model(name: str, tokens: int, mixed: bool, modes: tuple[str, ...]) -> Part:
        def run() -> list[dict]:
            return designs.measure(name, tokens, mixed, device, own, (16,) * 3, rounds, modes)

        return ("designs", f"{name}, {tokens} tokens, {'mixed' if mixed else 'equal'}", run)

    both, forward = ("forward", "train"), ("forward",)
    return [
        ("serving", small, partial(serving.measure, small, device, own, rounds)),
        model(small, 16384, True, both),
        ("ops", small, partial(ops.measure, small, SHAPES[small], 16384, device, own)),
        *[model(name, 16384, True, forward) for name in ("mistral-7b", "qwen3-4b", "qwen3-1.7b")],
        *[("serving", name, partial(serving.measure, name, device, own, rounds)) for name in LARGE],
        model(small, 16384, False, both),
        *[model(small, tokens, True, both) for tokens in (1024, 4096, 65536)],
        (
            "ops",
            "qwen3-4b",
            partial(ops.measure, "qwen3-4b", SHAPES["qwen3-4b"], 16384, device, own),
        ),
        *libraries,
    ]


def unfinished(about: dict, path: Path) -> dict:
    """The record at `path` if it can be gone on with: parts are left, and what it is about, its
    commit aside, is the same; else an empty one."""
    old = read_json(path, "remove it") if path.exists() else {}
    same = all(old.get(key) == about[key] for key in about.keys() - {"git"})
    return old if same and old["left_out"] else {}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--base", default=bases.DEFAULT, help="a known name, hub id or folder")
    parser.add_argument("--data", default=DATA, help="where the texts come from")
    parser.add_argument("--rounds", type=int, default=0, help="0: 3 on a CPU, 10 on a card")
    parser.add_argument("--minutes", type=float, default=20, help="no part begins after that")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=list(TABLES), help="sections; kept apart in RUNS"
    )
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="where --only writes")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = given.rounds or (3 if device == "cpu" else 10)
    if rounds < 2:
        parser.error(f"--rounds {rounds}: quartiles need at least 2")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    bench = Workbench(given.data, device, bases.cache_folder(), keep_prefix=False)
    about = {"base": given.base, "data": given.data, "rounds": rounds, **timing.made_by(device)}
    if given.only:
        about["only"] = sorted(given.only)
    # Other texts are another record, and a few sections never stand in the place of all.
    names = [about["device"], Path(given.base).name, *[Path(given.data).name][given.data == DATA :]]
    folder = Path(given.runs) / "bench" if given.only else RESULTS
    path = folder / f"{timing.stem(*names)}.json"
    listed = [
        (f"{section}, {what}", section, run)
        for section, what, run in parts(bench, given.base, rounds)
        if not given.only or section in given.only
    ]
    record = unfinished(about, path) or {
        **about, **{section: [] for section in TABLES}, "seconds": 0.0,
        "left_out": [name for name, _, _ in listed], "too_large": [],
    }  # fmt: skip
    before = record["seconds"]
    for name, section, run in listed:
        late = time.monotonic() - started > 60 * given.minutes
        if name not in record["left_out"] or late:
            continue
        print(name, flush=True)
        try:
            record[section] += run()
        except torch.OutOfMemoryError:
            record["too_large"].append(name)
            torch.cuda.empty_cache()
        record["left_out"].remove(name)
        # What is there is kept if a later part dies, and the next call goes on from it.
        record["seconds"] = before + time.monotonic() - started
        write_text(path, json.dumps(record, indent=1) + "\n")
        write_text(path.with_suffix(".md"), render(record))
    print(render(record))
    print(f"written to {path.with_suffix('.md')} and .json")
    if record["left_out"]:
        print(f"out of time: {len(record['left_out'])} parts are left, the same command goes on")


if __name__ == "__main__":
    main()
