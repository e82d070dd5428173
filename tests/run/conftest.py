"""One run of two arms over one seed, finished once, and copies of it to do things to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from analysis import reports
from tests.run.shared import ARMS, FIELDS
from tests.train.tiny import write_collection


def stub_report(patch: pytest.MonkeyPatch) -> None:
    """What is written from the trials has tests of its own."""
    stub = SimpleNamespace(write=lambda folder: {}, summary=lambda verdict: "summary")
    patch.setattr(reports, "REPORTS", {"verdict": stub})


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_report(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("run") / "Tiny")


@pytest.fixture(scope="module")
def setting(tiny_base: Path) -> str:
    return f"smoke-{tiny_base.name}-tiny"


@pytest.fixture(scope="module")
def words(tiny_base: Path, data: Path) -> Callable[..., list[str]]:
    """The arguments of a run of two arms and one seed into `runs`; `more` follows and wins."""

    def words(runs: Path, *more: str, command: str = "run") -> list[str]:
        where = ["--scale", "smoke", "--base", str(tiny_base), "--data", str(data)]
        line = [command, "kill_gate", *where, "--runs", str(runs)]
        if command in ("run", "status"):
            line += ["--seeds", "1"]
        if command == "run":
            line += ["--arms", *ARMS, "--device", "cpu"]
            line += [w for name, value in FIELDS.items() for w in ("--set", f"{name}={value}")]
        return [*line, *more]

    return words


@pytest.fixture(scope="module")
def done(words, setting, tmp_path_factory) -> Path:
    """The folder of the setting after an undisturbed run; nobody writes into it."""
    place = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIMOER_CACHE", str(place / "cache"))
        stub_report(patch)
        assert run.main(words(place / "runs")) == 0
    return place / "runs" / "kill_gate" / setting


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(done: Path, tmp_path: Path, setting: str) -> Path:
    """The finished setting once more, under tmp_path/runs, to do things to."""
    return Path(shutil.copytree(done, tmp_path / "runs" / "kill_gate" / setting))
