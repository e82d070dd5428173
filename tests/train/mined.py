"""Folders of negatives: what is mined of the tiny collection, read and changed."""

import json
from collections.abc import Callable
from pathlib import Path

from train import mining
from train.mining import Settings

WIDE = Settings(depth=30, ranks=(1, 30), margin=0, negatives=4, fill=True, part=7)


def rows(folder: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in (folder / "negatives.jsonl").read_text().splitlines()]
    return {row["query"]: row for row in found}


def changed(folder: Path, to: Path, change: Callable[[dict], object], sign: bool = True) -> Path:
    """A copy whose lines are changed, and signed as if it had been mined so."""
    to.mkdir()
    made = list(rows(folder).values())
    for row in made:
        change(row)
    text = "".join(json.dumps(row) + "\n" for row in made if row)
    (to / "negatives.jsonl").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    if sign:
        manifest["sha256"] = mining.hashlib.sha256(text.encode()).hexdigest()
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to
