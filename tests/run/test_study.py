"""run.py over several experiments: shared trials, baselines of each size, looks into models."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import experiments
import run
from analysis import measures, probing, reports, representation
from eval.machine import device_name
from eval.provenance import sources
from model.unimoer import UniMoER
from tests.train.tiny import write_collection

STEPS = ["--set", "steps=2", "--set", "dtype=float32", "--set", "measured=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("study") / "Tiny")


@pytest.fixture
def real() -> dict:
    """The reports of the product, before `go` puts stubs in their place."""
    return dict(reports.REPORTS)


@pytest.fixture
def go(real: dict, tiny_base: Path, data: Path, tmp_path: Path, monkeypatch):
    """go(experiment, *arms) -> the setting's folder, after a run of one seed."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    stub = SimpleNamespace(write=lambda folder: {}, summary=lambda found: "summary")
    monkeypatch.setattr(reports, "REPORTS", dict.fromkeys(reports.REPORTS, stub))

    def go(experiment: str, *arms: str) -> Path:
        line = ["run", experiment, "--scale", "smoke", "--base", str(tiny_base), "--data",
                str(data), "--runs", str(tmp_path / "runs"), "--seeds", "1", "--device", "cpu",
                *STEPS, "--arms", *arms]  # fmt: skip
        assert run.main(line) == 0
        setting = experiments.setting_name("smoke", str(tiny_base), str(data))
        return tmp_path / "runs" / experiment / setting

    return go


def forbidden(*args: object) -> None:
    raise AssertionError("this was to be taken over, not computed")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_same_trial_of_another_experiment_is_taken_over(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = go("kill_gate", "joint-moe")
    monkeypatch.setattr(run, "run_trial", forbidden)
    second = go("soft_vs_hard", "sparsegen")
    assert "is the same trial as" in capsys.readouterr().out
    old, new = read(first / "joint-moe/seed0.json"), read(second / "sparsegen/seed0.json")
    assert (old.pop("arm"), new.pop("arm")) == ("joint-moe", "sparsegen")
    assert old == new
    models = [UniMoER.from_pretrained(folder / "seed0.model")
              for folder in (first / "joint-moe", second / "sparsegen")]  # fmt: skip
    assert models[0].predict([("a", "b")]).tolist() == models[1].predict([("a", "b")]).tolist()


def test_a_watched_trial_stands_for_one_that_was_left_alone(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes change nothing: both ways of coming by the trial give the same bits."""
    alone = read(go("soft_vs_hard", "sparsegen") / "sparsegen/seed0.json")
    watched = go("gradient_conflict", "joint-moe")
    assert "gradients" in read(watched / "joint-moe/seed0.json")["curve"][-1]
    shutil.rmtree(watched.parents[1] / "soft_vs_hard")
    monkeypatch.setattr(run, "run_trial", forbidden)
    monkeypatch.setattr(run, "run_baselines", forbidden)
    folder = go("kill_gate", "joint-moe")
    taken, long = (read(at / "joint-moe/seed0.json") for at in (folder, watched))
    assert 0 < taken["seconds"]["train"] < long["seconds"]["train"]
    for result in (taken, alone):
        for name in ("arm", "seconds", "peak_bytes"):
            result.pop(name)
    assert taken == alone
    baselines = [read(place / "baselines.json") for place in (watched, folder)]
    assert baselines[0] == baselines[1]


def test_a_trial_is_not_taken_for_one_whose_gradients_are_asked_for(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go("kill_gate", "joint-single")
    monkeypatch.setattr(run, "run_trial", forbidden)
    with pytest.raises(AssertionError, match="not computed"):
        go("gradient_conflict", "joint-single")


@pytest.mark.parametrize("change", ["sources", "device", "config"])
def test_what_differs_is_not_taken_over(
    change: str, go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = go("kill_gate", "emb-only") / "emb-only/seed0.json"
    other = read(path)
    other[change] = {**other["config"], "clip": 9.0} if change == "config" else "another"
    path.write_text(json.dumps(other))
    monkeypatch.setattr(run, "run_trial", forbidden)
    with pytest.raises(AssertionError, match="not computed"):
        go("soft_vs_hard", "emb-only")


def test_each_size_has_its_own_baselines(go: Callable[..., Path]) -> None:
    folder = go("scale_study", "emb-only-2l", "emb-only-3l")
    small, large = read(folder / "baselines.json"), read(folder / "baselines-3l.json")
    assert (small["config"]["layers"], large["config"]["layers"]) == (2, 3)
    assert large["body_parameters"] == pytest.approx(1.5 * small["body_parameters"], rel=0.01)
    assert small["untrained"] != large["untrained"] and small["bm25"] == large["bm25"]
    assert read(folder / "emb-only-3l/seed0.json")["body_parameters"] == large["body_parameters"]


def test_a_look_into_a_model_is_kept(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = go("routing", "joint-moe", "bare-moe")
    for arm in ("joint-moe", "bare-moe"):
        found = read(folder / arm / "routing-seed0.json")
        assert found["texts"]["pair"] == 10 and len(found["means"]["pair"]) == 1
    assert found["seconds"]["measure"] > 0 and found["device"].startswith(device_name("cpu"))
    assert len(found["sources"]) == 64 and found["sources"] != sources()  # analysis counts too
    monkeypatch.setattr(measures, "measure", forbidden)
    assert go("routing", "joint-moe") == folder
    # Of other texts, or of another model than the one that lies there now, it is made again.
    kept = (folder / "joint-moe" / "routing-seed0.json").read_text()
    (folder / "joint-moe" / "routing-seed0.json").write_text(
        json.dumps(json.loads(kept) | {"data": "of others"})
    )
    with pytest.raises(AssertionError, match="not computed"):
        go("routing", "joint-moe")
    (folder / "joint-moe" / "routing-seed0.json").write_text(kept)
    name = "seed0.model/adapters.safetensors"
    shutil.copy(folder / "bare-moe" / name, folder / "joint-moe" / name)
    with pytest.raises(AssertionError, match="not computed"):
        go("routing", "joint-moe")


def test_the_base_is_probed_once(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same under every arm: what one trial found of it, the others take."""
    right, seen = probing.probe, []

    def probe(layers, *of):
        seen.append(len(layers))
        return right(layers, *of)

    monkeypatch.setattr(probing, "probe", probe)
    folder = go("probing", "rank-only", "joint-moe")
    files = [read(folder / arm / "probing-seed0.json") for arm in ("rank-only", "joint-moe")]
    assert len(seen) == 2 + 4  # the model and the base; the model and three experts
    assert files[0]["probes"]["base"] == files[1]["probes"]["base"]
    assert files[0]["base_mark"] == files[1]["base_mark"] != ""


@pytest.mark.parametrize(
    ("experiment", "arms"),
    [
        ("gradient_conflict", ("joint-single", "joint-moe", "pcgrad")),
        ("soft_vs_hard", ("similarity-max", "sparsegen", "token", "random")),
        ("routing", ("joint-moe", "bare-moe")),
        ("representation", ("emb-only", "joint-moe")),
        ("probing", ("rank-only", "joint-moe")),
        (
            "pointwise_vs_listwise",
            (
                "pointwise-single",
                "pointwise-moe",
                "listwise-single",
                "listwise-moe",
                "e2rank-single",
                "e2rank-moe",
            ),
        ),
        ("rank_sweep", ("all-r1", "all-r16", "shared-r1")),
        (
            "transfer",
            (
                "emb-only",
                "rank-only",
                "full",
                "isolated",
                "rerank-beside-embedding",
                "rerank-beside-nothing",
                "head-on-base",
                "head-on-embedding",
            ),
        ),
        ("trained_baselines", ("emb-only", "task", "sparsegen", "embedder-lora", "base-lora")),
        ("remedies", ("emb-only", "rank-only", "joint-moe", "weight-25", "merged-sum", "ties-20")),
    ],
)
def test_every_experiment_goes_from_data_to_its_report(
    experiment: str, arms: tuple[str, ...], go: Callable[..., Path], real: dict, monkeypatch
) -> None:
    """With a seed each: intervals are missing and said to be."""
    # It compiles itself for half a minute, and is run in analysis/test_representation.py.
    monkeypatch.setitem(representation.MAP_METHODS, "UMAP", lambda x: x[:, :2])
    folder = go(experiment, *arms)
    reports.REPORTS.update(real)
    assert reports.write(experiment, folder, tables=True)
    text = (folder / "report.md").read_text()
    assert not re.search(r"\bnan\b", text) and "What could not be concluded" in text
    for figure in re.findall(r"!\[\w+\]\((\w+\.png)\)", text):
        assert (folder / figure).exists()
    assert r"\toprule" in (folder / "tables.tex").read_text()


def test_arms_that_are_equal_by_plan_stand_for_each_other(tmp_path, monkeypatch, capsys) -> None:
    """Rank in proportion to a width may be the rank that another arm has anyway."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "width", lambda base: 64 * 16)
    monkeypatch.setattr(run, "check_starts", stop)
    line = ["run", "scale_study", "--scale", "full", "--seeds", "1", "--device", "cpu",
            "--runs", str(tmp_path), "--arms", "emb-only"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run.main([*line, "emb-only-w64"])
    assert run.main([*line, "emb-only-r4", "--set", "ranks=[8]"]) == 2
    assert "--set makes emb-only and emb-only-r4 the same trial" in capsys.readouterr().err
