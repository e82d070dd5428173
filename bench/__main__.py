"""`python -m bench`: what this machine can show, as tables and one JSON file.

On a CPU: encoding, reranking and training beside the known libraries, the bordered weight beside
addmm, two models beside one, corpora and BM25's index of growing size. On a card: two models beside
one, the whole model in four designs, and every kernel beside its twins, in the real shapes with
random weights; then the libraries too.
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

from analysis.figures import table
from bench import corpus, designs, encoding, index, ops, reranking, serving, timing, training
from bench.serving import PAIR
from bench.shapes import SHAPES
from eval.files import write_text
from eval.machine import device_name
from model import bases
from model.config import DTYPES
from train.trial import Workbench, resolve_dtype

RESULTS = Path(__file__).parent / "results"
LARGE = ("qwen3-1.7b", "qwen3-4b", "mistral-7b")
NOT_MEASURED = "not measured"


def _ratio(r: dict | None) -> str:
    return "-" if r is None else f"**{r['median']:.2f}** [{r['q1']:.2f}, {r['q3']:.2f}]"


def rivals_table(rows: list[dict]) -> str:
    """Ours against a known library, in turns: median throughput and the ratio by round."""
    head = ["what", "dtype", "against", "ours", "theirs", "ours / theirs"]
    cells = [
        [row["what"], row["dtype"], row["against"], f"{row['ours']['median']:,.0f}",
         f"{row['theirs']['median']:,.0f}", _ratio(row["ratio"])]
        for row in rows
    ]  # fmt: skip
    return "Tokens per second.\n\n" + table(head, cells)


def designs_table(rows: list[dict]) -> str:
    head = ["shape", "texts", "mode", "design", "tokens/s", "TFLOP/s of the base's work",
            "peak memory (GB)", "ours / this"]  # fmt: skip
    cells = []
    for row in rows:
        texts = f"{row['tokens']:,} tokens, {row['lengths']}"
        if "failed" in row:
            values = [row["failed"], "-", "-", "-"]
        else:
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
            values = [f"{row['rate']['median']:,.0f}", f"{row['flops'] / 1e12:.1f}", peak,
                      "-" if row["design"] == "ours" else _ratio(row["ours_against"])]  # fmt: skip
        cells.append([row["shape"], texts, row["mode"], row["design"], *values])
    what = "Designs as in `bench/designs.py`; ranks 16 x 3 on seven projections, 128 tokens a text."
    return f"{what}\n\n{table(head, cells)}"


def ops_table(rows: list[dict]) -> str:
    head = ["op", "mode", "shape", "ours (ms)", "plain (ms)", "torch.compile (ms)", "limit (ms)",
            "limit / ours"]  # fmt: skip
    cells = []
    for row in rows:
        times = [f"{row[k]['median']:.3f}" if k in row else "-"
                 for k in ("ours", "plain", "compiled", "limit")]  # fmt: skip
        share = row["limit"]["median"] / row["ours"]["median"]
        cells.append([row["op"], row["mode"], row["shape"], *times, f"{share:.2f}"])
    what = (
        "One layer's work. Limit of a forward pass: a copy of the bytes it must move, or its GEMM."
    )
    return f"{what}\n\n{table(head, cells)}"


def serving_table(rows: list[dict]) -> str:
    head = ["shape", "side", "resident (GB)", "peak (GB)", "saved", "encode (tokens/s)",
            "rerank (pairs/s)", "request", "request (ms)"]  # fmt: skip
    cells = []
    for row in rows:
        if "failed" in row:
            cells.append([row["shape"], row["failed"], *"-------"])
            continue
        for side in ("two", "one"):
            peak, resident = row["peak_bytes"][side], row["resident_bytes"]
            of = row["peak_bytes"] if peak is not None else resident
            saved = "-" if side == "two" else f"{100 * (1 - of['one'] / of['two']):.1f} %"
            shape = f"{row['shape']}, {row['dtype']}"
            cells.append([shape, f"{side} model{'s' if side == 'two' else ''}",
                          f"{resident[side] / 1e9:.3f}",
                          "-" if peak is None else f"{peak / 1e9:.3f}", saved,
                          f"{row['encode'][side]['median']:,.0f}",
                          f"{row['rerank'][side]['median']:,.1f}",
                          f"{row['index']:,} vectors, {row['reranked']} documents",
                          f"{1000 / row['request'][side]['median']:,.1f}"])  # fmt: skip
    what = (
        f"Ranks {', '.join(map(str, serving.RANKS))}, fp32 masters dropped; one batch. A request: "
        "encode a query, search an index, rerank."
    )
    return f"{what}\n\n{table(head, cells)}"


def corpus_table(rows: list[dict]) -> str:
    head = ["texts", "tokens", "tokens/s", "peak after loading (GB)", "peak (GB)"]
    cells = [
        [f"{row['texts']:,}", f"{row['tokens']:,}", f"{row['tokens'] / row['seconds']:,.0f}",
         f"{row['loaded_bytes'] / 1e9:.3f}", f"{row['peak_bytes'] / 1e9:.3f}"]
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    what = (
        f"Short passages into shards of {first['window']:,}, {first['layers']} layers, "
        f"{first['dtype']}; reading the corpus and writing the vectors included."
    )
    return f"{what}\n\n{table(head, cells)}"


def index_table(rows: list[dict]) -> str:
    head = ["documents", "seconds", "before (GB)", "peak (GB)", "once made (GB)"]
    cells = [
        [f"{row['documents']:,}", f"{row['seconds']:,.0f}"]
        + [f"{row[key] / 1e9:.3f}" for key in ("before_bytes", "peak_bytes", "made_bytes")]
        for row in rows
    ]
    peak, made = (index.growth(rows, key) for key in ("peak_bytes", "made_bytes"))
    what = (
        f"Made-up documents of {index.WORDS} words after Zipf, never kept. One more takes "
        f"{peak:,.0f} bytes while the index is made, {made:,.0f} from then on."
    )
    return f"{what}\n\n{table(head, cells)}"


TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "serving": ("Two models against one", serving_table),
    "designs": ("The whole model in four designs", designs_table),
    "ops": ("The kernels", ops_table),
    "encoding": ("Encoding", rivals_table),
    "reranking": ("Reranking", rivals_table),
    "training": ("Training", rivals_table),
    "bordered": ("The bordered weight on a CPU", rivals_table),
    "elementwise": ("Elementwise ops on a CPU", rivals_table),
    "corpus": ("A corpus into shards on disk", corpus_table),
    "index": ("BM25's index", index_table),
}

Part = tuple[str, str, Callable[[], list[dict]]]  # section, what it measures, how


def parts(bench: Workbench, base: str, rounds: int) -> list[Part]:
    """What is measured, in order of value."""
    device = bench.device
    pairs = 40 if device == "cpu" else 640
    libraries: list[Part] = [
        ("encoding", "encoding", lambda: encoding.run(bench, base, rounds=rounds)),
        ("reranking", "reranking", lambda: reranking.run(bench, base, count=pairs, rounds=rounds)),
        ("training", "training", lambda: training.run(bench, base, rounds=rounds)),
    ]
    if device == "cpu":
        shape, dtypes = SHAPES["smollm2-135m"], ("float32", "bfloat16")
        # As many tokens as a micro-batch of the study's CPU scale has.
        layer = ("smollm2-135m", shape, 2048, dtypes, 20 * rounds)
        bordered = partial(ops.bordered_rows, *layer)
        elementwise = partial(ops.elementwise_rows, *layer)
        serve = partial(_serve, "smollm2-135m", device, "float32", rounds, tokens=1024, reranked=10)
        # Bytes are what a larger shape shows here, its speed is no news.
        larger = partial(
            _serve, "qwen3-0.6b", device, "bfloat16", rounds, tokens=PAIR, reranked=1, index=1000
        )
        return [
            *libraries,
            ("bordered", "bordered", bordered),
            ("elementwise", "elementwise", elementwise),
            ("serving", "smollm2-135m", serve),
            ("serving", "qwen3-0.6b", larger),
            ("corpus", "1,000 to 100,000 texts", partial(corpus.run, bench, base)),
            ("index", "100,000 and 300,000 documents", index.run),
        ]
    dtype = resolve_dtype("auto")
    own: torch.dtype = DTYPES[dtype]
    small = "qwen3-0.6b"

    def model(name: str, tokens: int, mixed: bool, modes: tuple[str, ...]) -> Part:
        def run() -> list[dict]:
            return designs.measure(name, tokens, mixed, device, own, (16,) * 3, rounds, modes)

        return ("designs", f"{name}, {tokens} tokens, {'mixed' if mixed else 'equal'}", run)

    both, forward = ("forward", "train"), ("forward",)
    return [
        ("serving", small, partial(_serve, small, device, dtype, rounds)),
        model(small, 16384, True, both),
        ("ops", small, partial(ops.measure, small, SHAPES[small], 16384, device, own)),
        *[model(name, 16384, True, forward) for name in ("mistral-7b", "qwen3-4b", "qwen3-1.7b")],
        *[("serving", name, partial(_serve, name, device, dtype, rounds)) for name in LARGE],
        model(small, 16384, False, both),
        *[model(small, tokens, True, both) for tokens in (1024, 4096, 65536)],
        (
            "ops",
            "qwen3-4b",
            partial(ops.measure, "qwen3-4b", SHAPES["qwen3-4b"], 16384, device, own),
        ),
        *libraries,
    ]


def _serve(name: str, device: str, dtype: str, rounds: int, **size: Any) -> list[dict]:
    try:
        return [serving.measure(name, device, DTYPES[dtype], rounds, **size)]
    except torch.OutOfMemoryError:
        return [{"shape": name, "failed": "out of memory"}]
    finally:
        if device != "cpu":
            torch.cuda.empty_cache()


def render(record: dict) -> str:
    """The record in Markdown, with what was left out."""
    text = f"# {record['device']}\n\n"
    commit = (record["commit"] or "no commit")[:12] + (", changed" if record["dirty"] else "")
    torch_version, driver = record["versions"]["torch"], record["driver"] or "-"
    text += (
        f"By `make bench` in {record['seconds'] / 60:.1f} minutes; torch {torch_version}, driver "
        f"{driver}, commit {commit}. Medians of {record['rounds']} rounds in which the sides take "
        "turns; ratios round by round, with quartiles. Base "
        f"{record['base']}, texts of {record['data']} where real ones are used.\n\n"
    )
    for section, (title, make) in TABLES.items():
        if record[section]:
            text += f"## {title}\n\n{make(record[section])}"
    left = [f"{what}: {NOT_MEASURED} (out of time)" for what in record["left_out"]]
    if not record["device"].startswith(("NVIDIA", "Tesla")):
        left.append(f"everything that needs a GPU: {NOT_MEASURED}")
    return text.rstrip() + "\n" + "".join(f"\n- {line}" for line in left) + ("\n" if left else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--base", default=bases.DEFAULT, help="a known name, hub id or folder")
    parser.add_argument("--data", default="stdlib", help="where the texts come from")
    parser.add_argument("--rounds", type=int, default=0, help="0: 3 on a CPU, 10 on a card")
    parser.add_argument("--minutes", type=float, default=20, help="no part begins after that")
    parser.add_argument("--only", nargs="*", default=[], choices=list(TABLES), help="sections")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = given.rounds or (3 if device == "cpu" else 10)
    if rounds < 2:
        parser.error(f"--rounds {rounds}: quartiles need at least 2")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, started = device_name(device), time.monotonic()
    bench = Workbench(given.data, device, bases.cache_folder(), keep_prefix=False)
    record: dict = {"device": name, "base": given.base, "data": given.data, "rounds": rounds}
    record |= {**timing.machine(), **{section: [] for section in TABLES}, "left_out": []}
    stem = timing.stem(name, given.base.split("/")[-1])
    for section, what, run in parts(bench, given.base, rounds):
        if given.only and section not in given.only:
            continue
        if time.monotonic() - started > 60 * given.minutes:
            record["left_out"].append(f"{section}, {what}")
        else:
            print(f"{section}: {what}", flush=True)
            record[section] += run()
        # What is there is kept if a later part dies.
        record["seconds"] = time.monotonic() - started
        write_text(RESULTS / f"{stem}.json", json.dumps(record, indent=1) + "\n")
        write_text(RESULTS / f"{stem}.md", render(record))
    print(render(record))
    print(f"written to {RESULTS / stem}.md and .json")


if __name__ == "__main__":
    main()
