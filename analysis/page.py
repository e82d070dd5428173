"""What the reports of all experiments share: files written whole, intervals over seeds,
provenance, warnings."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

import experiments
from analysis import figures
from eval import inference, rule
from eval.metrics import interval

FRAME = """# {title}

**Question.** {v[question]}

**Expected, before the first run.** {v[expected]}
{notes}
## Reading

{reading}

{body}## What could not be concluded

{limits}

## Provenance

{provenance}
"""

KINDS = {"png": "Software", "svg": "Date"}  # of a figure's files -> what in each tells its making


def frame(v: dict[str, Any], reading: str, body: str, unsure: Iterable[str]) -> str:
    """A report: the question, what was expected, the reading, `body` (sections with their headings,
    up to the next one), what could not be concluded, and where the numbers come from."""
    return FRAME.format(
        v=v,
        title=f"{v['experiment'].replace('_', ' ').capitalize()}: {v['setting']}",
        notes=warnings(v),
        reading=reading,
        body=body,
        limits="\n".join(f"- {text}" for text in unsure),
        provenance=provenance(v),
    )


def write_folder(
    folder: Path, data: Mapping[str, dict], page: str, drawn: Mapping[str, Figure]
) -> None:
    """Write JSON files, report.md and figures (PNG and SVG) into `folder`.

    All is written aside first and then renamed, file by file, so a failure leaves the old report.
    Figures that the old report shows and this one does not are removed. The same figures give the
    same bytes.
    """
    old = folder / "report.md"
    shown = figures_of(old.read_text("utf-8")) if old.exists() else []
    part = folder / ".report.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "report.md").write_text(page, encoding="utf-8")
    for name, content in data.items():
        (part / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    for name, figure in drawn.items():
        save_figure(part / name, figure)
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
    part.rmdir()
    for name in set(shown).difference(drawn):
        for kind in KINDS:
            (folder / f"{name}.{kind}").unlink(missing_ok=True)


def figures_of(page: str) -> list[str]:
    """The names of the figures that a page shows from its own folder."""
    return re.findall(r"\]\(([^)/\s]+)\.png\)", page)


def save_figure(path: Path, figure: Figure) -> None:
    """<path>.png and <path>.svg, each whole or not at all; the same figure gives the same bytes."""
    with matplotlib.rc_context(figures.STYLE):
        for kind, made in KINDS.items():
            part = path.with_name(f".{path.name}.part.{kind}")
            figure.savefig(part, metadata={made: None})
            os.replace(part, path.with_name(f"{path.name}.{kind}"))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % interval and two-sided p of mean = 0 over seeds; None where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "interval": None, "p": None, "seeds": []}
    middle, n = float(np.mean(known)), len(known)
    if n < 2:
        return {"mean": middle, "interval": None, "p": None, "seeds": known}
    se = float(np.std(known, ddof=1)) / math.sqrt(n)
    p = float(2 * scipy_stats.t.sf(abs(middle) / se, n - 1)) if se else float(middle == 0)
    return {"mean": middle, "interval": list(interval(known)), "p": p, "seeds": known}


def by_seed_less(
    one: Mapping[int, float | None], other: Mapping[int, float | None]
) -> list[float | None]:
    """The differences at the seeds that both have; None where either has no value."""
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    return [None if a is None or b is None else a - b for a, b in pairs]


def with_holm(
    rows: Iterable[dict[str, Any]], alpha: float = inference.ALPHA
) -> list[dict[str, Any]]:
    """The rows that have a `p`; each gets `p_holm`, adjusted over all of them, and `detectable`.

    That is the smallest effect that its test finds with 80 % power at Holm's first step of the
    level alpha, by the row's `se` and `df`, or by its values over `seeds`.
    """
    tested = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tested, inference.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
        se, df = row.get("se"), row.get("df")
        if se is None or df is None:
            n = len(row["seeds"])
            se, df = float(np.std(row["seeds"], ddof=1)) / math.sqrt(n), n - 1
        row["detectable"] = inference.smallest_detectable_effect(se, df, alpha / len(tested))
    return tested


def by_seed(values: Sequence[float | None]) -> dict[str, Any]:
    """`over_seeds` with the value of each seed, in their order."""
    return {**over_seeds(values), "by_seed": list(values)}


def spread(found: Mapping[str, Any], form: str = ".2f") -> str:
    """What `over_seeds` gives as a cell: mean ± standard deviation [interval]."""
    if found["mean"] is None:
        return "-"
    text = format(found["mean"], form)
    if found["interval"] is None:
        return text
    low, high = (format(x, form) for x in found["interval"])
    return f"{text} ± {np.std(found['seeds'], ddof=1):{form.lstrip('+')}} [{low}, {high}]"


def claims_table(rows: Iterable[Mapping[str, Any]], digits: int = 2) -> str:
    """Differences over seeds that `with_holm` has adjusted, a row each: arm, what, difference."""
    cells = [
        [figures.label(row["arm"]), row["what"], spread(gap, f"+.{digits}f"),
         figures.p_value(gap["p"]), figures.p_value(gap.get("p_holm")),
         f"{gap['detectable']:.{digits}f}" if "detectable" in gap else "-", str(len(gap["seeds"]))]
        for row in rows for gap in (row["difference"],)
    ]  # fmt: skip
    head = ["arm", "what", "difference", "p", "Holm p", "detectable", "seeds"]
    return figures.table(head, cells)


def notes(v: dict[str, Any]) -> list[str]:
    """What a reader has to know before any number; v: with setting, split and warnings."""
    said = [f"Warning: {text}" for text in v["warnings"]]
    if v["split"] != "test":
        said.insert(0, f"Measured on {v['split']}, where the settings may have been chosen.")
    if v["setting"].split("-")[0] == "smoke":
        said.insert(0, "SCALE=smoke shows that the machinery runs: it concludes nothing.")
    return said


def warnings(v: dict[str, Any]) -> str:
    """`notes` as quoted lines."""
    return "".join(f"\n> **{text}**\n" for text in notes(v))


def missing(arms: Mapping[str, dict[str, Any]]) -> list[str]:
    """Which arms were not run, and which lack seeds of those planned or run; an item each.

    arms: arm -> a row with `seeds` and `missing_seeds`.
    """
    absent = [figures.label(arm) for arm, row in arms.items() if not row["seeds"]]
    lacking: dict[str, list[str]] = {}  # seeds -> the arms without them
    for arm, row in arms.items():
        if row["seeds"] and row["missing_seeds"]:
            lacking.setdefault(seed_names(row["missing_seeds"]), []).append(figures.label(arm))
    said = [f"Anything about what was not run: {', '.join(absent)}."] if absent else []
    if lacking:
        told = "; ".join(f"{of} of {', '.join(names)}" for of, names in lacking.items())
        said.append(f"Anything that needs seeds that were not run: {told}.")
    return said


def seed_names(numbers: Sequence[int]) -> str:
    """`seed 1`, `seeds 0 and 2`, `seeds 0 to 2`, `seeds 0, 2, 5`."""
    first, *rest = numbers
    if not rest:
        return f"seed {first}"
    if len(rest) == 1:
        return f"seeds {first} and {rest[0]}"
    if list(numbers) == list(range(first, first + len(numbers))):
        return f"seeds {first} to {numbers[-1]}"
    return f"seeds {', '.join(map(str, numbers))}"


def limits(v: dict[str, Any]) -> list[str]:
    """What could not be concluded from the numbers of `compare.compare`, an item each."""
    said = []
    said += missing(v["arms"])
    sizes = {
        r["trainable_parameters"] for a, r in v["arms"].items() if a not in rule.SPECIALIST.values()
    }
    if len(sizes - {None}) > 1:
        said.append(
            "Whether a difference comes from the mechanism, or from the number of trainable "
            "parameters or the rank of an expert, where the tables show that these differ."
        )
    routed = [
        (figures.label(a), r["shaken"]) for a, r in v["arms"].items() if len(r["experts"]) > 1
    ]
    names = [", ".join(arm for arm, shaken in routed if shaken is kind) for kind in (True, False)]
    if all(names):
        said.append(
            "Whether a difference comes from the router or from the noise on its logits and the "
            f"expert dropout in training. With these: {names[0]}; without: {names[1]}."
        )
    seen = max((len(row["seeds"]) for row in v["arms"].values()), default=0)
    if seen > experiments.seeds(v["experiment"], v["setting"]):
        said.append(
            f"What an earlier look at fewer seeds adds to chance: p at {seen} seeds are not "
            "adjusted for one."
        )
    wide = [row for row in v["differences"] if (row.get("detectable") or 0) > 1]
    if wide:
        said.append(
            f"Differences of one point: {len(wide)} of {len(v['differences'])} comparisons could "
            "not have found one."
        )
    return [*said, f"Other collections than {v['data']['name']}, other bases than this one."]


def provenance(v: dict[str, Any]) -> str:
    """Where the numbers come from, an item each."""
    facts = {
        **{"base": v["base"], "data": v["data"]},
        **v["origin"],
        "seconds of all files": f"{v['seconds']:,.0f}",
        "peak memory of a process": f"{v['peak_bytes'] / 1e9:.2f} GB",
        "files": [f"`{name}`" for name in v["files"]],
    }
    return "\n".join(f"- {name}: {figures.plain(value)}" for name, value in facts.items())
