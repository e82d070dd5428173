"""Pointwise against listwise: the report of `compare` with what each mode costs, how much the order
of the documents matters, and which of them gains more from routing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import compare, disk, judge
from analysis.compare import Section, Trials, summary
from analysis.figures import label, p_value, span, table
from analysis.page import with_holm
from eval import inference, stats
from eval.order import sensitivity, speed
from eval.protocol import EvaluationSet
from experiments import MODES
from model.unimoer import UniMoER
from train.batches import TrainingData
from trials import Config

__all__ = ["measure", "summary", "write"]
ORDERS, QUERIES = 4, 50  # a list is read once for each order, without prefix states
POINTWISE = "pointwise"
MODE_NAMES = {mode: "by pseudo-query" if mode == "e2rank" else mode for mode in MODES}
TEXT = """## Order and speed

{what}{table}## Which mode gains more from routing?

{gain}

"""
WHAT = """\
{queries} queries, their BM25 candidates in {orders} random orders: nDCG@10 × 100 as the mean over
orders and seeds, its standard deviation over the orders of a seed (mean over seeds), and Kendall's
tau between the rankings that two orders lead to. A model that scores pairs never sees an order.
Speed: pairs per second of `rank`, one query after the other, with tokenization and without prefix
states, on this machine and whatever else ran on it: mean over seeds (lowest to highest); and where
reranking compares a pseudo-query with the documents' vectors, with these at hand from retrieval.

"""


def measure(
    model: UniMoER,
    evaluation: EvaluationSet,
    data: Callable[[], TrainingData],
    config: Config,
    place: Path,
) -> dict[str, Any]:
    """Sensitivity to order and speed of a trained model, on QUERIES queries at most.

    Speed is that of the saved model as it is loaded by default, by kernels where there are some.
    """
    part = evaluation.sample(min(config.measured, QUERIES))
    served = UniMoER.from_pretrained(place.with_name(f"{place.name}.model"), model.device)
    return {"order": sensitivity(model, part, ORDERS), "speed": speed(served, part)}


def write(folder: Path) -> dict[str, Any]:
    """As `compare.write`, with order, speed and what routing adds in each mode."""
    folder = folder.resolve()

    def add(v: dict[str, Any], baselines: dict, arms: Trials) -> Section:
        measured = disk.measured(folder, arms, "order")
        disk.add_measures(v, measured, "order")
        found = {arm: summarise(list(rows.values())) for arm, rows in measured.items()}
        gain = routing_gain(*judge.arrays(baselines, arms), arms)
        return section(found, gain, [arm for arm in arms if arm not in found])

    return compare.write(folder, add)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm, over its seeds."""
    taus = [row["order"]["tau"] for row in rows if row["order"]["tau"] is not None]
    rates = [rate for row in rows if (rate := row["speed"]["pairs_per_second"])]
    stored = [row["speed"].get("stored_pairs_per_second") for row in rows]
    return {
        "seeds": len(rows),
        "queries": rows[0]["order"]["queries"],
        "orders": rows[0]["order"]["orders"],
        "mean": float(np.mean([row["order"]["mean"] for row in rows])),
        "spread": float(np.mean([row["order"]["spread"] for row in rows])),
        "tau": float(np.mean(taus)) if taus else None,
        "pairs_per_second": float(np.mean(rates)) if rates else None,
        "stored": float(np.mean(stored)) if all(stored) else None,
        "slowest": min(rates, default=None),
        "fastest": max(rates, default=None),
    }


def routing_gain(
    y: dict[str, dict[str, np.ndarray]], labels: dict[str, list[str]], arms: Trials
) -> dict[str, Any] | None:
    """What MoE adds to a single LoRA on reranking, in points, and by how much more than pointwise.

    Of the seeds that both arms of a mode have. None where pointwise or all others have none, or
    all queries are of one cluster.

    Returns:
        by_mode: mode -> points; against: mode -> difference to pointwise with interval, p and
        p_holm over these differences.
    """
    gains = {}
    for mode in MODES:
        pair = [f"{mode}-{kind}" for kind in ("moe", "single")]
        if not all(arm in y["reranking"] for arm in pair):
            continue
        both = [seed for seed in arms[pair[0]] if seed in arms[pair[1]]]
        at = [[list(arms[arm]).index(seed) for seed in both] for arm in pair]
        gain = y["reranking"][pair[0]][at[0]] - y["reranking"][pair[1]][at[1]]
        if len(gain):
            gains[mode] = gain
    others = [mode for mode in gains if mode != POINTWISE]
    if POINTWISE not in gains or not others or len(set(labels["reranking"])) < 2:
        return None
    found = {m: stats.arm_difference(gains, labels["reranking"], m, POINTWISE) for m in others}
    against: dict[str, dict[str, Any]] = {
        mode: {"difference": e.value, "interval": e.interval, "p": None, "p_holm": None,
               "detectable": None, **({"p": e.p, "se": e.se, "df": e.df} if e.interval else {})}
        for mode, e in found.items()
    }  # fmt: skip
    with_holm(against.values())
    by_mode = {mode: 100 * float(gain.mean()) for mode, gain in gains.items()}
    return {"by_mode": by_mode, "against": against}


def section(
    found: dict[str, dict[str, Any]], gain: dict[str, Any] | None, unmeasured: Sequence[str] = ()
) -> Section:
    """unmeasured: the arms with trials whose order and speed were not measured."""
    rows = [
        [
            label(arm),
            f"{100 * row['mean']:.2f}",
            f"{100 * row['spread']:.2f}",
            "-" if row["tau"] is None else f"{row['tau']:.3f}",
            f"{row['pairs_per_second']:,.1f} ({row['slowest']:,.1f} to {row['fastest']:,.1f})"
            if row["pairs_per_second"]
            else "-",
            f"{row['stored']:,.1f}" if row["stored"] else "-",
        ]
        for arm, row in found.items()
    ]
    head = ["arm", "nDCG@10 over orders", "spread", "Kendall's tau", "pairs per second",
            "vectors at hand"]  # fmt: skip
    first = next(iter(found.values()), {})
    text = TEXT.format(
        what=WHAT.format(queries=first["queries"], orders=first["orders"]) if first else "",
        table=(table(head, rows) if rows else "Nothing was measured yet.\n\n")
        + (
            f"Not measured: {', '.join(map(label, unmeasured))}.\n\n" if rows and unmeasured else ""
        ),
        gain=gained(gain),
    )
    return Section(text, reading(found, gain), {"order": found, "routing_gain": gain})


def gained(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return (
            "Not known: it takes both arms of pointwise and of another way, and several clusters."
        )
    by_mode = ", ".join(f"{points:+.2f} ({MODE_NAMES[m]})" for m, points in gain["by_mode"].items())
    told = []
    for mode, row in gain["against"].items():
        sure = (
            f" {span(row['interval'])}, Holm p {p_value(row['p_holm'])}, detectable "
            f"{row['detectable']:.2f}"
            if row["interval"]
            else ""
        )
        told.append(f"{MODE_NAMES[mode]} {row['difference']:+.2f}{sure}")
    tested = any(row["interval"] for row in gain["against"].values())
    end = "these differences of differences are a family of their own" if tested else (
        "one seed: not tested"
    )  # fmt: skip
    return (
        f"On reranking MoE adds to a single LoRA, in points: {by_mode}. Against pointwise: "
        f"{'; '.join(told)} ({end})."
    )


def reading(found: dict[str, dict[str, Any]], gain: dict[str, Any] | None) -> str:
    """What order, speed and the differences of differences say, in a few sentences."""
    said = []
    for arm, row in found.items():
        mode, _, kind = arm.rpartition("-")
        if mode == POINTWISE:
            continue
        tau = "" if row["tau"] is None else f" (Kendall's tau {row['tau']:.2f})"
        text = f"Another order moves {label(arm)} by {100 * row['spread']:.2f} points{tau}"
        twin = found.get(f"{POINTWISE}-{kind}")
        if twin and twin["pairs_per_second"] and row["pairs_per_second"]:
            ratio = row["pairs_per_second"] / twin["pairs_per_second"]
            text += f"; it scores {ratio:.2f} times as many pairs a second as pointwise"
            if row["stored"]:
                more = row["stored"] / twin["pairs_per_second"]
                text += f", {more:.2f} times with the documents' vectors at hand"
        said.append(f"{text}.")
    for mode, row in (gain or {"against": {}})["against"].items():
        if row["p_holm"] is None:
            continue
        more, less = (mode, POINTWISE) if row["difference"] > 0 else (POINTWISE, mode)
        said.append(
            f"Routing adds more {MODE_NAMES[more]} than {MODE_NAMES[less]}."
            if row["p_holm"] <= inference.ALPHA
            else f"Whether routing adds more pointwise or {MODE_NAMES[mode]} is undetermined "
            f"(Holm p {p_value(row['p_holm'])})."
        )
    return " ".join(said)
