"""Probes -> probing.json, report.md and a figure; the numbers are `analysis.probing`'s."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import ablation, compare, disk, figures, roles
from analysis.bands import shade
from analysis.figures import label, p_value, table
from analysis.page import claims_table, frame, limits, over_seeds, spread, write_folder
from analysis.probe_claims import (
    ALONE,
    HELD,
    INGREDIENTS,
    OWN_ALONE,
    RELEVANCE,
    at_best,
    claims,
    held,
)

PROPERTY_NAMES = {
    "covered_terms": "covered query terms", "covered_share": "share of terms covered",
    "tf_sum": "sum of TF", "idf_sum": "sum of IDF",
    "bm25": "BM25 (whole text)",
    "bigrams": "share of query bigrams", "length": "length of what is read (ln)",
    "exact": "has a query bigram", "similarity": "similarity in the base",
    "nouns": "share of nouns in the query", "verbs": "share of verbs in the query",
    "relevant": "relevant",
}  # fmt: skip
COLUMNS = (
    "score", "control (SD of draws)", "selectivity", "score, new documents",
    "control (SD of draws)", "selectivity", "code", "bits saved", "seeds",
)  # fmt: skip
BODY = """\
## What can be read off

Probes of {pairs:,} pairs of {queries} queries, tested on unseen queries: R² of ridge regression,
for a yes or no ({yes}) the balanced accuracy of logistic regression. Selectivity: that score less
the one on a control task, in which each document has one value at random under every query
({recurring:.0f} % of the pairs are of a document that recurs), in the mean over {draws} draws, or
less chance (0, of accuracies 0.5) where that is below it. New documents: the same where the pairs
of all documents that a probe is tested on leave what it is fitted to, of which {kept:.0f} % are
left; so nothing is gained by remembering documents, but fewer pairs read less off. Code:
the bits of each value (of a number, in units of its standard deviation) by the online code of the
probe; bits saved: against the values' own distribution, 0 where the features say nothing. Portions
of that code: {portions} % of the queries.
Of a document a model reads the first {tokens} tokens; {cut:.0f} % of the pairs' documents
are longer. Properties of texts are of what is read, but for BM25's score and the numbers of
documents that have a term (IDF), which are of whole texts. The penalty of each probe is the one
that does best on queries left out of what it is fitted to; of what is one value in each query the
control has one for each query.
At the layer with the highest mean score (of the base all layers are probed, of an arm the adapted
ones: those below are the base's); mean over seeds ± their standard deviation, with its 95 %
interval; the base is one model. An expert "alone" is the model with weight 1 for it in every layer:
what can be read off where it has to do all of the work, not what it adds to the others in the model
as it is.

{table}The same behind the last layer, which is what the heads read.

{last}{picture}{tests}{ablation}{arms}"""
TESTS = """Differences by seed, tested where there are several, with Holm's correction over this
table. Scores at the best of the layers that an arm adapts, chosen on the same queries, of an arm by
its mean over seeds, of the base, one model, by its one score among the same layers. p is of other
seeds, not of other queries. Detectable: with 80 % power at the first step of that correction.

"""
CAPTION = (
    "Score of the probes by layer, R² or, where it says so, balanced accuracy: mean over seeds, "
    "where there are several with its 95 % interval; grey, dotted: the untrained base. Each panel "
    "has a range of its own."
)


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/probing/<setting>; return what probing.json holds.

    Raises ValueError as `disk.load`, and if no trial was probed, or by code that knew less.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    measured = disk.measured(folder, arms, "probing", "kept")
    if not measured:
        raise ValueError(f"{folder} has no probed model yet: `make probing` makes it")
    found = compare.compare(folder, baselines, arms)
    disk.add_measures(found, measured, "probing")
    found["probed"] = {
        arm: summarise({seed: _by_role(one, arms[arm][seed]) for seed, one in trials.items()})
        for arm, trials in measured.items()
    }
    found["tests"] = claims(found["probed"])
    ablated = disk.measured(folder, arms, "ablation")
    found["ablated"] = {
        arm: ablation.summarise([_by_role(one, arms[arm][at]) for at, one in trials.items()])
        for arm, trials in ablated.items()
    }
    disk.add_measures(found, ablated, "ablation")
    drawn = {"probes": draw(found)}
    if found["ablated"]:
        drawn["ablation"] = ablation.draw(found["ablated"])
    write_folder(folder, {"probing.json": found}, markdown(found), drawn)
    return found


def _by_role(measured: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """With the experts' views or components under their roles, in an order that is the same for
    every seed."""
    names = roles.of_trial(trial)
    named = {name: ALONE.format(role) for name, role in names.items()}
    named |= {f"expert {name}": f"expert: {role}" for name, role in names.items()}
    found = dict(measured)
    for key in {"probes", "components"} & measured.keys():
        rows = {named[k] if k in named else k: row for k, row in measured[key].items()}
        last = sorted(named[k] for k in measured[key] if k in named)
        found[key] = {k: rows[k] for k in (*(k for k in rows if k not in last), *last)}
    return found


def summarise(of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds: view -> property -> scores by layer, and the best layer."""
    trials = list(of.values())
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
    same = ("first_layer", "pairs", "queries", "recurring", "kept", "document_tokens", "cut",
            "binary")  # fmt: skip
    return {**{k: first[k] for k in same}, "at": list(of), "views": views}


def first_layer(found: dict[str, Any], rows: Sequence[Any]) -> int:
    """The layer of the first of `rows`: all views end with the last layer."""
    some = next(iter(found["views"]["model"].values()))
    return found["first_layer"] + len(some["layers"]) - len(rows)


def _at_own_best(found: dict[str, Any], name: str, key: str) -> float | None:
    """A number of a property in the model, at its best layer, over seeds."""
    of = found["views"]["model"][name]
    return None if of["best"] is None else of["layers"][of["best"]][key]["mean"]


def _beside(found: dict[str, Any], names: Sequence[str]) -> str:
    """The selectivity of a claim's properties in their mean, and what is read off new documents."""
    said = ""
    gaps = [gap for n in names if (gap := _at_own_best(found, n, "selectivity")) is not None]
    if gaps:
        said = f"; selectivity {np.mean(gaps):+.2f}"
    keys = ("new_score", "new_control", "new_selectivity")
    rows = [[_at_own_best(found, name, key) for key in keys] for name in names]
    if known := [row for row in rows if None not in row]:
        score, control, gap = np.array(known, float).mean(0)
        said += f"; on new documents {score:.2f}, control {control:.2f}, selectivity {gap:+.2f}"
    return said


def _unselective(probed: dict[str, dict[str, Any]]) -> str | None:
    """Which of the claims' properties a probe reads no better than values that have no meaning."""
    low = []
    for arm, found in probed.items():
        for name in (*INGREDIENTS, "relevant"):
            gap = _at_own_best(found, name, "selectivity")
            if gap is None or gap > 0:
                continue
            new = _at_own_best(found, name, "new_selectivity")
            beside = "not known" if new is None else f"{new:+.2f}"
            low.append(f"{PROPERTY_NAMES[name]} in {label(arm)} ({gap:+.2f}; {beside})")
    if not low:
        return None
    return (
        f"How much of these the documents' own look gives away: {', '.join(low)}. There the probe "
        "does no better than on values drawn at random for each document (selectivity), so what it "
        "reads it may have learnt document by document. Behind the semicolon the selectivity on "
        "new documents: where it is above 0, some of it is read off documents never seen."
    )


def _coded(of: dict[str, Any]) -> bool:
    """Whether the probe of a property saves bits of its code somewhere."""
    return any((row["saved_bits"]["mean"] or 0) > 0 for row in of["layers"])


def _told(row: dict[str, Any]) -> str:
    """A difference with Holm's p; of one seed, without."""
    gap = row["difference"]
    sure = f"Holm p {p_value(gap['p_holm'])}" if "p_holm" in gap else "one seed"
    return f"{gap['mean']:+.3f} ({sure})"


def _experts(arm: str, found: dict[str, Any], tested: Sequence[dict[str, Any]]) -> list[str]:
    """Whether reranking's own expert holds more of BM25's ingredients than the others."""
    own = held(found, OWN_ALONE, INGREDIENTS) if OWN_ALONE in found["views"] else {}
    start = f"{HELD}, expert: {OWN_ALONE} against "
    gaps = [row for row in tested if row["arm"] == arm and row["what"].startswith(start)]
    if not own or not gaps:
        return []
    others = ", ".join(f"{_told(row)} against {row['what'].removeprefix(start)}" for row in gaps)
    mean = np.mean(list(own.values()))
    return [
        f"Of {label(arm)} with one expert alone, that which pairs are given more than other texts "
        f"holds BM25 and its ingredients at a mean R² of {mean:.2f}: {others}."
    ]


def reading(v: dict[str, Any]) -> str:
    said = []
    base = next(iter(v["probed"].values()))
    in_base = [
        f"{PROPERTY_NAMES[name]} at layer {first_layer(base, of['layers']) + of['best']} "
        f"({of['layers'][of['best']]['score']['mean']:.2f})"
        for name in INGREDIENTS
        if (of := base["views"]["base"][name])["best"] is not None
    ]
    if in_base:
        said.append(f"The base holds BM25 and its ingredients best in: {', '.join(in_base)}.")
    for arm, found in v["probed"].items():
        gains = {}  # of R^2 alone: those of accuracies have another unit
        for name in (n for n in found["views"]["model"] if n not in found["binary"]):
            of = found["views"]["model"][name]
            if not _coded(of):
                continue  # R² without a bit saved says nothing of the property
            depth = len(of["layers"])
            base_rows = found["views"]["base"][name]["layers"][-depth:]
            best, other = at_best(of["layers"]), at_best(base_rows)
            if best and other:
                gains[name] = best["mean"] - other["mean"]
        if gains:
            up, down = max(gains, key=lambda n: gains[n]), min(gains, key=lambda n: gains[n])
            said.append(
                f"Against the same layers of the base, {label(arm)}'s pairs gain most R² on "
                f"{PROPERTY_NAMES[up]} ({gains[up]:+.2f}) and least on {PROPERTY_NAMES[down]} "
                f"({gains[down]:+.2f})."
            )
        for what in (HELD, RELEVANCE):
            rows = [row for row in v["tests"] if row["arm"] == arm and
                    row["what"].startswith(f"{what}, against ")]  # fmt: skip
            if rows:
                told = ", ".join(f"{_told(row)} {row['what'].split(', ')[1]}" for row in rows)
                names = INGREDIENTS if what == HELD else ("relevant",)
                said.append(f"{label(arm)} on {what}: {told}{_beside(found, names)}.")
        said += _experts(arm, found, v["tests"])
    if max(len(row["seeds"]) for row in v["arms"].values()) == 1:
        said.insert(0, "One seed: what differs between arms may be its own.")
    more = ablation.reading(v["ablated"])
    return " ".join([*said, more] if more else said) or "There is nothing to compare yet."


def _cells(row: dict[str, Any], view: str) -> list[str]:
    """Of COLUMNS, at one layer."""
    if view == "base":  # one model, whatever the seeds of the arms
        row = {key: over_seeds(row[key]["seeds"][:1]) for key in row}

    def beside_control(of: str) -> list[str]:
        control, sd = row[f"{of}control"], row[f"{of}control_sd"]["mean"]
        told = spread(control) if sd is None else f"{spread(control)} ({sd:.2f})"
        return [spread(row[f"{of}score"]), told, spread(row[f"{of}selectivity"])]

    code = [spread(row["bits"]), spread(row["saved_bits"])]
    return [*beside_control(""), *beside_control("new_"), *code, str(len(row["score"]["seeds"]))]


def markdown(v: dict[str, Any]) -> str:
    from analysis.probing import DRAWS, PORTIONS  # takes a second, with scikit-learn

    rows, last, one = [], [], next(iter(v["probed"].values()))
    for arm, found in v["probed"].items():
        for view, properties in found["views"].items():
            if view == "base" and found is not one:
                continue  # the same for every arm
            for name, of in properties.items():
                if of["best"] is None:
                    continue
                who = "untrained base" if view == "base" else label(arm)
                where = "all layers" if view == "base" else view
                layer = str(first_layer(found, of["layers"]) + of["best"])
                rows.append([who, where, PROPERTY_NAMES[name], layer,
                             *_cells(of["layers"][of["best"]], view)])  # fmt: skip
                if view in ("base", "model"):
                    last.append([who, PROPERTY_NAMES[name], *_cells(of["layers"][-1], view)])
    unsure = limits(v)
    if low := _unselective(v["probed"]):
        unsure.insert(0, low)
    unsure.insert(0, "Whether the model uses what a probe reads: that needs an intervention.")
    body = BODY.format(
        pairs=one["pairs"],
        portions=", ".join(f"{100 * share:g}" for share in PORTIONS),
        queries=one["queries"],
        yes=", ".join(PROPERTY_NAMES[name] for name in one["binary"]),
        tokens=one["document_tokens"],
        cut=100 * one["cut"] / one["pairs"],
        draws=DRAWS,
        kept=100 * one["kept"],
        recurring=100 * one["recurring"] / one["pairs"],
        arms=compare.arms_section(v),
        table=table(["arm", "view", "property", "layer", *COLUMNS], rows),
        last=table(["arm", "property", *COLUMNS], last),
        tests=TESTS + claims_table(v["tests"], 3) if v["tests"] else "",
        picture=f"![probes](probes.png)\n\n*{CAPTION}*\n\n",
        ablation=ablation.markdown(v["ablated"]),
    )  # fmt: skip
    return frame(v, reading(v), body, unsure)


def draw(v: dict[str, Any]) -> Figure:
    """A panel a property: the score by layer, a line an arm."""
    arms = v["probed"]
    first = next(iter(arms.values()))
    names = list(first["views"]["model"])
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
            _line(axes, first, "base", name, figures.GREY, ":", "untrained base")
            unit = " (acc.)" if name in first["binary"] else ""
            axes.set_title(PROPERTY_NAMES[name] + unit, fontsize=7)
            axes.tick_params(labelsize=7)
        for axes, name in zip(grid[::wide], names[::wide], strict=False):
            axes.set_ylabel("accuracy" if name in first["binary"] else "R²")
        for axes in grid[-wide:]:
            axes.set_xlabel("layer")
        handles, texts = grid[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=4)
        return figure


def _line(axes, found: dict[str, Any], view: str, name: str, colour, dash, text: str) -> None:
    rows = [layer["score"]["seeds"] for layer in found["views"][view][name]["layers"]]
    if not all(rows):
        return
    at = first_layer(found, rows) + np.arange(len(rows))
    axes.plot(at, [np.mean(r) for r in rows], color=colour, linestyle=dash, marker="o",
              markersize=2, linewidth=1, label=text)  # fmt: skip
    shade(axes, at, rows, colour)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
