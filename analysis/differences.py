"""Differences between arms that are tested: a row each, and their table."""

from typing import Any

from analysis import judge
from analysis.disk import Trials
from analysis.figures import TASKS, label, p_value, span, table
from analysis.page import with_holm
from eval import stats

PAIRED = (
    "Paired: by seed, where both see the same batches and begin alike, or the one where the other "
    "ended; the other arms count as independent of each other.\n\n"
)


def difference(
    arm: str, other: str, task: str, shows: str, y: stats.Arms, labels: list[str], arms: Trials,
    paired: tuple[tuple[str, str], ...] = (),
) -> dict[str, Any] | None:  # fmt: skip
    """One row of a table of differences, without its Holm p; None without a seed of both.

    paired: the pairs of arms that are compared seed by seed.
    """
    both = judge.at_common_seeds(y, arms, arm, other)
    if not len(both[arm]):
        return None
    pairs = (arm, other) in paired and len(both[arm]) > 1
    e = stats.Estimate(100 * float(both[arm].mean() - both[other].mean()))
    if len(set(labels)) > 1:  # one cluster gives no interval
        e = stats.arm_difference(both, labels, arm, other, by_seed=pairs)
    return {
        "arm": arm, "against": other, "task": task, "shows": shows, "paired": pairs,
        "difference": e.value, "interval": e.interval,
        "p": e.p if e.interval else None, "se": e.se if e.interval else None, "df": e.df,
        "by_seed": (100 * (both[arm] - both[other]).mean(axis=1)).tolist(),
    }  # fmt: skip


def tested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, as one family of Holm's correction."""
    with_holm(rows)
    for row in rows:
        row.pop("df")
    return rows


def markdown(differences: list[dict[str, Any]]) -> str:
    """A table of rows as `difference` makes them."""
    contrasts = any(row["shows"] for row in differences)
    rows = [
        [
            *([row["shows"]] if contrasts else []),
            f"{label(row['arm'])} − {label(row['against'])}" if contrasts else label(row["arm"]),
            TASKS[row["task"]],
            f"{row['difference']:+.2f} {span(row['interval'])}" + ", paired" * row["paired"],
            p_value(row["p"]),
            p_value(row.get("p_holm")),
            f"{row['detectable']:.2f}" if row.get("detectable") is not None else "-",
        ]
        for row in differences
    ]
    first = ["what it shows", "arms"] if contrasts else ["arm"]
    made = table([*first, "task", "difference, points", "p", "Holm p", "detectable"], rows)
    return made + PAIRED * any(row["paired"] for row in differences)
