"""run.py: what a whole tiny experiment leaves, what it does when run again, what it publishes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import analysis.report
import experiments
import run
import train.trial
from analysis import overview
from eval.collections import load
from eval.metrics import METRICS
from eval.protocol import EvaluationSet, without_states
from experiments import Config
from model.unimoer import UniMoER
from tests.run.shared import ARMS, FIELDS, STEPS, forbidden, read, snapshot
from tests.train.tiny import TEST
from train.mining import Settings, mine
from train.negatives import mined_sha256

pytestmark = pytest.mark.usefixtures("no_report")

RESULT = {
    "schema", "arm", "seed", "config", "base", "data", "git", "sources", "versions", "device",
    "kernels", "processes", "seconds", "peak_bytes", "body_parameters", "width",
    "layers",
}  # fmt: skip


# What a run leaves ------------------------------------------------------------------------------


def test_files(done):
    files = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    names = ("config.json", "adapters.safetensors", "heads.safetensors")
    models = {f"{arm}/seed0.model/{name}" for arm in ARMS for name in names}
    results = {"baselines.json", *(f"{arm}/seed0.json" for arm in ARMS)}
    assert files == {*results, *models, "took.json"}
    took = json.loads((done / "took.json").read_text())
    assert took["trials"] == len(ARMS) and 0 < took["baselines_after"] < took["seconds"]


def test_the_trained_model_is_kept(done, data):
    """It scores as its trial says."""
    model = UniMoER.from_pretrained(done / "joint-moe" / "seed0.model")
    collection = load(str(data))
    trial = read(done, "joint-moe")
    config = Config.from_json(trial["config"])
    evaluation = EvaluationSet(collection, model.tokenizer, config, without_states)
    found = evaluation.retrieval(model)
    close = [math.isclose(found[q]["map"], row["map"], abs_tol=1e-6)
             for q, row in trial["scores"]["embedding"].items()]  # fmt: skip
    assert sum(close) >= 0.8 * len(close)  # states kept in fp16 may swap a near tie


def test_the_report_reads_what_a_run_writes(copy):
    """No stub in between: the trials as stored, through to the files."""
    verdict = analysis.report.write(copy)
    assert verdict["decision"] is None and "no trial of rank-only" in verdict["reason"]
    assert verdict["arms"]["joint-moe"]["scores"].keys() == {"embedding", "reranking"}
    text = (copy / "report.md").read_text()
    assert "Joint-MoE" in text and (copy / "scores.png").is_file()


@pytest.mark.parametrize("arm", ARMS)
def test_a_trial(done, arm, tiny_base, data):
    trial = read(done, arm)
    assert trial.keys() == RESULT | {
        "scores", "curve", "trainable_parameters", "merged_energy"}  # fmt: skip
    config = Config.from_json(trial["config"])
    expected = experiments.config(
        "kill_gate", arm, "smoke", 0, base=str(tiny_base), data=str(data), **FIELDS
    )
    assert config == expected
    assert (trial["schema"], trial["arm"], trial["seed"]) == (1, arm, 0)
    queries = load(str(data)).qrels["test"]
    assert trial["scores"].keys() == set(config.tasks)
    for scores in trial["scores"].values():
        assert scores.keys() == queries.keys() and len(scores) == TEST
        assert all(row.keys() == set(METRICS) for row in scores.values())
        assert all(0 <= value <= 1 for row in scores.values() for value in row.values())
    assert [line["step"] for line in trial["curve"]] == list(range(STEPS))
    for task in config.tasks:
        losses = [line[f"loss_{task}"] for line in trial["curve"]]
        assert all(map(math.isfinite, losses)) and len(set(losses)) == STEPS
    parameters = UniMoER(train.trial.model_config(config)).trained().values()
    assert trial["trainable_parameters"] == sum(p.numel() for p in parameters)
    assert trial["seconds"].keys() == {"prepare", "train", "test"}
    assert min(trial["seconds"].values()) > 0 and trial["peak_bytes"] > 1 << 20


def test_where_a_result_comes_from(done, data):
    for path in [done / "baselines.json", *sorted(done.glob("*/seed0.json"))]:
        result = json.loads(path.read_text())
        assert result.keys() >= RESULT
        assert set(result["base"]) == {"name", "revision", "fingerprint"}
        assert result["data"]["name"] == "Tiny" and result["data"]["path"] == str(data)
        assert result["data"]["fingerprint"] == load(str(data)).fingerprint
        assert result["git"].keys() == {"commit", "dirty"}
        assert result["versions"].keys() == {"python", "torch", "numpy", "tokenizers", "bm25s"}
        assert result["versions"]["torch"] == torch.__version__
        assert "threads" in result["device"] and len(result["sources"]) == 64


def test_the_baselines(done):
    result = json.loads((done / "baselines.json").read_text())
    more = {"bm25", "untrained", "ceiling", "clusters", "pool"}
    assert result.keys() == RESULT | more and result["arm"] == "baselines"
    for row in ("bm25", "untrained"):
        assert result[row].keys() == {"embedding", "reranking"}
        assert all(len(scores) == TEST for scores in result[row].values())
    assert result["clusters"].keys() == result["ceiling"]["reranking"].keys()
    ceiling = result["ceiling"]["reranking"]
    for query, row in read(done, "joint-moe")["scores"]["reranking"].items():
        assert row["ndcg_cut_10"] <= ceiling[query]["ndcg_cut_10"]


def test_status_and_list(copy, words, tmp_path, capsys):
    (copy / "rank-only").mkdir()
    (copy / "rank-only" / "seed0.log.jsonl").write_text("")
    assert run.main(words(tmp_path / "runs", command="status")) == 0
    lines = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    names = ["emb-only", "rank-only", "joint-single", "joint-moe"]
    assert lines == dict(
        zip(
            [str(copy / name / "seed0.json") for name in names],
            ["done", "begun", "missing", "done"],
            strict=True,
        )
    )
    assert run.main(["list"]) == 0
    listed = capsys.readouterr().out
    for name, row in experiments.EXPERIMENTS.items():
        assert f"{name}: {row.question}" in listed
        assert all(arm in listed for arm in experiments.arms(name, True, True))


# Run again --------------------------------------------------------------------------------------


def test_what_is_finished_is_skipped(copy, words, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_trial", forbidden)
    monkeypatch.setattr(run, "run_baselines", forbidden)
    before = snapshot(copy)
    assert run.main(words(tmp_path / "runs")) == 0
    assert snapshot(copy) == before
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    assert "bm25" in shown.out and "untrained base" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines() if " seed 0 " in line] == ARMS


@pytest.mark.parametrize(
    ("field", "file"),
    [("temperature=0.5", "baselines.json"), (f"steps={STEPS + 1}", "emb-only/seed0")],
)
def test_another_config_is_an_error_that_names_the_field(
    copy, words, tmp_path, cache, monkeypatch, capsys, field, file
):
    monkeypatch.setattr(run, "run_trial", forbidden)
    before = snapshot(copy)
    assert run.main(words(tmp_path / "runs", "--set", field)) == 2
    name, value = field.split("=")
    error = capsys.readouterr().err
    assert file in error and "another config" in error
    assert f"({name}: {read(copy, 'emb-only')['config'][name]} there, {value} here)" in error
    assert snapshot(copy) == before


def test_other_negatives_under_the_same_path_are_another_config(
    words, setting, data, tmp_path, cache, capsys
):
    folder = tmp_path / "mined"
    mined = Settings(depth=30, ranks=(1, 30), margin=0, fill=True)
    line = words(tmp_path / "runs", "--arms", "emb-only", "--set", f"negatives={folder}")
    assert run.main(line) == 2 and "manifest.json is missing" in capsys.readouterr().err
    mine(folder, load(str(data)), mined, "bm25")
    assert run.main(line) == 0
    result = read(tmp_path / "runs" / "kill_gate" / setting, "emb-only")
    assert result["config"]["negatives_sha256"] == mined_sha256(folder)
    assert run.main(line) == 0  # and that is one finished
    shutil.rmtree(folder)
    mine(folder, load(str(data)), replace(mined, pick="top"), "bm25")
    assert run.main(line) == 2
    assert "was made with another config (negatives_sha256: " in capsys.readouterr().err


def test_the_config_of_another_version_is_an_error_too(copy, words, tmp_path, cache, capsys):
    path = copy / "emb-only" / "seed0.json"
    trial = read(copy, "emb-only")
    del trial["config"]["clip"]
    trial["config"]["gone"] = 3
    path.write_text(json.dumps(trial))
    assert run.main(words(tmp_path / "runs")) == 2
    # A field that has come since stands at what changes nothing; one that has gone may have.
    assert "made with another config (gone: 3 there, None here)" in capsys.readouterr().err


def test_changed_sources_are_a_warning(copy, words, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(run.reuse, "sources", lambda *more: "another")
    assert run.main(words(tmp_path / "runs")) == 0
    error = capsys.readouterr().err
    for name in ("baselines.json", "emb-only/seed0.json", "joint-moe/seed0.json"):
        assert f"warning: the source has changed since {copy / name} was made" in error


def test_other_data_under_the_same_name_are_no_result_of_these(
    copy, words, data, tmp_path, cache, capsys
):
    """The config is the same, so only what is read tells them apart."""
    path = data / "qrels" / "test.tsv"
    before = path.read_text()
    lines = before.splitlines()
    try:
        path.write_text("\n".join(lines[:-1]) + "\n")
        assert run.main(words(tmp_path / "runs")) == 2
    finally:
        path.write_text(before)
    error = capsys.readouterr().err
    assert f"{copy / 'baselines.json'} is of another data (data: " in error
    assert "move it away first" in error


def test_results_of_the_other_kernels(copy, words, tmp_path, cache, capsys):
    for path in (*copy.glob("*/seed0.json"), copy / "baselines.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kernels": "triton"}))
    assert run.main(words(tmp_path / "runs")) == 0  # whatever made them
    assert run.main(words(tmp_path / "runs", "--kernels", "torch")) == 2
    assert "is of another kernels (kernels: triton there, torch here)" in capsys.readouterr().err


def test_a_new_arm_joins_what_is_there(copy, words, tmp_path, cache):
    """The baselines do not depend on which arm came first."""
    before = snapshot(copy)
    more = ("--arms", "rank-only", "--set", "steps=1")
    assert run.main(words(tmp_path / "runs", *more)) == 0
    new = {Path(path).relative_to(copy).parts[:2] for path in {*snapshot(copy)} - {*before}}
    assert new == {("rank-only", "seed0.json"), ("rank-only", "seed0.model")}
    assert read(copy, "rank-only")["scores"].keys() == {"reranking"}


# Published --------------------------------------------------------------------------------------


def test_publish_copies_what_is_quoted(copy, words, setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", tmp_path / "repository")
    (copy / "report.md").write_text("report")
    (copy / "emb-only" / "seed1.checkpoint").mkdir()
    (copy / "emb-only" / "seed1.checkpoint" / "state.safetensors").write_text("large")
    (copy / "emb-only" / "seed1.log.jsonl").write_text("{}")
    (copy / "emb-only" / ".seed1.json.part").write_text("{")
    target = tmp_path / "repository" / "results" / "kill_gate" / setting
    target.mkdir(parents=True)
    (target / "old.json").write_text("{}")  # of an earlier time
    assert run.main(words(tmp_path / "runs", command="publish")) == 2
    assert "lacks 10 results (arm, seed): emb-only 1, emb-only 2, rank-only 0" in (
        capsys.readouterr().err
    ) and (target / "old.json").exists()  # fmt: skip
    assert run.main(words(tmp_path / "runs", "--partial", command="publish")) == 0
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    results = {"baselines.json", *(f"{arm}/seed0.json" for arm in ARMS)}
    assert files == {*results, "report.md", "took.json"}
    there, here = (
        json.loads((at / "joint-moe" / "seed0.json").read_text()) for at in (target, copy)
    )
    assert there == overview.portable(here) and str(tmp_path) not in json.dumps(there)
    assert [path.name for path in target.parent.iterdir()] == [setting]
    page = (tmp_path / "repository" / "results" / f"{setting}.md").read_text()
    assert f"(kill_gate/{setting}/report.md)" in page
    assert str(target) in capsys.readouterr().out
