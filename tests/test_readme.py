"""What the README quotes stands in the published reports, word for word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("| ") and "`" not in line}


def test_every_number_in_a_table_is_a_published_one() -> None:
    published = set()
    for folder in ("results", "bench/results"):
        for path in (ROOT / folder).rglob("*.md"):
            published |= rows(path.read_text(encoding="utf-8"))
    quoted = {row for row in rows(README) if re.search(r"\d", row)}
    assert len(quoted) >= 10 and quoted <= published


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
