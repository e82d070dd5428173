"""Interference in every record of a setting, side by side: what agrees and how sure each is."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import disk, figures
from analysis.figures import TASKS
from eval.inference import ALPHA
from eval.rule import PIVOT_BELOW, PROCEED_FROM

CAPTION = (
    "Interference I in each record of the kill gate (by collection, with its seeds) and of the "
    "scale study (by layers): 95 % interval over seeds and queries; black: significant after the "
    "correction of its own record, grey: not; open: the task is not measurable there. Thin line "
    "below: the same paired by seed, which was not declared and decides nothing. Shaded: under 1 % "
    "(blue; on both tasks: pivot), and 2 % or more (amber: proceed). Records have trials in "
    "common, and no correction over records is made."
)
WIDEST = 40.0  # % either way; an interval beyond is cut


def entries(runs: Path, setting: str) -> dict[str, dict[str, dict[str, Any]]]:
    """name -> task -> interference, interval, measurable, sure, and paired where it is known."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    paths = sorted(runs.glob(f"kill_gate/{setting}*/verdict.json"))
    gates = {path.parent.name: disk.read(path) for path in paths}
    ladder = runs / "scale_study" / setting / "scale.json"
    scale: dict[str, Any] = disk.read(ladder) if ladder.exists() else {"rows": []}
    sizes = scale["rows"]
    sizes = [row for row in sizes if not row.get("missing")]
    several = len({row["rank"] for row in sizes}) > 1
    bases = {Path(v["base"]["name"]).name for v in gates.values()} | {row["name"] for row in sizes}

    def named(base: str, name: str) -> str:
        return f"{base}, {name}" if len(bases) > 1 else name

    for place, verdict in gates.items():
        name = f"{verdict['data']['name']}, {verdict['seeds']} seeds"
        name = named(Path(verdict["base"]["name"]).name, name)
        for task, row in verdict["tasks"].items():
            paired = verdict.get("sensitivity", {}).get(task, {}).get("ways", {}).get("paired", {})
            entry = {k: row[k] for k in ("interference", "interval", "measurable")}
            entry |= {"sure": row["p_holm"] is not None and row["p_holm"] <= verdict["alpha"]}
            _add(found, name, place, task, entry | {"paired": paired.get("interval")})
    for row in sizes:
        layers = "all layers" if row["layers"] is None else f"{row['layers']} layers"
        entry = {k: row[k] for k in ("interference", "interval", "measurable")}
        entry |= {"sure": row.get("p_holm", 1.0) <= ALPHA, "paired": None}
        rank = f", rank {row['rank']}" if several else ""
        told = f"{scale['data']['name']}, {layers}{rank}, {row['seeds']} seeds"
        name = named(row["name"], told)
        _add(found, name, row["size"], row["task"], entry)
    return found


def _add(found: dict, name: str, place: str, task: str, entry: dict[str, Any]) -> None:
    """place: tells records of one name apart."""
    if entry["interval"] is not None:
        name = f"{name} ({place})" if task in found.get(name, {}) else name
        found.setdefault(name, {})[task] = entry


def draw(found: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """A panel a task, a row a record."""
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 0.2 * len(found) + 0.75)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(TASKS), sharey=True)
        for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
            _panel(axes, [rows.get(task) for rows in found.values()])
            axes.set_title(title.capitalize(), fontweight="bold")
            axes.set_xlabel("interference (%)")
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(found)), list(found))
        panels[0].set_ylim(len(found) - 0.4, -0.6)
        return figure


def _panel(axes: Axes, rows: list[dict[str, Any] | None]) -> None:
    for at, row in enumerate(rows):
        if row is None:
            continue
        colour = figures.SIGNIFICANT if row["sure"] else figures.UNSURE
        axes.plot(row["interval"], [at, at], color=colour, linewidth=1.2)
        axes.plot(row["interference"], at, "o", color=colour, markersize=4.2,
                  mfc=colour if row["measurable"] else "white")  # fmt: skip
        if row["paired"]:
            axes.plot(row["paired"], [at + 0.25] * 2, color=figures.GREY, linewidth=0.8)
    low, high = axes.get_xlim()
    low, high = max(low, -WIDEST), min(high, WIDEST)
    axes.set_xlim(low, high)
    axes.axvspan(low, PIVOT_BELOW, color="#56B4E9", alpha=0.13, linewidth=0)
    axes.axvspan(PROCEED_FROM, high, color="#E69F00", alpha=0.16, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
