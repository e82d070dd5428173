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

from analysis import judge
from analysis.figures import TASKS
from analysis.page import with_holm
from eval import stats

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


def fits(rows: Rows, scores: Scores, labels: dict[str, list[str]]) -> list[dict[str, Any]]:
    """A line for each axis and task where two sizes or more are measurable, Holm by axis."""
    found = []
    for axis, (_, key, _) in AXES.items():
        family: list[dict[str, Any]] = []
        for task in TASKS:
            line = [row for row in along(rows, axis, task) if row["measurable"]]
            line = [row for row in line if row["family"] == main_family(line)]
            if len(line) < 2:
                continue
            e = slope(line, key, scores[task], labels[task])
            at = [math.log2(row[key]) for row in line]
            middle = float(np.mean([row["interference"] for row in line]))
            family.append({
                "axis": axis, "task": task, "sizes": [row["size"] for row in line],
                "family": line[0]["family"],
                "slope": e.value, "interval": e.interval, "p": e.p, "se": e.se, "df": e.df,
                "middle": [float(np.mean(at)), middle], "range": [min(at), max(at)],
                "without": _without(line, key, scores[task], labels[task]),
            })  # fmt: skip
        found += with_holm(family)
    return found


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


def slope(rows: Rows, key: str, y: dict[str, np.ndarray], labels: list[str]) -> stats.Estimate:
    """Least-squares slope of I over x = log2(size): sum_k c_k I_k.

    c_k = (x_k - mean x) / sum (x - mean x)^2. With I_k = 100 (1 - J_k / P_k) its gradient is
    100 c_k J_k / P_k^2 for the specialist and -100 c_k / P_k for the joint arm; arms of all sizes
    answer the same queries.

    Args:
        rows: with `size`, `interference`, `task` and the key of the size.
        y: "<arm> <size>" -> (S, Q).
    """
    x = np.array([math.log2(row[key]) for row in rows])
    c = (x - x.mean()) / float(((x - x.mean()) ** 2).sum())
    gradient: dict[str, float] = {}
    for weight, row in zip(c.tolist(), rows, strict=True):
        special = f"{stats.SPECIALIST[row['task']]} {row['size']}"
        joint = f"{judge.JOINT} {row['size']}"
        p, j = float(y[special].mean()), float(y[joint].mean())
        gradient[special] = 100 * weight * j / p**2
        gradient[joint] = -100 * weight / p
    value = float(sum(w * row["interference"] for w, row in zip(c.tolist(), rows, strict=True)))
    return stats.estimate(value, gradient, y, labels)
