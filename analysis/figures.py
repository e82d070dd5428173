"""The report's figures, for a two-column paper: PNG and SVG, the same bytes for the same trials."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D

Arms = Mapping[str, Mapping[int, dict]]  # arm -> seed -> trial as stored

NAMES = ("scores", "curves", "routing")
WIDTH = 6.8  # inches: both columns
TASKS = {"embedding": "Retrieval", "reranking": "Reranking"}
EXPERTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Okabe and Ito's palette. The specialists share a colour: no panel has both.
COLOURS = {
    "emb-only": "#0072B2",
    "rank-only": "#0072B2",
    "joint-single": "#D55E00",
    "joint-moe": "#009E73",
}
SPARE = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")  # for arms not named above
DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))  # tells lines apart in grey
REFERENCES = {"bm25": "BM25", "untrained": "untrained", "ceiling": "ceiling"}
GREY = "#666666"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "svg.hashsalt": "unimoer",
}


def label(arm: str) -> str:
    """An arm's name as the tables and figures print it: `joint-moe` -> `Joint-MoE`."""
    if arm.endswith("-aa"):
        return f"{label(arm[:-3])} (A/A)"
    words = {"moe": "MoE", "2r": "2r", "3r": "3r"}
    return "-".join(words.get(word, word.capitalize()) for word in arm.split("-"))


def write(folder: Path, verdict: dict[str, Any], arms: Arms) -> list[str]:
    """Draw what there is to draw into `folder`; return the names out of `NAMES` that were drawn.

    verdict: as `report.judge` returns it; arms: the trials, for their curves.
    """
    with matplotlib.rc_context(STYLE):
        drawn = {"scores": scores(verdict), "curves": curves(arms), "routing": routing(arms)}
        for name, figure in drawn.items():
            if figure is not None:
                figure.savefig(folder / f"{name}.png", metadata={"Software": None})
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return [name for name, figure in drawn.items() if figure is not None]


def scores(verdict: dict[str, Any]) -> Figure:
    """nDCG@10 of every arm with its 95 % interval and its seeds; interference with its limits."""
    rows = {
        task: [a for a, row in verdict["arms"].items() if task in (row["tasks"] or TASKS)]
        for task in TASKS
    }
    count = max(map(len, rows.values()))
    effects = _effects(verdict)
    top, bottom = 0.19 * count + 0.95, 0.22 * len(effects) + 0.75
    figure = Figure(figsize=(WIDTH, top + (bottom if effects else 0)), layout="constrained")
    heights = [top, bottom] if effects else [top]
    grid = GridSpec(len(heights), 2, figure, height_ratios=heights)
    for column, task in enumerate(TASKS):
        _score_panel(figure.add_subplot(grid[0, column]), verdict, task, rows[task])
    if effects:
        _effect_panel(figure.add_subplot(grid[1, :]), effects)
    return figure


def _score_panel(axes: Axes, verdict: dict[str, Any], task: str, arms: list[str]) -> None:
    for at, arm in enumerate(arms):
        if (found := verdict["arms"][arm]["scores"].get(task)) is None:
            axes.text(0.02, at, "missing", transform=axes.get_yaxis_transform(), color=GREY,
                      va="center", style="italic")  # fmt: skip
            continue
        colour = COLOURS.get(arm, GREY)
        if found["interval"]:
            low, high = (100 * v for v in found["interval"])
            axes.plot([low, high], [at, at], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot(100 * found["ndcg_cut_10"], at, "o", color=colour, markersize=4.2)
        seeds = [100 * v for v in found["by_seed"]]
        axes.plot(seeds, [at + 0.28] * len(seeds), "o", color=colour, markersize=2.2, alpha=0.6,
                  markeredgewidth=0)  # fmt: skip
    lines = [(name, verdict["references"][name][task]) for name in REFERENCES
             if task in verdict["references"][name]]  # fmt: skip
    for _, row in lines:
        axes.axvline(100 * row["ndcg_cut_10"], color=GREY, linewidth=0.8, linestyle=(0, (1, 1.5)),
                     zorder=0)  # fmt: skip
    axes.margins(x=0.06)
    low, high = axes.get_xlim()
    for level, (name, row) in enumerate(reversed(lines)):  # a row each: close lines cannot collide
        x = 100 * row["ndcg_cut_10"]
        side = "left" if x < (low + high) / 2 else "right"
        axes.annotate(
            f"{REFERENCES[name]} {x:.1f}", (x, 1), xycoords=axes.get_xaxis_transform(),
            xytext=(0, 2 + 8.5 * level), textcoords="offset points", ha=side, color=GREY,
            fontsize=7,
        )  # fmt: skip
    axes.set_title(TASKS[task], fontweight="bold", pad=6 + 8.5 * len(lines))
    axes.set_xlabel("nDCG@10 (× 100)")
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _effects(verdict: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(text, colour, statistics) of each row of the interference panel."""
    return [
        (f"{TASKS[task]}{kind}", colour, found)
        for tasks, kind, colour in (
            (verdict["tasks"], "", COLOURS["joint-single"]),
            (verdict["aa"], " A/A", GREY),
        )
        for task, found in tasks.items()
        if found["interference"] is not None
    ]


def _effect_panel(axes: Axes, effects: list[tuple[str, str, dict[str, Any]]]) -> None:
    for at, (_, colour, found) in enumerate(effects):
        if found["interval"]:
            axes.plot(found["interval"], [at, at], color=colour, linewidth=1.2)
        fill = colour if found["measurable"] else "white"
        axes.plot(found["interference"], at, "o", color=colour, markersize=4.2, mfc=fill)
        if (smallest := found["smallest_detectable_effect"]) is not None:
            axes.plot(smallest, at, "|", color=GREY, markersize=7, markeredgewidth=1)
    low, high = axes.get_xlim()
    low, high = min(low, -2.5), max(high, 4.0)
    axes.set_xlim(low, high)
    axes.axvspan(low, 1, color="#56B4E9", alpha=0.13, linewidth=0)
    axes.axvspan(2, high, color="#E69F00", alpha=0.16, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.6)
    # Right-aligned and left-aligned at their limits, so that they never meet between 1 and 2.
    for x, side, text in ((1, "right", "under 1 %: pivot"), (2, "left", "2 % or more: proceed")):
        axes.annotate(text, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 2),
                      textcoords="offset points", ha=side, fontsize=7, color=GREY)  # fmt: skip
    axes.set_title("Interference", fontweight="bold", pad=14)
    axes.set_xlabel("nDCG@10 that Joint-Single loses, in % of the specialist's")
    axes.set_yticks(range(len(effects)), [text for text, _, _ in effects])
    axes.set_ylim(len(effects) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    handles = [Line2D([], [], marker="|", color=GREY, linestyle="", markersize=7,
                      label="smallest effect detected with 80 % power")]  # fmt: skip
    if not all(found["measurable"] for _, _, found in effects):
        handles.append(Line2D([], [], marker="o", color=GREY, mfc="white", linestyle="",
                              markersize=4.2, label="not measurable"))  # fmt: skip
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)


def curves(arms: Arms) -> Figure | None:
    """Training loss by step: each seed light, the mean over seeds smoothed; None without a curve.

    Where the arms of the rule are there, the controls are left out: a dozen lines are not legible.
    """
    chosen = [arm for arm in arms if arm in COLOURS] or list(arms)[: len(SPARE)]
    spare = iter(SPARE)
    colours = {arm: COLOURS.get(arm) or next(spare) for arm in chosen}
    panels = {
        task: {arm: lines for arm in chosen if (lines := _lines(arms[arm], f"loss_{task}"))}
        for task in TASKS
    }
    panels = {task: found for task, found in panels.items() if found}
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH if len(panels) == 2 else WIDTH / 2, 2.3), layout="constrained")
    for axes, (task, found) in zip(_row(figure, len(panels)), panels.items(), strict=True):
        smooth = []
        for order, (arm, lines) in enumerate(found.items()):
            colour, dash = colours[arm], DASHES[order % len(DASHES)]
            smooth += _mean_and_spread(axes, lines, colour, dash, label(arm), raw=True)
        axes.set_ylim(*_limits(smooth, axes.get_ylim()))
        axes.set_title(TASKS[task], fontweight="bold")
        axes.set_xlabel("Training step")
        axes.set_ylabel("Loss (nats)")
        axes.legend(handlelength=2.6)
    return figure


def routing(arms: Arms, arm: str = "joint-moe") -> Figure | None:
    """Mean expert weight of each task by step; None where the arm was not run or has no router."""
    trials = arms.get(arm, {})
    panels = {task: lines for task in TASKS if (lines := _lines(trials, f"weights_{task}"))}
    if not panels:
        return None
    names = next(iter(trials.values()))["config"]["experts"]
    figure = Figure(figsize=(WIDTH if len(panels) == 2 else WIDTH / 2, 2.3), layout="constrained")
    for axes, (task, lines) in zip(_row(figure, len(panels)), panels.items(), strict=True):
        for i, name in enumerate(names):
            _mean_and_spread(axes, [line[:, i] for line in lines], EXPERTS[i % len(EXPERTS)],
                             DASHES[i % len(DASHES)], f"{name} expert")  # fmt: skip
        axes.axhline(1 / len(names), color=GREY, linewidth=0.6, zorder=0)
        axes.set_ylim(0, 1)
        axes.set_title(f"{TASKS[task]} texts", fontweight="bold")
        axes.set_xlabel("Training step")
        axes.set_ylabel("Mean expert weight")
        axes.legend(handlelength=2.6)
    return figure


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _lines(trials: Mapping[int, dict], key: str) -> list[np.ndarray]:
    """One array (steps, ...) for each seed whose curve has the key."""
    found = ([row[key] for row in trial["curve"] if key in row] for trial in trials.values())
    return [np.asarray(values, dtype=np.float64) for values in found if values]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the steps, over what there is of it at the ends."""
    window = np.ones(2 * (len(values) // 20) + 1)
    weight = np.convolve(np.ones(len(values)), window)
    keep = slice(len(window) // 2, len(window) // 2 + len(values))
    return (np.convolve(values, window) / weight)[keep]


def _mean_and_spread(
    axes: Axes,
    lines: list[np.ndarray],
    colour: str,
    dash: Any,
    text: str,
    raw: bool = False,
) -> Iterable[np.ndarray]:
    """Smoothed mean over seeds in a band from the lowest to the highest smoothed seed."""
    steps = min(map(len, lines))
    smooth = np.stack([_smooth(line[:steps]) for line in lines])
    at = np.arange(1, steps + 1)
    if raw:
        for line in lines:
            axes.plot(at, line[:steps], color=colour, linewidth=0.4, alpha=0.22)
    if len(lines) > 1:
        axes.fill_between(at, smooth.min(0), smooth.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(at, smooth.mean(0), color=colour, linestyle=dash, label=text)
    return list(smooth)


def _limits(smooth: list[np.ndarray], natural: tuple[float, float]) -> tuple[float, float]:
    """Limits in which a single wild step does not press the curves flat."""
    low, high = min(s.min() for s in smooth), max(s.max() for s in smooth)
    room = 0.35 * (high - low)
    return max(natural[0], low - room), min(natural[1], high + room)
