"""analysis/tracking.py against a stand-in for wandb, which also plays what is online.

The stand-in does what wandb's documentation says of the calls: of a run that is resumed `step` is
the first that it lacks, a lower step is lost, and offline nothing is resumed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import experiments
import run
from analysis import reports, tracking
from eval.metrics import METRICS, mean
from experiments import Config
from model import parallel
from tests.train.tiny import write_collection

STEPS = 4  # with a checkpoint after 2: SCALES["smoke"]


class Stopped(Exception):
    """Stands for whatever ends a run."""


class Run:
    """A `wandb.Run`. lines: (step, what was logged). failed: None until it is finished."""

    def __init__(self, step: int, options: dict, fall_at: int | None):
        self.step, self.options, self.fall_at = step, options, fall_at
        self.lines: list[tuple[int, dict]] = []
        self.summary: dict = {}
        self.failed: bool | None = None

    def log(self, data: dict, step: int) -> None:
        assert self.failed is None and step >= self.step, "wandb drops this"
        assert all(isinstance(value, int | float | str) for value in data.values())
        if step == self.fall_at:
            raise Stopped
        self.lines.append((step, data))
        self.step = step + 1

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.failed = kind is not None


class Wandb(ModuleType):
    """The module. runs: all that were begun. fall_at: the step at which the next one raises."""

    def __init__(self):
        super().__init__("wandb")
        self.runs: list[Run] = []
        self.fall_at: int | None = None

    def init(
        self, *, project: str, group: str, name: str, id: str, config: dict, dir: str,  # noqa: A002
        mode: str | None, resume: str | None, settings: dict,
    ) -> Run:  # fmt: skip
        assert len(id) <= 128 and not set(id) & set("/\\#?%:") and Path(dir).is_dir()
        assert settings == {"console": "off"} and json.dumps(config)
        options = {
            "project": project, "group": group, "name": name, "id": id, "config": config,
            "dir": dir, "mode": mode or os.environ["WANDB_MODE"], "resume": resume,
        }  # fmt: skip
        same = [r.step for r in self.runs if r.options["id"] == id]
        resumed = resume == "allow" and options["mode"] == "online"
        made = Run(max(same, default=0) if resumed else 0, options, self.fall_at)
        self.runs.append(made)
        self.fall_at = None
        return made


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("tracked") / "Tiny")


@pytest.fixture
def go(tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """go(experiment, arm, *more, runs="runs") -> what the arm's trial has stored."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    stub = SimpleNamespace(write=lambda folder: {}, summary=lambda found: "summary")
    monkeypatch.setattr(reports, "REPORTS", dict.fromkeys(reports.REPORTS, stub))
    setting = experiments.setting_name("smoke", str(tiny_base), str(data))

    def go(experiment: str, arm: str, *more: str, runs: str = "runs") -> dict:
        line = ["run", experiment, "--scale", "smoke", "--base", str(tiny_base), "--data",
                str(data), "--runs", str(tmp_path / runs), "--seeds", "1", "--device", "cpu",
                "--set", "dtype=float32", "--arms", arm, *more]  # fmt: skip
        assert run.main(line) == 0
        return json.loads((tmp_path / runs / experiment / setting / arm / "seed0.json").read_text())

    return go


def lines_of(result: dict) -> list[tuple[int, dict]]:
    experts = tuple(result["config"]["experts"])
    return [(line["step"], tracking.drawn(line, experts)) for line in result["curve"]]


def test_a_trial_is_a_run(go: Callable[..., dict], wandb: Wandb, tmp_path: Path) -> None:
    result = go("kill_gate", "joint-moe", "--wandb", "gate")
    (made,) = wandb.runs
    assert made.lines == lines_of(result) and made.step == STEPS
    setting = next((tmp_path / "runs" / "kill_gate").iterdir()).name
    options = dict(made.options)
    config = {"experiment": "kill_gate", "setting": setting, "arm": "joint-moe"}
    assert json.loads(json.dumps(options.pop("config"))) == config | result["config"]
    assert len(options.pop("id")) == 32
    assert options == {
        "project": "gate", "group": f"kill_gate/{setting}", "name": "joint-moe seed0",
        "dir": str(tmp_path / "runs"), "mode": "offline", "resume": None,
    }  # fmt: skip
    assert made.summary["embedding/ndcg_cut_10"] == mean(
        result["scores"]["embedding"], "ndcg_cut_10"
    )
    assert {f"{task}/{m}" for task in result["scores"] for m in METRICS} <= made.summary.keys()
    assert made.summary["trainable_parameters"] == result["trainable_parameters"]
    assert made.summary["seconds/train"] == result["seconds"]["train"]
    assert made.failed is False

    go("kill_gate", "joint-moe", "--wandb", "gate")  # what is finished is not logged again
    assert len(wandb.runs) == 1
    taken = go("soft_vs_hard", "sparsegen", "--wandb", "gate")  # the same trial, taken over
    assert wandb.runs[1].lines == made.lines and wandb.runs[1].summary == made.summary
    assert wandb.runs[1].options["group"] == f"soft_vs_hard/{setting}"
    assert wandb.runs[1].options["id"] != made.options["id"]

    alone = go("kill_gate", "joint-moe", runs="others")
    assert len(wandb.runs) == 2  # none where none was asked for
    for kept in (result, taken, alone):
        for name in ("arm", "seconds", "peak_bytes"):
            kept.pop(name)
    assert result == alone == taken


@pytest.mark.parametrize(
    ("mode", "resume", "again"),
    [("", None, range(STEPS)), ("dryrun", None, range(STEPS)), ("online", "allow", range(3, 4))],
)
def test_a_trial_that_goes_on_goes_on_in_its_run(
    mode: str, resume: str | None, again: range, go, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 3, one step after its checkpoint: wandb has three steps, the trial two."""
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    wandb.fall_at = 3
    with pytest.raises(Stopped):
        go("kill_gate", "emb-only", "--wandb", "gate")
    result = go("kill_gate", "emb-only", "--wandb", "gate")
    first, second = wandb.runs
    assert (first.failed, second.failed) == (True, False)
    assert first.options == second.options and first.options["resume"] == resume
    assert first.options["mode"] == (mode or "offline")
    assert first.lines == lines_of(result)[:3]
    assert second.lines == [lines_of(result)[step] for step in again]
    assert "embedding/ndcg_cut_10" in second.summary and not first.summary


def test_another_config_is_another_run(wandb: Wandb, tmp_path: Path) -> None:
    places = [tmp_path / runs / "kill_gate" / "small" / "emb-only" / "seed0" for runs in "ab"]
    for place, config in ((places[0], Config()), (places[0], Config(clip=2.0)),
                          (places[1], Config())):  # fmt: skip
        with tracking.tracked("gate", place, config):
            pass
    assert len({made.options["id"] for made in wandb.runs}) == 3


def test_one_process_logs_for_all(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    place = tmp_path / "kill_gate" / "small" / "emb-only" / "seed0"
    with tracking.tracked("gate", place, Config()) as track:

        def watch(model, data, config) -> None:
            return None

        assert track.beside(watch) is watch
        track.end({})
    assert not wandb.runs and not list(tmp_path.iterdir())


def test_what_is_drawn_of_a_line() -> None:
    line = {"step": 3, "loss_embedding": 0.5, "weights_embedding": [0.25, 0.75], "alarm": "a: b",
            "gradients": [{"layer": 0}]}  # fmt: skip
    assert tracking.drawn(line, ("one", "two")) == {
        "loss_embedding": 0.5,
        "weights_embedding/one": 0.25,
        "weights_embedding/two": 0.75,
        "alarm": "a: b",
    }


def test_without_the_package_nothing_is_begun(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = ["run", "kill_gate", "--scale", "smoke", "--base", str(tiny_base), "--data", str(data),
            "--runs", str(tmp_path / "runs"), "--wandb", "gate"]  # fmt: skip
    assert run.main(line) == 2
    assert "--wandb gate: needs the package wandb: `pip install wandb`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
