"""Interference against size: the figure of `analysis.scale`."""

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures, slopes
from analysis.figures import TASKS
from analysis.slopes import AXES


def draw(v: dict[str, Any]) -> Figure:
    """A panel a task and axis: interference over size."""
    shown = [
        axis for axis in AXES
        if axis == "parameters" or any(slopes.along(v["rows"], axis, task) for task in TASKS)
    ]  # fmt: skip
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 2.3 * len(shown))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(shown), 2, sharey=True, squeeze=False)
        for line, axis in zip(grid, shown, strict=True):
            for panel, task in zip(line, TASKS, strict=True):
                _panel(panel, v, axis, task)
            line[0].set_ylabel("interference (%)")
        return figure


def _panel(axes: Axes, v: dict[str, Any], axis: str, task: str) -> None:
    text, key, _ = AXES[axis]
    alone = [row for row in v["rows"] if row["task"] == task and row.get("interval")]
    rows = slopes.along(v["rows"], axis, task) or alone[:1]
    family, bases = slopes.main_family(rows), {row["name"] for row in rows}
    for row in rows:
        mine = row["family"] == family
        x, tone = math.log2(row[key]), figures.mark(row.get("p_holm"))
        axes.plot([x, x], row["interval"], color=tone, linewidth=1.2, zorder=1)
        axes.plot(x, row["interference"], "o" if mine else "s", color=tone, markersize=4.2,
                  mfc=tone if row["measurable"] else "white")  # fmt: skip
        note = f"{row['rank']}" if key == "rank" else f"{row['layers'] or 'all'}"
        axes.annotate(row["name"] if len(bases) > 1 else note, (x, row["interval"][1]),
                      xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7,
                      color=figures.GREY)  # fmt: skip
    for row in (row for row in v["slopes"] if row["axis"] == axis and row["task"] == task):
        x = np.array(row["range"])
        axes.plot(x, row["middle"][1] + row["slope"] * (x - row["middle"][0]), linewidth=0.8,
                  color=figures.mark(row["p_holm"]), linestyle=(0, (5, 1.5)))  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    axes.set_title(TASKS[task].capitalize(), fontweight="bold")
    ticks = sorted({row[key] for row in rows})
    names = [f"{n}" if key == "rank" else f"{n / 1e6:.0f} M" for n in ticks]
    axes.set_xticks([math.log2(n) for n in ticks], names)
    note = " (labels: layers)" if key == "parameters" and len(bases) < 2 else ""
    axes.set_xlabel(f"{text}{note}")
