"""`python -m bench`: every measurement that this machine allows, as a table and one JSON file."""

import argparse
import json
import os
import re
from pathlib import Path

import torch
import transformers

from bench import encoding, timing, training
from model import bases
from train.trial import Workbench, device_name

RESULTS = Path(__file__).parent / "results"
PARTS = {"encoding": (encoding.run, {}), "training": (training.run, {})}


def table(rows: list[dict]) -> str:
    """The rows in Markdown: median and quartiles of the throughput, and of ours over theirs."""
    lines = ["| what | dtype | against | ours | theirs | ours / theirs |"]
    lines.append("|---|---|---|---:|---:|---:|")
    for row in rows:
        pair = [f"{row[k]['median']:,.0f}" for k in ("ours", "theirs")]
        r = row["ratio"]
        ratio = f"**{r['median']:.2f}** [{r['q1']:.2f}, {r['q3']:.2f}]"
        cells = [row["what"], row["dtype"], row["against"], *pair, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--base", default=bases.DEFAULT, help="a known name, hub id or folder")
    parser.add_argument("--data", default="stdlib", help="where the texts come from")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds of each row")
    given = parser.parse_args(arguments)
    if given.rounds < 2:
        parser.error(f"--rounds {given.rounds}: quartiles need at least 2")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device)
    bench = Workbench(given.data, device, bases.cache_folder(), keep_prefix=False)
    rows = []
    for part, options in PARTS.values():
        rows += part(bench, given.base, rounds=given.rounds, **options)
        print(table(rows), flush=True)
    record = {"device": name, "base": given.base, "data": given.data, "rounds": given.rounds}
    record |= {**timing.machine(), "rows": rows}
    title = f"{name}, {given.base}, texts of {given.data}, tokens per second"
    text = f"# {title}\n\nMedian of {given.rounds} rounds, in which the two sides take turns; the "
    text += f"ratio is taken round by round, with its quartiles.\n\n{table(rows)}"
    RESULTS.mkdir(exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", f"{name} {given.base.split('/')[-1]}".lower()).strip("-")
    for suffix, content in ((".json", json.dumps(record, indent=1) + "\n"), (".md", text)):
        whole = RESULTS / f".{stem}{suffix}.part"
        whole.write_text(content)
        os.replace(whole, RESULTS / f"{stem}{suffix}")
    print(f"written to {RESULTS / stem}.md and .json")


if __name__ == "__main__":
    main()
