"""What the reports of all experiments share: files written whole, intervals over seeds,
provenance, warnings."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from analysis import figures


def write_folder(
    folder: Path, data: Mapping[str, dict], page: str, drawn: Mapping[str, Figure]
) -> None:
    """Write JSON files, report.md and figures (PNG and SVG) into `folder`.

    All is written aside first and then renamed, so a stop on the way leaves the old report. The
    same figures give the same bytes.
    """
    part = folder / ".report.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "report.md").write_text(page, encoding="utf-8")
    for name, content in data.items():
        (part / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with matplotlib.rc_context(figures.STYLE):
        for name, figure in drawn.items():
            figure.savefig(part / f"{name}.png", metadata={"Software": None})
            figure.savefig(part / f"{name}.svg", metadata={"Date": None})
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
    part.rmdir()


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % interval and two-sided p of mean = 0 over seeds; None where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "interval": None, "p": None, "seeds": []}
    mean, n = float(np.mean(known)), len(known)
    if n < 2:
        return {"mean": mean, "interval": None, "p": None, "seeds": known}
    se = float(np.std(known, ddof=1)) / math.sqrt(n)
    half = float(scipy_stats.t.isf(0.025, n - 1)) * se
    p = float(2 * scipy_stats.t.sf(abs(mean) / se, n - 1)) if se else float(mean == 0)
    return {"mean": mean, "interval": [mean - half, mean + half], "p": p, "seeds": known}


def warnings(v: dict[str, Any]) -> str:
    """What a reader has to know before any number, as quoted lines."""
    notes = [f"Warning: {text}" for text in v["warnings"]]
    if v["split"] != "test":
        notes.insert(0, f"Measured on {v['split']}, where the settings may have been chosen.")
    if v["setting"].split("-")[0] == "smoke":
        notes.insert(0, "SCALE=smoke shows that the machinery runs: it concludes nothing.")
    return "".join(f"\n> **{text}**\n" for text in notes)


def provenance(v: dict[str, Any]) -> str:
    """Where the numbers come from, an item each."""
    facts = {
        **{"base": v["base"], "data": v["data"]},
        **v["origin"],
        "seconds of all files": f"{v['seconds']:,.0f}",
        "peak memory of a process": f"{v['peak_bytes'] / 1e9:.2f} GB",
        "files": [f"`{name}`" for name in v["files"]],
    }
    return "\n".join(f"- {name}: {figures.plain(value)}" for name, value in facts.items())
