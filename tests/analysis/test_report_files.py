"""The report: its files are whole and the same again; what cannot be told together is refused."""

import json
import shutil

import numpy as np
import pytest

from analysis import figures, report
from tests.analysis.made import Make, change, rows, text_of, words_alone
from trials import Config

FIGURES = [f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "svg")]


@words_alone
def test_verdict_is_strict_json(make: Make) -> None:
    folder = make(seeds=1)
    verdict = report.write(folder)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (folder / "verdict.json").read_text()
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(verdict))


@pytest.mark.draws
def test_twice_gives_the_same_bytes(make: Make) -> None:
    folder = make()
    report.write(folder)
    names = ["verdict.json", "report.md", *FIGURES]
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    report.write(folder)
    assert {name: (folder / name).read_bytes() for name in names} == first


@words_alone
@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({"git": {"commit": "e" * 40, "dirty": False}}, "2 different values of commit"),
        ({"git": {"commit": "c" * 40, "dirty": True}}, "1 of the 13 files were made with uncom"),
        ({"git": {"commit": None, "dirty": False}}, "2 different values of commit"),
        ({"git": {"commit": None, "dirty": None}}, "1 of the 13 files do not say which commit"),
        ({"sources": "other"}, "2 different values of sources"),
        ({"device": "H100"}, "2 different values of device"),
    ],
)
def test_mixed_origin_is_warned_of(make: Make, new: dict, words: str) -> None:
    folder = make()
    assert report.write(folder)["warnings"] == []
    change(folder / "joint-moe" / "seed1.json", **new)
    verdict = report.write(folder)
    assert words in text_of(folder) and words in report.summary(verdict)


def test_a_stop_leaves_the_old_report(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    report.write(folder)
    names = ["verdict.json", "report.md", *FIGURES]
    before = {name: (folder / name).read_bytes() for name in names}
    (folder / "joint-moe" / "seed2.json").unlink()

    def stop(verdict: dict, drawn: list) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "markdown", stop)
        with pytest.raises(KeyboardInterrupt):
            report.write(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before
    report.write(folder)
    assert (folder / "report.md").read_bytes() != before["report.md"]
    assert not (folder / ".report.part").exists()


def test_a_figure_that_no_longer_holds_is_removed(make: Make) -> None:
    folder = make()
    report.write(folder)
    assert (folder / "routing.svg").exists() and "(routing.png)" in text_of(folder)
    (mine := folder / "of-my-own.png").touch()  # which no report shows
    shutil.rmtree(folder / "joint-moe")
    report.write(folder)
    assert not (folder / "routing.svg").exists() and "(routing.png)" not in text_of(folder)
    assert "joint-moe was not run" in text_of(folder) and mine.exists()


@words_alone
def test_what_cannot_be_compared_is_an_error(make: Make) -> None:
    folder = make()
    path = folder / "emb-only" / "seed0.json"
    whole = path.read_text()
    for new, words in (
        ({"data": {"name": "other", "fingerprint": "g"}}, "has other data than"),
        ({"scores": {"embedding": rows(np.ones(3))}}, "has other embedding queries than"),
    ):
        path.write_text(whole)
        change(path, **new)
        with pytest.raises(ValueError, match=words):
            report.write(folder)
    path.write_text(whole[:100])
    # What was put aside is no trial.
    (path.with_name("seed0.old.json")).write_text("{")
    with pytest.raises(ValueError, match="seed0.json cannot be read as JSON"):
        report.write(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="seed0.json is no result, it lacks base, data, config"):
        report.write(folder)
    (folder / "baselines.json").unlink()
    with pytest.raises(ValueError, match="there is no .*baselines.json"):
        report.write(folder)


@pytest.mark.draws
def test_importing_and_writing_leave_matplotlib_alone(make: Make) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write(make())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("arm", "name"),
    [("joint-moe", "Joint-MoE"), ("joint-3r", "Joint-3r"), ("emb-only-aa", "Emb-Only (A/A)")],
)
def test_label(arm: str, name: str) -> None:
    assert figures.label(arm) == name


def test_seeds_of_an_older_code_stand_beside_newer_ones(make: Make) -> None:
    """What it did not know yet is at what changes nothing; other content under another commit is
    not the same data."""
    folder = make()
    path = folder / "joint-moe" / "seed0.json"
    trial = json.loads(path.read_text())
    trial["config"] = Config.completed(trial["config"])
    change(path, config=trial["config"], data=trial["data"] | {"hub/name": "another commit"})
    report.write(folder)
    change(path, config=trial["config"] | {"shard": True})
    with pytest.raises(ValueError, match="shard is .* they cannot be compared"):
        report.write(folder)
