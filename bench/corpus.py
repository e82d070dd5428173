"""Encoding a corpus into shards on disk: peak memory and tokens per second by its size.

Each size is encoded in a process of its own, since a peak of memory is a process's. The passages
are short, so that 100,000 of them take minutes: what is in memory is a window of them, whatever
their number, and 8 bytes for each while duplicates are looked for.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from eval.machine import peak_bytes
from eval.sources import Sources
from eval.vectors import WINDOW, encode, windows
from model.config import ModelConfig
from model.files import write_text
from model.unimoer import UniMoER
from train.trial import Workbench

COUNTS = (1000, 10_000, 100_000)
WORDS = 10  # of a passage


def passages(texts: Iterable[str], count: int) -> Iterator[str]:
    """`count` runs of WORDS words, taken from everywhere in the texts, end joined to start."""
    words = " ".join(texts).split()
    words += words[:WORDS]
    for i in range(count):
        at = i * 7919 % (len(words) - WORDS)
        yield " ".join(words[at : at + WORDS])


def run(
    bench: Workbench,
    base: str,
    layers: int = 2,
    counts: tuple[int, ...] = COUNTS,
    window: int = WINDOW,
    dtype: str = "float32",
) -> list[dict]:
    """One row for each count: tokens, tokens/s, peak bytes after loading and at the end.

    Raises:
        ValueError: a process ended with an error.
    """
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            lines = (
                json.dumps({"_id": str(i), "text": text})
                for i, text in enumerate(passages(bench.collection.queries.values(), count))
            )
            write_text(Path(place) / "corpus.jsonl", "\n".join(lines))
            words = [sys.executable, "-m", "bench.corpus", base, str(layers), str(window), dtype,
                     bench.device, place]  # fmt: skip
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise ValueError(f"encoding {count} texts ended with an error, see above")
        rows.append(
            {"texts": count, "window": window, "layers": layers, "dtype": dtype}
            | json.loads(done.stdout.splitlines()[-1])
        )
    return rows


def one(
    base: str, layers: int, window: int, dtype: str, device: str, place: Path
) -> dict[str, float]:
    """What is measured of one corpus, in this process."""
    shape = {"layers": layers, "dtype": dtype, "embedding_pooling": "mean"}
    model = UniMoER(ModelConfig(base=base, **shape), device)
    model.encode_document(["one text"])  # what is made at the first call is not the corpus's
    sources = Sources("passages", [place / "corpus.jsonl"], [], {}, {})
    loaded, started = peak_bytes(device), time.perf_counter()
    encode(model, sources, place / "vectors", revision="bench", window=window)
    seconds, peak = time.perf_counter() - started, peak_bytes(device)
    tokens = sum(
        sum(map(len, model.tokenizer.documents(texts))) for _, texts in windows(sources, window)
    )
    return {"tokens": tokens, "seconds": seconds, "loaded_bytes": loaded, "peak_bytes": peak}


if __name__ == "__main__":
    base, layers, window, dtype, device, place = sys.argv[1:]
    print(json.dumps(one(base, int(layers), int(window), dtype, device, Path(place))))
