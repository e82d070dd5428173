"""The tables that README and docs quote are the published ones, word for word; links hold."""

import json
import re
from pathlib import Path

import pytest

import experiments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTING = {"README.md": 10, "speed.md": 20}  # page -> rows of numbers, at least


def rows(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("| ") and "`" not in line}


@pytest.mark.parametrize("name", QUOTING)
def test_every_number_in_a_table_is_a_published_one(name: str) -> None:
    [page] = [page for page in PAGES if page.name == name]
    published = set()
    for folder in ("results", "bench/results"):
        for path in (ROOT / folder).rglob("*.md"):
            published |= rows(path.read_text(encoding="utf-8"))
    quoted = {row for row in rows(page.read_text(encoding="utf-8")) if re.search(r"\d", row)}
    assert len(quoted) >= QUOTING[name] and quoted - published == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_four_experiments_took_what_the_page_says() -> None:
    """Kill gate, scale, routers and gradient conflict at `small`: the seconds in their published
    files, what two of them share counted once, two and a half hours at most."""
    taken: dict[str, float] = {}
    trials = set()
    for name in ("gradient_conflict", "kill_gate", "scale_study", "soft_vs_hard"):
        folder = ROOT / "results" / name / "small"
        planned = [folder / arm for arm in experiments.arms(name)]
        files = [path for arm in planned for path in arm.glob("seed[012].json")]
        for path in [*files, *folder.glob("baselines*.json")]:
            record = json.loads(path.read_text(encoding="utf-8"))
            # A watched trial stands for the same one unwatched; each host took its own dtype; as
            # many pairs are scored of 480 queries as were of 200 when all were.
            apart = ("probes", "dtype", "reranking_queries")
            completed = experiments.Config.completed(record["config"])
            config = {k: v for k, v in completed.items() if k not in apart}
            key = json.dumps([config, path in files], sort_keys=True)
            taken.setdefault(key, sum(record["seconds"].values()))
            trials |= {key} if path in files else set()
    minutes = round(sum(taken.values()) / 60)
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert f"are {len(trials)} different trials: {minutes} minutes by the seconds" in page
    assert minutes <= 150
