"""The tables of a verdict in Markdown: scores, interference, what is won back."""

from collections.abc import Callable
from typing import Any

from analysis.figures import (
    METRIC,
    METRICS,
    REFERENCE_ROWS,
    SECONDS,
    TASKS,
    label,
    p_value,
    percent,
    score,
    span,
    table,
)
from analysis.page import seed_names

OTHER = [(t, m) for t in TASKS for m in METRICS if m != METRIC]
OTHER.remove(("reranking", "recall_100"))  # the candidates set it, no arm changes it
AGAINST = (
    "The other arms against Joint-Single, and Joint-MoE against those of about its size, at the "
    "seeds that both have, in points of nDCG@10 with 95 % intervals; above 0 the first is better. "
    "Holm: p adjusted over all differences of the table, to be held against this look's "
    "level{level}. Detectable: the smallest difference found with 80 % power at Holm's first step. "
    "Won back: what the arm is above Joint-Single as a share of that loss, given only where the "
    "loss's interval excludes 0, of all seeds and of these, adjusted or not."
)
FAR = 10.0  # times the loss: a bound of what is won back that is beyond it says nothing more


def arms_tables(verdict: dict[str, Any]) -> str:
    """nDCG@10 with intervals, seeds and cost; then the other metrics. Scores are x 100."""
    main, other = [], []
    for name, text in REFERENCE_ROWS.items():
        found = verdict["references"][name]
        cells = [f"{100 * found[t][METRIC]:.2f}" if t in found else "-" for t in TASKS]
        main.append([text, *cells, "-", "-", "-"])
        other.append([text, *_others(found)])
    for arm, row in verdict["arms"].items():
        absent = {t: "missing" if t in row["tasks"] else "-" for t in TASKS}
        cells = [score(row["scores"][t]) if t in row["scores"] else absent[t] for t in TASKS]
        some = f" ({seed_names(row['seeds'])})" if row["seeds"] and row["missing_seeds"] else ""
        cells.append(f"{len(row['seeds'])}{some}")
        cost = [f"{row['trainable_parameters'] or 0:,}", f"{row['training_seconds'] or 0:,.0f}"]
        main.append([label(arm), *cells, *(cost if row["seeds"] else ("-", "-"))])
        other.append([label(arm), *_others(row["scores"])])
    head = ["", *(f"{name} nDCG@10" for name in TASKS.values())]
    return table([*head, "seeds", "trainable parameters", SECONDS], main) + table(
        ["", *(f"{TASKS[task]} {METRICS[m]}" for task, m in OTHER)], other
    )


def _others(found: dict[str, dict[str, float]]) -> list[str]:
    return [f"{100 * found[task][m]:.2f}" if task in found else "-" for task, m in OTHER]


def effects_table(tasks: dict[str, dict[str, Any]], joint: str) -> str:
    """What `rule.verdict` gives for each task, a statistic a row."""
    if not tasks:
        return "Not run.\n\n"

    def measurable(t: dict[str, Any]) -> str:
        gain = f"specialist {100 * (t['specialist'] - t['base']):+.2f} over the base"
        return f"{'yes' if t['measurable'] else '**no**'}: {gain}"

    def gain(t: dict[str, Any]) -> str:
        interval = t["gain_normalised_interval"]
        return f"{percent(t['gain_normalised'], 100)} {span(interval, 100) if interval else ''}"

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "specialist, nDCG@10": lambda t: f"{100 * t['specialist']:.2f}",
        f"{joint}, nDCG@10": lambda t: f"{100 * t['joint']:.2f}",
        "**interference I**": lambda t: (
            f"**{percent(t['interference'])}**" if t["measurable"] else percent(t["interference"])
        ),
        "95 % interval of I": lambda t: span(t["interval"], 1, " %"),
        "p of I = 0 (crossed t)": lambda t: p_value(t["p"]),
        "p, Holm over the tasks": lambda t: p_value(t["p_holm"]),
        "p, randomisation (these models, new queries)": lambda t: p_value(t["p_randomisation"]),
        "p of \\|I\\| ≥ 2 % (equivalence)": lambda t: (
            p_value(t["p_equivalence"]) if t["measurable"] else "-"
        ),
        "gain-normalised I": gain,
        "detectable I (power 80 %)": lambda t: percent(t["smallest_detectable_effect"]),
        "95 % interval of what is detectable": lambda t: span(t["detectable_interval"], 1, " %"),
        "measurable (+5.00 needed)": measurable,
    }
    cells = [[name, *(read(t) for t in tasks.values())] for name, read in rows.items()]
    return table(["", *(TASKS[task] for task in tasks)], cells)


def back(found: dict[str, Any]) -> str:
    """What is won back of the joint arm's loss, or why that is not known."""
    if found["won_back"] is None:
        return f"not known: {found['won_back_reason']}" if "won_back_reason" in found else "-"
    value, interval = f"{100 * found['won_back']:.0f} %", found["won_back_interval"]
    if interval is None or all(abs(end) <= FAR for end in interval):
        return f"{value} {span(interval, 100, ' %', 0)}"
    # The loss, which it is a share of, may be next to nothing.
    low, high = ("< -1,000" if x < -FAR else "> 1,000" if x > FAR else f"{100 * x:.0f}"
                 for x in interval)  # fmt: skip
    return f"{value} [{low}, {high}] %"


def won_back(verdict: dict[str, Any]) -> str:
    """What Joint-MoE wins back, beside every other arm's difference to the joint arm."""
    text = "".join(f"- {TASKS[task]}: {back(f)}\n" for task, f in verdict["tasks"].items())
    rows = []
    for arm, row in verdict["arms"].items():
        if of := row["against_joint"]:
            rows.append(_against(label(arm), of, f"{row['trainable_parameters']:,}"))
    for other in dict.fromkeys(row["against"] for row in verdict["moe_against"]):
        of = {row["task"]: row for row in verdict["moe_against"] if row["against"] == other}
        rows.append(_against(f"Joint-MoE − {label(other)}", of, "-"))
    if not rows:
        return text or "Not run.\n"
    head = [
        f"{name}, {what}"
        for name in TASKS.values()
        for what in ("points", "p (Holm)", "detectable", "won back")
    ]
    level = f" of {verdict['alpha']:.4f}" if verdict["alpha"] else ""
    made = table(["", "seeds", *head, "trainable parameters"], rows)
    return f"{text}\n{AGAINST.format(level=level)}\n\n{made}"


def _against(name: str, found: dict[str, dict[str, Any]], size: str) -> list[str]:
    """A row: task -> a difference; `-` where there is none."""
    cells = []
    for task in TASKS:
        row = found.get(task)
        cells += ["-"] * 4 if row is None else [
            f"{row['difference']:+.2f} {span(row['interval'])}",
            f"{p_value(row['p'])} ({p_value(row['p_holm'])})",
            "-" if row["detectable"] is None else f"{row['detectable']:.2f}",
            back(row) if "won_back" in row else "-",
        ]  # fmt: skip
    seeds = {seed for row in found.values() for seed in row["seeds_compared"]}
    return [name, str(len(seeds)), *cells, size]
