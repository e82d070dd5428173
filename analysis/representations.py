"""Representations -> representation.json, report.md and figures; numbers of the measure's files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import compare, disk, roles, subspaces
from analysis.figures import label, table
from analysis.page import (
    by_seed,
    claims_table,
    frame,
    limits,
    mean,
    over_seeds,
    spread,
    write_folder,
)
from analysis.representation_claims import SPECIALISTS, UNROUTED, claims
from analysis.representation_figures import (
    CAPTIONS,
    KIND_NAMES,
    MAP_NAMES,
    draw_experts,
    draw_layers,
    draw_maps,
    draw_spectra,
    draw_stir,
)
from eval import inference, rule

BODY = """\
All views are of the same {texts} documents and {texts} pairs: the mean over a text's tokens of the
hidden state behind each adapted layer, each token at root mean square 1, as later blocks read it
(the raw states vary almost only in one direction, that of the first token's massive activations).
Values are means over {seeds} seeds ± their standard deviation, with the 95 % interval over seeds
(Student's t, which knows no limit such as CKA's 1).

## How alike are the models?

Unbiased linear CKA of an arm's features with those of another arm of the same seed and with the
base's, behind the last layer; 1 is the same up to rotation and scale, 0 unrelated.

{models}{layers}{tests}## How alike are the experts?

CKA behind the last layer of two views of one model on the same texts: each expert alone, `uniform`
(all of them with equal weights) and `base` (untrained). Experts of a learned router are told by
their roles, which it deals anew with each seed: a task's own is the one that its texts give more
weight than the other's do, over the last quarter of the steps. Where no router learns they have
their names, of which those of {unrouted} mean nothing.

{views}{experts}
## What do the experts look like?

Over all adapted linears: Frobenius norm of ΔW = s B A, effective rank (exp of the entropy of the
normalised singular values) and stable rank.

{spectra}Pairs of experts: mean squared cosine of the principal angles of what they read (rows of
A) and where they write (columns of B), beside what random spaces of their ranks have, and the
cosine of the two ΔW.

{pairs}{values}## Does an expert act on the other task's texts?

Crosstalk: E ||ΔW x||² on pairs over that on documents, over all linears (geometric mean); 1: the
expert acts on both alike.

{crosstalk}
## Do the tasks share a subspace? (STIR)

Of what training added to the features of documents and of pairs: how much one task's k leading
directions hold of the other's variance (cross), between what they hold of the other half of their
own task's texts (within) and what random directions hold (null): STIR = (cross - null) / (within -
null). k: as many as hold 90 % of the energy, at most a tenth of the texts in a half; held: how much
they do hold (harmonic mean of the tasks), and below 90 % the strongest directions alone are spoken
of. Direction: cosine of the two mean changes; tasks may share a subspace and pull apart in it. A
pair holds a document, and a specialist has never trained the other task: its STIR is what the
texts' likeness gives by itself, and speaks of the tasks only as far as a joint arm's differs.

{stir}{overlap}{subspaces}{maps}{arms}"""
TESTS = """Tested, over seeds, with Holm's correction over this table; detectable: with 80 % power
at its first step. Of another arm's overlap, the mean of its pairs at the same seed.

"""
NONE = over_seeds([])  # of an arm that was not run


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/representation/<setting>; return what representation.json holds.

    Raises ValueError as `disk.load`, and if no trial was measured.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    measured = disk.measured(folder, arms, "representation")
    if not measured:
        raise ValueError(f"{folder} has no measured model yet: `make representation` makes it")
    found = compare.compare(folder, baselines, arms)
    disk.add_measures(found, measured, "representation")
    for arm, trials in measured.items():
        for seed, one in trials.items():
            trials[seed] = by_role(one, arms[arm][seed])
            if arm != "rank-only" and found["arms"][arm]["router"] != "task":
                # In older files it is experts of one name, whatever their roles.
                trials[seed]["deltas"] = [row for row in one["deltas"] if "experts" in row]
    found["measured"] = {arm: summarise(trials) for arm, trials in measured.items()}
    for arm, of in found["measured"].items():
        width = next(iter(arms[arm].values()))["width"]
        for row in of["stir"]:  # the null is (k / D) / held
            row["held"] = row["k"]["mean"] / width / row["null"]["mean"]
    found["tests"] = claims(found["measured"])
    drawn = {"layers": draw_layers(found), "spectra": draw_spectra(measured),
             "stir": draw_stir(found),
             **{name: draw_maps(measured, MAP_NAMES[name]) for name in MAP_NAMES}}  # fmt: skip
    if any(of["pairs"] for of in found["measured"].values()):
        drawn["experts"] = draw_experts(found)
    write_folder(folder, {"representation.json": found}, markdown(found), drawn)
    return found


def by_role(measured: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """With the experts of a learned router under their roles, in an order that is the same for
    every seed (`roles.columns`)."""
    names, order = roles.columns(trial)
    experts = [trial["config"]["experts"][at] for at in order]
    told = dict(zip(experts, names, strict=True))
    views = ["model", "base", *names, "uniform"]

    def pair(two: Sequence[str]) -> list[str]:
        return sorted((told.get(view, view) for view in two), key=views.index)

    def place(row: tuple[list[str], Any]) -> list[int]:
        return [views.index(view) for view in row[0]]

    cka = {kind: sorted(((pair(name.split(" | ")), row) for name, row in rows.items()), key=place)
           for kind, rows in measured["cka"].items()}  # fmt: skip
    return {
        **measured,
        "experts": names,
        "cka": {kind: {" | ".join(two): row for two, row in rows} for kind, rows in cka.items()},
        "linears": [
            {
                **row,
                "alone": {told[expert]: row["alone"][expert] for expert in experts},
                "pairs": [
                    {**of, "experts": two}
                    for two, of in sorted(
                        ((pair(of["experts"]), of) for of in row["pairs"]), key=place
                    )
                ],
            }
            for row in measured["linears"]
        ],
        "crosstalk": [
            {**row, "energy": {told[expert]: row["energy"][expert] for expert in experts}}
            for row in measured["crosstalk"]
        ],
    }


def summarise(of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds; of: seed -> what was measured."""
    trials = list(of.values())
    first = trials[0]
    pairs = [" | ".join(pair["experts"]) for pair in first["linears"][0]["pairs"]]
    return {
        "at": list(of),
        "first_layer": first["first_layer"],
        "seeds": len(trials),
        "texts": first["texts"],
        "base": {
            kind: [[trial["cka"][kind]["model | base"][i] for trial in trials]
                   for i in range(len(first["cka"][kind]["model | base"]))]
            for kind in KIND_NAMES
        },
        "arms": {
            kind: {arm: by_seed([trial["cka_arms"][kind].get(arm, [None])[-1]
                                  for trial in trials])
                   for arm in {a: 0 for trial in trials for a in trial["cka_arms"][kind]}}
            for kind in KIND_NAMES
        },
        "views": {
            kind: {name: over_seeds([trial["cka"][kind][name][-1] for trial in trials])
                   for name in first["cka"][kind]}
            for kind in KIND_NAMES
        },
        "experts": {  # by layer, the seeds' values
            kind: {name: [list(at) for at in zip(*(trial["cka"][kind][name] for trial in trials),
                                                 strict=True)]
                   for name in pairs}
            for kind in KIND_NAMES
        },
        "spectra": {
            expert: {name: over_seeds([
                mean([row["alone"][expert][name] for row in trial["linears"]]) for trial in trials
            ]) for name in ("norm", "effective_rank", "stable_rank")}
            for expert in first["experts"]
        },
        "pairs": {
            name: _over_linears(trials, at) for at, name in enumerate(pairs)
        },
        "crosstalk": {
            expert: over_seeds([_crosstalk(trial["crosstalk"], expert) for trial in trials])
            for expert in first["experts"]
        },
        "stir": [
            {key: by_seed([trial["stir"][i][key] for trial in trials])
             for key in ("stir", "direction", "cross", "within", "null", "k")}
            for i in range(len(first["stir"]))
        ],
        **{what: subspaces.summarise(trials, what) for what in ("gradients", "deltas")},
    }  # fmt: skip


def _over_linears(trials: list[dict[str, Any]], at: int) -> dict[str, dict[str, Any]]:
    """A pair of experts: the mean over linears of each overlap and of the cosine, over seeds."""
    of = [[row["pairs"][at] for row in trial["linears"]] for trial in trials]
    return {
        **{f"{side}_{key}": over_seeds([mean([pair[side][key] for pair in rows]) for rows in of])
           for side in ("inputs", "outputs") for key in ("overlap", "by_chance")},
        "cosine": over_seeds([mean([pair["cosine"] for pair in rows]) for rows in of]),
    }  # fmt: skip


def _crosstalk(rows: list[dict[str, Any]], expert: str) -> float:
    """Geometric mean over linears of an expert's energy on pairs over that on documents."""
    energy = [row["energy"][expert] for row in rows]
    ratios = [max(e["pair"], 1e-300) / max(e["document"], 1e-300) for e in energy]
    return float(np.exp(np.mean(np.log(ratios))))


def reading(v: dict[str, Any]) -> str:
    said = []
    for kind in KIND_NAMES:
        last = [mean(found["base"][kind][-1]) for found in v["measured"].values()]
        alike = [value for value in last if value is not None]
        if alike:
            said.append(
                f"Behind the last layer the arms lie at CKA {_range(alike)} with the base on "
                f"{KIND_NAMES[kind].split()[0]}."
            )
    for arm, found in v["measured"].items():
        near = {
            other: [found["arms"][kind].get(other, NONE)["mean"] for kind in KIND_NAMES]
            for other in SPECIALISTS
        }
        if arm in near or None in (value for values in near.values() for value in values):
            continue
        gaps = [row["difference"] for row in v["tests"]
                if row["arm"] == arm and row["what"].startswith("CKA")]  # fmt: skip
        sure = [gap["mean"] > 0 for gap in gaps if gap.get("p_holm", 1) <= inference.ALPHA]
        unsure = not gaps or len(sure) < len(gaps) or len(set(sure)) > 1
        first, second = sorted(near, key=lambda other, near=near: -sum(near[other]))
        values = {o: " and ".join(f"{value:.2f}" for value in near[o]) for o in near}
        said.append(
            f"{label(arm)} is nearer to {label(first)} (CKA {values[first]} on "
            f"{' and '.join(text.split()[0] for text in KIND_NAMES.values())}) than to "
            f"{label(second)} ({values[second]})"
            f"{', not significantly' if unsure else ''}."
        )
    shared = [
        f"{found['stir'][-1]['stir']['mean']:.2f} in {label(arm)}"
        for arm, found in v["measured"].items()
        if arm in (*SPECIALISTS, "joint-single") and found["stir"][-1]["stir"]["mean"] is not None
    ]
    if shared:
        said.append(
            "Behind the last layer STIR between what training added to documents and to pairs is "
            f"{', '.join(shared)}."
        )
    for arm, found in v["measured"].items():
        known = {side: row["stir"]["mean"] for side, row in found["deltas"].items()}
        if known and None not in known.values():
            told = " and ".join(f"{value:.2f} ({side})" for side, value in known.items())
            own = f"the tasks' own experts of {label(arm)}"
            whose = "the specialists" if arm == "rank-only" else own
            said.append(
                f"What training changed in the weights for each task shares STIR {told} between "
                f"{whose}."
            )
    moe = v["measured"].get("joint-moe")
    if moe and moe["pairs"]:
        of = [[row[f"outputs_{key}"]["mean"] for row in moe["pairs"].values()]
              for key in ("overlap", "by_chance")]  # fmt: skip
        said.append(
            f"Joint-MoE's experts write into spaces that overlap by {_range(of[0])} "
            f"({_range(of[1])} by chance){_unrouted(v)}."
        )
    return " ".join(said)


def _unrouted(v: dict[str, Any]) -> str:
    """How the overlaps of Joint-MoE's experts compare with those of Uniform-MoE."""
    end = f"less {label(UNROUTED)}'s"
    gaps = [row["difference"] for row in v["tests"]
            if row["arm"] == rule.MOE and row["what"].endswith(f"(write) {end}")]  # fmt: skip
    if not gaps:
        return ""
    told = [gap["mean"] for gap in gaps if gap.get("p_holm", 1) <= inference.ALPHA]
    if not any("p_holm" in gap for gap in gaps):
        return ""
    if len(told) == len(gaps) and len({gap < 0 for gap in told}) == 1:
        less = f"{_range([abs(gap) for gap in told])} {'less' if told[0] < 0 else 'more'}"
        return f", {less} than those of {label(UNROUTED)}"
    return f"; {len(told)} of {len(gaps)} differ significantly from those of {label(UNROUTED)}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def markdown(v: dict[str, Any]) -> str:
    models, views, spectra, pairs, crosstalk, stir = [], [], [], [], [], []
    for arm, found in v["measured"].items():
        for kind, text in KIND_NAMES.items():
            with_base = spread(over_seeds(found["base"][kind][-1]))
            others = [spread(found["arms"][kind].get(other, NONE)) for other in
                      ("emb-only", "rank-only", "joint-single")]  # fmt: skip
            models.append([label(arm), text, with_base, *others])
        for name in found["views"]["pair"]:
            if "model" not in name:
                cells = [spread(found["views"][kind][name]) for kind in KIND_NAMES]
                views.append([label(arm), name.replace(" | ", " with "), *cells])
        for expert, row in found["spectra"].items():
            spectra.append([label(arm), expert, *map(spread, row.values())])
            crosstalk.append([label(arm), expert, spread(found["crosstalk"][expert])])
        for name, row in found["pairs"].items():
            pairs.append([
                label(arm), name.replace(" | ", " with "),
                *(text for side in ("inputs", "outputs") for text in
                  (spread(row[f"{side}_overlap"]), f"{row[f'{side}_by_chance']['mean']:.2f}")),
                spread(row["cosine"], "+.2f"),
            ])  # fmt: skip
        for i, row in enumerate(found["stir"]):
            stir.append([
                label(arm), str(found["first_layer"] + i),
                spread(row["stir"], "+.2f"), spread(row["cross"]), spread(row["within"]),
                f"{row['null']['mean']:.2f}", f"{row['k']['mean']:.0f}",
                f"{100 * row['held']:.0f} %", spread(row["direction"], "+.2f"),
            ])  # fmt: skip
    one = next(iter(v["measured"].values()))
    unsure = limits(v)
    unsure.insert(0, "Whether what differs is used: CKA, overlaps and STIR describe, they do not "
                     "intervene.")  # fmt: skip
    none = "No arm has more than one expert.\n"
    body = BODY.format(
        texts=one["texts"]["pair"],
        unrouted=label(UNROUTED),
        seeds=" or ".join(map(str, sorted({found["seeds"] for found in v["measured"].values()}))),
        models=table(["arm", "texts", "base", "Emb-Only", "Rank-Only", "Joint-Single"], models),
        layers=_picture("layers"),
        tests=TESTS + claims_table(v["tests"]) if v["tests"] else "",
        views=table(["arm", "experts", *KIND_NAMES.values()], views) if views else none,
        experts=_picture("experts") if any(of["pairs"] for of in v["measured"].values()) else "",
        spectra=table(["arm", "expert", "norm", "effective rank", "stable rank"], spectra),
        pairs=table(["arm", "experts", "read", "by chance", "write", "by chance", "cosine of ΔW"],
                    pairs) if pairs else none + "\n",
        values=_picture("spectra"),
        crosstalk=table(["arm", "expert", "crosstalk"], crosstalk),
        stir=table(["arm", "layer", "STIR", "cross", "within", "null", "k",
                    "held", "direction"], stir),
        overlap=_picture("stir"),
        subspaces=subspaces.markdown(v["measured"], label),
        arms=compare.arms_section(v),
        maps="".join(_picture(name) for name in MAP_NAMES),
    )  # fmt: skip
    return frame(v, reading(v), body, unsure)


def _picture(name: str) -> str:
    return f"![{name}]({name}.png)\n\n*{CAPTIONS[name]}*\n\n"
