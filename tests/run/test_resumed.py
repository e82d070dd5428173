"""run.py: the same numbers without the prefix cache, with a damaged one, and after being stopped.

"The same" is bit for bit: scores per query and loss curves.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import model.prefix
import run
import train.trial
from analysis import reports
from tests.processes import ROOT, Child
from tests.run.shared import ARMS, assert_same_numbers, forbidden, read, snapshot

pytestmark = pytest.mark.usefixtures("no_report")


class Stopped(Exception):
    """Stands for whatever ends a run."""


# The prefix cache -------------------------------------------------------------------------------


def test_without_the_prefix_cache_the_numbers_are_the_same(done, words, setting, tmp_path, cache):
    assert run.main(words(tmp_path / "runs", "--no-prefix-cache")) == 0
    assert_same_numbers(tmp_path / "runs" / "kill_gate" / setting, done)
    assert not (cache / "prefix").exists()


def test_a_damaged_prefix_cache_is_made_again(done, words, setting, tmp_path, cache, capsys):
    shutil.copytree(done.parents[2] / "cache", cache)
    files = sorted((cache / "prefix").glob("*.states"))
    whole = [path.read_bytes() for path in files]
    assert len(files) == 4  # texts and pairs, of training and of the test
    files[0].write_bytes(whole[0][:100] + bytes([whole[0][100] ^ 1]) + whole[0][101:])
    files[1].write_bytes(whole[1][:-2])
    note = files[2].with_suffix(".json")  # of other texts, and whole
    note.write_text(json.dumps(json.loads(note.read_text()) | {"key": "0" * 64}))
    files[3].with_suffix(".json").unlink()
    assert run.main(words(tmp_path / "runs")) == 0
    said = capsys.readouterr().out
    assert [f"{path}: damaged, made again" in said for path in files] == [True] * 3 + [False]
    assert_same_numbers(tmp_path / "runs" / "kill_gate" / setting, done)
    assert [path.read_bytes() for path in files] == whole


def test_the_prefix_cache_is_used(done, words, setting, tmp_path, cache, monkeypatch):
    shutil.copytree(done.parents[2] / "cache", cache)
    monkeypatch.setattr(model.prefix, "_compute", forbidden)
    assert run.main(words(tmp_path / "runs", "--set", "learning_rate=0.5")) == 0
    new = read(tmp_path / "runs" / "kill_gate" / setting, "joint-moe")["curve"]
    old = read(done, "joint-moe")["curve"]
    assert new[0]["loss_embedding"] == old[0]["loss_embedding"]  # before any step was taken


# Stopped and killed -----------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "function"), [(run.stages, "write_json"), (run, "forget")])
def test_stopped_around_the_storing_of_a_result(
    done, words, setting, tmp_path, cache, monkeypatch, module, function
):
    """After the training, before the result is there; and after it, before the tidying."""
    true = getattr(module, function)

    def stop(path: Path, *rest: object) -> None:
        if path.parent.name == "joint-moe":
            raise Stopped
        true(path, *rest)

    monkeypatch.setattr(module, function, stop)
    with pytest.raises(Stopped):
        run.main(words(tmp_path / "runs"))
    monkeypatch.setattr(module, function, true)
    folder = tmp_path / "runs" / "kill_gate" / setting
    assert (folder / "joint-moe" / "seed0.checkpoint").exists()
    assert (folder / "joint-moe" / "seed0.json").exists() == (function == "forget")
    assert run.main(words(tmp_path / "runs")) == 0
    assert_same_numbers(folder, done)
    # How long it took cannot be told of a run that was stopped.
    assert len(snapshot(folder)) == len(snapshot(done)) - 1
    assert not (folder / "took.json").exists()


def test_killed_twice_it_ends_with_the_same_numbers(done, words, setting, tmp_path):
    """SIGKILL in the first trial's training, then in the second's; each past a checkpoint."""
    folder = tmp_path / "runs" / "kill_gate" / setting
    kept = str(tmp_path / "cache")
    environment = os.environ | {
        "UNIMOER_CACHE": kept,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "run", *words(tmp_path / "runs")]

    def steps(arm: str) -> int:
        log = folder / arm / "seed0.log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def start_and_kill(arm: str, after: int) -> None:
        process = Child(tmp_path / "output", run.main, words(tmp_path / "runs"), UNIMOER_CACHE=kept)
        while steps(arm) < after:
            assert process.code is None, process.text
            time.sleep(0.002)
        process.kill()
        assert process.code == -9, "it ended before it was killed"

    start_and_kill("emb-only", 6)
    assert not (folder / "emb-only" / "seed0.json").exists()
    assert (folder / "emb-only" / "seed0.checkpoint").exists()
    start_and_kill("joint-moe", 6)
    first = read(folder, "emb-only")
    assert not (folder / "joint-moe" / "seed0.json").exists()
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert_same_numbers(folder, done)
    assert read(folder, "emb-only") == first
    left = {path.name for arm in ARMS for path in (folder / arm).iterdir()}
    assert left == {"seed0.json", "seed0.model"}


def deadly(when: str, words: list[str]) -> int:
    """`run.main` that dies of SIGKILL. In a process of its own."""
    replace = os.replace

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_the_model(source, target) -> None:
        die() if ".model" in str(target) else replace(source, target)

    place, name, instead = {
        "the baselines": (run, "run_baselines", die),
        "the pieces' removal": (run.stages, "discard", die),
        "an evaluation": (train.trial, "_scores", die),
        "the saving of a model": (os, "replace", die_at_the_model),
        "the report": (reports, "write", die),
    }[when]
    setattr(place, name, instead)
    return run.main(words)


def test_killed_beside_the_training_it_ends_with_the_same_numbers(
    done, words, setting, tmp_path, cache
):
    """Five times, each further on than the last."""
    line = words(tmp_path / "runs")
    folder = tmp_path / "runs" / "kill_gate" / setting
    for when in ("the baselines", "the pieces' removal", "an evaluation", "the saving of a model",
                 "the report"):  # fmt: skip
        kept = os.environ["UNIMOER_CACHE"]
        killed = Child(tmp_path / "output", deadly, when, line, UNIMOER_CACHE=kept)
        assert killed.wait() == -9, killed.text
        there = {path.name for path in folder.rglob("*.json")} if folder.exists() else set()
        assert ("baselines.json" in there) == (when != "the baselines")
        assert ("seed0.json" in there) == (when == "the report")
    assert run.main(line) == 0
    assert_same_numbers(folder, done)
    assert not [*folder.rglob("*.part")]
    # How long it took cannot be told of a run that was stopped.
    assert len(snapshot(folder)) == len(snapshot(done)) - 1
    assert not (folder / "took.json").exists()
