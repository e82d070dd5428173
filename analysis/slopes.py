"""The slope of interference over the size of the model, by which axis the size is read.

A slope is the least-squares line through the interference of the measurable sizes over log2 of
their size; its interval follows, as every other, from the gradient of the slope with respect to the
arms' means (`eval.stats`). Where bases of several families were run, the line is through the family
with the most sizes: another family changes more than the size.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from analysis.figures import TASKS
from analysis.page import with_holm
from eval import rule, stats

# axis -> what the size is called, the key that holds it, and what is the same along the line
AXES = {
    "parameters": ("parameters outside the embeddings", "parameters", "rank"),
    "share": ("parameters, rank in proportion to width", "parameters", "share"),
    "rank": ("rank of the experts", "rank", "parameters"),
}
Rows = list[dict[str, Any]]  # as `scale` makes them: a size and a task each
Scores = dict[str, dict[str, np.ndarray]]  # task -> "<arm> <size>" -> (seeds, queries)


def along(rows: Rows, axis: str, task: str) -> Rows:
    """The rows of a task that differ along an axis alone, of all families; [] if fewer than two.

    What has to be the same along it takes its most common value; of equal sizes the first counts.
    """
    _, key, same = AXES[axis]
    full = [row for row in rows if row.get("interval") and row.get(same) is not None]
    if axis == "share" and len({row["width"] for row in full}) < 2:
        return []
    counts = Counter(row[same] for row in full)
    if not counts:
        return []
    mine = [row for row in full if row["task"] == task and row[same] == max(
        counts, key=lambda value: counts[value])]  # fmt: skip
    sizes = {(row["family"], row[key]): row for row in reversed(mine)}
    found = sorted(sizes.values(), key=lambda row: row[key])
    return found if len({row[key] for row in found}) > 1 else []


def main_family(rows: Rows) -> str:
    counts = Counter(row["family"] for row in rows)
    return max(counts, key=lambda family: counts[family]) if counts else ""


def fits(
    rows: Rows, scores: Scores, labels: dict[str, list[str]], bases: Scores
) -> list[dict[str, Any]]:
    """A line for each axis and task where two sizes or more are measurable; Holm over all of them.

    bases: task -> size -> (Q,) scores of the untrained base. Under `other` stand the slopes of the
    gain-normalised loss and of that in points: I divides by a specialist that changes with size.
    """
    found: list[dict[str, Any]] = []
    for axis, (_, key, _) in AXES.items():
        for task in TASKS:
            line = [row for row in along(rows, axis, task) if row["measurable"]]
            line = [row for row in line if row["family"] == main_family(line)]
            if len(line) < 2:
                continue
            e = slope(line, key, scores[task], labels[task])
            at = [math.log2(row[key]) for row in line]
            middle = float(np.mean([row["interference"] for row in line]))
            found.append({
                "axis": axis, "task": task, "sizes": [row["size"] for row in line],
                "family": line[0]["family"],
                "slope": e.value, "interval": e.interval, "p": e.p, "se": e.se, "df": e.df,
                "middle": [float(np.mean(at)), middle], "range": [min(at), max(at)],
                "without": _without(line, key, scores[task], labels[task]),
                "other": {
                    form: {"slope": of.value, "interval": of.interval, "p": of.p}
                    for form in ("gain", "points")
                    for of in [slope(line, key, scores[task], labels[task], form, bases[task])]
                },
            })  # fmt: skip
    return with_holm(found)


def _without(
    line: Rows, key: str, y: dict[str, np.ndarray], labels: list[str]
) -> list[dict[str, Any]]:
    """The slope with each size left out in turn, where two others are left; first what takes most
    of the whole slope away."""
    found, whole = [], slope(line, key, y, labels).value
    for out in line if len(line) > 2 else []:
        e = slope([row for row in line if row is not out], key, y, labels)
        found.append({"size": out["size"], "slope": e.value, "interval": e.interval})
    return sorted(found, key=lambda row: math.copysign(1, whole) * row["slope"])


def loss(form: str, p: float, j: float, b: float) -> tuple[float, float, float, float]:
    """What the joint arm's mean j lacks of the specialist's p, and its derivatives by p, j and b.

    form: `relative`, I = 100 (p - j) / p; `gain`, 100 (p - j) / (p - b), of what training gained
    over the untrained base's b; `points`, 100 (p - j).
    """
    if form == "points":
        return 100 * (p - j), 100.0, -100.0, 0.0
    if form == "gain":
        share = (p - j) / (p - b)
        scale = 100 / (p - b)
        return 100 * share, scale * (1 - share), -scale, scale * share
    return 100 * (p - j) / p, 100 * j / p**2, -100 / p, 0.0


def slope(
    rows: Rows, key: str, y: dict[str, np.ndarray], labels: list[str],
    form: str = "relative", bases: dict[str, np.ndarray] | None = None,
) -> stats.Estimate:  # fmt: skip
    """Least-squares slope of a `loss` L over x = log2(size): sum_k c_k L_k, with
    c_k = (x_k - mean x) / sum (x - mean x)^2; arms of all sizes answer the same queries.

    Args:
        rows: with `size`, `task` and the key of the size.
        y: "<arm> <size>" -> (S, Q). bases: size -> (Q,), the untrained base's, for `gain`.
    """
    x = np.array([math.log2(row[key]) for row in rows])
    c = (x - x.mean()) / float(((x - x.mean()) ** 2).sum())
    gradient: dict[str, float] = {}
    value, fixed = 0.0, np.zeros(len(labels))
    for weight, row in zip(c.tolist(), rows, strict=True):
        special = f"{rule.SPECIALIST[row['task']]} {row['size']}"
        joint = f"{rule.JOINT} {row['size']}"
        base = np.zeros(len(labels)) if bases is None else bases[row["size"]]
        made, by_p, by_j, by_b = loss(
            form, *(float(of.mean()) for of in (y[special], y[joint], base))
        )
        value += weight * made
        gradient |= {special: weight * by_p, joint: weight * by_j}
        if by_b:
            fixed = fixed + weight * by_b * base
    return stats.estimate(value, gradient, y, labels, fixed)
