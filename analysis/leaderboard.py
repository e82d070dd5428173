"""MTEB for the embedding side of the kill gate: interference over its tasks -> mteb.json, mteb.md.

An arm's score is what leaderboards show: the mean over tasks of each task's main score. So a task
stands where a query does elsewhere: I = 100 (P - J) / P of these means, with the interval of
`eval.stats` over seeds and tasks, each task a cluster of its own. The reranking side is that of the
collections that the models were measured on, or of the one that they were trained on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import across, disk, judge
from analysis.figures import label, percent, plain, span, table
from analysis.page import warnings
from eval import inference, rule, stats
from model.files import write_json, write_text
from model.unimoer import UniMoER
from model.weights import revision
from train.trial import model_config
from trials import Config

Scores = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> task of MTEB -> main score
BASE = "base"  # the untrained one, whose only seed is 0
PAGE = """# {setting}: MTEB for the embedding side
{notes}
Trained in `{setting}`, seeds {seeds}; vectors measured on {count} tasks through `mteb`. Main scores
× 100: mean over seeds ± their standard deviation. I = 100 (specialist - joint) / specialist, in %;
of the mean with its 95 % interval over seeds and tasks, each task a cluster of its own.

{table}Detectable in the mean, with 80 % power at half this look's level: {least}.

{against}Reranking on {v[reranking_on]}: I {other}.

**{v[decision]}**, supported by the statistics: **{supported}**.

{v[reason]}

## Provenance

{origin}
"""


def named(names: Sequence[str]) -> list[Any]:
    """Tasks of mteb by name; raises ValueError for an unknown one, and for fewer than two."""
    from eval import mteb_adapter  # of the development set, and slow to import

    tasks = mteb_adapter.named(names)
    if len(tasks) < 2:
        raise ValueError(
            f"--mteb {' '.join(names)}: one task, but an interval over tasks needs two or more"
        )
    return tasks


def measure(folder: Path, tasks: Sequence[Any], device: str, kernels: str) -> Scores:
    """The main scores of every trained model that embeds, and of the untrained base.

    Whatever has been measured is read from <folder>/mteb, which is in mteb's own layout.
    """
    from eval import mteb_adapter

    found: Scores = {}

    def score(arm: str, seed: int, model: UniMoER, version: str) -> None:
        side = mteb_adapter.Encoder(model, f"unimoer/{arm}-seed{seed}", version)
        found.setdefault(arm, {})[seed] = {
            task.metadata.name: mteb_adapter.main_score(side, task, folder / "mteb")
            for task in tasks
        }

    baselines, arms = disk.load(folder)
    config = model_config(Config.from_json(baselines["config"]))
    # Its vectors follow from the weights and from how they are read, wherever the weights lie.
    read = {**asdict(replace(config, base="", revision=None)), "prompts": config.prompts.texts()}
    how = [baselines["base"]["fingerprint"], read]
    mark = hashlib.sha256(json.dumps(how, default=str).encode()).hexdigest()[:16]
    base = UniMoER(config, device=device, kernels=kernels)
    score(BASE, 0, base, mark)  # untrained experts add nothing
    del base
    for arm, trials in arms.items():
        for seed in (seed for seed, trial in trials.items() if "embedding" in trial["scores"]):
            saved = folder / arm / f"seed{seed}.model"
            model = UniMoER.from_pretrained(saved, device, kernels=kernels)
            score(arm, seed, model, revision(saved))
    return found


def decide(folder: Path, scores: Scores, elsewhere: Sequence[Path] = ()) -> dict[str, Any]:
    """What mteb.json holds: by arm and task, and by `rule.decide` the decision on both sides.

    Compared are the seeds that both sides have; an arm without one of them is left out.

    Args:
        folder: the setting that the models were trained in. elsewhere: those on other collections.
    Raises:
        ValueError: see `analysis.disk.load` and `analysis.across.judge`; an arm is missing, or no
            seed is on both sides.
    """
    pair = (rule.SPECIALIST["embedding"], rule.JOINT)
    if missing := [arm for arm in pair if arm not in scores]:
        raise ValueError(f"{folder}: no trained model of {', '.join(missing)} was measured on MTEB")
    if elsewhere:
        other = across.judge(elsewhere)
        known, where = other["seeds"], ", ".join(f"`{place.name}`" for place in elsewhere)
    else:
        other = judge.judge(folder, *disk.load(folder))
        if other["decision"] is None:
            raise ValueError(f"{folder}: {other['reason']}")
        other["split"] = other["config"]["split"]
        known, where = other["seeds_compared"], f"`{folder.name}`"
    seeds = sorted(set(known).intersection(*(scores[arm] for arm in pair)))
    if not seeds:
        raise ValueError(f"{folder}: no seed of {', '.join(pair)} is on both sides")
    used = {
        arm: kept for arm, rows in scores.items()
        if (kept := {s: row for s, row in rows.items() if arm == BASE or s in seeds})
    }  # fmt: skip
    names = list(used[BASE][0])
    y = {
        arm: np.array([[row[name] for name in names] for row in rows.values()])
        for arm, rows in used.items()
    }
    base = y.pop(BASE)[0]
    found = rule.verdict(
        {"embedding": y}, {"embedding": base}, {"embedding": None}, family=len(rule.SPECIALIST)
    )
    both = {"embedding": found["tasks"]["embedding"], "reranking": other["tasks"]["reranking"]}
    adjusted = inference.holm([1.0 if row["p"] is None else row["p"] for row in both.values()])
    for row, p in zip(both.values(), adjusted, strict=True):
        row["p_holm"] = None if row["p"] is None else p
    against = {
        arm: stats.arm_difference(y, None, arm, rule.JOINT)
        for arm in y if arm not in (*pair, "emb-only-aa")
    }  # fmt: skip
    return {
        **rule.decide(both, len(seeds), names={"embedding": "MTEB"}),
        "seeds": seeds,
        "alpha": found["alpha"],
        "scores": {arm: {str(s): row for s, row in rows.items()} for arm, rows in used.items()},
        "tasks": both,
        "reranking_on": where,
        **{key: other[key] for key in ("split", "warnings", "origin")},
        "differences": {
            arm: {"difference": e.value, "interval": e.interval, "p": e.p if e.interval else None}
            for arm, e in against.items()
        },
    }


def write(
    folder: Path, tasks: Sequence[Any], device: str, kernels: str, elsewhere: Sequence[Path] = ()
) -> str:
    """Measure, decide, and put mteb.json and mteb.md into the setting; what they say."""
    found = decide(folder, measure(folder, tasks, device, kernels), elsewhere)
    write_json(folder / "mteb.json", found)
    text = markdown(folder.name, found)
    write_text(folder / "mteb.md", text)
    return f"{text}\nwritten to {folder / 'mteb.md'}"


def markdown(setting: str, v: Mapping[str, Any]) -> str:
    arms = {arm: rows for arm, rows in v["scores"].items() if arm != BASE}
    names, pair = list(v["scores"][BASE]["0"]), (rule.SPECIALIST["embedding"], rule.JOINT)

    def line(title: str, of: Sequence[str], loss: str) -> list[str]:
        """One row of the table, of a task or of the mean over tasks."""
        cells = [f"{100 * np.mean([v['scores'][BASE]['0'][name] for name in of]):.2f}"]
        for rows in arms.values():
            seeds = [100 * float(np.mean([row[name] for name in of])) for row in rows.values()]
            sd = f" ± {np.std(seeds, ddof=1):.2f}" if len(seeds) > 1 else ""
            cells.append(f"{np.mean(seeds):.2f}{sd}")
        return [title, *cells, loss]

    rows = []
    for name in names:
        p, j = (np.mean([row[name] for row in arms[arm].values()]) for arm in pair)
        rows.append(line(name, [name], percent(float(100 * (p - j) / p)) if p > 0 else "-"))
    mine, other = v["tasks"]["embedding"], v["tasks"]["reranking"]
    total = f"**{percent(mine['interference'])}** {span(mine['interval'])}"
    rows.append(line(f"**mean of {len(names)}**", names, total))
    against = [
        f"{label(arm)} {row['difference']:+.2f} {span(row['interval'])}"
        for arm, row in v["differences"].items()
    ]
    return PAGE.format(
        v=v,
        setting=setting,
        seeds=", ".join(map(str, v["seeds"])),
        count=len(names),
        table=table(["task", "untrained", *map(label, arms), "I"], rows),
        against=f"Against {label(rule.JOINT)}, in points of the mean: {'; '.join(against)}.\n\n"
        if against
        else "",
        other=f"{percent(other['interference'])} {span(other['interval'])}",
        least=percent(mine["smallest_detectable_effect"]),
        notes=warnings({**v, "setting": setting}),
        origin="\n".join(f"- {name}: {plain(value)}" for name, value in v["origin"].items()),
        supported="yes" if v["supported"] else "no",
    )
