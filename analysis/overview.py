"""All experiments on one page; what is published, and whether it follows; tables for LaTeX."""

import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import experiments
from analysis import disk, forest
from analysis.figures import TASKS, p_value, percent, span, table
from analysis.page import KINDS, figures_of, save_figure
from model.files import write_text
from trials import parts

Report = Callable[[str, Path], str]
PAGE = """# The study: {setting}

When does sharing one model between retrieval and reranking hurt, where, and does routing undo it?
Under each section: which sources made its trials, and where. Of other sources or another processor
the same arm scores a little otherwise.

{sections}{missing}{records}
## What it took

{cost}
{collections}"""
RECORDS = """
## Interference, record by record

![interference]({setting}-interference.png)

*{caption}*
"""
COLLECTIONS = """
## On other collections

Interference I with its 95 % interval over seeds and queries, Holm's p over the two tasks of each
collection, none over the collections; detectable: the smallest I found with 80 % power at Holm's
first step; `sources`: what made the trials.

{table}{agreement}
"""


def markdown(setting: str, readings: Mapping[str, str], runs: Path, drawn: bool = False) -> str:
    """readings: experiment -> what its report concludes; experiments without one are missing.
    drawn: whether the picture of `forest` lies beside the page."""
    sections = []
    for name, text in readings.items():
        first, *rest = [" ".join(line.split()) for line in text.splitlines()]
        said = re.sub(rf"^{name} {re.escape(setting)}[^:]*: ", "", first)
        said += "".join(f"\n- {line}" for line in rest)
        title = f"[{name.replace('_', ' ').capitalize()}]({name}/{setting}/report.md)"
        question, made = experiments.EXPERIMENTS[name].question, made_by(runs / name / setting)
        sections.append(f"## {title}\n\n*{question}*\n\n{said}\n\n{made}\n")
    absent = [name for name in experiments.EXPERIMENTS if name not in readings]
    missing = f"\nNot run in this setting: {', '.join(absent)}.\n" if absent else ""
    return PAGE.format(
        setting=setting, missing=missing, sections="\n".join(sections),
        records=RECORDS.format(setting=setting, caption=forest.CAPTION) if drawn else "",
        cost=cost([runs / name / setting for name in readings]),
        collections=collections(runs, setting),
    )  # fmt: skip


def made_by(folder: Path) -> str:
    """Sources, devices and dtypes of a setting's trials, the most frequent first; "" if none."""
    trials = [disk.read(path) for path in disk.trial_files(folder)]
    if not trials:
        return ""
    sources = Counter(f"`{trial['sources'][:8]}`" for trial in trials)
    devices = Counter(f"{trial['device']}, {trial['config']['dtype']}" for trial in trials)
    first = (", ".join(name for name, _ in of.most_common()) for of in (sources, devices))
    return f"Sources {'; '.join(first)}."


def cost(folders: Sequence[Path]) -> str:
    """Trials and their time; one that stands for the same in several experiments counts once."""
    took: dict[tuple, float] = {}  # the seconds of its evaluation tell a trial from every other
    devices, count = set(), 0
    for path in (p for folder in folders for p in disk.trial_files(folder)):
        trial = disk.read(path)
        seconds = trial["seconds"]
        key = (trial["seed"], seconds["test"], seconds.get("prepare"))
        # Watching gradients is part of one of them alone; what is measured elsewhere was trained
        # in another setting.
        spent = seconds["test"] if "trained" in trial else sum(seconds.values())
        took[key] = max(took.get(key, 0.0), spent)
        devices.add(trial["device"])
        count += 1
    shared = f", which {count} files hold, some of them in several experiments"
    return (
        f"{len(took)} trials{shared if count > len(took) else ''}: "
        f"{sum(took.values()) / 60:,.0f} minutes of training and evaluation on "
        f"{'; '.join(sorted(devices))}. Baselines, measures of trained models and starting are not "
        "in it.\n"
    )


def collections(runs: Path, setting: str) -> str:
    """The kill gate of this setting beside that of its scale on other collections or bases."""
    found = {path.parent.name: disk.read(path)
             for path in sorted(runs.glob(f"kill_gate/{setting}*/verdict.json"))}  # fmt: skip
    if len(found) < 2 or setting not in found:
        return ""
    rows = []
    for name, verdict in found.items():
        cells = []
        for task in TASKS:
            row = verdict["tasks"].get(task)
            if row is None or row["interference"] is None:
                cells += ["missing", "-", "-"]
                continue
            unsure = "" if row["measurable"] else " (not measurable)"
            cells += [f"{percent(row['interference'])} {span(row['interval'])}{unsure}",
                      p_value(row["p_holm"]),
                      percent(row["smallest_detectable_effect"])]  # fmt: skip
        rows.append([
            f"[{name}](kill_gate/{name}/report.md)", *cells, str(verdict["seeds"]),
            str(verdict["decision"]), "yes" if verdict["supported"] else "no",
            ", ".join(str(x)[:7] for x in verdict["origin"]["sources"]),
            ", ".join(map(str, verdict["origin"]["device"])),
        ])  # fmt: skip
    head = ["setting",
            *(t for name in TASKS.values() for t in (f"I, {name}", "Holm p", "detectable")),
            "seeds", "decision", "supported", "sources", "device"]  # fmt: skip
    return COLLECTIONS.format(table=table(head, rows), agreement=agreement(found))


def agreement(found: Mapping[str, dict]) -> str:
    """In what the verdicts of several settings are alike and in what not, in words."""
    decided = Counter(verdict["decision"] or "no verdict" for verdict in found.values())
    [(most, count), *others] = decided.most_common()
    apart = "".join(f", {kind} in {n}" for kind, n in others)
    sure = [name for name, verdict in found.items() if verdict["supported"]]
    backed = f"in {len(sure)} ({', '.join(sure)})" if sure else "in none"
    first = f"There is {most}" if most == "no verdict" else f"The decision is {most}"
    said = [
        f"{first} in {count} of {len(found)} settings{apart}; the statistics support it {backed}."
    ]
    for task, title in TASKS.items():
        rows = {name: (row, verdict["alpha"]) for name, verdict in found.items()
                if (row := verdict["tasks"].get(task)) and row["measurable"]
                and row["interference"] is not None}  # fmt: skip
        if not rows:
            said.append(f"Nowhere is {title} measurable.")
            continue
        losses = [row["interference"] for row, _ in rows.values()]
        sure = [name for name, (row, alpha) in rows.items()
                if row["p_holm"] is not None and row["p_holm"] <= alpha]  # fmt: skip
        back = [name for name, (row, _) in rows.items() if (row["won_back_interval"] or [0])[0] > 0]
        reach = f"{min(losses):+.1f} to {max(losses):+.1f} %" if len(rows) > 1 else (
            f"{losses[0]:+.1f} %")  # fmt: skip
        said.append(
            f"On {title}, measurable in {len(rows)}, I is above 0 in {sum(x > 0 for x in losses)} "
            f"({reach}), significant at its look's level in {', '.join(sure) or 'none'}; "
            f"Joint-MoE wins back a significant part in {', '.join(back) or 'none'}."
        )
    return " ".join(said)


def write(runs: Path, setting: str, report: Report) -> dict[str, str]:
    """Write every report of a setting and <runs>/<setting>.md over them; what they conclude.

    report: (experiment, folder) -> writes its report and says what it concludes; a `Report`.
    """
    readings = {
        name: report(name, folder)
        for name in experiments.EXPERIMENTS
        if disk.trial_files(folder := runs / name / setting)
    }
    if readings:
        records = forest.entries(runs, setting)
        if drawn := len(records) > 1:
            save_figure(runs / f"{setting}-interference", forest.draw(records))
        else:
            for kind in KINDS:
                (runs / f"{setting}-interference.{kind}").unlink(missing_ok=True)
        write_text(runs / f"{setting}.md", markdown(setting, readings, runs, drawn))
    return readings


@contextmanager
def told_together(report: Report) -> Iterator[Report]:
    """A `report` that says what is wrong where it cannot be written, so that the others are.

    Raises:
        ValueError: in the end, all that was wrong.
    """
    wrong: list[str] = []

    def each(name: str, folder: Path) -> str:
        try:
            return report(name, folder)
        except ValueError as error:
            wrong.append(str(error))
            return f"{name} {folder.name}: no report, {error}"

    yield each
    if wrong:
        raise ValueError("; ".join(wrong))


def settings(runs: Path, experiment: str = "") -> list[str]:
    """Those that have trials under `runs`, of one experiment or of any.

    Other collections come before the scale whose page shows them.
    """
    names = [experiment] if experiment else experiments.EXPERIMENTS
    places = [place for name in names for place in (runs / name).glob("*")]
    return sorted({place.name for place in places if disk.trial_files(place)}, reverse=True)


def stale(results: Path, report: Report) -> list[str]:
    """The published reports that no longer follow from the trials beside them.

    Each setting is copied, its reports and its overview written again; text has to be the same, and
    JSON to the rounding of another processor's arithmetic; tables.tex where there is one. The bytes
    of figures depend on the version of the plotting library and are not compared: those that the
    pages show have to be there, as PNG and SVG, and no others. What is hidden is what a killed
    `publish` has left.

    Args:
        results: results/<experiment>/<setting>. report: as for `write`.
    Returns:
        the files that differ, are new, are no longer written, or are figures that are missing or
        left over.
    """
    found = []
    with tempfile.TemporaryDirectory() as place:
        folders = sorted(path for path in results.glob("[!.]*/[!.]*") if path.is_dir())
        unwritten = shutil.ignore_patterns("report.md")
        for folder in folders:  # all of them first: a report may take in other settings
            copy = Path(place) / folder.relative_to(results)
            shutil.copytree(folder, copy, ignore=unwritten)
        with suppress(ValueError), told_together(report) as each:  # what has no report is stale
            for setting in settings(Path(place)):
                write(Path(place), setting, each)
        for folder in [results, *folders]:
            copy = Path(place) / folder.relative_to(results)
            page, tables = copy / "report.md", copy / "tables.tex"
            if page.exists() and tables.exists():
                write_text(tables, latex(page.read_text("utf-8")))
            texts = _names((folder, copy), ("md", "json", "tex"))
            found += [str(folder / name) for name in sorted(texts)
                      if not _same(folder / name, copy / name)]  # fmt: skip
            pages = [path.read_text("utf-8") for path in sorted(copy.glob("*.md"))]
            shown = {f"{name}.{kind}" for p in pages for name in figures_of(p) for kind in KINDS}
            found += [str(folder / name) for name in sorted(shown ^ _names([folder], KINDS))]
    return found


def _names(folders: Iterable[Path], kinds: Iterable[str]) -> set[str]:
    return {path.name for folder in folders for kind in kinds for path in folder.glob(f"*.{kind}")}


def _same(old: Path, new: Path) -> bool:
    """Whether there are two files that hold the same, numbers to a part in 10^9."""
    if not (old.exists() and new.exists()):
        return False
    if old.suffix != ".json" or old.read_bytes() == new.read_bytes():
        return old.read_bytes() == new.read_bytes()
    return _alike(disk.read(old), disk.read(new))


def _alike(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return type(a) is type(b) and a == b


def portable(result: dict) -> dict:
    """A stored result without the folders of the machine: a path becomes its last part, which
    names the data or base; what they were is told by their fingerprints."""

    def last(value: object) -> object:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    def each(value: str) -> str:
        return "+".join(str(last(part)) for part in parts(value))

    places = ("base", "data", "negatives", "measured_on")
    named = {k: each(v) for k, v in result["config"].items() if k in places}
    data = result["data"]  # of a measure, the fingerprint alone
    if isinstance(data, dict):
        data = {k: last(v) for k, v in data.items()}
    return {**result, "config": result["config"] | named, "data": data}


SPECIAL = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}",
           "~": r"\textasciitilde{}", "±": r"$\pm$",
           "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "Δ": r"$\Delta$", "²": r"$^2$",
           "<": "$<$", ">": "$>$", "\u2212": "$-$", "…": r"\dots{}"}  # fmt: skip


def latex(report: str) -> str:
    """Every Markdown table of a report as a booktabs tabular, under its heading as a comment."""
    made, heading, lines = [], "", report.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("| ") and re.fullmatch(
            r"\|[ :|-]+\|", lines[min(at + 1, len(lines) - 1)]
        ):
            end = at
            while end < len(lines) and lines[end].startswith("| "):
                end += 1
            cells = [_cells(row) for row in (lines[at], *lines[at + 2 : end])]
            body = [" & ".join(map(_tex, row)) + r" \\" for row in cells]
            columns = "l" + "r" * (len(cells[0]) - 1)
            made.append("\n".join([
                f"% {heading}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0],
                r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}",
            ]))  # fmt: skip
    return "\n\n".join(made) + "\n"


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1])]


def _tex(cell: str) -> str:
    """One cell: bold stays bold, links keep their text, the rest is escaped."""
    cell = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", cell).replace(r"\|", "|").replace("`", "")
    cell = re.sub(r"\*([^*]+)\*", r"\1", cell) if "**" not in cell else cell
    parts = re.split(r"\*\*", cell)
    escaped = ["".join(SPECIAL.get(c, c) for c in part) for part in parts]
    return "".join(rf"\textbf{{{p}}}" if i % 2 else p for i, p in enumerate(escaped))
