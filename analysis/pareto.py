"""Remedies beside routing: the report of `compare` with the plane of both tasks and its front."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from analysis import compare, figures
from analysis.compare import SPECIALISTS, Section, Trials, summary
from analysis.figures import METRIC, TASKS, label, table
from eval import inference

__all__ = ["summary", "write"]
ROUTING, SHARING = "joint-moe", "joint-single"
FRONT = "#3B7DD8"
TEXT = """## Both tasks at once

An arm is on the front if no other has a mean at least as high on both tasks; merges of the
specialists train nothing further. Kept: the share of a merged change's squared norm that the rank
of the merged adapter holds.

{table}![pareto](pareto.png)

*{caption}*

"""
CAPTION = (
    "nDCG@10 × 100 of both tasks: mean over seeds. Bars: the 95 % intervals, over seeds and "
    "queries, of an arm's differences to Joint-Single (the contrasts, here without Holm's "
    "correction), around the arm; the intervals of the scores themselves, which hold how hard the "
    "queries are and are several times as wide, stand in the table of scores; Joint-Single, to "
    "which they are, has none. Grey line: Joint-Single by the weight of retrieval in the loss; "
    "dashed stairs: the front of the means; dotted: the specialists."
)


def write(folder: Path) -> dict[str, Any]:
    """As `compare.write`, with the front."""
    return compare.write(folder, front)


def dominated(means: dict[str, tuple[float, float]]) -> dict[str, list[str]]:
    """arm -> the arms that are at least as good on both tasks and better on one."""
    return {
        arm: [
            other for other, theirs in means.items()
            if all(t >= m for t, m in zip(theirs, mine, strict=True)) and theirs != mine
        ]
        for arm, mine in means.items()
    }  # fmt: skip


def front(v: dict[str, Any], baselines: dict, arms: Trials) -> Section:
    both = {a: r for a, r in v["arms"].items() if r["scores"].keys() >= set(TASKS)}
    means = {
        a: (r["scores"]["embedding"][METRIC], r["scores"]["reranking"][METRIC])
        for a, r in both.items()
    }
    by = dominated(means)
    energy = {arm: [trial["merged_energy"]["shared"] for trial in trials.values()
                    if trial.get("merged_energy", {}).get("shared") is not None]
              for arm, trials in arms.items()}  # fmt: skip
    rows = [
        [
            label(arm),
            *(f"{100 * value:.2f}" for value in means[arm]),
            "yes" if not others else "no",
            ", ".join(map(label, others)) or "-",
            f"{100 * sum(energy[arm]) / len(energy[arm]):.1f} %" if energy[arm] else "-",
        ]
        for arm, others in by.items()
    ]
    head = ["arm", *TASKS.values(), "on the front", "dominated by", "kept"]
    numbers = {"front": [arm for arm, others in by.items() if not others], "dominated": by}
    return Section(
        TEXT.format(table=table(head, rows), caption=CAPTION) if rows else "",
        against_routing(v) if ROUTING in means else "",
        numbers,
        {"pareto": draw(v, means, numbers["front"])} if rows else {},
    )


def against_routing(v: dict[str, Any]) -> str:
    """Whether routing beats the remedies: the significant differences to it."""
    rows = [row for row in v["differences"] if row["against"] == ROUTING and "p_holm" in row]
    remedies = {row["arm"] for row in rows}
    if not remedies:
        return ""
    sure = [row for row in rows if row["p_holm"] <= inference.ALPHA]
    beaten = {(row["arm"], row["task"]) for row in sure if row["difference"] < 0}
    better = {(row["arm"], row["task"]) for row in sure if row["difference"] > 0}
    whole = {arm for arm in remedies if all((arm, task) in beaten for task in TASKS)}
    said = []
    for found, word in ((beaten, "is above"), (better, "is below")):
        if found:
            listed = "; ".join(
                f"on {name} {', '.join(label(arm) for arm, of in sorted(found) if of == task)}"
                for task, name in TASKS.items()
                if any(of == task for _, of in found)
            )
            said.append(f"Routing ({label(ROUTING)}) {word}: {listed}.")
    if whole == remedies:
        return " ".join(
            [*said, f"It beats every remedy that was run ({len(whole)}) on both tasks."]
        )
    told = "not every remedy" if whole else "no remedy"
    said.append(f"Routing beats {told} significantly on both tasks.")
    return " ".join(said)


def draw(v: dict[str, Any], means: dict[str, tuple[float, float]], best: list[str]) -> Figure:
    """Each arm in the plane of the tasks, retrieval to the right, reranking up."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        weights = [arm for arm in v["arms"] if arm.startswith("weight-") and arm in means]
        order = {arm: int(arm.removeprefix("weight-")) for arm in weights}
        if SHARING in means:
            order[SHARING] = 50
        line = [means[arm] for arm in sorted(order, key=lambda a: order[a])]
        if len(line) > 1:
            axes.plot(*zip(*[(100 * x, 100 * y) for x, y in line], strict=True),
                      color=figures.GREY, linewidth=0.8, zorder=0)  # fmt: skip
            axes.plot([], [], "o-", color=figures.GREY, linewidth=0.8, markersize=5,
                      label="weight of retrieval")  # fmt: skip
        shapes = iter("D^vP*Xh<>dp8" * 2)
        others = [a for a in means if a not in figures.COLOURS and a not in weights]
        spare = itertools.cycle(figures.SPARE)
        colours = dict(zip(others, spare, strict=False)) | figures.COLOURS
        gaps = compare.bars(v, SHARING)
        for arm, (x, y) in means.items():
            colour = figures.GREY if arm in weights else colours[arm]
            shape = "o" if arm in weights or arm in figures.COLOURS else next(shapes)
            name = None if arm in weights else label(arm)
            axes.plot(100 * x, 100 * y, shape, color=colour, markersize=5, label=name)
            if arm in weights:  # told by its place on the line
                axes.annotate(f"{order[arm]} %", (100 * x, 100 * y), xytext=(5, 5), fontsize=7,
                              textcoords="offset points", color=figures.GREY)  # fmt: skip
            if all((arm, task) in gaps for task in TASKS):
                (left, right), (low, high) = (gaps[arm, task] for task in TASKS)
                style: Any = {"color": colour, "linewidth": 0.7, "alpha": 0.5, "zorder": 1}
                axes.plot([100 * x + left, 100 * x + right], [100 * y] * 2, **style)
                axes.plot([100 * x] * 2, [100 * y + low, 100 * y + high], **style)
        stairs = sorted(means[arm] for arm in best)
        for (x, y), (right, down) in zip(stairs, stairs[1:], strict=False):
            axes.plot([100 * x, 100 * x, 100 * right], [100 * y, 100 * down, 100 * down],
                      color=FRONT, linewidth=0.8, linestyle=(0, (5, 1.5)), zorder=0)  # fmt: skip
        ends = {"front of the means": (FRONT, (0, (5, 1.5))), "specialists": ("black", ":")}
        for name, (colour, dash) in ends.items():
            axes.plot([], [], color=colour, linewidth=0.8, linestyle=dash, label=name)
        for arm, (task, draw_line) in zip(
            SPECIALISTS, (("embedding", axes.axvline), ("reranking", axes.axhline)), strict=True
        ):
            scores = v["arms"].get(arm, {}).get("scores", {})
            if task in scores:
                draw_line(100 * scores[task][METRIC], color="black", linewidth=0.6, linestyle=":")
        axes.set_xlabel("retrieval, nDCG@10 (× 100)")
        axes.set_ylabel("reranking, nDCG@10 (× 100)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure
