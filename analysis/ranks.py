"""Quality against rank: the report of `compare` with the smallest rank that is enough."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from analysis import compare, figures, judge
from analysis.compare import Section, Trials, summary
from analysis.figures import METRIC, TASKS, label, span, table
from eval import inference, stats

__all__ = ["summary", "write"]
ENOUGH = 0.01  # of the best mean
LADDERS = ("all", "embedding", "reranking", "shared")  # which expert's rank varies; the others: 16
TEXT = """## How much rank is enough

The smallest rank whose mean is within 1 % of the best of its ladder, on which the rank of all
experts or of one varies (the others stay at 16). Loss: with its 95 % interval, corrected neither
for the ladders nor for having been chosen as small. Shown: whether a loss of 1 % or more is
excluded for it, one-sided, with Holm's correction over all ranks below the best of each ladder and
task; otherwise the means alone say so. All ranks have the
learning rate and steps that were settled at 16. Bytes: all that is trained, in fp32.

{table}![ranks](ranks.png)

*{caption}*

"""
CAPTION = (
    "nDCG@10 against the bytes that are trained: mean over seeds; bars: the 95 % intervals, over "
    "seeds and queries, of the differences to rank 16 for all (the contrasts, here without Holm's "
    "correction), around each arm; the wider ones of the scores stand in the table of scores. "
    "Labels: the rank of all experts."
)


def write(folder: Path) -> dict[str, Any]:
    """As `compare.write`, with the ladders."""
    return compare.write(folder, ladders)


def rank_of(arm: str, ladder: str) -> int | None:
    """The rank at which an arm stands on a ladder; `all-r16` stands on each."""
    if arm == "all-r16":
        return 16
    name, _, rank = arm.rpartition("-r")
    return int(rank) if name == ladder else None


def ladders(v: dict[str, Any], baselines: dict, arms: Trials) -> Section:
    y, labels = judge.arrays(baselines, arms)
    found: list[dict[str, Any]] = []
    for ladder in LADDERS:
        steps = {arm: rank for arm in arms if (rank := rank_of(arm, ladder)) is not None}
        if len(steps) < 2:
            continue
        for task in TASKS:
            row = enough({a: y[task][a] for a in steps}, steps, labels[task])
            bytes_ = 4 * v["arms"][row["arm"]]["trainable_parameters"]
            ran = sorted(steps.values())
            found.append({"ladder": ladder, "task": task, "bytes": bytes_, "ran": ran, **row})
    settle(found)
    rows = [
        [
            row["ladder"], TASKS[row["task"]], ", ".join(map(str, row["ran"])),
            f"r{row['best_rank']}", f"r{row['rank']}",
            "the best itself"
            if row["arm"] == row["best"]
            else f"{row['loss']:+.2f} % {span(row['interval'])}",
            {True: "yes", False: "no", None: "-"}[row["shown"]], f"{row['bytes'] / 1e6:.2f} MB",
        ]
        for row in found
    ]  # fmt: skip
    if not rows:
        return Section("", "", {})
    head = [
        "rank of",
        "task",
        "ranks that were run",
        "best",
        "smallest within 1 %",
        "loss to the best",
        "shown",
        "bytes",
    ]
    picture = {"ranks": draw(v, arms)}
    return Section(
        TEXT.format(table=table(head, rows), caption=CAPTION), told(found), {"ladders": found},
        picture,
    )  # fmt: skip


def enough(y: dict[str, np.ndarray], steps: dict[str, int], labels: list[str]) -> dict[str, Any]:
    """The smallest rank within 1 % of the best, y: arm -> (seeds, queries), steps: arm -> rank.

    loss: of that arm to the best, in % of the best's mean, with its interval; excluded: rank -> p
    of a loss of 1 % or more, one-sided, of all ranks below the best's that have an interval.
    """
    means = {arm: float(scores.mean()) for arm, scores in y.items()}
    best = max(means, key=lambda arm: (means[arm], -steps[arm]))
    near = [arm for arm in steps if means[arm] >= (1 - ENOUGH) * means[best]]
    arm = min(near, key=lambda a: steps[a])
    lost = 100 * (1 - means[arm] / means[best]) if means[best] else 0.0
    found = {"arm": arm, "rank": steps[arm], "best": best, "best_rank": steps[best],
             "loss": lost, "interval": None, "excluded": {}}  # fmt: skip
    if len(set(labels)) < 2:  # one cluster gives no interval
        return found
    for other in (a for a in steps if steps[a] < steps[best]):
        loss = stats.interference(y, labels, best, other)
        if loss.interval and loss.se:
            below = (loss.value - 100 * ENOUGH) / loss.se
            found["excluded"][steps[other]] = float(student.cdf(below, loss.df))
            found["interval"] = loss.interval if other == arm else found["interval"]
    return found


def settle(found: list[dict[str, Any]]) -> None:
    """Give each row `shown`: whether Holm's correction over all ladders and tasks leaves a loss of
    1 % or more excluded for its rank; None where that is the best itself."""
    every = [(row, rank) for row in found for rank in row["excluded"]]
    adjusted = inference.holm([row["excluded"][rank] for row, rank in every])
    sure = {(id(row), rank) for (row, rank), p in zip(every, adjusted, strict=True)
            if p <= inference.ALPHA}  # fmt: skip
    for row in found:
        chosen = row["rank"] != row["best_rank"]
        row["shown"] = (id(row), row["rank"]) in sure if chosen else None


def told(found: list[dict[str, Any]]) -> str:
    said = []
    for row in found:
        if row["ladder"] == "all":
            on = f"On {TASKS[row['task']]}, r{row['rank']} for all experts is"
            if row["shown"] is None:
                said.append(
                    f"{on} the best, and no smaller rank is within 1 % of it, by the means."
                )
                continue
            sure = "" if row["shown"] else ", by the means alone"
            said.append(f"{on} within 1 % of the best (r{row['best_rank']}){sure}.")
    return " ".join(said)


def draw(v: dict[str, Any], arms: Trials) -> Figure:
    """A panel a task, a line a ladder."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, task in zip(panels, TASKS, strict=True):
            for at, ladder in enumerate(LADDERS):
                _line(axes, v, arms, task, ladder, at)
            axes.set_title(TASKS[task].capitalize(), fontweight="bold")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.set_xlabel("trained (MB, fp32)")
        panels[0].set_ylabel("nDCG@10 (× 100)")
        panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), title="rank of")
        return figure


def _line(axes: Axes, v: dict[str, Any], arms: Trials, task: str, ladder: str, at: int) -> None:
    steps = {arm: rank for arm in arms if (rank := rank_of(arm, ladder)) is not None}
    if len(steps) < 2:  # its arms were not run
        return
    order = sorted(steps, key=lambda arm: steps[arm])
    # The ladders of single experts have as many parameters at each rank: moved apart a little.
    x = [4e-6 * v["arms"][arm]["trainable_parameters"] * 1.03**at for arm in order]
    y = [100 * v["arms"][arm]["scores"][task][METRIC] for arm in order]
    gaps = compare.bars(v, v["reference"])
    axes.plot(x, y, color=figures.EXPERTS[at], linestyle=figures.DASHES[at], marker="o",
              markersize=3, label=ladder)  # fmt: skip
    for arm, at_x, at_y in zip(order, x, y, strict=True):
        if gap := gaps.get((arm, task)):
            axes.plot([at_x] * 2, [at_y + end for end in gap], linewidth=0.8,
                      color=figures.EXPERTS[at], alpha=0.6)  # fmt: skip
        if ladder == "all":
            axes.annotate(label(arm).rpartition("-")[2], (at_x, at_y), xytext=(4, -9),
                          textcoords="offset points", fontsize=7, color=figures.GREY)  # fmt: skip
