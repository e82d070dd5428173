"""analysis/tracking.py and wandb itself, offline: what a trial logs lies in the run's file.

test_tracking.py has the same against a stand-in, and what wandb does online.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

import run
from analysis import tracking
from eval.metrics import mean
from tests.train.tiny import write_collection


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:  # pyright: ignore[reportAttributeAccessIssue]
    """What a .wandb file holds: a log in LevelDB's format, in blocks of 32 KiB, behind 7 bytes."""
    raw, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:  # no room for a header: zeros
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, at)
        at += 7 + size
        whole = whole * (kind in (3, 4)) + raw[at - size : at]  # its middle and last part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(whole)
            yield record


def values(items) -> dict[str, object]:
    """Without what wandb adds."""
    pairs = (("/".join(i.nested_key) or i.key, json.loads(i.value_json)) for i in items)
    return {key: value for key, value in pairs if not key.startswith("_")}


def test_a_run_holds_every_step_and_the_scores(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    data = write_collection(tmp_path / "Tiny")
    line = ["run", "kill_gate", "--scale", "smoke", "--base", str(tiny_base), "--data", str(data),
            "--runs", str(tmp_path / "runs"), "--seeds", "1", "--device", "cpu", "--arms",
            "joint-moe", "--set", "dtype=float32", "--wandb", "gate"]  # fmt: skip
    assert run.main(line) == 0
    [place] = (tmp_path / "runs" / "kill_gate").rglob("seed0.json")
    result = json.loads(place.read_text())
    [path] = (tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb")
    found = list(records(path))
    [begun] = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name) == ("gate", "joint-moe seed0")
    assert begun.run_group == f"kill_gate/{place.parents[1].name}"
    config = values(begun.config.update)
    assert {k: config[k] for k in result["config"]} == result["config"]
    history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
    experts = tuple(result["config"]["experts"])
    logged = [(of.step.num, values(of.item)) for of in history]
    assert logged == [(of["step"], tracking.drawn(of, experts)) for of in result["curve"]]
    summary: dict[str, object] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= values(record.summary.update)
    for task, scores in result["scores"].items():
        assert summary[f"{task}/ndcg_cut_10"] == pytest.approx(mean(scores, "ndcg_cut_10"))
    assert summary["trainable_parameters"] == result["trainable_parameters"]
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
