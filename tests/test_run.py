"""run.py: a whole tiny experiment, then run again, damaged, killed and asked for nonsense.

"The same" is bit for bit: scores per query and loss curves.
"""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import analysis.report
import eval.provenance
import experiments
import model.prefix
import run
import train.trial
from analysis import overview, reports
from eval.collections import load
from eval.metrics import METRICS
from eval.protocol import EvaluationSet, without_states
from experiments import Config
from model import processor
from model.unimoer import UniMoER
from tests.processes import Child
from tests.train.tiny import TEST, tiny_config, write_collection
from train.mining import Settings, mine
from train.negatives import mined_sha256

ROOT = Path(__file__).resolve().parents[1]
ARMS = ["emb-only", "joint-moe"]
STEPS = 16
FIELDS = {
    "layers": 4,
    "adapter_layers": 2,
    "dtype": "float32",
    "lora_dropout": 0.1,
    "router_noise": 0.3,
    "steps": STEPS,
    "checkpoint_every": 3,
}
RESULT = {
    "schema", "arm", "seed", "config", "base", "data", "git", "sources", "versions", "device",
    "kernels", "processes", "seconds", "peak_bytes", "body_parameters", "width",
    "layers",
}  # fmt: skip


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stub_report(patch: pytest.MonkeyPatch) -> None:
    """What is written from the trials has tests of its own."""
    stub = SimpleNamespace(write=lambda folder: {}, summary=lambda verdict: "summary")
    patch.setattr(reports, "REPORTS", {"verdict": stub})


@pytest.fixture(autouse=True)
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


def read(folder: Path, arm: str) -> dict:
    return json.loads((folder / arm / "seed0.json").read_text())


def assert_same_numbers(found: Path, expected: Path) -> None:
    for arm in ARMS:
        new, old = read(found, arm), read(expected, arm)
        assert new["scores"] == old["scores"], arm
        assert new["curve"] == old["curve"], arm
    new, old = (json.loads((f / "baselines.json").read_text()) for f in (found, expected))
    assert all(new[key] == old[key] for key in ("bm25", "untrained", "ceiling", "clusters"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("this was not to be called")


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


def test_sources_are_the_modules_that_make_numbers(tmp_path, monkeypatch):
    folders = ("kernels", "model", "eval", "train", "analysis", "tests")
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(eval.provenance, "ROOT", tmp_path)
    sources = eval.provenance.sources.__wrapped__  # which a process asks once
    seen = [sources()]
    for folder in folders:
        (tmp_path / folder / "a.py").write_text("2")
        seen.append(sources())
    assert len(set(seen[:5])) == 5  # each of the first four counts
    assert seen[4] == seen[5] == seen[6]  # what only reads results does not


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


def test_a_model_is_not_kept_beyond_its_trial(tiny_base, data, tmp_path):
    """The evaluation set is, and with it the base would stay in memory beside the next one."""
    bench = train.trial.Workbench(str(data), "cpu", tmp_path, keep_prefix=False)
    config, models, make = tiny_config(tiny_base, data, prefix=True), [], bench.model

    def model(config: Config) -> UniMoER:
        made = make(config)
        models.append(weakref.ref(made))
        return made

    bench.model = model
    train.trial.run_baselines(config, bench, lambda *_: None)
    gc.collect()
    assert bench.evaluation(make(config), config)._sets and [ref() for ref in models] == [None]


def test_a_new_arm_joins_what_is_there(copy, words, tmp_path, cache):
    """The baselines do not depend on which arm came first."""
    before = snapshot(copy)
    more = ("--arms", "rank-only", "--set", "steps=1")
    assert run.main(words(tmp_path / "runs", *more)) == 0
    new = {Path(path).relative_to(copy).parts[:2] for path in {*snapshot(copy)} - {*before}}
    assert new == {("rank-only", "seed0.json"), ("rank-only", "seed0.model")}
    assert read(copy, "rank-only")["scores"].keys() == {"reranking"}


def test_seed_and_offset_decide_how_a_model_starts(tiny_base, data, tmp_path):
    bench = train.trial.Workbench(str(data), "cpu", tmp_path, keep_prefix=False)
    config = tiny_config(tiny_base, data)

    def head(**changes: int) -> list[float]:
        trained = bench.model(replace(config, **changes)).trained()
        return trained["head.linear.weight"].flatten().tolist()

    assert head() == head() != head(seed=1)
    assert head(seed_offset=1000) == head(seed=1000) != head()


def test_each_head_is_measured_on_the_tokens_it_is_trained_on(tiny_base, data, tmp_path):
    """yes_no reads its answer behind the template, with no end token, whatever ran before it."""
    bench = train.trial.Workbench(str(data), "cpu", tmp_path, keep_prefix=False)
    for head in ("linear", "yes_no"):
        config = tiny_config(tiny_base, data, rerank_head=head, reranking_pooling="last")
        model = bench.model(config)
        evaluation = bench.evaluation(model, config)
        texts = evaluation.collection
        pairs = [(texts.queries[q], texts.corpus[d]) for q, d in evaluation.pairs]
        expected = model.score_pairs(pairs).double()
        scores = evaluation.pair_scores(model)
        assert torch.as_tensor(scores).double().allclose(expected, atol=1e-5), head


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


@pytest.mark.parametrize("function", ["write_json", "forget"])
def test_stopped_around_the_storing_of_a_result(
    done, words, setting, tmp_path, cache, monkeypatch, function
):
    """After the training, before the result is there; and after it, before the tidying."""
    true = getattr(run, function)

    def stop(path: Path, *rest: object) -> None:
        if path.parent.name == "joint-moe":
            raise Stopped
        true(path, *rest)

    monkeypatch.setattr(run, function, stop)
    with pytest.raises(Stopped):
        run.main(words(tmp_path / "runs"))
    monkeypatch.setattr(run, function, true)
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


# What a user can get wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "steps"], "--set 'steps': expected FIELD=VALUE"),
        (["--set", "stepz=3"], "a field of trials.Config"),
        (["--set", "=3"], "expected FIELD=VALUE"),
        (["--set", "seed=3"], "seed has an option of its own, --seeds"),
        (["--set", "data=scifact"], "data has an option of its own, --data"),
        (
            ["--set", "seed_offset=1000", "--arms", "emb-only", "emb-only-aa"],
            "--set makes emb-only and emb-only-aa the same trial",
        ),
        (["--controls"], "--arms names all arms that are run: leave out --controls"),
        (["--set", "checkpoint_every=0"], "checkpoint_every must be at least 1, got 0"),
        (["--set", "reranking_queries=-1"], "reranking_queries must be at least 0, got -1"),
        (
            ["--set", "probes=1", "--set", "shard=true", "--arms", "joint-single"],
            "probes watch whole weights",
        ),
        (["--set", "probes=1"], "leave out the arms that train ('embedding',) alone"),
        (["--set", "steps=many"], "--set 'steps=many': expected <class 'int'>, as 1000"),
        (["--set", "steps=1.5"], "expected <class 'int'>"),
        (["--set", "layers=all"], "expected int | None"),
        (["--set", "learning_rate=fast"], "expected <class 'float'>, as 0.0001"),
        (["--set", "tasks=embedding"], "expected tuple[str, ...]"),
        (["--set", "steps=0"], "steps must be at least 1, got 0"),
        (["--set", 'tasks=["retrieval"]'], "tasks must be some of embedding, reranking"),
        (["--arms", "emb-only", "emb"], "unknown arms ['emb']: kill_gate has ['emb-only', "),
        (["--seeds", "-1"], "--seeds -1: expected at least 1"),
        (["--data", "nowhere"], "nowhere: neither a collection nor a folder"),
        (["--base", "nowhere"], "unknown base 'nowhere'"),
        (["--split", "final"], "Tiny has no final split"),
        (["--set", "layers=5"], "layers=5, but this base has 4"),
        (["--set", "router=magic"], "magic"),
        (["--set", "matryoshka=[8,32]"], "matryoshka (8, 32): expected widths below 32"),
        (["--set", "embedding_batch=99"], "24 training queries with a relevant document"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_code_2(words, tmp_path, cache, capsys, more, message):
    assert run.main(words(tmp_path / "runs", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_data_without_a_train_split(words, data, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_baselines", forbidden)  # the dear part comes after
    bare = Path(shutil.copytree(data, tmp_path / "bare"))
    (bare / "qrels" / "train.tsv").unlink()
    assert run.main(words(tmp_path / "runs", "--data", str(bare))) == 2
    assert "bare has no train split (it has dev, test): add qrels/tr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=3", ("steps", 3)),
        ("layers=null", ("layers", None)),
        ("learning_rate=1e-3", ("learning_rate", 1e-3)),
        ("learning_rate=1", ("learning_rate", 1)),
        ("prefix=false", ("prefix", False)),
        ("router=sparsegen", ("router", "sparsegen")),
        ('tasks=["embedding"]', ("tasks", ("embedding",))),
        ("query_prompt=a=b {query}", ("query_prompt", "a=b {query}")),
        ("revision=1234567", ("revision", "1234567")),
    ],
)
def test_what_set_takes(text, expected):
    assert run.override(text) == expected


@pytest.mark.parametrize("text", ['ranks=["a"]', "ranks=[1.5]", "tasks=[1]", 'steps="x"', "no=1",
                                  "steps=true", "clip=true"])  # fmt: skip
def test_what_set_does_not_take(text):
    with pytest.raises(ValueError, match=f"--set '{re.escape(text)}': expected"):
        run.override(text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"clip": 0}, "clip must be > 0 and finite, got 0"),
        ({"clip": -1}, "clip must be > 0 and finite, got -1"),
        ({"temperature": -0.02}, "temperature must be > 0 and finite, got -0.02"),
        ({"learning_rate": math.nan}, "learning_rate must be >= 0 and finite, got nan"),
        ({"embedding_weight": -1}, "embedding_weight must be >= 0 and finite, got -1"),
        ({"warmup": 2}, "warmup is a share of the steps, 0 to 1, got 2"),
        ({"merge_density": 7}, "merge_density is a share, above 0 to 1, got 7"),
        ({"balance": "maen"}, "balance is mean, argmax or support, got 'maen'"),
        ({"tasks": ("embedding", "embedding")}, "tasks must be some of embedding, reranking"),
        ({"tasks": ("embedding",), "probes": 1}, "leave out the arms that train"),
    ],
)
def test_a_config_that_cannot_work(fields, said):
    """Before anything is computed, and not as a result in which nothing moved."""
    with pytest.raises(ValueError, match=re.escape(said)):
        Config(**fields)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("small", "smollm2-135m", "stdlib"), "small"),
        (("small", "smollm2-135m", "scifact"), "small-scifact"),
        (("full", "Qwen/Qwen3-0.6B-Base", "msmarco"), "full-qwen3-0.6b-base-msmarco"),
        (("smoke", "/models/Mine/", "../data/FiQA/"), "smoke-mine-fiqa"),
        (("full", "Qwen/Qwen3-0.6B-Base", "stdlib"), "full-qwen3-0.6b-base"),
        (("small", "smollm2-135m", "../data/FiQA+msmarco"), "small-fiqa+msmarco"),
        (("small", "smollm2-135m", "mteb/SciFact"), "small-mteb-scifact"),
        (("small", "smollm2-135m", "scifact+mteb/M:sw"), "small-scifact+mteb-m-sw"),
    ],
)
def test_the_name_of_a_setting(given, name):
    assert experiments.setting_name(*given) == name


@pytest.mark.parametrize("words", [[], ["run"], ["run", "nothing"], ["fly"], ["list", "x"]])
def test_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 2 and "usage: python -m run" in capsys.readouterr().err


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_dtypes():
    assert processor.resolve_dtype("float16", "cpu") == "float16"
    assert processor.resolve_dtype("auto", "cpu") in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("make", "avx", "amx", "expected"),
    [
        ("AMD EPYC 9R14", True, False, "bfloat16"),
        ("Intel(R) Xeon(R) Processor", True, True, "bfloat16"),
        ("Intel(R) Xeon(R) Processor", True, False, "float32"),
        ("AMD EPYC 7B13", False, False, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(make, avx, amx, expected, monkeypatch):
    """There are processors with instructions for it that run it at half the speed of float32."""
    monkeypatch.setattr(processor, "name", lambda: make)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert processor.resolve_dtype("auto", "cpu") == expected


def test_python_m_run():
    """Without what only some commands need, each of which takes a second or more to import."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "run", "list"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("kill_gate: "), done.stderr
    taken = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    late = {"sklearn", "umap", "torch._dynamo", "torch.distributed.fsdp", "mteb", "transformers"}
    assert "torch" in taken and not late & taken
