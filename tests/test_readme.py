"""The tables that README and docs quote are the published ones, word for word; links hold."""

import re
from pathlib import Path

import pytest

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
