"""Keep and omit: what a model loses when a part of its adapters is taken back to the base.

After "How Relevance Emerges" (arXiv 2504.08780): a component's changes are taken out (omit), or all
others' are (keep), and the model is measured again, without any training. Components are the
projections, attention and MLP, the layers, the experts. Routers and the head stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from analysis import figures
from analysis.figures import METRIC, TASKS, label, span, table
from analysis.page import over_seeds, spread
from eval import metrics
from eval.protocol import EvaluationSet
from model.lora import adapted
from model.unimoer import UniMoER
from trials import Config

BLOCKS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}
SHARE = 4  # one of so many of the texts that other measures see: each component is an evaluation
Part = tuple[int, str, str]  # layer, projection, expert
TEXT = """## Which part of the adapters does the work? (keep and omit)

Points of nDCG@10 × 100 lost when a component's changes are taken back to the base, and the share of
the whole gain over the base that is left when it alone is kept, on {queries} queries: reranking of
their BM25 candidates, retrieval among the candidates and the relevant documents of all of them.
The base keeps the trained head and routers, unlike the untrained one of the scores; a seed whose
adapters gain nothing over it has no share (then how many have one stands behind). Nothing is
trained anew. Means over seeds ± their standard deviation, with 95 % intervals over seeds.

{table}![ablation](ablation.png)

*{caption}*

"""
CAPTION = (
    "Left: points lost without a component; right: share of the gain over the base that it keeps "
    "alone (cut at -1 and 2). Means over seeds, where there are several with 95 % intervals."
)


@contextmanager
def only(model: UniMoER, keeps: Callable[[Part], bool]) -> Iterator[None]:
    """Within, B is 0 for every (layer, projection, expert) that `keeps` refuses."""
    assert model.config.lora is not None
    slices, before = model.config.lora.slices(), []
    with torch.no_grad():
        for layer, _, name, group in adapted(model):
            b = group.lora_B[name]
            before.append((b, b.clone()))
            for expert, at in slices.items():
                if not keeps((layer, name, expert)):
                    b[:, at] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for b, old in before:
                b.copy_(old)


def components(model: UniMoER) -> dict[str, Callable[[Part], bool]]:
    """name -> whether a part belongs to it; what would be the whole model is left out."""
    assert model.config.lora is not None
    lora = model.config.lora
    layers = range(lora.first_layer, len(model.decoder.layers))
    found: dict[str, Callable[[Part], bool]] = {}
    for projection in lora.targets:
        found[projection] = lambda part, name=projection: part[1] == name
    for block, names in BLOCKS.items():
        found[block] = lambda part, names=names: part[1] in names
    if len(layers) > 1:
        for layer in layers:
            found[f"layer {layer}"] = lambda part, layer=layer: part[0] == layer
    if len(lora.experts) > 1:
        for expert in lora.experts:
            found[f"expert {expert}"] = lambda part, name=expert: part[2] == name
    return found


def measure(
    model: UniMoER, evaluation: EvaluationSet, data: object, config: Config, place: Path
) -> dict[str, Any]:
    """nDCG@10 of each task of the trial: whole, base, and for each component `omit` and `keep`."""
    sample = evaluation.sample(max(config.measured // SHARE, 1))
    tasks = config.scored or config.tasks

    def scores() -> dict[str, float]:
        measures = {"embedding": sample.retrieval, "reranking": sample.reranking}
        return {task: metrics.mean(measures[task](model), METRIC) for task in tasks}

    found: dict[str, Any] = {"queries": len(sample.queries), "whole": scores(), "components": {}}
    with only(model, lambda part: False):
        found["base"] = scores()
    for name, has in components(model).items():
        row = found["components"][name] = {}
        for kind, keeps in (("omit", lambda part, has=has: not has(part)), ("keep", has)):
            with only(model, keeps):
                row[kind] = scores()
    return found


def summarise(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """component -> task -> `lost` without it, in points, and `kept` alone, a share of the gain."""
    first, found = trials[0], {}
    for name in first["components"]:
        found[name] = {}
        for task in first["whole"]:
            lost, kept = [], []
            for trial in trials:
                whole, base = trial["whole"][task], trial["base"][task]
                row = trial["components"][name]
                lost.append(100 * (whole - row["omit"][task]))
                kept.append((row["keep"][task] - base) / (whole - base) if whole > base else None)
            found[name][task] = {"lost": over_seeds(lost), "kept": over_seeds(kept)}
    gains = {
        task: over_seeds([100 * (t["whole"][task] - t["base"][task]) for t in trials])
        for task in first["whole"]
    }
    return {"queries": first["queries"], "gains": gains, "components": found}


def markdown(ablated: dict[str, dict[str, Any]]) -> str:
    """ablated: arm -> as `summarise` gives it."""
    if not ablated:
        return ""
    rows = []
    for arm, found in ablated.items():
        for task, gain in found["gains"].items():
            cells = [spread(gain, "+.2f"), "1", str(len(gain["seeds"]))]
            rows.append([label(arm), TASKS[task], "everything", *cells])
        for name, tasks in found["components"].items():
            for task, row in tasks.items():
                seeds, shares = (len(row[key]["seeds"]) for key in ("lost", "kept"))
                some = f" ({shares} of {seeds})" if 0 < shares < seeds else ""
                cells = [spread(row["lost"], "+.2f"), spread(row["kept"]) + some, str(seeds)]
                rows.append([label(arm), TASKS[task], name, *cells])
    queries = next(iter(ablated.values()))["queries"]
    head = ["arm", "task", "component", "lost without it", "kept by it alone", "seeds"]
    return TEXT.format(queries=queries, table=table(head, rows), caption=CAPTION)


def reading(ablated: dict[str, dict[str, Any]]) -> str:
    """Of each arm and task, what its blocks are worth, and the projection with the largest mean."""
    said = []
    for arm, found in ablated.items():
        for task in found["gains"]:
            lost = {name: of[task]["lost"] for name, of in found["components"].items()}
            single = {n: row["mean"] for n, row in lost.items()
                      if n.endswith("_proj") and row["mean"] is not None}  # fmt: skip
            if single and {"attention", "MLP"} <= lost.keys():
                worst = max(single, key=lambda name: single[name])
                told = {name: _with_interval(lost[name]) for name in ("MLP", "attention", worst)}
                said.append(
                    f"On {TASKS[task]} {label(arm)} loses {told['MLP']} points without its MLP "
                    f"changes, {told['attention']} without those of attention; of single "
                    f"projections {worst} costs most ({told[worst]})."
                )
    return " ".join(said)


def _with_interval(row: dict[str, Any]) -> str:
    """`2.4 [1.9, 2.9]`; of one seed `2.4`."""
    interval = f" {span(row['interval'], 1, '', 1)}" if row["interval"] else ""
    return f"{row['mean']:.1f}{interval}"


def draw(ablated: dict[str, dict[str, Any]]) -> Figure:
    """A row a task, left what is lost without a component, right what it keeps alone."""
    names = list(dict.fromkeys(n for found in ablated.values() for n in found["components"]))
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 2 * (0.15 * len(names) + 0.6))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(TASKS), 2, sharey=True)
        for line, (task, text) in zip(grid, TASKS.items(), strict=True):
            for axes, kind in zip(line, ("lost", "kept"), strict=True):
                for at, (arm, found) in enumerate(ablated.items()):
                    colour = figures.COLOURS.get(arm, figures.GREY)
                    for y, name in enumerate(names):
                        row = found["components"].get(name, {}).get(task)
                        if row is None or row[kind]["mean"] is None:
                            continue
                        place = y + 0.22 * (at - (len(ablated) - 1) / 2)
                        axes.plot(row[kind]["mean"], place, "os^D"[at % 4], color=colour,
                                  markersize=2.8, label=label(arm) if y == 0 else None)  # fmt: skip
                        if row[kind]["interval"]:
                            axes.plot(row[kind]["interval"], [place] * 2, color=colour,
                                      linewidth=0.7)  # fmt: skip
                axes.axvline(0, color="black", linewidth=0.6, zorder=0)
                axes.set_yticks(range(len(names)), names, fontsize=7)
                axes.set_ylim(len(names) - 0.4, -0.6)
                axes.tick_params(axis="y", length=0)
            line[0].set_title(f"{text.capitalize()}: component removed", fontweight="bold")
            line[1].set_title(f"{text.capitalize()}: component alone", fontweight="bold")
            low, high = line[1].get_xlim()
            line[1].set_xlim(max(low, -1), min(high, 2))
        grid[-1][0].set_xlabel("points of nDCG@10 lost")
        grid[-1][1].set_xlabel("share of the gain kept")
        seen = {}
        for axes in grid.flatten():
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                seen.setdefault(text, handle)
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=4)
        return figure
