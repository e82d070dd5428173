"""The figures of a verdict as PNG and SVG, and what all figures and tables share.

The figures are sized for a two-column paper, and the same trials give the same bytes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis import roles
from analysis.bands import shade
from eval.inference import ALPHA
from eval.rule import PIVOT_BELOW, PROCEED_FROM

Arms = Mapping[str, Mapping[int, dict]]  # arm -> seed -> trial as stored

FIGURES = ("scores", "curves", "routing")
WIDTH = 6.8  # inches: both columns
TASKS = {"embedding": "retrieval", "reranking": "reranking"}  # a task -> its name in the text
METRIC = "ndcg_cut_10"  # what decides
SECONDS = "training, s (median)"  # of the seeds: a shared machine has slow minutes
METRICS = {METRIC: "nDCG@10", "map": "MAP", "recip_rank": "MRR", "recall_100": "Recall@100"}
REFERENCE_ROWS = {
    "bm25": "BM25",
    "untrained": "untrained base (reranking: mean of 20 random heads)",
    "ceiling": "ceiling of the BM25 candidates",
}
# Arms have Okabe and Ito's palette, experts and kinds of text Paul Tol's muted one, both safe for
# the colour-blind: no colour is an arm here and an expert there. Whether a difference is
# significant is no colour of either: black, or grey.
COLOURS = {
    "emb-only": "#0072B2",
    "rank-only": "#CC79A7",
    "joint-single": "#D55E00",
    "joint-moe": "#009E73",
}
SPARE = ("#E69F00", "#56B4E9", "#6A3D9A", "#7F4F24", "#8A8A00")  # for arms not named above
EXPERTS = ("#332288", "#CC6677", "#44AA99", "#882255", "#DDAA33", "#88CCEE")
DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))  # tells lines apart in grey
REFERENCES = {"bm25": "BM25", "untrained": "untrained", "ceiling": "ceiling"}
GREY = "#666666"
SIGNIFICANT, UNSURE = "#000000", "#999999"
CAPTIONS = {
    "scores": "nDCG@10 of each arm: mean over seeds (large dot) with its 95 % interval over seeds "
    "and queries, single seeds (small dots); lines: BM25, the untrained base, and the ceiling that "
    "BM25's candidates set (an interval is of a mean and knows no ceiling). Below, interference "
    "beside the limits of the rule, between which it asks for more seeds; black: significant at "
    "this look's level after Holm's correction, grey: not, though a 95 % interval may exclude 0; "
    "A/A: of two specialists that differ in their seeds alone.",
    "curves": "Training loss: single seeds (faint, cut at the axis), and their mean after "
    "smoothing over a tenth of the steps with its 95 % interval over seeds.",
    "routing": "Joint-MoE's expert weights, averaged over layers and texts of a batch and smoothed "
    "over a tenth of the steps; mean over seeds with its 95 % interval, cut at 0 and 1. Experts by "
    "the role that each seed gave them: a task's own is the one that its texts give more weight "
    "than the other task's do, over the last quarter of the steps.",
}
STYLE: dict[Any, Any] = {
    **{f"{kind}size": 8 for kind in ("font.", "axes.title", "axes.label", "legend.font")},
    **{f"{axis}tick.labelsize": 8 for axis in "xy"},
    **{f"{axis}tick.major.width": 0.6 for axis in "xy"},
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **{"axes.linewidth": 0.6, "lines.linewidth": 1.2, "legend.frameon": False},
    **{"figure.dpi": 100, "savefig.dpi": 300, "svg.hashsalt": "unimoer"},
}


def label(arm: str) -> str:
    """An arm's name as the tables and figures print it: `joint-moe` -> `Joint-MoE`."""
    if arm.endswith("-aa"):
        return f"{label(arm[:-3])} (A/A)"
    words = {"moe": "MoE", "pcgrad": "PCGrad", "entmax15": "entmax-1.5", "e2rank": "E2Rank",
             "lora": "LoRA"}  # fmt: skip
    return "-".join(
        words.get(word, word if re.fullmatch(r"r\d+", word) else word.capitalize())
        for word in arm.split("-")
    )


def mark(p_holm: float | None, alpha: float = ALPHA) -> str:
    """The colour of a difference: whether it is significant after Holm's correction."""
    return SIGNIFICANT if p_holm is not None and p_holm <= alpha else UNSURE


def draw(verdict: dict[str, Any], arms: Arms) -> dict[str, Figure]:
    """What there is to draw, by its name of `FIGURES`.

    verdict: as `judge.judge` returns it; arms: the trials, for their curves.
    """
    with matplotlib.rc_context(STYLE):
        drawn = {"scores": scores(verdict), "curves": curves(arms), "routing": routing(arms)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def scores(verdict: dict[str, Any]) -> Figure:
    """nDCG@10 of every arm with its 95 % interval and its seeds; interference with its limits."""
    rows = {
        task: [a for a, row in verdict["arms"].items() if task in (row["tasks"] or TASKS)]
        for task in TASKS
    }
    count = max(3, *map(len, rows.values()))
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
                      va="center", style="italic",
                      bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
            continue
        colour = COLOURS.get(arm, GREY)
        if found["interval"]:
            low, high = (100 * v for v in found["interval"])
            axes.plot([low, high], [at, at], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot(100 * found[METRIC], at, "o", color=colour, markersize=4.2)
        seeds = [100 * v for v in found["by_seed"]]
        axes.plot(seeds, [at + 0.28] * len(seeds), "o", color=colour, markersize=2.2, alpha=0.6,
                  markeredgewidth=0)  # fmt: skip
    lines = {name: 100 * row[task][METRIC] for name, row in verdict["references"].items()
             if task in row}  # fmt: skip
    for level, (name, x) in enumerate(sorted(lines.items(), key=lambda item: item[1])):
        axes.axvline(x, color=GREY, linewidth=0.6, zorder=0)
        # Each label to the left of its line, the next one higher: neither labels nor lines cross.
        axes.annotate(
            f"{REFERENCES[name]} {x:.1f} ", (x, 1), xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3 + 8.5 * level), textcoords="offset points", ha="right", fontsize=7,
            color=GREY, arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": GREY,
            "shrinkA": 0, "shrinkB": 0, "relpos": (1, 0.8)},
        )  # fmt: skip
    axes.margins(x=0.06)
    axes.set_title(TASKS[task].capitalize(), fontweight="bold", pad=8 + 8.5 * 3)
    axes.set_xlabel("nDCG@10 (× 100)")
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _effects(verdict: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(text, colour, statistics) of each row of the interference panel."""
    return [
        (
            f"{TASKS[task].capitalize()}{kind}",
            mark(found["p_holm"], found.get("alpha", verdict["alpha"])),
            found,
        )
        for tasks, kind in ((verdict["tasks"], ""), (verdict["aa"], " A/A"))
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
    axes.axvspan(low, PIVOT_BELOW, color="#56B4E9", alpha=0.13, linewidth=0)
    axes.axvspan(PROCEED_FROM, high, color="#E69F00", alpha=0.16, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.6)
    # Aligned to their limits from outside, and kept apart where a wide axis puts these together.
    for x, side, off, text in (
        (PIVOT_BELOW, "right", -3, f"under {PIVOT_BELOW:g} %: pivot"),
        (PROCEED_FROM, "left", 3, f"{PROCEED_FROM:g} % or more: proceed"),
    ):  # fmt: skip
        axes.annotate(text, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(off, 2),
                      textcoords="offset points", ha=side, fontsize=7, color=GREY)  # fmt: skip
    axes.set_title("Interference", fontweight="bold", pad=14, loc="left")
    axes.set_xlabel("nDCG@10 that Joint-Single (A/A: the twin) loses, in % of the specialist's")
    axes.set_yticks(range(len(effects)), [text for text, _, _ in effects])
    axes.set_ylim(len(effects) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    keys = {}
    if any(found["smallest_detectable_effect"] is not None for _, _, found in effects):
        keys["smallest effect detected with 80 % power"] = {"marker": "|", "markersize": 7}
    if not all(found["measurable"] for _, _, found in effects):
        keys["not measurable"] = {"marker": "o", "mfc": "white", "markersize": 4.2}
    handles = [Line2D([], [], color=GREY, linestyle="", label=k, **v) for k, v in keys.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.03, 1), ncols=2,
                handletextpad=0, borderpad=0, borderaxespad=1.7)  # fmt: skip


def curves(arms: Arms) -> Figure | None:
    """Training loss by step: each seed light, the mean over seeds smoothed; None without a curve.

    Where the arms of the rule are there, the others are left out: a dozen lines are not legible.
    """
    chosen = [arm for arm in arms if arm in COLOURS] or list(arms)[: len(SPARE)]
    colours = {**dict(zip(chosen, SPARE, strict=False)), **COLOURS}
    lines = {t: {a: x for a in chosen if (x := _lines(arms[a], f"loss_{t}"))} for t in TASKS}
    figure, panels = _panels([task for task in TASKS if lines[task]], "Loss (nats)")
    for task, axes in panels.items():
        smooth = np.concatenate([
            _mean_and_spread(axes, found, colours[arm], DASHES[i % len(DASHES)], label(arm), True)
            for i, (arm, found) in enumerate(lines[task].items())
        ])  # fmt: skip
        # By the smoothed lines: one wild step must not press the curves flat.
        room = 0.35 * (smooth.max() - smooth.min()) + 1e-9
        axes.set_ylim(max(0, smooth.min() - room), smooth.max() + room)
    if figure is not None:
        named = {text: handle for axes in panels.values() for handle, text in
                 zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, handlelength=2.6)
    return figure


def routing(arms: Arms, arm: str = "joint-moe") -> Figure | None:
    """Mean expert weight of each task by step; None where the arm was not run or has no router."""
    trials = arms.get(arm, {})
    orders = [roles.columns(trial)[1] for trial in trials.values()]
    lines = {
        task: [line[:, at] for line, at in zip(of, orders, strict=True)]
        for task in TASKS
        for of in [_lines(trials, f"weights_{task}")]
        if len(of) == len(orders)
    }
    figure, panels = _panels([task for task in TASKS if lines.get(task)], "Mean expert weight")
    for task, axes in panels.items():
        names = roles.columns(next(iter(trials.values())))[0]
        for i, name in enumerate(names):
            of = [line[:, i] for line in lines[task]]
            colour, dash = EXPERTS[i % len(EXPERTS)], DASHES[i % len(DASHES)]
            _mean_and_spread(axes, of, colour, dash, name)
        axes.axhline(1 / len(names), color=GREY, linewidth=0.6, zorder=0)
        axes.set_ylim(0, 1)
        axes.legend(handlelength=2.6)
    return figure


def _panels(tasks: list[str], what: str) -> tuple[Figure | None, dict[str, Axes]]:
    """A figure over training steps with one panel a task; None without tasks."""
    if not tasks:
        return None, {}
    figure = Figure(figsize=(WIDTH * len(tasks) / 2, 2.3), layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True))
    for task, axes in panels.items():
        axes.set(xlabel="Training step", ylabel=what)
        axes.set_title(TASKS[task].capitalize(), fontweight="bold")
    return figure, panels


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
    axes: Axes, lines: list[np.ndarray], colour: str, dash: Any, text: str, raw: bool = False
) -> np.ndarray:
    """Draw the smoothed mean and its interval over seeds; return what was smoothed."""
    steps = min(map(len, lines))
    smooth = np.stack([_smooth(line[:steps]) for line in lines])  # (seeds, steps)
    at = np.arange(1, steps + 1)
    for line in lines if raw else ():
        axes.plot(at, line[:steps], color=colour, linewidth=0.4, alpha=0.22)
    shade(axes, at, smooth.T, colour)
    axes.plot(at, smooth.mean(0), color=colour, linestyle=dash, label=text)
    return smooth.ravel()


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """A tick at each layer, or at some of them where there are many."""
    if len(layers) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        axes.set_xticks(layers)


def picture(name: str, drawn: Sequence[str]) -> str:
    """The figure in Markdown with its caption and an empty line, or nothing if not drawn."""
    caption = CAPTIONS[name]
    return f"![{name}]({name}.png)\n\n*{caption}*\n\n" if name in drawn else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column and those of words to the left, numbers to the right."""
    rows = list(rows)
    words = [sum(row[i][:1].isalpha() for row in rows) for i in range(len(header))]
    rule = ["---", *("---" if 2 * n > len(rows) else "---:" for n in words[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows)) + "\n"


def percent(value: float | None, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:+.2f} %"


def plain(value: Any) -> str:
    """A stored value as text: `name stdlib, python 3.11.7`."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(plain(item) for item in value)
    return "unknown" if value is None else str(value)


def span(interval: list[float] | None, scale: float = 1, unit: str = "", digits: int = 2) -> str:
    """`[0.52, 5.68] %`, or that there is no interval."""
    if interval is None:
        return "(no interval)"
    low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"[{low}, {high}]{unit}"


def p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def score(found: dict[str, Any]) -> str:
    spread = "" if found["seed_sd"] is None else f" ± {100 * found['seed_sd']:.2f}"
    return f"{100 * found[METRIC]:.2f}{spread} {span(found['interval'], 100)}"
