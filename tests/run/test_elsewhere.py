"""run.py --evaluate: what was trained on one collection, measured on others."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import experiments
import run
from analysis import reports
from eval.collections import load
from eval.metrics import mean
from model.unimoer import UniMoER
from tests.train.tiny import write_collection
from train.trial import Workbench
from trials import Config

ARMS = ("emb-only", "rank-only", "joint-single")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny collection, and two with other words; the last has no train split."""
    root, folders = tmp_path_factory.mktemp("elsewhere"), []
    for name, word in (("Tiny", "rare"), ("Other", "seldom"), ("Third", "odd")):
        folder = write_collection(root / name)
        for part in ("corpus", "queries"):
            path = folder / f"{part}.jsonl"
            path.write_text(path.read_text().replace("rare", word))
        folders.append(folder)
    (folders[2] / "qrels" / "train.tsv").unlink()
    return folders


@pytest.fixture
def go(tiny_base: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """go(*more) -> exit code, of a run of one seed into tmp_path / "runs"."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    stub = SimpleNamespace(write=lambda folder: {}, summary=lambda found: "summary")
    monkeypatch.setattr(reports, "REPORTS", dict.fromkeys(reports.REPORTS, stub))
    line = ["run", "kill_gate", "--scale", "smoke", "--base", str(tiny_base), "--data",
            str(data[0]), "--runs", str(tmp_path / "runs"), "--seeds", "1", "--device", "cpu",
            "--set", "steps=2", "--set", "dtype=float32", "--arms", *ARMS]  # fmt: skip
    return lambda *more: run.main([*line, *more])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_trained_once_and_measured_on_each(
    go: Callable[..., int], tiny_base: Path, data: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    others = [str(folder) for folder in data[1:]]
    assert go("--evaluate", *others) == 0
    home = tmp_path / "runs" / "kill_gate" / f"smoke-{tiny_base.name}-tiny"
    assert "**mean of 2**" in capsys.readouterr().out and (home / "across.md").exists()
    for folder in data[1:]:
        there = home.with_name(f"{home.name}-on-{folder.name.lower()}")
        baselines = read(there / "baselines.json")
        assert baselines["data"]["name"] == folder.name
        for arm in ARMS:
            trained, found = (read(at / arm / "seed0.json") for at in (home, there))
            changed = {"measured_on": str(folder)}
            assert found["config"] == trained["config"] | changed
            assert (
                found["data"] == baselines["data"] and found["trained"]["data"] == trained["data"]
            )
            assert found["curve"] == trained["curve"]
            assert found["seconds"]["train"] == trained["seconds"]["train"]
            config = Config.from_json(found["config"])
            bench = Workbench(str(folder), "cpu", tmp_path / "cache", keep_prefix=False)
            model = UniMoER.from_pretrained(home / arm / "seed0.model")
            evaluation = bench.evaluation(model, config)
            if "embedding" in found["scores"]:
                assert found["scores"]["embedding"] == evaluation.retrieval(model)
            if "reranking" in found["scores"]:
                assert found["scores"]["reranking"] == evaluation.reranking(model)
            assert found["scores"].keys() == trained["scores"].keys()
        assert set(found["scores"]["embedding"]) == set(load(str(folder)).qrels["test"])
    before = {p: p.read_bytes() for p in home.parent.rglob("*.json")}

    def forbidden(*args: object) -> None:
        raise AssertionError("this is there already")

    for name in ("run_trial", "run_baselines", "measure_trial"):
        monkeypatch.setattr(run, name, forbidden)
    assert go("--evaluate", *others) == 0
    assert before == {p: p.read_bytes() for p in home.parent.rglob("*.json")}


def test_the_mean_is_of_what_is_asked(go: Callable[..., int], data: list[Path], tmp_path: Path):
    assert go("--evaluate", str(data[1])) == 0
    (path,) = (tmp_path / "runs").rglob("across.json")
    found = read(path)
    (row,) = found["collections"].values()
    assert row["embedding"]["interference"] == found["tasks"]["embedding"]["interference"]
    (place,) = (tmp_path / "runs").rglob("*-on-other/emb-only/seed0.json")
    score = mean(read(place)["scores"]["embedding"], "ndcg_cut_10")
    assert row["embedding"]["specialist"] == pytest.approx(score)


@pytest.mark.filterwarnings("ignore")  # mteb's own
def test_mteb_decides_for_the_embedding_side(
    go: Callable[..., int], data: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Two of mteb's mock tasks: the table's numbers are mteb's, and nothing is measured twice."""
    from mteb.mocks.mock_tasks import reranking, retrieval

    from eval import mteb_adapter

    made = [retrieval.MockRetrievalTask(), reranking.MockRerankingTask()]
    names = [task.metadata.name for task in made]
    monkeypatch.setattr(mteb_adapter, "named", lambda asked: made if asked == names else [])
    assert go("--seeds", "2", "--mteb", *names) == 0
    home = tmp_path / "runs" / "kill_gate"
    (home,) = home.iterdir()
    found = read(home / "mteb.json")
    said = capsys.readouterr().out
    assert "Reranking on `smoke-" in said and (home / "mteb.md").read_text() in said
    model = UniMoER.from_pretrained(home / "joint-single" / "seed1.model")
    side = mteb_adapter.Encoder(model, "some/name", "1")
    mine = {name: mteb_adapter.main_score(side, task, tmp_path / "other")
            for name, task in zip(names, made, strict=True)}  # fmt: skip
    assert found["scores"]["joint-single"]["1"] == mine
    assert found["scores"].keys() == {"base", "emb-only", "joint-single"}
    p, j = (
        sum(sum(row.values()) for row in found["scores"][arm].values()) / 4
        for arm in ("emb-only", "joint-single")
    )
    row = found["tasks"]["embedding"]
    assert row["interference"] == pytest.approx(100 * (p - j) / p, abs=1e-9) and row["interval"]
    assert row["joint"] == pytest.approx(j)
    monkeypatch.setattr(UniMoER, "encode", lambda *_, **__: pytest.fail("it is there already"))
    assert go("--seeds", "2", "--mteb", *names, "--evaluate", str(data[1])) == 0
    assert "-on-other`" in read(home / "mteb.json")["reranking_on"]
    assert read(home / "mteb.json")["scores"] == found["scores"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mteb", "STS12"], "one task, but an interval over tasks needs two or more"),
        (["--mteb", "STS12", "SciFakt"], "mteb knows no such task or benchmark"),
        (["--evaluate", "nowhere"], "nowhere: neither a collection nor a folder"),
        (["--evaluate", "scifact+fiqa"], "measured_on is one collection, got 'scifact+fiqa'"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    go: Callable[..., int], tmp_path: Path, monkeypatch, capsys, more: list[str], message: str
) -> None:
    assert go(*more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_split_that_the_other_lacks(go: Callable[..., int], data: list[Path], capsys) -> None:
    (judged := data[2] / "qrels" / "dev.tsv").rename(hidden := judged.with_suffix(".off"))
    try:
        assert go("--split", "dev", "--evaluate", str(data[2])) == 2
    finally:
        hidden.rename(judged)
    assert "Third has no dev split" in capsys.readouterr().err


def test_only_a_verdict_is_given_elsewhere(capsys) -> None:
    for option in ("--evaluate", "--mteb"):
        assert run.main(["run", "probing", option, "scifact"]) == 2
        message = f"{option}: probing has no verdict to be given elsewhere"
        assert message in capsys.readouterr().err


def test_arms_without_which_nothing_is_decided_elsewhere(
    go: Callable[..., int], data: list[Path], tmp_path: Path, capsys
) -> None:
    """Refused before anything is trained, unless they were run before."""
    line = ("--arms", "rank-only", "--evaluate", str(data[1]))
    assert go(*line) == 2
    assert "run emb-only, joint-single too" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_config_is_not_measured(
    go: Callable[..., int], data: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Its result was changed after it was trained."""
    assert go() == 0
    (path,) = (tmp_path / "runs").rglob("emb-only/seed0.json")
    stored = run.reuse.stored
    monkeypatch.setattr(
        run.reuse,
        "stored",
        lambda at, config, bench: read(at) if at == path else stored(at, config, bench),
    )
    other = read(path)
    path.write_text(json.dumps(other | {"config": other["config"] | {"clip": 9.0}}))
    assert go("--evaluate", str(data[1])) == 2
    assert "was trained with another config (clip: 9.0, not 1.0)" in capsys.readouterr().err
    path.unlink()
    monkeypatch.setattr(
        run.reuse,
        "stored",
        lambda at, config, bench: other if at == path else stored(at, config, bench),
    )
    assert go("--evaluate", str(data[1])) == 2
    assert f"there is no {path} with its model" in capsys.readouterr().err


def test_the_name_of_such_a_setting(tmp_path: Path) -> None:
    def name(measured_on: str) -> str:
        return experiments.setting_name("full", "smollm2-135m", "msmarco", measured_on)

    assert name("bright/biology") == "full-msmarco-on-bright-biology"
    assert name("") == "full-msmarco"
    (tmp_path / "Mine").mkdir()
    assert name(str(tmp_path / "Mine")) == "full-msmarco-on-mine"


def test_a_collection_is_measured_on_its_own_split(
    go: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its authors measure it, unless another is asked for."""
    asked = []
    monkeypatch.setattr(run, "check_starts", lambda trials, _: asked.append(trials[0][1].split))
    monkeypatch.setattr(run, "Workbench", lambda *_: sys.exit(3))
    for more, split in (((), "test"), (("--data", "msmarco"), "dev"),
                        (("--data", "scifact"), "test"), (("--data", "msmarco+fiqa"), "dev"),
                        (("--data", "msmarco", "--split", "test"), "test")):  # fmt: skip
        with pytest.raises(SystemExit):
            go(*more)
        assert asked.pop() == split
