"""Which report an experiment has, and its writing."""

from pathlib import Path
from typing import Any

import experiments
from analysis import (
    compare,
    conflict,
    order,
    overview,
    pareto,
    pilot,
    probes,
    ranks,
    report,
    representations,
    routers,
    routes,
    scale,
    sweep,
)
from eval.metrics import mean
from eval.protocol import Scores
from model import parallel
from model.files import write_text
from model.router import TASKS

REPORTS = {  # each has write(folder), and reading or summary of what it wrote
    "verdict": report,
    "sweep": sweep,
    "pilot": pilot,
    "compare": compare,
    "routers": routers,
    "ranks": ranks,
    "pareto": pareto,
    "conflict": conflict,
    "routes": routes,
    "representations": representations,
    "probes": probes,
    "scale": scale,
    "order": order,
}


def write(experiment: str, folder: Path, tables: bool = False) -> str:
    """Write the report of runs/<experiment>/<setting> into it; return what it says, for a terminal.

    tables: tables.tex beside it.
    """
    kind = REPORTS[experiments.EXPERIMENTS[experiment].report]
    found = summary(kind, kind.write(folder))
    if tables:
        write_text(folder / "tables.tex", overview.latex((folder / "report.md").read_text()))
    return found


def summary(kind: Any, found: dict[str, Any]) -> str:
    """What a report says, for a terminal."""
    if hasattr(kind, "summary"):
        return kind.summary(found)
    return f"{found['experiment']} {found['setting']}: {kind.reading(found)}"


def show_row(arm: str, seed: int | None, scores: dict[str, Scores]) -> None:
    """One row of the running table: nDCG@10 of each task."""
    if parallel.rank() > 0:
        return
    cells = [
        f"{mean(scores[task], 'ndcg_cut_10'):.4f}" if task in scores else "-" for task in TASKS
    ]
    name = arm if seed is None else f"{arm} seed {seed}"
    print(f"{name:<24} retrieval {cells[0]:>7}   reranking {cells[1]:>7}", flush=True)
