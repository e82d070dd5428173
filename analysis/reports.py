"""Which report an experiment has, and its writing."""

from pathlib import Path

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
    routes,
    scale,
    sweep,
)
from model.files import write_text

REPORTS = {  # each has write(folder) and summary(what it wrote)
    "verdict": report,
    "sweep": sweep,
    "pilot": pilot,
    "compare": compare,
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
    found = kind.summary(kind.write(folder))
    if tables:
        write_text(folder / "tables.tex", overview.latex((folder / "report.md").read_text()))
    return found
