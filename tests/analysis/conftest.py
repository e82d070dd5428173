"""Trials of a kill gate; reports are written many times, and figures looked at in a few tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import experiments
from analysis import figures, report
from tests.analysis.made import ARMS, CLUSTERS, EVERY, QUERIES, Make, rows, write_json


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures become empty files, which takes a tenth of the time. `draws`: they are rendered, as
    tests/run/test_study.py does with those of every experiment."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b""))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at numbers and words alone: drawing takes most of the time."""
    monkeypatch.setattr(figures, "draw", lambda verdict, arms: {})


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(loss=(embedding, reranking), ...) -> a folder of trials, losses of joint-single in %."""

    def make(
        loss: tuple[float, float] = (5.0, 0.0),
        arms: tuple[str, ...] = ARMS,
        seeds: int = 3,
        noise: float = 0.002,
        gain: float = 0.3,
        name: str = "kill_gate/small",
    ) -> Path:
        folder = tmp_path / name
        rng = np.random.default_rng(0)
        hard = {task: 0.2 * rng.random(QUERIES) for task in report.TASKS}
        for arm in arms:
            for seed in range(seeds):
                config = experiments.config("kill_gate", arm, "smoke", seed).to_json()
                scores: dict[str, Any] = {}
                curve: list[dict[str, Any]] = [{"step": s} for s in range(config["steps"])]
                for task, percent in zip(report.TASKS, loss, strict=True):
                    if task not in config["tasks"]:
                        continue
                    share = {"joint-single": 1.0, "joint-moe": 0.5}.get(arm, 0.0)
                    mean = (0.3 + gain) * (1 - share * percent / 100)
                    y = mean + hard[task] - hard[task].mean() + rng.normal(0, noise, QUERIES)
                    scores[task] = rows(y - y.mean() + mean + rng.normal(0, noise))
                    for line in curve:
                        line[f"loss_{task}"] = 1 / (1 + line["step"])
                        if config["router"]:
                            line[f"weights_{task}"] = [0.5, 0.3, 0.2]
                trial = {**EVERY, "arm": arm, "seed": seed, "config": config, "scores": scores}
                trial |= {"curve": curve, "trainable_parameters": 1000}
                trial |= {"seconds": {"prepare": 1.0, "train": 2.0, "test": 3.0}}
                write_json(folder / arm / f"seed{seed}.json", trial)
        base = {task: rows(0.3 + hard[task] - hard[task].mean()) for task in report.TASKS}
        plain = {
            **EVERY,
            "config": experiments.config("kill_gate", "joint-single", "smoke", 0).to_json(),
            "bm25": base,
            "untrained": base,
            "ceiling": {"reranking": rows(np.ones(QUERIES))},
            "clusters": {f"q{i}": f"m{i % CLUSTERS}" for i in range(QUERIES)},
            "pool": 99,
            "seconds": {"test": 1.0},
        }
        write_json(folder / "baselines.json", plain)
        return folder

    return make
