"""A benchmark's record as tables in Markdown."""

from collections.abc import Callable

from analysis.figures import table
from bench import index, serving


def _ratio(r: dict | None) -> str:
    return "-" if r is None else f"**{r['median']:.2f}** [{r['q1']:.2f}, {r['q3']:.2f}]"


def rivals_table(rows: list[dict]) -> str:
    """Ours against a known library, in turns: median throughput and the ratio by round."""
    head = ["what", "dtype", "against", "rounds", "ours", "theirs", "ours / theirs"]
    cells = [
        [row["what"], row["dtype"], row["against"], str(row["rounds"]),
         f"{row['ours']['median']:,.0f}", f"{row['theirs']['median']:,.0f}", _ratio(row["ratio"])]
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
        shape = f"{row['shape']}, {row['dtype']}"
        for side in row["sides"]:
            name = f"{side} model{'s' if side == 'two' else ''}"
            if "failed" in row:
                cells.append([shape, name, row["failed"], *"------"])
                continue
            peak, resident = row["peak_bytes"][side], row["resident_bytes"][side]
            of = row["peak_bytes"] if peak is not None else row["resident_bytes"]
            # Against two where both were resident; without, there is nothing to compare with.
            saved = f"{100 * (1 - of['one'] / of['two']):.1f} %" if len(of) > 1 else "-"
            cells.append([shape, name, f"{resident / 1e9:.3f}",
                          "-" if peak is None else f"{peak / 1e9:.3f}",
                          saved if side == "one" else "-",
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
    names = {
        "before_bytes": "before (GB)", "peak_bytes": "peak (GB)", "made_bytes": "once made (GB)",
        "kept_bytes": "on disk (GB)", "own_bytes": "own, mapped (GB)",
    }  # fmt: skip
    names = {key: name for key, name in names.items() if key in rows[0]}  # earlier records: made
    cells = [
        [f"{row['documents']:,}", f"{row['seconds']:,.0f}"]
        + [f"{row[key] / 1e9:.3f}" for key in names]
        for row in rows
    ]
    more = [f"{index.growth(rows, key):,.0f} ({name.removesuffix(' (GB)')})"
            for key, name in names.items() if key != "before_bytes"]  # fmt: skip
    what = (
        f"Made-up documents of {index.WORDS} words after Zipf, never kept. One more takes so many "
        f"bytes: {', '.join(more)}."
    )
    return f"{what}\n\n{table(['documents', 'seconds', *names.values()], cells)}"


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


def render(record: dict) -> str:
    """The record in Markdown, with what was left out."""
    git, versions, driver = record["git"], record["versions"], record["driver"] or "-"
    commit = (git["commit"] or "no commit")[:12] + (", changed" if git["dirty"] else "")
    text = (
        f"# {record['device']}\n\n"
        f"By `make bench` in {record['seconds'] / 60:.1f} minutes; torch {versions['torch']}, "
        f"driver {driver}, commit {commit}. Medians of rounds in which the sides take turns; "
        f"ratios round by round, with quartiles. Base {record['base']}, texts of {record['data']} "
        "where real ones are used.\n\n"
    )
    for section, (title, make) in TABLES.items():
        if record[section]:
            text += f"## {title}\n\n{make(record[section])}"
    lines = [f"{what}: out of memory" for what in record["too_large"]]
    lines += [f"{what}: not measured (out of time)" for what in record["left_out"]]
    if not record["device"].startswith(("NVIDIA", "Tesla")):
        lines.append("everything that needs a GPU: not measured")
    return text.rstrip() + "\n" + "".join(f"\n- {line}" for line in lines) + "\n" * bool(lines)
