"""Trials as run.py stores them, with scores that were made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiments
from analysis.figures import TASKS

QUERIES, CLUSTERS = 60, 12
METRICS = ("ndcg_cut_10", "map", "recip_rank", "recall_100")
ARMS = ("emb-only", "rank-only", "joint-single", "joint-moe")
EVERY: dict[str, Any] = {
    "schema": 1,
    "base": {"name": "tiny", "revision": None, "fingerprint": "b" * 8},
    "data": {"name": "toy", "fingerprint": "d" * 8, "python": "3.11.7"},
    "git": {"commit": "c" * 40, "dirty": False},
    "sources": "s" * 8,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "device": "cpu, 1 threads",
    "peak_bytes": 10**9,
}
Make = Callable[..., Path]  # the fixture `make`, conftest.py
words_alone = pytest.mark.usefixtures("no_figures")  # and `no_figures`


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def rows(values: np.ndarray) -> dict[str, dict[str, float]]:
    return {f"q{i}": dict.fromkeys(METRICS, float(v)) for i, v in enumerate(values)}


def change(path: Path, **new: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def text_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


class Maker:
    """Writes the trials of one folder; arms share the difficulty of the queries."""

    def __init__(self, folder: Path, noise: float = 0.002, seed: int = 0):
        self.folder, self.noise = folder, noise
        self.rng = np.random.default_rng(seed)
        self.hard = {task: 0.2 * (self.rng.random(QUERIES) - 0.5) for task in TASKS}

    def baselines(self, name: str = "baselines.json", score: float = 0.3, **more: Any) -> None:
        base = {task: rows(score + self.hard[task]) for task in TASKS}
        write_json(self.folder / name, {
            **EVERY, "body_parameters": 1000,
            "config": experiments.plain(self.folder.parent.name, "smoke").to_json(),
            "bm25": base, "untrained": base, "ceiling": {"reranking": rows(np.ones(QUERIES))},
            "clusters": {f"q{i}": f"m{i % CLUSTERS}" for i in range(QUERIES)},
            "pool": 99, "seconds": {"test": 1.0}, **more,
        })  # fmt: skip

    def arm(
        self,
        arm: str,
        means: dict[str, float],
        seeds: int = 3,
        changes: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """means: task -> the arm's true mean; changes: of its config; more: of the trials' keys."""
        for seed in range(seeds):
            config = experiments.config(self.folder.parent.name, arm, "smoke", seed).to_json()
            config |= changes or {}
            scores, line = {}, {"step": config["steps"] - 1}
            for task, mean in means.items():
                noise = self.rng.normal(0, self.noise, QUERIES)
                at = mean + self.rng.normal(0, self.noise)
                scores[task] = rows(at + self.hard[task] + noise - noise.mean())
                line[f"loss_{task}"] = 1.0
                if config["router"]:
                    line[f"weights_{task}"] = [1 / len(config["experts"])] * len(config["experts"])
            write_json(self.folder / arm / f"seed{seed}.json", {
                **EVERY, "arm": arm, "seed": seed, "config": config, "scores": scores,
                "curve": [line], "trainable_parameters": 1000, "body_parameters": 1000,
                "seconds": {"prepare": 1.0, "train": 2.0, "test": 3.0}, **more,
            })  # fmt: skip
