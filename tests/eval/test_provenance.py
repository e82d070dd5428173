"""Who made a result, and by which code."""

import subprocess

import pytest

from eval import provenance


@pytest.fixture(autouse=True)
def afresh():
    """What is remembered of the code is asked for again, before and after."""
    provenance._git.cache_clear()
    yield
    provenance._git.cache_clear()


def test_without_git_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert provenance.made_by("cpu")["git"] == {"commit": None, "dirty": None}


@pytest.mark.parametrize(("changed", "dirty"), [("", False), (" M model/lora.py", True)])
def test_what_git_says(monkeypatch: pytest.MonkeyPatch, changed: str, dirty: bool) -> None:
    def answer(words: list[str], **_: object) -> subprocess.CompletedProcess:
        told = changed if "status" in words else "c" * 40
        return subprocess.CompletedProcess(words, 0, told + "\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert provenance.made_by("cpu")["git"] == {"commit": "c" * 40, "dirty": dirty}


def test_outside_of_a_repository_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 128, "", "fatal")
    )
    assert provenance.made_by("cpu")["git"] == {"commit": None, "dirty": None}


def test_sources_are_the_modules_that_make_numbers(tmp_path, monkeypatch):
    folders = ("kernels", "model", "eval", "train", "analysis", "tests")
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    sources = provenance.sources.__wrapped__  # which a process asks once
    seen = [sources()]
    for folder in folders:
        (tmp_path / folder / "a.py").write_text("2")
        seen.append(sources())
    assert len(set(seen[:5])) == 5  # each of the first four counts
    assert seen[4] == seen[5] == seen[6]  # what only reads results does not
