"""Gradient conflict along training -> conflict.json, report.md and figures.

The trials hold inner products of gradients (`analysis.gradients`); all that is shown follows from
them. Intervals are over seeds alone (t, mean +- t s / sqrt n): the probe texts are fixed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from analysis import compare, disk, roles
from analysis.conflict_figures import (
    CAPTIONS,
    SPACE_NAMES,
    draw_along,
    draw_heat,
    draw_steps,
)
from analysis.figures import label, p_value, span, table
from analysis.gradients import SPACES, pooled, statistics
from analysis.page import (
    by_seed,
    by_seed_less,
    frame,
    limits,
    mean,
    over_seeds,
    spread,
    with_holm,
    write_folder,
)
from eval import inference
from model.lora import PROJECTIONS

STATISTICS = ("cosine", "corrected", "reliability", "ratio", "similarity", "removed")
BY_STEP = {  # of these the curve's names in the table by step
    "cosine": "cosine", "reliability": "reliability", "conflicts": "negative",
    "removed": "removed", "ratio": "ratio", "similarity": "similarity",
}  # fmt: skip
Rows = list[dict[str, Any]]
BODY = """\
## Do the tasks' gradients conflict?

Cosine of the embedding gradient with the reranking gradient on fixed probe texts, all adapted
layers and projections as one vector, averaged over the probes along training: mean over seeds with
its 95 % interval over seeds. The probe texts are training texts, so a model has learnt from more of
them with every probe. Experts are told by their roles, which a learned router deals anew with each
seed: a task's own is the one that its texts give more weight than the other's do, over the last
quarter of the steps. Corrected: for the noise of the probe batches (Spearman, from halves
of the probe set), in the probes whose reliability is 0.3 or more: how many these are, and the raw
cosine of the same ones, stand behind it. Reliability: of either half of the probe set, the root of
both tasks' own cosine between halves (all of it, which the raw cosine uses, measures better); the
mean where it exists, so it flatters the noisiest probes. Negative: the share of negative cosines
over layers, projections and probes; 0.5 where the tasks have nothing to do with each other.
Removed: the share of the norm that PCGrad would drop. Ratio: a / b of the norms, a the embedding
gradient's, b the reranking gradient's, each task's loss at its weight of 1; similarity: 2 a b / (a²
+ b²), 1 where they are equal; both without the noise of the probe batches, in the probes of the
corrected cosine.
Holm: over the {family} rows of this table and the next, which are not independent of each other:
the gradient on W lies nearly whole across the frozen rows. Detectable: the smallest cosine that so
many seeds with this spread find with 80 % power at Holm's first step; above 1 (of a difference: 2),
none.

{overall}The same of the gradient on W after each number of steps: mean over the seeds that have one
(how many). Where its reliability is below 0.3 it is mostly the probe batches, and has no ratio and
no similarity. Negative: the share of the linears.

{stepped}{along}{steps}## Does it differ between the arms?

The arm's cosine less that of {reference} at the same seed; of an expert, its own cosine on W less
that of {reference} there.

{between}## Where?

Of the gradients induced on W, averaged over the probes along training, each number over those that
have one, as above: mean over seeds ± their standard deviation, with the 95 % interval over seeds;
where not all seeds have a value, how many do. Negative: the share of its linears, over all probes
and seeds, in which the cosine is.

{where}{heat}## What the arms score

{scores}{differences}
"""


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/gradient_conflict/<setting>; return what conflict.json holds.

    Raises ValueError as `disk.load`, and if no trial watched its gradients.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    watched = {arm: t for arm, trials in arms.items() if (t := _watched(trials))}
    if not watched:
        raise ValueError(
            f"{folder} has no trial with gradients: `make gradient-conflict` makes them"
        )
    found = compare.compare(folder, baselines, arms)
    found["gradients"] = {arm: summarise(trials) for arm, trials in watched.items()}
    found["between"] = between(found["gradients"], found["reference"])
    rows = [
        row
        for arm in found["gradients"].values()
        for row in (
            *(space["cosine"] for space in arm["spaces"].values()),
            *(expert["cosine"] for expert in arm["experts"].values()),
        )
    ]
    rows += [row["difference"] for row in found["between"]]
    found["family"] = len(with_holm(rows))
    drawn = {"along": draw_along(found), "steps": draw_steps(found), "heat": draw_heat(found)}
    write_folder(folder, {"conflict.json": found}, markdown(found), drawn)
    return found


def _watched(trials: dict[int, dict]) -> dict[int, list[tuple[int, Rows]]]:
    """seed -> (steps done, rows) of each probe, the experts by their roles."""
    found = {}
    for seed, trial in trials.items():
        names = {"all": "all", **roles.of_trial(trial)}
        found[seed] = [
            (line["step"] + 1,
             [{**row, "expert": names[row["expert"]]} for row in line["gradients"]])
            for line in trial["curve"] if "gradients" in line
        ]  # fmt: skip
    return {seed: probes for seed, probes in found.items() if probes}


def pick(rows: Rows, space: str, expert: str = "all", **where: Any) -> Rows:
    return [
        row for row in rows
        if row["space"] == space and row["expert"] == expert
        and all(row[name] == value for name, value in where.items())
    ]  # fmt: skip


def negative(rows: Rows) -> float | None:
    """The share of negative cosines among some linears."""
    cosines = (statistics(row["gram"])["cosine"] for row in rows)
    return mean([cosine < 0 for cosine in cosines if cosine is not None])


def summarise(trials: dict[int, list[tuple[int, Rows]]]) -> dict[str, Any]:
    """One arm: by space along training, then by layer, projection and expert."""
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
        values = [mean([row[i] for row in by_step]) for i in range(len(probes))]
        return by_seed(values)

    def corrected(space: str, expert: str) -> dict[str, Any]:
        """Over the probes that have one, with the raw cosine of the same probes."""
        fixed, raw = curve(space, "corrected", expert), curve(space, "cosine", expert)
        known = [[None if f is None else r for f, r in zip(*rows, strict=True)]
                 for rows in zip(fixed, raw, strict=True)]  # fmt: skip
        count = sum(value is not None for row in fixed for value in row)
        at = [step for step, row in zip(steps, fixed, strict=True) if set(row) != {None}]
        same = over_seeds([mean([row[i] for row in known]) for i in range(len(probes))])
        return {
            **averaged(space, "corrected", expert),
            "probes": count,
            "of": len(steps) * len(probes),
            "steps": at,
            "raw": same["mean"],
        }

    def conflicts(space: str, **where: Any) -> dict[str, Any]:
        """Share of negative cosines over layers, projections and probes."""
        return over_seeds([
            negative([row for rows in found.values() for row in pick(rows, space, **where)])
            for found in probes.values()
        ])  # fmt: skip

    def whole(space: str, expert: str = "all") -> dict[str, Any]:
        """All layers and projections together."""
        return {
            name: averaged(space, name, expert) for name in STATISTICS if name != "corrected"
        } | {
            "corrected": corrected(space, expert),
            "conflicts": conflicts(space, expert=expert),
        }

    one = next(iter(probes.values()))[steps[-1]]
    layers = sorted({row["layer"] for row in one})
    projections = [p for p in PROJECTIONS if any(row["projection"] == p for row in one)]
    experts = sorted({row["expert"] for row in one} - {"all"})

    def place(**where: Any) -> dict[str, Any]:
        """Each statistic over the probes that have one."""
        of = [
            [statistics(pooled(pick(rows, "w", **where))) for rows in found.values()]
            for found in probes.values()
        ]
        return {
            name: over_seeds([mean([row[name] for row in rows]) for rows in of])
            for name in STATISTICS
        } | {"conflicts": conflicts("w", **where)}

    return {
        "steps": steps,
        "seeds": list(probes),
        "spaces": {space: whole(space) for space in SPACES},
        "curve": {
            space: {
                **{name: curve(space, name) for name in STATISTICS},
                "conflicts": [
                    [negative(pick(probes[s][step], space)) for s in probes] for step in steps
                ],
            }
            for space in SPACES
        },
        "cells": {
            f"{layer}": {p: place(layer=layer, projection=p) for p in projections}
            for layer in layers
        },
        "layers": {f"{layer}": place(layer=layer) for layer in layers},
        "projections": {p: place(projection=p) for p in projections},
        "experts": {expert: whole("w", expert) for expert in experts},
    }


def between(measured: dict[str, dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """The cosine of each other arm, by space and expert, less the reference's at the same seed."""
    if reference not in measured:
        return []
    base, rows = measured[reference], []
    for arm, found in measured.items():
        if arm == reference:
            continue
        sides = [(SPACE_NAMES[s], row["cosine"], base["spaces"][s]["cosine"])
                 for s, row in found["spaces"].items()]  # fmt: skip
        theirs = base["spaces"]["w"]["cosine"]
        sides += [(f"expert: {name}", row["cosine"], theirs)
                  for name, row in found["experts"].items()]  # fmt: skip
        for where, mine, other in sides:
            of, to = (dict(zip(side["seeds"], cosines["by_seed"], strict=True))
                      for side, cosines in ((found, mine), (base, other)))  # fmt: skip
            rows.append({"arm": arm, "in": where, "difference": over_seeds(by_seed_less(of, to))})
    return rows


def reading(v: dict[str, Any]) -> str:
    """What follows from the numbers, in one paragraph."""
    said = []
    for arm, found in v["gradients"].items():
        cosine, corrected = found["spaces"]["w"]["cosine"], found["spaces"]["w"]["corrected"]
        if cosine["mean"] is None:
            continue
        sure = cosine["interval"] is not None and cosine.get("p_holm", 1) <= inference.ALPHA
        word = "agree" if cosine["mean"] > 0 else "conflict"
        word = word if sure else "neither agree nor conflict significantly"
        text = (
            f"In {label(arm)} the tasks' gradients {word} on the whole: cosine "
            f"{cosine['mean']:+.3f} {span(cosine['interval'], 1, '', 3)} on W"
        )
        if corrected["mean"] is not None:
            text += (
                f" ({corrected['mean']:+.3f} corrected for noise in the {corrected['probes']} of "
                f"{corrected['of']} probes that allow it, after {_steps(corrected['steps'])}, "
                f"{corrected['raw']:+.3f} raw in these)"
            )
        if not sure and "detectable" in cosine:
            least = cosine["detectable"]
            text += (
                f"; detectable is {least:.2f}"
                if least <= 1
                else "; with these seeds no cosine was detectable"
            )
        negative = found["spaces"]["w"]["conflicts"]
        share = f"{100 * negative['mean']:.0f} % {span(negative['interval'], 100, '', 0)}"
        said.append(f"{text}; {share} of the cosines are negative (50 % by chance).")
    sure = [row for row in v["between"] if row["difference"].get("p_holm", 1) <= inference.ALPHA]
    said += [
        f"In {label(row['arm'])} ({row['in']}) the cosine is "
        f"{row['difference']['mean']:+.3f} {span(row['difference']['interval'], 1, '', 3)} from "
        f"that in {label(v['reference'])}."
        for row in sure
    ]
    if v["between"] and not sure:
        on = [f"{_plain(row['difference']['detectable'])} for {label(row['arm'])}"
              for row in v["between"]
              if row["in"] == SPACE_NAMES["w"] and "detectable" in row["difference"]]  # fmt: skip
        seen = f" (detectable on W: {', '.join(on)})" if on else ""
        said.append(f"No arm's cosine differs significantly from {label(v['reference'])}'s{seen}.")
    said.append(compare.reading(v))
    return " ".join(said)


def markdown(v: dict[str, Any]) -> str:
    rows, where, one = [], [], next(iter(v["gradients"].values()))
    for arm, found in v["gradients"].items():
        parts = {SPACE_NAMES[space]: row for space, row in found["spaces"].items()}
        parts |= {f"induced on W, expert: {name}": row for name, row in found["experts"].items()}
        rows += [
            [label(arm), name, *_tested(row["cosine"]), _corrected(row["corrected"]), *_rest(row)]
            for name, row in parts.items()
        ]
        cells = {**{f"layer {k}": x for k, x in found["layers"].items()}, **found["projections"]}
        where += [
            [label(arm), name, *(_of(x[key], len(found["seeds"]))
                                 for key in ("cosine", "corrected")), *_rest(x)]
            for name, x in cells.items()
        ]  # fmt: skip
    stepped = [
        [label(arm), text, *map(_known, found["curve"]["w"][name])]
        for arm, found in v["gradients"].items() for name, text in BY_STEP.items()
    ]  # fmt: skip
    noisy = [label(arm) for arm, found in v["gradients"].items()
             if (mean(found["curve"]["w"]["reliability"][-1]) or 0) < 0.3]  # fmt: skip
    rest = ["reliability", "negative", "removed", "ratio", "similarity"]
    between = [[label(row["arm"]), row["in"], *_tested(row["difference"])] for row in v["between"]]
    test = ["p", "Holm p", "detectable", "seeds"]
    missing = [arm for arm in v["arms"] if arm not in v["gradients"]]
    unsure = limits(v)
    if missing:
        names = ", ".join(map(label, missing))
        unsure.insert(0, f"Anything about the gradients of {names}: no trial watched them.")
    if noisy:
        unsure.insert(0, "Where in the network the tasks conflict at the end of training, in "
                         f"{', '.join(noisy)}: the probe set measures mostly its own noise there, "
                         "and more `probes` would be needed.")  # fmt: skip
    unsure.insert(0, "Whether conflict causes interference: the cosines are an observation, PCGrad "
                     "is the intervention, and its scores stand above.")  # fmt: skip
    body = BODY.format(
        reference=label(v["reference"]),
        family=v["family"],
        overall=table(["arm", "in", "cosine", *test, "corrected", *rest], rows),
        stepped=table(["arm", "after", *map(str, one["steps"])], stepped),
        steps=f"![steps](steps.png)\n\n*{CAPTIONS['steps']}*\n\n",
        between=table(["arm", "in", "difference", *test], between)
        if between
        else "Nothing to compare with.\n\n",
        along=f"![along](along.png)\n\n*{CAPTIONS['along']}*\n\n",
        where=table(["arm", "where", "cosine", "corrected", *rest], where),
        heat=f"![heat](heat.png)\n\n*{CAPTIONS['heat']}*\n\n",
        scores=compare.scores_table(v),
        differences=compare.differences_table(v),
    )
    return frame(v, reading(v), body, unsure)


def _of(found: dict[str, Any], seeds: int) -> str:
    """`page.spread`, and how many seeds have a value where not all do."""
    known = len(found["seeds"])
    return spread(found, "+.3f") + (f" ({known} of {seeds})" if 0 < known < seeds else "")


def _tested(found: dict[str, Any]) -> list[str]:
    """Mean ± standard deviation [interval], p, Holm p, what is detectable, seeds."""
    return [spread(found, "+.3f"), p_value(found["p"]), p_value(found.get("p_holm")),
            _plain(found.get("detectable")), str(len(found["seeds"]))]  # fmt: skip


def _rest(row: dict[str, Any]) -> list[str]:
    """The cells beside the cosines."""
    return [spread(row["reliability"]), spread(row["conflicts"]),
            *(spread(row[name]) for name in ("removed", "ratio", "similarity"))]  # fmt: skip


def _corrected(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    count, after = f"{found['probes']} of {found['of']}", _steps(found["steps"])
    return f"{spread(found, '+.3f')} ({count}, after {after}; raw {found['raw']:+.3f})"


def _steps(steps: list[int]) -> str:
    """`1, 8 and 40 steps`."""
    *most, last = map(str, steps)
    return f"{', '.join(most)} and {last} steps" if most else f"{last} step{'s' * (last != '1')}"


def _known(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{np.mean(found):.2f} ({len(found)})" if found else "-"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value >= 0.1 else 3}f}"
