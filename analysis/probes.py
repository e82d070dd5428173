"""Probes -> probing.json, report.md and a figure; the numbers are `analysis.probing`'s."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis import ablation, compare, figures, judge
from analysis.figures import label, span, table
from analysis.page import over_seeds, provenance, warnings, write_folder

NAMES = {
    "covered_terms": "covered query terms", "covered_share": "their share", "tf_sum": "sum of TF",
    "idf_sum": "sum of IDF", "bm25": "BM25", "bigrams": "share of query bigrams",
    "length": "document length (ln)", "exact": "a query bigram is there",
    "similarity": "similarity in the base", "nouns": "nouns in the query",
    "verbs": "verbs in the query", "relevant": "relevant",
}  # fmt: skip
PAGE = """# {title}

**Question.** {v[question]}

**Expected, before the first run.** {v[expected]}
{notes}
## Reading

{reading}

## What can be read off

Probes of {pairs:,} pairs of {queries} queries, tested on unseen queries: R² of ridge regression,
for a yes or no ({yes}) the balanced accuracy of logistic regression. Selectivity: that score less
the one on the same values shuffled. Compression: the values' own code length over their online code
length by the probe; 1 says that the features save no bits. At the layer with the highest mean
score; mean over seeds with its 95 % interval.

{table}{picture}{ablation}## What could not be concluded

{limits}

## Provenance

{provenance}
"""
CAPTION = (
    "Score of the probes by layer: mean over seeds in a band from lowest to highest; grey, dotted: "
    "the untrained base."
)


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/probing/<setting>; return what probing.json holds.

    Raises ValueError as `judge.load`, and if no trial was probed.
    """
    folder = folder.resolve()
    baselines, arms = judge.load(folder)
    measured = {
        arm: {seed: judge.read(path) for seed in trials
              if (path := folder / arm / f"probing-seed{seed}.json").exists()}
        for arm, trials in arms.items()
    }  # fmt: skip
    measured = {arm: found for arm, found in measured.items() if found}
    if not measured:
        raise ValueError(f"{folder} has no probed model yet: `make probing` makes it")
    found = compare.compare(folder, baselines, arms)
    found["probed"] = {arm: summarise(list(trials.values())) for arm, trials in measured.items()}
    found["ablated"] = {
        arm: ablation.summarise([judge.read(path) for path in paths])
        for arm in arms
        if (paths := sorted((folder / arm).glob("ablation-seed*.json")))
    }
    drawn = {"probes": draw(found)}
    if found["ablated"]:
        drawn["ablation"] = ablation.draw(found["ablated"])
    write_folder(folder, {"probing.json": found}, markdown(found), drawn)
    return found


def summarise(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds: view -> property -> scores by layer, and the best layer."""
    first = trials[0]
    views: dict[str, Any] = {}
    for view, properties in first["probes"].items():
        views[view] = {}
        for name, rows in properties.items():
            by_layer = [
                {key: over_seeds([trial["probes"][view][name][i][key] for trial in trials])
                 for key in rows[i]}
                for i in range(len(rows))
            ]  # fmt: skip
            means = [row["score"]["mean"] for row in by_layer]
            known = [i for i, mean in enumerate(means) if mean is not None]
            best = max(known, key=lambda i: means[i]) if known else None
            views[view][name] = {"layers": by_layer, "best": best}
    return {**{k: first[k] for k in ("first_layer", "pairs", "queries", "binary")}, "views": views}


def reading(v: dict[str, Any]) -> str:
    said = []
    for arm, found in v["probed"].items():
        gains = {}
        for name, of in found["views"]["model"].items():
            base = found["views"]["base"][name]
            if of["best"] is None or base["best"] is None:
                continue
            best, other = (x["layers"][x["best"]]["score"]["mean"] for x in (of, base))
            gains[name] = best - other
        if gains:
            up, down = max(gains, key=lambda n: gains[n]), min(gains, key=lambda n: gains[n])
            said.append(
                f"Against the untrained base, {label(arm)}'s pairs gain most on {NAMES[up]} "
                f"({gains[up]:+.2f}) and least on {NAMES[down]} ({gains[down]:+.2f})."
            )
    more = ablation.reading(v["ablated"])
    return " ".join([*said, more] if more else said) or "There is nothing to compare yet."


def markdown(v: dict[str, Any]) -> str:
    rows = []
    for arm, found in v["probed"].items():
        for view, properties in found["views"].items():
            for name, of in properties.items():
                if of["best"] is None:
                    continue
                row = of["layers"][of["best"]]
                rows.append([
                    label(arm), view, NAMES[name], str(found["first_layer"] + of["best"]),
                    f"{row['score']['mean']:.2f} {span(row['score']['interval'])}",
                    *("-" if row[k]["mean"] is None else f"{row[k]['mean']:.2f}"
                      for k in ("selectivity", "compression")),
                ])  # fmt: skip
    one = next(iter(v["probed"].values()))
    limits = compare.limits(v)
    limits.insert(0, "Whether the model uses what a probe reads: that needs an intervention.")
    return PAGE.format(
        v=v,
        title=f"{v['experiment'].capitalize()}: {v['setting']}",
        notes=warnings(v),
        reading=reading(v),
        pairs=one["pairs"],
        queries=one["queries"],
        yes=", ".join(NAMES[name] for name in one["binary"]),
        table=table(["arm", "view", "property", "layer", "score", "selectivity", "compression"],
                    rows),
        picture=f"![probes](probes.png)\n\n*{CAPTION}*\n\n",
        ablation=ablation.markdown(v["ablated"]),
        limits="\n".join(f"- {text}" for text in limits),
        provenance=provenance(v),
    )  # fmt: skip


def draw(v: dict[str, Any]) -> Figure:
    """A panel a property: the score by layer, a line an arm."""
    arms = v["probed"]
    names = list(next(iter(arms.values()))["views"]["model"])
    with matplotlib.rc_context(figures.STYLE):
        wide = 4
        deep = -(-len(names) // wide)
        figure = Figure(figsize=(figures.WIDTH, 1.5 * deep + 0.5), layout="constrained")
        grid = figure.subplots(deep, wide, sharex=True, squeeze=False).flatten()
        for axes in grid[len(names) :]:
            axes.axis("off")
        for axes, name in zip(grid, names, strict=False):
            for at, (arm, found) in enumerate(arms.items()):
                colour = figures.COLOURS.get(arm, figures.GREY)
                _line(axes, found, "model", name, colour, figures.DASHES[at % 3], label(arm))
            first = next(iter(arms.values()))
            _line(axes, first, "base", name, figures.GREY, ":", "untrained base")
            axes.set_title(NAMES[name], fontsize=7)
            axes.tick_params(labelsize=7)
        for axes in grid[-wide:]:
            axes.set_xlabel("layer")
        handles, texts = grid[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=4)
        return figure


def _line(axes, found: dict[str, Any], view: str, name: str, colour, dash, text: str) -> None:
    rows = [layer["score"]["seeds"] for layer in found["views"][view][name]["layers"]]
    if not all(rows):
        return
    at = found["first_layer"] + np.arange(len(rows))
    axes.plot(at, [np.mean(r) for r in rows], color=colour, linestyle=dash, marker="o",
              markersize=2, linewidth=1, label=text)  # fmt: skip
    axes.fill_between(at, [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.15,
                      linewidth=0)  # fmt: skip
    axes.set_xticks(at)


def summary(v: dict[str, Any]) -> str:
    """The reading, for a terminal."""
    return f"{v['experiment']} {v['setting']}: {reading(v)}"
