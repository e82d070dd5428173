"""Gradient conflict along training -> conflict.json, report.md and figures.

The trials hold inner products of gradients (`analysis.gradients`); all that is shown follows from
them. Intervals are over seeds alone (t, mean +- t s / sqrt n): the probe texts are fixed.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from analysis import compare, figures, judge
from analysis.figures import label, p_value, span, table
from analysis.gradients import SPACES, pooled, statistics
from analysis.page import limits, mean, over_seeds, provenance, warnings, write_folder
from eval import stats
from model.lora import PROJECTIONS

NAMES = {
    "ab": "(A, B), as trained",
    "w": "the induced gradient on W",
    "along": "of it, along the frozen rows",
    "across": "of it, across the frozen rows",
}
Rows = list[dict[str, Any]]
PAGE = """# {title}

**Question.** {v[question]}

**Expected, before the first run.** {v[expected]}
{notes}
## Reading

{reading}

## Do the tasks' gradients conflict?

Cosine of the embedding gradient with the reranking gradient on fixed probe texts, all adapted
layers and projections as one vector, averaged over the probes along training: mean over seeds with
its 95 % interval over seeds. Corrected: for the noise of the probe batches (Spearman, from halves
of the probe set), in the probes whose reliability is 0.3 or more: how many these are, and the raw
cosine of the same ones, stand behind it. Reliability: the mean where it exists, so it flatters the
noisiest probes. Conflicts: the share of (layer, projection) pairs with a negative cosine.
Removed: the share of the norm that PCGrad would drop. Ratio: |embedding| / |reranking|, each task's
loss at its weight of 1. Holm: over the {family} rows, which are not independent of each other: the
gradient on W lies nearly whole across the frozen rows. Detectable: the smallest cosine that so many
seeds with this spread find with 80 % power at Holm's first step.

{overall}{along}## Where?

Cosine of the gradients induced on W, at the last probe, mean over seeds.

{where}{heat}## What the arms score

{scores}{differences}
## What could not be concluded

{limits}

## Provenance

{provenance}
"""
CAPTIONS = {
    "along": "Cosine between the tasks' gradients (induced on W, all layers and projections) after "
    "a number of steps: mean over seeds in a band from lowest to highest; dashed: corrected for "
    "noise.",
    "heat": "Cosine between the tasks' gradients (induced on W) by layer and projection at the "
    "last probe, mean over seeds; orange: conflict, blue: agreement.",
}


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/gradient_conflict/<setting>; return what conflict.json holds.

    Raises ValueError as `judge.load`, and if no trial watched its gradients.
    """
    folder = folder.resolve()
    baselines, arms = judge.load(folder)
    watched = {arm: t for arm, trials in arms.items() if (t := _watched(trials))}
    if not watched:
        raise ValueError(
            f"{folder} has no trial with gradients: `make gradient-conflict` makes them"
        )
    found = compare.compare(folder, baselines, arms)
    found["gradients"] = {arm: summarise(trials) for arm, trials in watched.items()}
    rows = [
        space
        for arm in found["gradients"].values()
        for space in arm["spaces"].values()
        if space["cosine"]["p"] is not None
    ]
    for row, p in zip(rows, stats.holm([row["cosine"]["p"] for row in rows]), strict=True):
        values = row["cosine"]["seeds"]
        se, df = float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1
        row["cosine"] |= {
            "p_holm": p,
            "detectable": stats.smallest_detectable_effect(se, df, stats.ALPHA / len(rows)),
        }
    drawn = {"along": draw_along(found), "heat": draw_heat(found)}
    write_folder(folder, {"conflict.json": found}, markdown(found), drawn)
    return found


def _watched(trials: dict[int, dict]) -> dict[int, list[tuple[int, Rows]]]:
    """seed -> (steps done, rows) of each probe."""
    found = {
        seed: [(line["step"] + 1, line["gradients"]) for line in t["curve"] if "gradients" in line]
        for seed, t in trials.items()
    }
    return {seed: probes for seed, probes in found.items() if probes}


def pick(rows: Rows, space: str, expert: str = "all", **where: Any) -> Rows:
    return [
        row for row in rows
        if row["space"] == space and row["expert"] == expert
        and all(row[name] == value for name, value in where.items())
    ]  # fmt: skip


def summarise(trials: dict[int, list[tuple[int, Rows]]]) -> dict[str, Any]:
    """One arm: by space along training, then layers, projections and experts at the last probe."""
    steps = [step for step, _ in next(iter(trials.values()))]
    probes = {seed: dict(found) for seed, found in trials.items()}

    def curve(space: str, name: str, expert: str = "all") -> list[list[float | None]]:
        """(steps, seeds) of a statistic of all layers and projections together."""
        return [
            [statistics(pooled(pick(probes[s][step], space, expert)))[name] for s in probes]
            for step in steps
        ]

    def averaged(space: str, name: str, expert: str = "all") -> dict[str, Any]:
        by_step = curve(space, name, expert)
        return over_seeds([mean([row[i] for row in by_step]) for i in range(len(probes))])

    def corrected(space: str) -> dict[str, Any]:
        """Over the probes that have one, with the raw cosine of the same probes."""
        fixed, raw = curve(space, "corrected"), curve(space, "cosine")
        known = [[None if f is None else r for f, r in zip(*rows, strict=True)]
                 for rows in zip(fixed, raw, strict=True)]  # fmt: skip
        count = sum(value is not None for row in fixed for value in row)
        same = over_seeds([mean([row[i] for row in known]) for i in range(len(probes))])
        return {
            **averaged(space, "corrected"),
            "probes": count,
            "of": len(steps) * len(probes),
            "raw": same["mean"],
        }

    def conflicts(space: str) -> float:
        """Share of negative cosines over layers, projections, probes and seeds."""
        cosines = [
            statistics(row["gram"])["cosine"]
            for found in probes.values() for rows in found.values() for row in pick(rows, space)
        ]  # fmt: skip
        return float(np.mean([c < 0 for c in cosines if c is not None]))

    last = [found[steps[-1]] for found in probes.values()]
    one = last[0]
    layers = sorted({row["layer"] for row in one})
    projections = [p for p in PROJECTIONS if any(row["projection"] == p for row in one)]
    experts = sorted({row["expert"] for row in one} - {"all"})

    def at_last(**where: Any) -> float | None:
        return mean([statistics(pooled(pick(rows, "w", **where)))["cosine"] for rows in last])

    return {
        "steps": steps,
        "seeds": list(probes),
        "spaces": {
            space: {
                name: averaged(space, name)
                for name in ("cosine", "reliability", "ratio", "similarity", "removed")
            }
            | {"corrected": corrected(space), "conflicts": conflicts(space)}
            for space in SPACES
        },
        "curve": {name: curve("w", name) for name in ("cosine", "corrected")},
        "cells": {
            f"{layer}": {p: at_last(layer=layer, projection=p) for p in projections}
            for layer in layers
        },
        "layers": {f"{layer}": at_last(layer=layer) for layer in layers},
        "projections": {p: at_last(projection=p) for p in projections},
        "experts": {expert: averaged("w", "cosine", expert) for expert in experts},
    }


def reading(v: dict[str, Any]) -> str:
    """What follows from the numbers, in one paragraph."""
    said = []
    for arm, found in v["gradients"].items():
        cosine, corrected = found["spaces"]["w"]["cosine"], found["spaces"]["w"]["corrected"]
        if cosine["mean"] is None:
            continue
        sure = cosine["interval"] is not None and cosine.get("p_holm", 1) <= stats.ALPHA
        word = "agree" if cosine["mean"] > 0 else "conflict"
        word = word if sure else "neither agree nor conflict beyond chance"
        text = (
            f"In {label(arm)} the tasks' gradients {word} on the whole: cosine "
            f"{cosine['mean']:+.3f} {span(cosine['interval'], 1, '', 3)} on W"
        )
        if corrected["mean"] is not None:
            text += (
                f" ({corrected['mean']:+.3f} corrected for noise in the {corrected['probes']} of "
                f"{corrected['of']} probes that allow it, {corrected['raw']:+.3f} raw in these)"
            )
        if not sure and "detectable" in cosine:
            text += f"; what could have been seen is {cosine['detectable']:.2f}"
        share = 100 * found["spaces"]["w"]["conflicts"]
        said.append(f"{text}; {share:.0f} % of the layers and projections conflict.")
    said.append(compare.reading(v))
    return " ".join(said)


def markdown(v: dict[str, Any]) -> str:
    rows = []
    for arm, found in v["gradients"].items():
        for space, row in found["spaces"].items():
            cosine = row["cosine"]
            rows.append([
                label(arm), NAMES[space], _signed(cosine["mean"], cosine["interval"]),
                p_value(cosine["p"]), p_value(cosine.get("p_holm")),
                _plain(cosine.get("detectable")),
                _corrected(row["corrected"]), _plain(row["reliability"]["mean"]),
                f"{100 * row['conflicts']:.0f} %", _plain(row["removed"]["mean"]),
                _plain(row["ratio"]["mean"]), _plain(row["similarity"]["mean"]),
            ])  # fmt: skip
        for expert, cosine in found["experts"].items():
            rows.append([
                label(arm), f"induced on W, expert {expert}",
                _signed(cosine["mean"], cosine["interval"]), p_value(cosine["p"]), *"-" * 8,
            ])  # fmt: skip
    head = ["arm", "in", "cosine", "p", "Holm p", "detectable", "corrected", "reliability",
            "conflicts", "removed", "ratio", "similarity"]  # fmt: skip
    where = []
    for arm, found in v["gradients"].items():
        cells = {**{f"layer {k}": x for k, x in found["layers"].items()}, **found["projections"]}
        where += [[label(arm), name, _signed(x, None)] for name, x in cells.items()]
    missing = [arm for arm in v["arms"] if arm not in v["gradients"]]
    unsure = limits(v)
    if missing:
        names = ", ".join(map(label, missing))
        unsure.insert(0, f"Anything about the gradients of {names}: no trial watched them.")
    unsure.insert(0, "Whether conflict causes interference: the cosines are an observation, PCGrad "
                     "is the intervention, and its scores stand above.")  # fmt: skip
    return PAGE.format(
        v=v,
        title=f"{v['experiment'].replace('_', ' ').capitalize()}: {v['setting']}",
        notes=warnings(v),
        reading=reading(v),
        family=sum(len(found["spaces"]) for found in v["gradients"].values()),
        overall=table(head, rows),
        along=f"![along](along.png)\n\n*{CAPTIONS['along']}*\n\n",
        where=table(["arm", "where", "cosine"], where),
        heat=f"![heat](heat.png)\n\n*{CAPTIONS['heat']}*\n\n",
        scores=compare.scores_table(v),
        differences=compare.differences_table(v),
        limits="\n".join(f"- {text}" for text in unsure),
        provenance=provenance(v),
    )


def _signed(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" + (f" {span(interval, 1, '', 3)}" if interval else "")


def _corrected(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    count = f"{found['probes']} of {found['of']}"
    return f"{found['mean']:+.3f} ({count}; raw {found['raw']:+.3f})"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw_along(v: dict[str, Any]) -> Figure:
    """The cosine after each probe, a line an arm."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.4), layout="constrained")
        axes = figure.subplots()
        spare = iter(figures.SPARE)
        for arm, found in v["gradients"].items():
            colour = figures.COLOURS.get(arm) or next(spare)
            steps = np.array(found["steps"])
            _line(axes, steps, found["curve"]["cosine"], colour, "-", label(arm))
            _line(axes, steps, found["curve"]["corrected"], colour, (0, (4, 1.5)), None)
        axes.axhline(0, color="black", linewidth=0.6, zorder=0)
        axes.set_xlabel("training step")
        axes.set_ylabel("cosine of the tasks' gradients")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def _line(
    axes: Axes, steps: np.ndarray, rows: Any, colour: str, dash: Any, name: str | None
) -> None:
    known = [i for i, row in enumerate(rows) if all(value is not None for value in row)]
    if not known:
        return
    values = np.array([rows[i] for i in known], dtype=float)  # (steps, seeds)
    axes.plot(steps[known], values.mean(1), color=colour, linestyle=dash, label=name)
    if dash == "-" and values.shape[1] > 1:
        axes.fill_between(steps[known], values.min(1), values.max(1), color=colour, alpha=0.15,
                          linewidth=0)  # fmt: skip


def draw_heat(v: dict[str, Any]) -> Figure:
    """Layer by projection, a panel an arm."""
    read: Callable[[float | None], float] = lambda x: math.nan if x is None else x  # noqa: E731
    with matplotlib.rc_context(figures.STYLE):
        arms = list(v["gradients"])
        deep = max(len(v["gradients"][arm]["cells"]) for arm in arms)
        size = (figures.WIDTH, 0.17 * deep + 1.35)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
        grids = {
            arm: np.array([[read(x) for x in row.values()]
                           for row in v["gradients"][arm]["cells"].values()])
            for arm in arms
        }  # fmt: skip
        top = max(0.05, *(float(np.nanmax(np.abs(grid))) for grid in grids.values()))
        colours = LinearSegmentedColormap.from_list("conflict", ["#D55E00", "#ffffff", "#0072B2"])
        images = []
        for axes, arm in zip(panels, arms, strict=True):
            cells = v["gradients"][arm]["cells"]
            images.append(axes.imshow(grids[arm], cmap=colours, vmin=-top, vmax=top,
                                      aspect="auto", origin="lower"))  # fmt: skip
            names = [name.removesuffix("_proj") for name in next(iter(cells.values()))]
            axes.set_xticks(range(len(names)), names, rotation=60)
            axes.set_yticks(range(len(cells)), list(cells))
            axes.set_title(label(arm), fontweight="bold")
            axes.tick_params(length=0)
        panels[0].set_ylabel("layer")
        figure.colorbar(images[0], ax=list(panels), label="cosine", fraction=0.05, pad=0.01)
        return figure


def summary(v: dict[str, Any]) -> str:
    """The reading, for a terminal."""
    return f"{v['experiment']} {v['setting']}: {reading(v)}"
