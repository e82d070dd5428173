"""A setting's trials -> verdict.json, report.md and figures, written beside them.

What is printed comes from the dict of `judge.judge` alone.
"""

import re
from pathlib import Path
from typing import Any

import scales
from analysis import arm_table, figures, sensitivity, verdict_tables
from analysis.disk import load
from analysis.figures import TASKS, label, p_value, span
from analysis.judge import SAME_SIZE, judge
from analysis.page import missing, notes, warnings, write_folder
from eval import rule
from eval.rule import JOINT, MOE, SPECIALIST
from trials import parts

DECISIONS = ("proceed", "pivot", "more_seeds", "inconclusive")
PAGE = """# {title}

**Question.** {v[question]}

**Expected.** {v[expected]}
{notes}
## Verdict

**{headline}** Supported by the statistics: **{supported}**.

{reading}

Reason: {v[reason]}

## Scores

nDCG@10 × 100, {v[config][split]} split: the mean over seeds ± their standard deviation, and its
95 % interval over seeds and queries. Retrieval has {v[queries][embedding]:,} queries in
{v[clusters][embedding]} clusters, reranking {v[queries][reranking]:,} in {v[clusters][reranking]},
on {v[documents]:,} documents.

{arms}
## Interference

I = 100 (specialist - joint) / specialist, in % of nDCG@10; below 0 the joint arm is the better one.

{effects}
### What Joint-MoE wins back

{won_back}

### What the verdict hangs on

{sensitivity}### The instrument's own zero (A/A)

{aa}
## How to read it

The rule, fixed before the run:

> under 1 % on both tasks, pivot; 2 % or more on either, proceed; between, more seeds (3, then 6,
> then 9, with alpha spending; then "inconclusive").

It is a point rule, which noise alone can satisfy, so read first whether the statistics support it.
Seeds and queries are crossed (t, from the variances of both), queries of one domain count together,
the p of two tasks are adjusted after Holm, and pivot needs an equivalence test within ± 2 %. That p
has to be below this look's level{level}: looking after 3, 6 and 9 seeds shares out 5 % in all.{off}
Intervals are 95 % each, adjusted neither for tasks nor for looks. The randomisation test takes the
models as they are and asks about other queries alone. Detectable: what would be found with 80 %
power at half the level, Holm's first step; its interval is wide because few seeds tell little of
their own spread, on which it rests. Gain-normalised I divides by what training gained the
specialist over the untrained base. A task on which that gain is under 5.00 is not measurable, which
is not "no interference". A/A: two specialists that differ in nothing but their seeds, so what the
instrument shows where there is nothing.

What each decision leads to:

- **proceed**{proceed}: there is interference to study: where it arises (layer by layer, gradients
  of one task against the other's) and what undoes it (routers, ranks, mixtures).
- **pivot**{pivot}: why does none emerge? Do both tasks live in one subspace of the adapter; is
  there capacity to spare (lower ranks, smaller bases would tell); are the data too alike or too
  few? And the efficiency question: what does one resident model instead of two save in memory,
  loading and throughput at equal quality?
- **more_seeds**{more_seeds}: the same command with `SEEDS=6`, then `SEEDS=9`; finished trials stay.
- **inconclusive**{inconclusive}: no claim either way. Mend the measurement first: train longer
  where a task is not measurable, take more queries or collections where an interval is wide.

## What could not be concluded

{limits}

## Training

{curves}All files together: {v[seconds]:,.0f} s; peak memory of a process: {peak:.2f} GB.

## Provenance

{provenance}
"""


def write(folder: Path) -> dict[str, Any]:
    """Write verdict.json, report.md and the figures into `folder`; return the verdict.

    folder: runs/<experiment>/<setting>, with baselines.json and <arm>/seed<k>.json. All is written
    aside first and then renamed, so a stop on the way leaves the old report. A missing arm or seed
    is shown as missing; `decision` is None where a needed one is. Raises ValueError for missing
    baselines, a damaged file, or a trial on another base, other data or other queries than theirs.
    """
    folder = folder.resolve()
    baselines, arms = load(folder)
    verdict = judge(folder, baselines, arms)
    drawn = figures.draw(verdict, arms)
    write_folder(folder, {"verdict.json": verdict}, markdown(verdict, list(drawn)), drawn)
    return verdict


def headline(verdict: dict[str, Any]) -> str:
    """The verdict in one plain sentence."""
    size = {t: round(f["interference"], 9) for t, f in verdict["tasks"].items() if f["measurable"]}
    told = {t: f"{value:+.2f} % on {TASKS[t]}" for t, value in size.items()}
    large = " and ".join(told[t] for t in size if size[t] >= rule.PROCEED_FROM)
    lost = " and ".join(TASKS[t] for t in verdict["tasks"] if t not in size)
    both = " and ".join(told.values())
    unseen = f"{lost} cannot be measured here" if lost else ""
    return {
        "proceed": f"Proceed: one adapter for both scores 2 % or more below the specialist "
        f"({large}).",
        "pivot": f"Pivot: one adapter for both scores less than 1 % below the specialists "
        f"({both}).",
        "more_seeds": f"More seeds: {'no measurable' if lost else 'no'} task loses 2 %, but not "
        f"all lose under 1 % ({'; '.join(filter(None, (both, unseen)))}).",
        "inconclusive": f"Inconclusive: {'; '.join(filter(None, (both, unseen)))}.",
    }.get(verdict["decision"], "No verdict.")


def reading(verdict: dict[str, Any]) -> str:
    """What the numbers say, task by task, in one paragraph."""
    said = []
    for task, f in verdict["tasks"].items():
        special, joint, base = (100 * f[key] for key in ("specialist", "joint", "base"))
        end = f"a {'loss' if joint <= special else 'gain'} of {abs(f['interference'] or 0):.2f} %"
        if not f["measurable"]:
            end = (
                f"training moved the specialist by {special - base:+.2f}, too little (5.00) to tell"
            )
        elif f["interval"]:
            sure = "" if f["p_holm"] <= verdict["alpha"] else "not "
            end += f" (95 % interval of I {span(f['interval'], 1, ' %')}; Holm p "
            end += f"{p_value(f['p_holm'])}), {sure}significant at this look's level of "
            end += f"{verdict['alpha']:.4f}"
        pair = f"{label(SPECIALIST[task])} scores {special:.2f} and Joint-Single {joint:.2f}"
        said.append(f"On {TASKS[task]} {pair}: {end}.")
    return " ".join(said) or "Until the needed arms are there, nothing is compared."


def limits(verdict: dict[str, Any]) -> list[str]:
    """What this run cannot conclude, an item each."""
    arms, config, said = verdict["arms"], verdict["config"], []
    for task, f in verdict["tasks"].items():
        name, smallest, interval = TASKS[task], f["smallest_detectable_effect"], f["interval"]
        if not f["measurable"]:
            said.append(f"Whether sharing hurts {name}: the task is not measurable here.")
        elif interval is None:
            said.append(f"How sure the value on {name} is: one seed gives no interval.")
        elif smallest > rule.PROCEED_FROM:
            said.append(f"An effect of 2 % on {name}: detectable is {smallest:.2f} % or more.")
        if f["measurable"] and interval and interval[0] <= 0 and interval[1] >= rule.PROCEED_FROM:
            said.append(f"Whether it is 0 or 2 % on {name}: the interval holds both.")
    for task, f in verdict["aa"].items():
        if f["interval"] and f["interval"][0] * f["interval"][1] > 0:
            said.append(f"Small effects on {TASKS[task]}: even the A/A pair shows one.")
    said += missing(arms)
    if (n := verdict["seeds"]) < (planned := verdict["seeds_planned"] or 0):
        said.append(f"What {planned} seeds would show: {n} can be compared.")
    if arms.get(MOE, {}).get("seeds") and not all(arms.get(a, {}).get("seeds") for a in SAME_SIZE):
        size = "Joint-3r and Uniform-MoE were not both run (`CONTROLS=1`)"
        said.append(f"Whether routing sets Joint-MoE apart, or its threefold size: {size}.")
    said.append(
        f"What longer texts would show: the models read {config['document_tokens']} tokens of a "
        "document, BM25 all of it."
    )
    if shaken := [label(arm) for arm, row in arms.items() if row.get("shaken")]:
        said.append(
            f"Whether what {', '.join(shaken)} lacks or gains is the router's or that of the noise "
            "on its logits and the expert dropout in training, which the other arms do without."
        )
    if verdict["setting"].partition("-on-")[0] not in scales.TUNED:
        said.append(
            "Whether each arm has the learning rate that suits it: none was swept for this setting "
            "(`make sweep`)."
        )
    base = f"{config['base']} ({config['layers'] or 'all'} layers)"
    return [*said, f"Other collections than {verdict['data']['name']}, other bases than {base}."]


def _off_plan(seeds: int) -> str:
    """What a look at another number of seeds takes the place of."""
    later = [look for look in rule.LOOKS if look > seeds] or [rule.LOOKS[-1]]
    if seeds in rule.LOOKS or seeds < 2:
        return ""
    return (
        f" This look, at {seeds}, takes the place of the one at {later[0]}: look at both, and they "
        "share out more."
    )


def markdown(verdict: dict[str, Any], drawn: list[str]) -> str:
    """report.md; `drawn`: the figures that lie beside it."""
    v, c = verdict, verdict["config"]
    mined = c.get("negatives", "bm25")  # published trials are older than this choice
    kind, negatives, more = "BM25", f"from BM25's top {c['negatives_depth']}", {}
    if mined != "bm25":
        kind, negatives = "mined", "mined"
        more["mined negatives"] = f"{mined}, sha256 {c['negatives_sha256'][:16]}"
    if len(trained := parts(c["data"])) > 1:
        more["trained on"] = f"{', '.join(trained)}, in proportion to queries^(1/"
        more["trained on"] += f"{c['mixture_temperature']:g})"
    elif c.get("measured_on"):
        more["trained on"] = f"{c['data']}; what is measured is another collection"
    if widths := c.get("matryoshka"):
        more["Matryoshka"] = "InfoNCE is the mean over the whole vectors and their first "
        more["Matryoshka"] += ", ".join(map(str, widths))
    if how := c.get("distill"):
        more["distillation"] = f"{how}, weight {c['distill_weight']:g}, temperature "
        more["distillation"] += f"{c['distill_temperature']:g}"
    facts = {
        **{"base": v["base"], "data": v["data"]},
        "model": f"{c['layers'] or 'all'} layers, experts from layer {c['adapter_layers']} up, "
        f"{c['dtype']}; pooling {c['embedding_pooling']} (embedding) and {c['reranking_pooling']} "
        f"(reranking); documents cut at {c['document_tokens']} tokens",
        "embedding steps": f"{c['steps']} of {c['embedding_batch']} queries, in-batch negatives, "
        f"{c['hard_negatives']} {negatives} each; InfoNCE, temperature {c['temperature']:g}",
        "reranking steps": f"{c['steps']} of {c['reranking_batch']} groups of {c['group_size']}, "
        f"one positive and {kind} negatives; {c['reranking_loss']} loss, {c['rerank_head']} head",
        **more,
        "candidates": f"BM25's own top {c['candidates']}, nothing forced in",
        "learning rate and clipping": [
            f"{label(arm)} {row['rates']['learning_rate']:g} and {row['rates']['clip']:g}"
            for arm, row in v["arms"].items()
            if row["rates"]
        ],
        "learning rate of the head": f"{c['head_learning_rate']:g}",
        **v["origin"],
        "files": [f"`{name}`" for name in v["trials"]],
    }
    text = PAGE.format(
        v=v,
        title=f"{v['experiment'].replace('_', ' ').capitalize()}: {v['setting']}",
        notes=warnings({**v, "split": c["split"]}),
        headline=headline(v),
        supported="yes" if v["supported"] else "no",
        reading=reading(v),
        arms=verdict_tables.arms_tables(v)
        + arm_table.markdown(v["made_of"])
        + figures.picture("scores", drawn),
        effects=verdict_tables.effects_table(v["tasks"], "Joint-Single"),
        won_back=verdict_tables.won_back(v),
        sensitivity=sensitivity.markdown(v),
        aa=verdict_tables.effects_table(v["aa"], "its twin"),
        level=f" of {v['alpha']:.4f}" if v["alpha"] else "",
        off=_off_plan(v["seeds"]),
        **{d: " (this run)" if d == v["decision"] else "" for d in DECISIONS},
        limits="\n".join(f"- {text}" for text in limits(v)),
        curves=figures.picture("curves", drawn) + figures.picture("routing", drawn),
        peak=v["peak_bytes"] / 1e9,
        provenance="\n".join(f"- {name}: {figures.plain(value)}" for name, value in facts.items()),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def summary(verdict: dict[str, Any]) -> str:
    """The verdict for a terminal, in six to ten lines."""
    v = verdict
    lines = [
        f"{v['experiment']} {v['setting']}: {headline(v)}",
        f"supported: {'yes' if v['supported'] else 'no'}. {v['reason']}",
    ]
    for task, f in v["tasks"].items():
        scores = {"specialist": f["specialist"], label(JOINT): f["joint"], label(MOE): f["moe"]}
        cells = [f"{name} {100 * x:.2f}" for name, x in scores.items() if x is not None]
        unsure = "" if f["measurable"] else " (not measurable)"
        cells += [f"I {figures.percent(f['interference'])} {span(f['interval'])}{unsure}"]
        lines += [
            f"{TASKS[task]}: {', '.join(cells)}",
            f"  {label(MOE)} wins back: {verdict_tables.back(f)}",
        ]
    lines.append(f"seeds {v['seeds_compared']}, {len(v['trials']) - 1} trials")
    return "\n".join([*lines, *notes({**v, "split": v["config"]["split"]})])
