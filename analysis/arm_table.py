"""What the arms of a report are made of: a table, from the configs of their trials."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from analysis.figures import TASKS, label, table
from trials import Config

COLUMNS = ("adapters (rank)", "router", "trained on", "other differences")
ROUTER = ("router", "router_noise", "expert_dropout", "always_on", "per_token", "router_frozen")
# Shown in columns of their own, or not what an arm is.
APART = ("tasks", "experts", "ranks", *ROUTER, "scored", "seed", "measured_on", "negatives_sha256")
TEXT = """What each arm is made of; other differences: what else sets it apart from most arms.

"""


def describe(arms: Mapping[str, Mapping[int, dict]]) -> dict[str, list[str]]:
    """arm -> a cell for each of COLUMNS. arms: arm -> seed -> trial as stored, one or more."""
    first = {arm: next(iter(trials.values())) for arm, trials in arms.items()}
    whole = {arm: Config.completed(trial["config"]) for arm, trial in first.items()}
    if not whole:
        return {}
    usual = {
        name: Counter(json.dumps(c[name]) for c in whole.values()).most_common(1)[0][0]
        for name in Config().to_json()
        if name not in APART
    }
    found = {}
    for arm, c in whole.items():
        differs = [_said(name, c[name]) for name, value in usual.items()
                   if json.dumps(c[name]) != value]  # fmt: skip
        found[arm] = [
            _adapters(c),
            _router(c) if c["router"] else "-",
            " and ".join(TASKS[task] for task in c["tasks"]) if c["steps"] else "nothing",
            ", ".join(differs) or "-",
        ]
    return found


def markdown(made_of: Mapping[str, list[str]]) -> str:
    """The table, with what it shows; nothing where no arm is known."""
    if not made_of:
        return ""
    return TEXT + table(["", *COLUMNS], [[label(arm), *cells] for arm, cells in made_of.items()])


def _adapters(c: dict[str, Any]) -> str:
    """`one LoRA, 16`; of several experts each with its rank."""
    experts = list(zip(c["experts"], c["ranks"], strict=True))
    if len(experts) == 1:
        return f"one LoRA, {experts[0][1]}"
    return ", ".join(f"{name} {rank}" for name, rank in experts)


def _router(c: dict[str, Any]) -> str:
    rest = [_said(name, c[name]) for name in ROUTER[1:] if c[name]]
    return ", ".join([c["router"], *rest])


def _said(name: str, value: Any) -> str:
    """`embedding weight 0.2`, `start shared=emb-only`, `pcgrad`."""
    words = name.replace("_", " ")
    if value is True:
        return words
    if isinstance(value, list):
        value = " ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = "none" if value in ("", None) else text
    return f"{words} {text if text.isprintable() else json.dumps(text)}"
