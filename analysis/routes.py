"""What routers do -> routing.json, report.md and figures; the numbers are `analysis.routing`'s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis import compare, disk, figures
from analysis.figures import TASKS, label, table
from analysis.page import (
    frame,
    limits,
    mean,
    over_seeds,
    spread,
    write_folder,
)
from eval import inference

SHIFTS = ("task", "template", "content")
KIND_NAMES = {"query": "queries", "document": "documents", "pair": "pairs"}
# Whether it is the task or the form of the text that moves the weights: the first two are of one
# task, the second and third of about one length.
APART = (("query", "document"), ("document", "pair"), ("query", "pair"))
BODY = """\
## Does routing follow the task?

Means over layers and {seeds} seeds, ± the standard deviation over seeds, with the 95 % interval
over seeds ({texts} texts a kind). Information: what the expert, drawn with a text's weights, tells
about its task, in bits of at most 1, beside its mean when the labels are shuffled; sure: the share
of layers and seeds in which chance is ruled out ({shuffles:,} shuffles, Holm over layers and
seeds). Entropy: of a text's weights, at most ln {experts_n} = {most:.2f}
nats. Variance: of the weights over the texts of a task, and between the tasks' means. Read off: how
often a linear reader of the weights tells the task of a text that it has not seen, 50 % by chance;
soft weights can be read without fail and still hardly act on the task. Shift: total variation
between mean weights: of the two tasks (queries and documents against pairs); of the pair with and
without its template (`template`, the same words); of the bare pair and the document alone
(`content`, no template in either). These are three comparisons, not parts of one another.

{task}Retrieval holds queries and documents, reranking pairs: what tells the tasks may be the form
of the text. Total variation between the mean weights of two kinds of text, in %:

{apart}## Expert by expert

Mean weight over layers and seeds, by the expert's name: each seed settles anew what a name is used
for, so a mean near a third may be of seeds that differ (the spread tells). Dead: layers whose mean
weight over both tasks is under 1 %, of all layers and seeds. Role: the task that the expert is
matched to (Hungarian, on its mean weight in the task less that over both), in how many seeds.

{experts}{layers}By layer: information on the task, the shift between the tasks' mean weights and
the entropy of the weights.

{depth}## Does routing follow the domain?

Information on the domain of a text, in bits, by kind of text; else as above.

{domain}{places}## Along training

{along}{arms}"""
DOMAINS = (
    "Mean weights, over texts and layers, in the domains with the most texts; over seeds by the "
    "expert's name, as above."
)
LAYERS = (
    "Mean expert weights by layer and kind of text, a line for each seed and expert (each seed "
    "settles anew what an expert is used for, so their mean would be no model's); grey: uniform."
)


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/routing/<setting>; return what routing.json holds.

    Raises ValueError as `disk.load`, and if no trial's routing was measured.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    measured = disk.measured(folder, arms, "routing")
    if not measured:
        raise ValueError(f"{folder} has no measured routing yet: `make routing` makes it")
    found = compare.compare(folder, baselines, arms)
    disk.add_measures(found, measured, "routing")
    found["measured"] = {arm: summarise(trials) for arm, trials in measured.items()}
    drawn = {"layers": draw(found, measured)}
    with matplotlib.rc_context(figures.STYLE):
        curves = figures.routing(arms)
    if curves is not None:
        drawn["along"] = curves
    write_folder(folder, {"routing.json": found}, markdown(found, "along" in drawn), drawn)
    return found


def summarise(trials: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One arm: means over layers and seeds, and how often something is sure."""
    first = next(iter(trials.values()))
    every = list(trials.values())

    def told(rows: Callable[[dict[str, Any]], list[dict[str, float]]]) -> dict[str, Any]:
        adjusted = inference.holm([row["p"] for trial in every for row in rows(trial)])
        of = {name: over_seeds([mean([row[name] for row in rows(trial)]) for trial in every])
              for name in ("nats", "by_chance")}  # fmt: skip
        return {**of, "sure": float(np.mean([p <= inference.ALPHA for p in adjusted]))}

    def means(value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return over_seeds([value(trial) for trial in every])

    dead = [name for trial in every for layer in trial["dead"] for name in layer]
    depth = sum(len(trial["dead"]) for trial in every)
    return {
        "seeds": list(trials),
        "first_layer": first["first_layer"],
        "experts": first["experts"],
        "texts": first["texts"],
        "shuffles": first["shuffles"],
        "task": told(lambda trial: trial["task"]),
        "decoded": means(lambda trial: float(np.mean(trial["decoded"]))),
        "domain": {
            kind: told(lambda trial, k=kind: trial["domain"][k])
            for kind in KIND_NAMES
            if kind in first["domain"]
        },
        "shift": {
            name: means(lambda trial, of=name: float(np.mean(trial["shift"][of])))
            for name in first["shift"]
        },
        "entropy": {
            t: means(lambda trial, t=t: float(np.mean(trial["entropy"][t]))) for t in TASKS
        },
        "apart": {
            f"{a} and {b}": means(
                lambda trial, a=a, b=b: (
                    0.5
                    * float(
                        np.mean(np.abs(np.subtract(trial["means"][a], trial["means"][b])).sum(-1))
                    )
                )
            )
            for a, b in APART
        },
        "difference": over_seeds(
            [
                float(np.mean(trial["shift"]["template"]) - np.mean(trial["shift"]["content"]))
                for trial in every
            ]
        ),
        "layers": [
            {
                "nats": over_seeds([trial["task"][i]["nats"] for trial in every]),
                "shift": over_seeds([trial["shift"]["task"][i] for trial in every]),
                **{t: over_seeds([trial["entropy"][t][i] for trial in every]) for t in TASKS},
            }
            for i in range(len(first["task"]))
        ],
        "domains": _domains(every),
        "within": means(lambda trial: float(np.mean(trial["within"]))),
        "between": means(lambda trial: float(np.mean(trial["between"]))),
        "weights": {
            kind: [
                means(lambda trial, kind=kind, e=e: float(np.mean(trial["means"][kind], 0)[e]))
                for e in range(len(first["experts"]))
            ]
            for kind in first["means"]
        },
        "dead": {name: dead.count(name) / depth for name in first["experts"]},
        "idle": [sum(bool(trial["dead"][i]) for trial in every) for i in range(len(first["task"]))],
        "roles": {
            name: {task: sum(trial["roles"].get(task) == name for trial in every) for task in TASKS}
            for name in first["experts"]
        },
    }


def _domains(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """domain -> texts, and by kind the weight of each expert over seeds; {} where not measured."""
    return {
        name: {
            "texts": row["texts"],
            **{kind: [over_seeds([t["domains"][name][kind][e] for t in trials])
                      for e in range(len(row[kind]))]
               for kind in KIND_NAMES},
        }
        for name, row in trials[0].get("domains", {}).items()
        if all(name in t.get("domains", {}) for t in trials)
    }  # fmt: skip


BIT = float(np.log(2))


def reading(v: dict[str, Any]) -> str:
    said = []
    for arm, found in v["measured"].items():
        task, shift = found["task"], {name: row["mean"] for name, row in found["shift"].items()}
        text = (
            f"{label(arm)}'s routing tells {task['nats']['mean'] / BIT:.4f} bits of the task's 1 "
            f"({task['by_chance']['mean'] / BIT:.5f} by chance), sure in "
            f"{100 * task['sure']:.0f} % of the layers and seeds; a linear reader of the weights "
            f"tells the task in {100 * found['decoded']['mean']:.0f} % of the texts (50 % by "
            f"chance); the mean weights of the two tasks lie {100 * shift['task']:.1f} % apart, "
            "those of queries and documents, which are one task, "
            f"{100 * found['apart']['query and document']['mean']:.1f} %, those of documents and "
            f"pairs {100 * found['apart']['document and pair']['mean']:.1f} %"
        )
        if shift["template"] > 0:  # without a template there is nothing to take away
            text += (
                f"; the template alone moves them by {100 * shift['template']:.1f} %, other words "
                f"by {100 * shift['content']:.1f} % (difference "
                f"{_scaled(found['difference'], 100, '+.1f')} points)"
            )
        said.append(f"{text}.")
        if any(found["idle"]):
            where = ", ".join(f"{count} of {len(found['seeds'])} seeds at layer "
                              f"{found['first_layer'] + i}"
                              for i, count in enumerate(found["idle"]) if count)  # fmt: skip
            said.append(f"An expert carries under 1 % of both tasks in {where}.")
    said.append(compare.reading(v))
    return " ".join(said)


def markdown(v: dict[str, Any], curves: bool) -> str:
    task, experts, domain = [], [], []
    for arm, found in v["measured"].items():
        shift = [_scaled(found["shift"][name], 100, ".1f") for name in SHIFTS]
        task.append([
            label(arm), *_told(found["task"]), _scaled(found["decoded"], 100, ".0f"), *shift,
            *(spread(found["entropy"][t]) for t in TASKS),
            spread(found["within"], ".4f"), spread(found["between"], ".4f"),
        ])  # fmt: skip
        for at, name in enumerate(found["experts"]):
            roles = [f"{t} {n}" for t, n in found["roles"][name].items() if n]
            experts.append([
                label(arm), name, *(spread(found["weights"][kind][at]) for kind in KIND_NAMES),
                f"{100 * found['dead'][name]:.0f} %", ", ".join(roles) or "-",
            ])  # fmt: skip
        for kind, text in KIND_NAMES.items():
            if kind in found["domain"]:
                domain.append([label(arm), text, *_told(found["domain"][kind])])
    depth = [
        [label(arm), str(found["first_layer"] + i), _scaled(row["nats"], 1 / BIT, ".4f"),
         _scaled(row["shift"], 100, ".1f"), *(spread(row[t]) for t in TASKS)]
        for arm, found in v["measured"].items() for i, row in enumerate(found["layers"])
    ]  # fmt: skip
    domains = [
        [label(arm), name, str(row["texts"]), text, *map(spread, row[kind])]
        for arm, found in v["measured"].items() for name, row in found["domains"].items()
        for kind, text in KIND_NAMES.items()
    ]  # fmt: skip
    one = next(iter(v["measured"].values()))
    unsure = limits(v)
    unsure.insert(0, "Whether an expert does what its name says: weights say who is used, not what "
                     "for.")  # fmt: skip
    head = ["arm", "information (bits)", "by chance", "sure"]
    body = BODY.format(
        texts=next(iter(one["texts"].values())),
        seeds=" or ".join(map(str, sorted({len(f["seeds"]) for f in v["measured"].values()}))),
        shuffles=one["shuffles"],
        experts_n=len(one["experts"]),
        most=np.log(len(one["experts"])),
        task=table([*head, "read off (%)", "shift: task (%)", "template (%)", "content (%)",
                    "entropy, retrieval (nats)", "entropy, reranking", "variance within a task",
                    "between tasks"], task),
        experts=table(["arm", "expert", *KIND_NAMES.values(), "dead", "role (seeds)"], experts),
        layers=f"![layers](layers.png)\n\n*{LAYERS}*\n\n",
        apart=table(
            ["arm", *(f"{KIND_NAMES[a]} and {KIND_NAMES[b]}" for a, b in APART)],
            [[label(arm), *(_scaled(row, 100, ".1f") for row in found["apart"].values())]
             for arm, found in v["measured"].items()],
        ),
        arms=compare.arms_section(v),
        depth=table(["arm", "layer", "information (bits)", "shift: task (%)",
                     "entropy, retrieval (nats)", "entropy, reranking"], depth),
        places=f"{DOMAINS}\n\n{table(['arm', 'domain', 'texts', 'of', *one['experts']], domains)}"
        if domains
        else "",
        domain=table([head[0], "texts", *head[1:]], domain)
        if domain
        else "Not measured: the collection names no domains.\n\n",
        along="![along](along.png)\n\n*" + figures.CAPTIONS["routing"] + "*\n\n"
        if curves
        else "Not drawn: Joint-MoE was not run.\n\n",
    )  # fmt: skip
    return frame(v, reading(v), body, unsure)


def _scaled(found: dict[str, Any], factor: float, form: str) -> str:
    """`page.spread` in another unit."""
    return spread(over_seeds([factor * value for value in found["seeds"]]), form)


def _told(found: dict[str, Any]) -> list[str]:
    return [_scaled(found["nats"], 1 / BIT, ".4f"), f"{found['by_chance']['mean'] / BIT:.5f}",
            f"{100 * found['sure']:.0f} %"]  # fmt: skip


def draw(v: dict[str, Any], measured: dict[str, dict[int, dict[str, Any]]]) -> Figure:
    """A row an arm, a panel a kind of text: the weight of each expert by layer."""
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 1.7 * len(measured) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(measured), len(KIND_NAMES), sharey=True, squeeze=False)
        for line, (arm, trials) in zip(grid, measured.items(), strict=True):
            first = next(iter(trials.values()))
            for axes, (kind, text) in zip(line, KIND_NAMES.items(), strict=True):
                w = np.array([trial["means"][kind] for trial in trials.values()])  # (S, layers, E)
                at = first["first_layer"] + np.arange(w.shape[1])
                for e, name in enumerate(first["experts"]):
                    lines = axes.plot(at, w[:, :, e].T, color=figures.EXPERTS[e], linewidth=0.9,
                                      linestyle=figures.DASHES[e % 4], marker="o",
                                      markersize=2.2)  # fmt: skip
                    lines[0].set_label(name)
                axes.axhline(1 / len(first["experts"]), color=figures.GREY, linewidth=0.6, zorder=0)
                axes.set_title(f"{label(arm)}, {text}", fontweight="bold")
                figures.layer_ticks(axes, at)
                axes.set_ylim(-0.03, 1.03)
            line[0].set_ylabel("mean weight")
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure
