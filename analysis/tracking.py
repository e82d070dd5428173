"""Weights & Biases beside the record: what a trial logs is copied there, each trial being a run.

The JSON files remain the record; nothing is read back. A run is offline unless WANDB_MODE says
otherwise. Its group is `experiment/setting`, and its id is made of the trial's place and config, so
that a trial which goes on after a kill goes on in its run. Online it is told nothing that it has
(`Run.step` is the first step that it lacks). Offline wandb resumes nothing, so what goes on starts
a folder that holds the run from its first step; once synced, it replaces what came before under
this id. What is called here is in https://docs.wandb.ai/ref/python.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.metrics import METRICS, mean
from model import parallel
from model.unimoer import UniMoER
from train.batches import TrainingData
from train.loop import Callback
from train.trial import Watch
from trials import Config

OFFLINE = ("offline", "dryrun")  # two names of one mode


def wandb_init(project: str) -> Callable[..., Any]:
    """`wandb.init`.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        from wandb import init  # pyright: ignore[reportMissingImports]  (not in requirements.txt)
    except ImportError as error:
        raise ValueError(
            f"--wandb {project}: needs the package wandb: `pip install wandb` ({error})"
        ) from error
    return init


class Track:
    """The run of one trial.

    Args:
        run: a `wandb.Run`; None: nothing is logged.
        place: of the trial, as in `train.loop.train`. config: the trial's.
    """

    def __init__(self, run: Any, place: Path, config: Config):
        self._run, self._config = run, config
        self._log_path = place.with_name(place.name + ".log.jsonl")
        self._next = run.step if run is not None else 0  # the first step that the run lacks

    def beside(self, watch: Watch) -> Watch:
        """`watch`, and each line is logged once that has added to it."""
        if self._run is None:
            return watch

        def both(model: UniMoER, data: TrainingData, config: Config) -> Callback:
            watched = watch(model, data, config)

            def callback(step: int, line: dict) -> None:
                if watched is not None:
                    watched(step, line)
                if self._next < step:  # a trial that goes on: the loop's log has what came before
                    for text in self._log_path.read_text().splitlines():
                        self._log(json.loads(text))
                self._log(line)

            return callback

        return both

    def end(self, result: dict) -> None:
        """Log what a result holds: the steps that nobody has watched here, scores and costs."""
        if self._run is None:
            return
        for line in result["curve"]:
            self._log(line)
        means = {
            f"{task}/{metric}": mean(scores, metric)
            for task, scores in result["scores"].items()
            for metric in METRICS
        }
        costs = {f"seconds/{stage}": took for stage, took in result["seconds"].items()}
        more = {name: result[name] for name in ("trainable_parameters", "peak_bytes")}
        self._run.summary.update(means | costs | more)

    def _log(self, line: dict) -> None:
        if line["step"] >= self._next:
            self._run.log(drawn(line, self._config.experts), step=line["step"])
            self._next = line["step"] + 1


def drawn(line: dict, experts: tuple[str, ...]) -> dict[str, int | float | str]:
    """What wandb draws of a log line: numbers and words as they are, a list of weights by expert
    (`weights_embedding/shared`). Rows that an analysis adds stay in the record alone."""
    found = {key: value for key, value in line.items() if isinstance(value, int | float | str)}
    for key, value in line.items():
        if key.startswith("weights_"):
            found |= {f"{key}/{name}": w for name, w in zip(experts, value, strict=True)}
    del found["step"]
    return found


@contextmanager
def tracked(project: str, place: Path, config: Config) -> Iterator[Track]:
    """The run of a trial in a project of wandb, of which rank 0 alone has one; "" for no run.

    Its files lie in `<runs>/wandb`. It is finished with what the body ends with: an exception marks
    it as failed.

    Args:
        place: `<runs>/<experiment>/<setting>/<arm>/seed<k>`.
    Raises:
        ValueError: wandb is not installed.
    """
    if not project or parallel.rank() > 0:
        yield Track(None, place, config)
        return
    runs, (experiment, setting, arm, seed) = place.resolve().parents[3], place.parts[-4:]
    runs.mkdir(parents=True, exist_ok=True)
    made_of = json.dumps([str(place.resolve()), config.to_json()])
    offline = (asked := os.environ.get("WANDB_MODE", "")) in ("", *OFFLINE)
    options = {
        "project": project,
        "group": f"{experiment}/{setting}",
        "name": f"{arm} {seed}",
        "id": hashlib.sha256(made_of.encode()).hexdigest()[:32],
        "config": {"experiment": experiment, "setting": setting, "arm": arm, **config.to_json()},
        "dir": str(runs),
        "mode": None if asked else "offline",
        "resume": None if offline else "allow",
        "settings": {"console": "off"},  # what is printed is not wandb's business
    }
    with wandb_init(project)(**options) as run:
        yield Track(run, place, config)
