"""What a verdict hangs on: its interference tested in other ways, by other metrics, query by query;
how often the same arm, run twice, would satisfy the rule. None of it decides.

The verdict takes arms as independent, the wider of two readings: a specialist and the joint arm of
one seed begin alike and see the same batches, and where that shows in their scores the paired test
(`eval.stats.paired`) is the sharper one.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from analysis.figures import METRIC, METRICS, TASKS, label, p_value, percent, span, table
from eval import inference, rule, stats

Scores = Mapping[str, stats.Arms]  # metric -> arm -> (S, Q)
FEWEST = 4  # runs of one specialist that can be split into two of two
MOST = 252  # splits that are looked at: all of ten runs
TEXT = """\
The verdict rests on the row in bold; the rest was not declared beforehand, is not corrected for
being several, and decides nothing. Paired by seed: a specialist and Joint-Single of one seed begin
alike and see the same batches, so that what a seed does to both drops out; correlation: of their
means, over seeds. The other metrics have the verdict's own test.

{ways}{queries}
{beside}{null}"""
BESIDE = """Each arm less BM25, in points of nDCG@10 with the 95 % interval and p:

{table}"""
NULL = """How often the same arm, run twice, would have shown I ≥ 2 % on a task (the rule asks for
it on either): the runs of each specialist, with its A/A twin's where there is one, in the splits
into two halves ({most} of them, drawn, where there are more), either half as the specialist. The
halves are smaller than the verdict's groups where runs are few, so noise is larger here; the
splits overlap, so these shares are a description and have no interval.

{table}"""


def sensitivity(
    y: Scores,
    labels: Sequence[str],
    pair: tuple[str, str],
    twin: str,
    references: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """One task's part of `verdict["sensitivity"]`.

    Args:
        y: with METRIC; `pair`, the specialist and the joint arm, at the same seeds; `twin`, the
            specialist's A/A, may be absent.
        references: bm25, and for reranking the ceiling of its candidates: nDCG@10 (Q,).
    """
    main, (specialist, joint) = y[METRIC], pair
    p, j = (main[arm].mean(axis=1) for arm in pair)
    ways = {"paired": _row(stats.interference(main, labels, *pair, by_seed=True))}
    ways |= {m: _row(stats.interference(y[m], labels, *pair)) for m in y if m != METRIC}
    # To nine digits: seeds that score a query alike may sum to another last bit.
    gap = np.round(main[joint].mean(axis=0) - main[specialist].mean(axis=0), 9)  # (Q,)
    steady = len(p) > 1 and min(p.std(), j.std()) > 0
    ceiling = references.get("ceiling")
    runs = np.concatenate([main[arm] for arm in (specialist, twin) if arm in main])
    return {
        "ways": ways,
        "correlation": float(np.corrcoef(p, j)[0, 1]) if steady else None,
        "lost": int((gap < 0).sum()),
        "gained": int((gap > 0).sum()),
        "same": int((gap == 0).sum()),
        "reachable": None if ceiling is None else int((ceiling > 0).sum()),
        "above_bm25": {
            arm: _row(stats.above_reference(main, labels, arm, references["bm25"])) for arm in main
        },
        "null": null(runs, labels),
    }


def _row(e: stats.Estimate) -> dict[str, Any]:
    return {"value": e.value, "interval": e.interval, "p": e.p if e.interval else None}


def null(runs: np.ndarray, labels: Sequence[str]) -> dict[str, Any] | None:
    """What the rule and its test say of runs (N, Q) of one arm, in the splits into two groups of
    N // 2 and the rest, each way round; None of fewer than FEWEST."""
    n = len(runs)
    if n < FEWEST:
        return None
    # Of an even number each split comes twice, with either half as the first.
    splits = [first for first in combinations(range(n), n // 2) if n % 2 or 0 in first]
    if len(splits) > MOST:
        splits = random.Random(0).sample(splits, MOST)
    found = []
    for first in splits:
        rest = [at for at in range(n) if at not in first]
        groups = {"a": runs[list(first)], "b": runs[rest]}
        found += [stats.interference(groups, labels, *pair) for pair in (("a", "b"), ("b", "a"))]
    values = np.array([e.value for e in found])
    return {
        "runs": n,
        "groups": [n // 2, n - n // 2],
        "splits": len(splits),
        "proceed": float(np.mean(values >= rule.PROCEED_FROM)),
        "told": float(np.mean([e.p <= inference.ALPHA for e in found])),
        "largest": float(np.abs(values).max()),
    }


def markdown(verdict: Mapping[str, Any]) -> str:
    """The section of the report; of a task without an interval nothing is told."""
    found = {task: row for task, row in verdict["sensitivity"].items() if row}
    if not found:
        return "Not known: it takes two seeds of the needed arms, and two clusters.\n\n"
    ways, names = [], {"paired": "I, paired by seed"}
    names |= {m: f"I on {METRICS[m]}" for m in METRICS if m != METRIC}
    head = ["", *(f"{TASKS[t]}{what}" for t in found for what in ("", ", p"))]
    main = [verdict["tasks"][task] for task in found]
    cells = [
        (f"**{percent(t['interference'])} {span(t['interval'])}**", p_value(t["p"])) for t in main
    ]
    ways.append(["**I, as the verdict has it**", *(c for pair in cells for c in pair)])
    for way, name in names.items():
        cells = [_cells(row["ways"].get(way), " %") for row in found.values()]
        if any(c != ["-", "-"] for c in cells):
            ways.append([name, *(c for pair in cells for c in pair)])
    known = [row["correlation"] for row in found.values()]
    shown = (["-" if r is None else f"{round(r, 2) + 0.0:+.2f}", "-"] for r in known)
    ways.append(["correlation by seed", *(c for pair in shown for c in pair)])
    beside = [
        [label(arm), *(c for row in found.values() for c in _cells(row["above_bm25"].get(arm)))]
        for arm in verdict["arms"]
        if any(arm in row["above_bm25"] for row in found.values())
    ]
    splits = [
        [TASKS[task], str(of["runs"]), " and ".join(map(str, of["groups"])), str(of["splits"]),
         f"{100 * of['proceed']:.0f} %", f"{100 * of['told']:.0f} %", f"{of['largest']:.2f} %"]
        for task, row in found.items() if (of := row["null"])
    ]  # fmt: skip
    columns = ["", "runs", "groups", "splits", "I ≥ 2 %", "p ≤ 0.05", "largest \\|I\\|"]
    return TEXT.format(
        ways=table(head, ways),
        queries=" ".join(_queries(task, row) for task, row in found.items()) + "\n",
        beside=BESIDE.format(table=table(head, beside)),
        null=NULL.format(most=MOST, table=table(columns, splits)) if splits else "",
    )


def _cells(row: Mapping[str, Any] | None, unit: str = "") -> list[str]:
    if row is None:
        return ["-", "-"]
    return [f"{row['value']:+.2f}{unit} {span(row['interval'])}", p_value(row["p"])]


def _queries(task: str, row: Mapping[str, Any]) -> str:
    """How the queries part, in a sentence or two."""
    every = row["lost"] + row["gained"] + row["same"]
    said = (
        f"Of {every:,} queries of {TASKS[task]} {row['lost']:,} score lower with Joint-Single, "
        f"{row['gained']:,} higher and {row['same']:,} the same, in the mean over seeds."
    )
    if row["reachable"] is not None:
        said += (
            f" {row['reachable']:,} of them have a relevant document among their candidates; the "
            "others score 0 in every arm."
        )
    return said
