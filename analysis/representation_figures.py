"""The figures of representations: CKA and STIR by layer, spectra of the experts, maps of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from analysis import figures, roles
from analysis.bands import shade
from analysis.figures import label

KIND_NAMES = {"document": "documents (embedding)", "pair": "pairs (reranking)"}
# Experts, each in its colour in every panel; a role is no name.
NAMED = (*roles.OWN.values(), "the other", "shared", "embedding", "reranking")
MAP_NAMES = {"tsne": "t-SNE", "umap": "UMAP"}
CAPTIONS = {
    "layers": "CKA with the untrained base by layer: mean over seeds with its 95 % interval.",
    "experts": "CKA of two experts of one model, each alone on the same texts, by layer: mean over "
    "seeds with its 95 % interval (Student's t, which knows no limit such as 1). Experts of a "
    "learned router are told by their roles.",
    "spectra": "Singular values of ΔW by expert, each over its linear's largest: geometric mean "
    "over linears and seeds with its 95 % interval over seeds. Experts of a learned router are "
    "told by their roles.",
    "stir": "What training added, by layer: STIR between documents and pairs (1: as much as a "
    "task's own other half, 0: as random directions), and the cosine of the two mean changes; mean "
    "over seeds with its 95 % interval. The axes do not begin at 0.",
    **{
        name: f"{method} of the features behind the last layer, first seed: documents and pairs in "
        "one map for each view; equal weights: the same model with all experts on alike. "
        "Distances between clusters and their sizes mean little in a map."
        for name, method in MAP_NAMES.items()
    },
}


def draw_layers(v: dict[str, Any]) -> Figure:
    """CKA with the base by layer, a panel a kind of text, a line an arm."""
    titles = {kind: text.capitalize() for kind, text in KIND_NAMES.items()}
    figure, panels = _by_layer(v, titles, lambda found, kind: [
        [x for x in row if x is not None] for row in found["base"][kind]
    ])  # fmt: skip
    panels[0].set_ylabel("CKA with the base")
    return figure


def draw_experts(v: dict[str, Any]) -> Figure:
    """CKA of two experts by layer: a column a kind of text, a row an arm, a line a pair."""
    arms = {arm: found for arm, found in v["measured"].items() if found["pairs"]}
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 0.7 + 1.5 * len(arms))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(arms), len(KIND_NAMES), sharex=True, sharey=True, squeeze=False)
        for row, (arm, found) in zip(grid, arms.items(), strict=True):
            row[0].set_ylabel(f"{label(arm)}\nCKA")
            for axes, kind in zip(row, KIND_NAMES, strict=True):
                for at, (pair, rows) in enumerate(found["experts"][kind].items()):
                    x = [found["first_layer"] + i for i in range(len(rows))]
                    known = [[value for value in values if value is not None] for values in rows]
                    colour = figures.EXPERTS[at % len(figures.EXPERTS)]
                    middle = [np.mean(values) if values else np.nan for values in known]
                    axes.plot(x, middle, color=colour, marker="os^Dv"[at % 5], markersize=3,
                              linestyle=figures.DASHES[at % 4],
                              label=pair.replace(" | ", "\nwith "))  # fmt: skip
                    shade(axes, x, known, colour)
                    figures.layer_ticks(axes, x)
            row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=0.8)
        for axes, text in zip(grid[0], KIND_NAMES.values(), strict=True):
            axes.set_title(text.capitalize(), fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        return figure


def draw_stir(v: dict[str, Any]) -> Figure:
    """STIR between the tasks' changes and the cosine of their means by layer, a line an arm."""
    titles = {"stir": "Shared subspace", "direction": "Mean change"}
    figure, panels = _by_layer(
        v, titles, lambda found, key: [row[key]["seeds"] for row in found["stir"]]
    )
    for axes, name in zip(panels, ("STIR", "cosine"), strict=True):
        axes.set_ylabel(name)
        axes.axhline(1, color=figures.GREY, linewidth=0.6, zorder=0)
    return figure


def _by_layer(
    v: dict[str, Any], titles: dict[str, str],
    values: Callable[[dict[str, Any], str], list[list[float]]],
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A panel a title, a line an arm over the layers: the mean over seeds with its interval.
    values: (an arm's numbers, the title's key) -> by layer, the seeds' values."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.4), layout="constrained")
        panels = figure.subplots(1, len(titles), sharey=True)
        others = [arm for arm in v["measured"] if arm not in figures.COLOURS]
        colours = dict(zip(others, figures.SPARE, strict=False)) | figures.COLOURS
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            for at, (arm, found) in enumerate(v["measured"].items()):
                rows = values(found, key)
                known = [i for i, row in enumerate(rows) if row]
                colour = colours.get(arm, figures.GREY)
                x = [found["first_layer"] + i for i in known]
                axes.plot(x, [np.mean(rows[i]) for i in known], color=colour,
                          marker="os^Dv"[at % 5], linestyle=figures.DASHES[at % 4],
                          markersize=3, label=label(arm))  # fmt: skip
                shade(axes, x, [rows[i] for i in known], colour)
                figures.layer_ticks(axes, [found["first_layer"] + i for i in range(len(rows))])
            axes.set_title(title, fontweight="bold")
            axes.set_xlabel("layer")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure, list(panels)


def draw_spectra(measured: dict[str, dict[int, dict[str, Any]]]) -> Figure:
    """Normalised singular values, a panel an arm, a line an expert, on a logarithmic scale."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.3), layout="constrained")
        panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
        for axes, (arm, trials) in zip(panels, measured.items(), strict=True):
            first = next(iter(trials.values()))
            for expert in first["experts"]:
                at = NAMED.index(expert) if expert in NAMED else 0
                logs = [decay([row["alone"][expert]["values"] for row in trial["linears"]])
                        for trial in trials.values()]  # fmt: skip
                known = np.array([row for row in logs if row is not None])  # (seeds, R)
                if len(known):
                    x, colour = np.arange(1, known.shape[1] + 1), figures.EXPERTS[at]
                    axes.plot(x, known.mean(0), color=colour, linewidth=1.1,
                              linestyle=figures.DASHES[at % 4], label=expert)  # fmt: skip
                    shade(axes, x, known.T, colour)
            axes.set_title(label(arm), fontweight="bold")
            axes.set_xlabel("index")
        panels[0].set_ylabel("singular value / largest")
        panels[0].yaxis.set_major_locator(MultipleLocator(1))
        panels[0].yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
        named = {text: handle for axes in panels for handle, text in
                 zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(named.values(), named, loc="outside lower center", ncols=6, columnspacing=1,
                      handlelength=2.4)  # fmt: skip
        return figure


def decay(values: Sequence[Sequence[float]]) -> np.ndarray | None:
    """log10 of singular values over the largest of each linear, (R,), mean over linears; None where
    no linear changed. values: by linear, largest first."""
    changed = [np.array(row) / row[0] for row in values if row[0] > 0]
    # What underflowed must not take the mean to minus infinity.
    return np.log10(np.maximum(changed, 1e-8)).mean(0) if changed else None


def draw_maps(measured: dict[str, dict[int, dict[str, Any]]], method: str) -> Figure:
    """The first seed's maps by one method, a panel an arm and view."""
    maps, base = [], None
    for arm, trials in measured.items():
        found = next(iter(trials.values()))["maps"][method]
        base = base or found["base"]
        maps.append((label(arm), found["model"]))
        if "uniform" in found and found["uniform"] != found["model"]:
            maps.append((f"{label(arm)}, equal weights", found["uniform"]))
    maps.append(("untrained base", base))
    with matplotlib.rc_context(figures.STYLE):
        wide = min(4, len(maps))
        deep = -(-len(maps) // wide)
        figure = Figure(figsize=(figures.WIDTH, 1.75 * deep + 0.3), layout="constrained")
        grid = figure.subplots(deep, wide, squeeze=False).flatten()
        for axes in grid[len(maps) :]:
            axes.axis("off")
        for axes, (text, found) in zip(grid, maps, strict=False):
            for at, kind in enumerate(KIND_NAMES):
                x = np.array(found[kind])
                axes.plot(x[:, 0], x[:, 1], "o^"[at], color=figures.EXPERTS[at], markersize=2,
                          markeredgewidth=0, alpha=0.7, label=KIND_NAMES[kind])  # fmt: skip
            axes.set_title(text, fontweight="bold", fontsize=7)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
        return figure
