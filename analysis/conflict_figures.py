"""The figures of gradient conflict: along training, and by layer and projection."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from analysis import figures
from analysis.bands import shade
from analysis.figures import label

CAPTIONS = {
    "along": "Cosine between the tasks' gradients (all layers and projections) after a number of "
    "steps, by space: mean over seeds with its 95 % interval; open: corrected for noise, where "
    "all seeds allow it.",
    "steps": "The gradients induced on W after a number of steps: share of the adapted linears "
    "whose cosine is negative (dotted: by chance), share of the norm that PCGrad would remove from "
    "all of them as one vector, and similarity of the tasks' norms (1: equal), where all seeds "
    "are reliable enough to have one. Mean over seeds with its 95 % interval (Student's t), cut at "
    "the limits of a share, 0 and 1; the middle panel is enlarged.",
    "heat": "Cosine between the tasks' gradients (induced on W) by layer and projection, "
    "averaged over the probes along training, mean over seeds; orange: conflict, blue: agreement. "
    "Dot: its 95 % interval over seeds excludes 0, by chance in one cell of 20.",
}
SPACE_NAMES = {
    "ab": "(A, B), as trained",
    "w": "the induced gradient on W",
    "along": "of it, along the frozen rows",
    "across": "of it, across the frozen rows",
}
# A panel each. What lies across the frozen rows is nearly all of the gradient on W.
PANELS = {"ab": "(A, B), as trained", "w": "Induced on W", "along": "W, along its frozen rows"}
SHARES = {"conflicts": "Negative linears", "removed": "Removed by PCGrad",
          "similarity": "Similarity of norms"}  # fmt: skip


def draw_along(v: dict[str, Any]) -> Figure:
    """The cosine after each probe, a panel a space, a line an arm."""

    def lines(axes: Axes, space: str, found: dict[str, Any], name: str, style: dict) -> None:
        steps, curve = np.array(found["steps"]), found["curve"][space]
        _line(axes, steps, curve["cosine"], style, name)
        _line(axes, steps, curve["corrected"], style | {"mfc": "white"}, None)

    figure, panels = _panels(v, PANELS, lines)
    for axes in panels:
        axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    panels[0].set_ylabel("cosine")
    return figure


def draw_steps(v: dict[str, Any]) -> Figure:
    """What else the gradients on W show after each probe, a panel a statistic, a line an arm."""

    def lines(axes: Axes, key: str, found: dict[str, Any], name: str, style: dict) -> None:
        _line(axes, np.array(found["steps"]), found["curve"]["w"][key], style, name)

    figure, panels = _panels(v, SHARES, lines, sharey=False)
    for axes, key in zip(panels, SHARES, strict=True):
        top = min(axes.get_ylim()[1], 1.0) if key == "removed" else 1.0
        axes.set_ylim(-0.04 * top, 1.04 * top)  # the markers of 0 and 1 are whole
    panels[0].axhline(0.5, color=figures.GREY, linewidth=0.8, linestyle=":", zorder=0)
    panels[0].set_ylabel("share")
    return figure


def _panels(
    v: dict[str, Any], titles: dict[str, str], lines: Callable[..., None], sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """A panel a title; lines: (axes, the title's key, an arm's numbers, its name, its style)."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.5), layout="constrained")
        panels = figure.subplots(1, len(titles), sharex=True, sharey=sharey)
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            spare = iter(figures.SPARE)
            for at, (arm, found) in enumerate(v["gradients"].items()):
                lines(axes, key, found, label(arm), {
                    "color": figures.COLOURS.get(arm) or next(spare), "marker": "os^Dv"[at % 5],
                    "linestyle": figures.DASHES[at % 4], "markersize": 3.5,
                })  # fmt: skip
            axes.set_title(title, fontweight="bold")
            axes.set_xlabel("training step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure, list(panels)


def _line(
    axes: Axes, steps: np.ndarray, rows: Any, style: dict[str, Any], name: str | None
) -> None:
    """The mean over seeds where all have a value; with a name, its interval too."""
    known = [i for i, row in enumerate(rows) if all(value is not None for value in row)]
    if not known:
        return
    values = np.array([rows[i] for i in known], dtype=float)  # (steps, seeds)
    axes.plot(steps[known], values.mean(1), label=name, **style)
    if name:
        shade(axes, steps[known], values, style["color"])


def draw_heat(v: dict[str, Any]) -> Figure:
    """Layer by projection, a panel an arm."""
    read: Callable[[float | None], float] = lambda x: math.nan if x is None else x  # noqa: E731
    with matplotlib.rc_context(figures.STYLE):
        arms = list(v["gradients"])
        deep = max(len(v["gradients"][arm]["cells"]) for arm in arms)
        size = (figures.WIDTH, 0.17 * deep + 1.35)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
        grids = {
            arm: np.array([[read(x["cosine"]["mean"]) for x in row.values()]
                           for row in v["gradients"][arm]["cells"].values()])
            for arm in arms
        }  # fmt: skip
        top = max(0.05, *(float(np.nanmax(np.abs(grid))) for grid in grids.values()))
        colours = LinearSegmentedColormap.from_list("conflict", ["#D55E00", "#ffffff", "#0072B2"])
        images = []
        for axes, arm in zip(panels, arms, strict=True):
            cells = v["gradients"][arm]["cells"]
            images.append(axes.imshow(grids[arm], cmap=colours, vmin=-top, vmax=top,
                                      aspect="auto", origin="lower"))  # fmt: skip
            sure = [
                (x, y)
                for y, row in enumerate(cells.values())
                for x, cell in enumerate(row.values())
                if apart(cell["cosine"]["interval"])
            ]
            axes.plot(*np.array(sure).reshape(-1, 2).T, "o", color="black", markersize=2.2)
            names = [name.removesuffix("_proj") for name in next(iter(cells.values()))]
            axes.set_xticks(range(len(names)), names, rotation=60)
            axes.set_yticks(range(len(cells)), list(cells))
            axes.set_title(label(arm), fontweight="bold")
            axes.tick_params(length=0)
        panels[0].set_ylabel("layer")
        figure.colorbar(images[0], ax=list(panels), label="cosine", fraction=0.05, pad=0.01)
        return figure


def apart(interval: Sequence[float] | None) -> bool:
    """Whether an interval excludes 0; of one seed there is none."""
    return interval is not None and interval[0] * interval[1] > 0
