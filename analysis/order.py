"""Pointwise against listwise: the report of `compare` with what each mode costs, how much the order
of the documents matters, and which of the two gains more from routing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from analysis import compare, judge
from analysis.compare import Section, Trials, summary
from analysis.figures import label, p_value, span, table
from eval import stats
from eval.order import sensitivity, speed
from eval.protocol import EvaluationSet
from model.unimoer import UniMoER
from train.batches import TrainingData
from trials import Config

__all__ = ["measure", "summary", "write"]
ORDERS, QUERIES = 4, 50  # a list is read once for each order, without prefix states
MODES = ("pointwise", "listwise")
TEXT = """## Order and speed

{queries} queries, their BM25 candidates in {orders} random orders: nDCG@10 × 100 as the mean over
orders and seeds, its standard deviation over the orders of a seed (mean over seeds), and Kendall's
tau between the rankings that two orders lead to. A model that scores pairs never sees an order.
Speed: pairs per second of `rank`, one query after the other, with tokenization and without prefix
states, on this machine and whatever else ran on it: mean over seeds (lowest to highest).

{table}## Which mode gains more from routing?

{gain}

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
        measured = {
            arm: [judge.read(path) for seed in trials
                  if (path := folder / arm / f"order-seed{seed}.json").exists()]
            for arm, trials in arms.items()
        }  # fmt: skip
        found = {arm: summarise(rows) for arm, rows in measured.items() if rows}
        gain = routing_gain(*judge.arrays(baselines, arms), arms)
        return section(found, gain)

    return compare.write(folder, add)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm, over its seeds."""
    taus = [row["order"]["tau"] for row in rows if row["order"]["tau"] is not None]
    rates = [row["speed"]["pairs_per_second"] for row in rows]
    return {
        "seeds": len(rows),
        "queries": rows[0]["order"]["queries"],
        "orders": rows[0]["order"]["orders"],
        "mean": float(np.mean([row["order"]["mean"] for row in rows])),
        "spread": float(np.mean([row["order"]["spread"] for row in rows])),
        "tau": float(np.mean(taus)) if taus else None,
        "pairs_per_second": float(np.mean(rates)),
        "slowest": min(rates),
        "fastest": max(rates),
    }


def routing_gain(
    y: dict[str, dict[str, np.ndarray]], labels: dict[str, list[str]], arms: Trials
) -> dict[str, Any] | None:
    """What MoE adds to a single LoRA on reranking, listwise minus pointwise, in points.

    Of the seeds that both arms of a mode have; None where a mode has none, or all queries are of
    one cluster.
    """
    gains = {}
    for mode in MODES:
        pair = [f"{mode}-{kind}" for kind in ("moe", "single")]
        if not all(arm in y["reranking"] for arm in pair):
            return None
        both = [seed for seed in arms[pair[0]] if seed in arms[pair[1]]]
        at = [[list(arms[arm]).index(seed) for seed in both] for arm in pair]
        gains[mode] = y["reranking"][pair[0]][at[0]] - y["reranking"][pair[1]][at[1]]
    if not all(map(len, gains.values())) or len(set(labels["reranking"])) < 2:
        return None
    e = stats.arm_difference(gains, labels["reranking"], "listwise", "pointwise")
    return {
        **{mode: 100 * float(gain.mean()) for mode, gain in gains.items()},
        "difference": e.value,
        "interval": e.interval,
        "p": e.p if e.interval else None,
    }


def section(found: dict[str, dict[str, Any]], gain: dict[str, Any] | None) -> Section:
    rows = [
        [
            label(arm),
            f"{100 * row['mean']:.2f}",
            f"{100 * row['spread']:.2f}",
            "-" if row["tau"] is None else f"{row['tau']:.3f}",
            f"{row['pairs_per_second']:,.1f} ({row['slowest']:,.1f} to {row['fastest']:,.1f})",
        ]
        for arm, row in found.items()
    ]
    head = ["arm", "nDCG@10 over orders", "spread", "Kendall's tau", "pairs per second"]
    first = next(iter(found.values()), {"queries": 0, "orders": ORDERS})
    text = TEXT.format(
        queries=first["queries"],
        orders=first["orders"],
        table=table(head, rows) if rows else "Nothing was measured yet.\n\n",
        gain=gained(gain),
    )
    return Section(text, reading(found, gain), {"order": found, "routing_gain": gain})


def gained(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "Not all four arms have a seed in common."
    told = f" {span(gain['interval'])}, p {p_value(gain['p'])}" if gain["interval"] else ""
    return (
        f"On reranking MoE adds {gain['listwise']:+.2f} points to a single LoRA listwise and "
        f"{gain['pointwise']:+.2f} pointwise: {gain['difference']:+.2f}{told} (this one difference "
        "of differences, outside of the table's family)."
    )


def reading(found: dict[str, dict[str, Any]], gain: dict[str, Any] | None) -> str:
    """What order, speed and the difference of differences say, in a few sentences."""
    said = []
    for arm in (arm for arm in found if arm.startswith("listwise")):
        row = found[arm]
        tau = "" if row["tau"] is None else f" (Kendall's tau {row['tau']:.2f})"
        text = f"Another order moves {label(arm)} by {100 * row['spread']:.2f} points{tau}"
        twin = found.get(arm.replace("listwise", "pointwise"))
        if twin and twin["pairs_per_second"]:
            ratio = row["pairs_per_second"] / twin["pairs_per_second"]
            text += f"; it scores {ratio:.2f} times as many pairs a second as pointwise"
        said.append(f"{text}.")
    if gain and gain["p"] is not None:
        more = "listwise" if gain["difference"] > 0 else "pointwise"
        said.append(
            f"Routing adds more {more}."
            if gain["p"] <= stats.ALPHA
            else "Which mode gains more from routing cannot be told from chance."
        )
    return " ".join(said)
