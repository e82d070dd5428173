"""The report: its numbers are those of eval.stats, its words fit them, and its files are whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiments
from analysis import figures, report, verdict_tables
from eval import stats
from trials import Config

QUERIES, CLUSTERS = 60, 12
METRICS = ("ndcg_cut_10", "map", "recip_rank", "recall_100")
ARMS = ("emb-only", "rank-only", "joint-single", "joint-moe")
FIGURES = [f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "svg")]
Make = Callable[..., Path]


def rows(values: np.ndarray) -> dict[str, dict[str, float]]:
    return {f"q{i}": dict.fromkeys(METRICS, float(v)) for i, v in enumerate(values)}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(loss=(embedding, reranking), ...) -> a folder of trials, losses of joint-single in %."""

    def write(path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

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
        every = {
            "schema": 1,
            "base": {"name": "tiny", "revision": None, "fingerprint": "b" * 8},
            "data": {"name": "toy", "fingerprint": "d" * 8, "python": "3.11.7"},
            "git": {"commit": "c" * 40, "dirty": False},
            "sources": "s" * 8,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "device": "cpu, 1 threads",
            "peak_bytes": 10**9,
        }
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
                trial = {**every, "arm": arm, "seed": seed, "config": config, "scores": scores}
                trial |= {"curve": curve, "trainable_parameters": 1000}
                trial |= {"seconds": {"prepare": 1.0, "train": 2.0, "test": 3.0}}
                write(folder / arm / f"seed{seed}.json", trial)
        base = {task: rows(0.3 + hard[task] - hard[task].mean()) for task in report.TASKS}
        plain = {
            **every,
            "config": experiments.config("kill_gate", "joint-single", "smoke", 0).to_json(),
            "bm25": base,
            "untrained": base,
            "ceiling": {"reranking": rows(np.ones(QUERIES))},
            "clusters": {f"q{i}": f"m{i % CLUSTERS}" for i in range(QUERIES)},
            "pool": 99,
            "seconds": {"test": 1.0},
        }
        write(folder / "baselines.json", plain)
        return folder

    return make


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at numbers and words alone: drawing takes most of the time."""
    monkeypatch.setattr(figures, "draw", lambda verdict, arms: {})


words_alone = pytest.mark.usefixtures("no_figures")


def change(path: Path, **new: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def text_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


@words_alone
def test_numbers_are_those_of_stats(make: Make) -> None:
    folder = make()
    _, arms = report.load(folder)
    verdict = report.write(folder)

    def matrix(arm: str, task: str) -> np.ndarray:
        trials = [t["scores"][task] for t in arms[arm].values()]
        return np.array([[r["ndcg_cut_10"] for r in t.values()] for t in trials])

    y = {
        task: {a: matrix(a, task) for a in (stats.SPECIALIST[task], "joint-single", "joint-moe")}
        for task in report.TASKS
    }
    baselines = json.loads((folder / "baselines.json").read_text())
    base = {
        task: np.array([r["ndcg_cut_10"] for r in baselines["untrained"][task].values()])
        for task in y
    }
    labels = list(baselines["clusters"].values())
    direct = stats.verdict(y, base, dict.fromkeys(y, labels))
    assert {key: verdict[key] for key in direct} == direct
    row = verdict["arms"]["joint-single"]["scores"]["embedding"]
    mean = stats.arm_mean(y["embedding"], labels, "joint-single")
    assert row["ndcg_cut_10"] == pytest.approx(mean.value) and row["interval"] == mean.interval
    assert row["seed_sd"] == pytest.approx(np.std(row["by_seed"], ddof=1))
    value = direct["tasks"]["embedding"]["interference"]
    assert value == pytest.approx(5, abs=1) and f"**{value:+.2f} %**" in text_of(folder)


@words_alone
@pytest.mark.parametrize(
    ("loss", "gain", "decision", "words"),
    [
        ((5.0, 0.0), 0.3, "proceed", "Proceed: sharing one adapter costs 2 % or more (+"),
        ((0.0, 0.0), 0.3, "pivot", "Pivot: sharing one adapter costs under 1 % ("),
        ((1.5, 0.0), 0.3, "more_seeds", "More seeds: no task loses 2 %"),
        ((0.0, 0.0), 0.01, "inconclusive", "retrieval and reranking cannot be measured here"),
    ],
)
def test_each_decision_has_its_words(
    make: Make, loss: tuple[float, float], gain: float, decision: str, words: str
) -> None:
    folder = make(loss, gain=gain, noise=1e-4)
    verdict = report.write(folder)
    text = text_of(folder)
    assert verdict["decision"] == decision and words in text
    assert f"- **{decision}** (this run)" in text and text.count("(this run)") == 1
    assert verdict["supported"] == (decision in ("proceed", "pivot"))
    assert f"Supported by the statistics: **{'yes' if verdict['supported'] else 'no'}**" in text
    assert 6 <= len(report.summary(verdict).splitlines()) <= 10
    assert words in report.summary(verdict)


@words_alone
@pytest.mark.parametrize("loss", [0.0, 3.0])
def test_a_planted_loss_lies_in_its_interval(make: Make, loss: float) -> None:
    found = report.write(make((loss, loss)))["tasks"]
    for task, row in found.items():
        low, high = row["interval"]
        assert low <= loss <= high and (low > 0) == (loss > 0), (task, low, high)


@words_alone
def test_won_back_is_told_only_of_a_loss(make: Make) -> None:
    verdict = report.write(make((5.0, 0.0), noise=1e-4))
    told = verdict["arms"]["joint-moe"]["against_joint"]
    found = verdict["tasks"]["embedding"]
    assert told["embedding"]["won_back"] == pytest.approx(found["won_back"])
    assert found["won_back"] == pytest.approx(0.5, abs=0.05)
    assert told["reranking"]["won_back"] is None


@words_alone
def test_nine_seeds_without_an_answer_are_inconclusive(make: Make) -> None:
    folder = make((1.5, 1.5), seeds=9, noise=1e-4)
    assert report.write(folder)["decision"] == "inconclusive"
    assert "Inconclusive: +1.5" in text_of(folder)


@words_alone
def test_a_missing_arm_is_shown_and_gives_no_verdict(make: Make) -> None:
    folder = make()
    shutil.rmtree(folder / "rank-only")
    verdict = report.write(folder)
    assert verdict["decision"] is None and not verdict["supported"]
    assert verdict["reason"] == "no trial of rank-only."
    assert list(verdict["tasks"]) == ["embedding"]
    assert "| Rank-Only | - | missing | 0 (missing: 0, 1, 2) |" in text_of(folder)
    assert "No verdict." in report.summary(verdict)


@words_alone
def test_only_common_seeds_are_compared(make: Make) -> None:
    folder = make()
    (folder / "joint-single" / "seed1.json").unlink()
    (folder / "joint-moe" / "seed2.json").unlink()
    verdict = report.write(folder)
    assert verdict["seeds_compared"] == [0, 2] and verdict["seeds"] == 2
    assert verdict["arms"]["emb-only"]["seeds"] == [0, 2]
    assert verdict["arms"]["joint-moe"]["seeds"] == [0]
    assert "emb-only/seed1.json" not in verdict["trials"]
    assert "Joint-Single 1, Joint-MoE 2" in text_of(folder)


@words_alone
def test_no_common_seed_gives_no_verdict(make: Make) -> None:
    folder = make(seeds=2)
    (folder / "joint-single" / "seed0.json").unlink()
    for arm in ("emb-only", "rank-only"):
        (folder / arm / "seed1.json").unlink()
    verdict = report.write(folder)
    assert verdict["decision"] is None and "no seed in common" in verdict["reason"]


def test_one_seed_has_scores_but_no_interval(make: Make) -> None:
    folder = make(seeds=1)
    verdict = report.write(folder)
    assert verdict["decision"] == "proceed" and not verdict["supported"]
    assert verdict["tasks"]["embedding"]["interval"] is None
    assert verdict["arms"]["emb-only"]["scores"]["embedding"]["seed_sd"] is None
    assert "one seed gives no interval" in text_of(folder)


def test_one_arm_of_an_unknown_experiment(make: Make) -> None:
    folder = make(arms=("emb-only",), name="routers/full-toy")
    verdict = report.write(folder)
    assert verdict["decision"] is None and list(verdict["arms"]) == ["emb-only"]
    assert text_of(folder).startswith("# Routers: full-toy\n")
    assert not (folder / "routing.png").exists()


def test_no_trial_at_all(make: Make) -> None:
    folder = make(arms=())
    assert report.write(folder)["decision"] is None
    assert "| Emb-Only | missing | - | 0 |" in text_of(folder)
    assert (folder / "scores.png").exists() and not (folder / "curves.png").exists()


def test_controls_and_twins(make: Make) -> None:
    arms = (*ARMS, "joint-3r", "uniform-moe", "emb-only-aa", "rank-only-aa")
    verdict = report.write(make(arms=arms))
    plain = {k: v for k, v in verdict["tasks"]["embedding"].items()}
    assert set(verdict["aa"]) == {"embedding", "reranking"}
    assert set(verdict["aa"]["embedding"]) == set(plain)
    assert abs(verdict["aa"]["embedding"]["interference"]) < 1
    assert verdict["arms"]["joint-3r"]["against_joint"]["embedding"]["difference"] > 0
    assert verdict["arms"]["emb-only-aa"]["against_joint"] == {}
    told = [d for row in verdict["arms"].values() for d in row["against_joint"].values()]
    assert len(told) == 6 and len(verdict["moe_against"]) == 4
    told += verdict["moe_against"]  # one family
    assert [d["p_holm"] for d in told] == stats.holm([d["p"] for d in told])
    level = verdict["alpha"] / len(told)
    for d in told:
        least = stats.smallest_detectable_effect(d["se"], d["df"], level)
        assert d["detectable"] == pytest.approx(least)
    text = report.markdown(verdict, [])
    assert "| Emb-Only (A/A) |" in text and "| its twin, nDCG@10 |" in text
    assert "threefold size" not in text


@words_alone
def test_arms_are_held_against_each_other_at_their_common_seeds(make: Make) -> None:
    """Joint-Single scores 0.1 more at seeds that Joint-3r lacks: no part of their difference."""
    folder = make((0.0, 0.0), arms=(*ARMS, "joint-3r"), seeds=6, noise=0.0)
    for seed in (3, 4, 5):
        (folder / "joint-3r" / f"seed{seed}.json").unlink()
        path = folder / "joint-single" / f"seed{seed}.json"
        trial = json.loads(path.read_text())
        for scores in trial["scores"].values():
            for row in scores.values():
                row["ndcg_cut_10"] += 0.1
        path.write_text(json.dumps(trial))
    verdict = report.write(folder)
    for task in report.TASKS:
        assert verdict["tasks"][task]["interference"] < -5
        for arm, seeds, gap in (("joint-3r", [0, 1, 2], 0.0), ("joint-moe", [*range(6)], -5.0)):
            found = verdict["arms"][arm]["against_joint"][task]
            assert found["seeds_compared"] == seeds
            assert found["difference"] == pytest.approx(gap, abs=1e-9)


@words_alone
@pytest.mark.parametrize("lost", [(0.04, 0.04, 0.04), (-0.01, 0.04, 0.0)])
def test_what_is_won_back_is_told_at_the_seeds_of_all_three(
    make: Make, lost: tuple[float, ...]
) -> None:
    """Joint-Single loses `lost` at the seeds that Joint-MoE has, and 0.05 at six others."""
    folder = make((0.0, 0.0), seeds=9, noise=0.0)
    for seed, loss in enumerate((*lost, *[0.05] * 6)):
        if seed >= len(lost):
            (folder / "joint-moe" / f"seed{seed}.json").unlink()
        path = folder / "joint-single" / f"seed{seed}.json"
        trial = json.loads(path.read_text())
        for scores in trial["scores"].values():
            for row in scores.values():
                row["ndcg_cut_10"] -= loss
        path.write_text(json.dumps(trial))
    verdict = report.write(folder)
    for task in report.TASKS:
        found = verdict["tasks"][task]
        row = verdict["arms"]["joint-moe"]["against_joint"][task]
        assert found["interval"][0] > 0 and found["won_back"] == row["won_back"]
        told = min(lost) > 0
        assert (found["won_back"] == pytest.approx(1)) if told else found["won_back"] is None
        assert ("at the seeds that all three" in found["won_back_reason"]) != told


@pytest.mark.parametrize(
    ("interval", "told"),
    [((-1146.9, -0.21), "-82 % [< -1,000, -21] %"), ((-0.9, 12.0), "-82 % [-90, > 1,000] %"),
     ((-0.9, 0.5), "-82 % [-90, 50] %"), (None, "-82 % (no interval)")],
)  # fmt: skip
def test_a_share_of_next_to_nothing_has_no_digits(interval: tuple | None, told: str) -> None:
    assert verdict_tables.back({"won_back": -0.82, "won_back_interval": interval}) == told


@words_alone
def test_without_a_loss_the_reason_is_that(make: Make) -> None:
    folder = make((0.0, 0.0), seeds=4)
    (folder / "joint-moe" / "seed3.json").unlink()
    for found in report.write(folder)["tasks"].values():
        assert "no loss whose interval excludes 0" in found["won_back_reason"]


@words_alone
def test_arms_without_a_common_seed_are_not_held_against_each_other(make: Make) -> None:
    folder = make(arms=(*ARMS, "joint-3r"), seeds=2)
    (folder / "joint-moe" / "seed0.json").unlink()
    (folder / "joint-3r" / "seed1.json").unlink()
    verdict = report.write(folder)
    assert verdict["moe_against"] == []
    assert verdict["arms"]["joint-3r"]["against_joint"]["embedding"]["seeds_compared"] == [0]


@words_alone
def test_the_verdict_does_not_depend_on_the_controls(make: Make) -> None:
    folder = make(arms=(*ARMS, "joint-2r"))
    whole = report.write(folder)
    shutil.rmtree(folder / "joint-2r")
    assert report.write(folder)["tasks"] == whole["tasks"]


def test_a_single_cluster_has_no_interval(make: Make) -> None:
    folder = make()
    change(folder / "baselines.json", clusters={f"q{i}": "all" for i in range(QUERIES)})
    verdict = report.write(folder)
    assert verdict["decision"] is None and "one cluster" in verdict["reason"]
    assert "(no interval)" in text_of(folder)


@words_alone
@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 10])
def test_a_look_that_was_not_planned_says_which_it_replaces(make: Make, seeds: int) -> None:
    folder = make(seeds=seeds)
    report.write(folder)
    next_one = 3 if seeds < 3 else 6 if seeds < 6 else 9
    told = f"This look, at {seeds}, takes the place of the one at {next_one}"
    assert (told in text_of(folder)) == (seeds not in (3, 6))


@words_alone
def test_smoke_concludes_nothing(make: Make) -> None:
    folder = make(name="kill_gate/smoke-toy")
    summary = report.summary(report.write(folder))
    assert "it concludes nothing" in text_of(folder) and "it concludes nothing" in summary


@words_alone
def test_verdict_is_strict_json(make: Make) -> None:
    folder = make(seeds=1)
    verdict = report.write(folder)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (folder / "verdict.json").read_text()
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(verdict))


@pytest.mark.draws
def test_twice_gives_the_same_bytes(make: Make) -> None:
    folder = make()
    report.write(folder)
    names = ["verdict.json", "report.md", *FIGURES]
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    report.write(folder)
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_nothing_is_said_of_a_task_that_cannot_be_measured() -> None:
    tasks = {"embedding": {"interference": 0.2, "measurable": False},
             "reranking": {"interference": 1.5, "measurable": True}}  # fmt: skip
    assert report.headline({"decision": "more_seeds", "tasks": tasks}) == (
        "More seeds: no measurable task loses 2 %, but not all lose under 1 % (+1.50 % on "
        "reranking; retrieval cannot be measured here)."
    )
    assert report.headline({"decision": "inconclusive", "tasks": tasks}) == (
        "Inconclusive: +1.50 % on reranking; retrieval cannot be measured here."
    )


@words_alone
@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({"git": {"commit": "e" * 40, "dirty": False}}, "2 different values of commit"),
        ({"git": {"commit": "c" * 40, "dirty": True}}, "1 of the 13 files were made with uncom"),
        ({"git": {"commit": None, "dirty": False}}, "2 different values of commit"),
        ({"git": {"commit": None, "dirty": None}}, "1 of the 13 files do not say which commit"),
        ({"sources": "other"}, "2 different values of sources"),
        ({"device": "H100"}, "2 different values of device"),
    ],
)
def test_mixed_origin_is_warned_of(make: Make, new: dict, words: str) -> None:
    folder = make()
    assert report.write(folder)["warnings"] == []
    change(folder / "joint-moe" / "seed1.json", **new)
    verdict = report.write(folder)
    assert words in text_of(folder) and words in report.summary(verdict)


def test_a_stop_leaves_the_old_report(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    report.write(folder)
    names = ["verdict.json", "report.md", *FIGURES]
    before = {name: (folder / name).read_bytes() for name in names}
    (folder / "joint-moe" / "seed2.json").unlink()

    def stop(verdict: dict, drawn: list) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "markdown", stop)
        with pytest.raises(KeyboardInterrupt):
            report.write(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before
    report.write(folder)
    assert (folder / "report.md").read_bytes() != before["report.md"]
    assert not (folder / ".report.part").exists()


def test_a_figure_that_no_longer_holds_is_removed(make: Make) -> None:
    folder = make()
    report.write(folder)
    assert (folder / "routing.svg").exists() and "(routing.png)" in text_of(folder)
    (mine := folder / "of-my-own.png").touch()  # which no report shows
    shutil.rmtree(folder / "joint-moe")
    report.write(folder)
    assert not (folder / "routing.svg").exists() and "(routing.png)" not in text_of(folder)
    assert "joint-moe was not run" in text_of(folder) and mine.exists()


@words_alone
def test_what_cannot_be_compared_is_an_error(make: Make) -> None:
    folder = make()
    path = folder / "emb-only" / "seed0.json"
    whole = path.read_text()
    for new, words in (
        ({"data": {"name": "other", "fingerprint": "g"}}, "has other data than"),
        ({"scores": {"embedding": rows(np.ones(3))}}, "has other embedding queries than"),
    ):
        path.write_text(whole)
        change(path, **new)
        with pytest.raises(ValueError, match=words):
            report.write(folder)
    path.write_text(whole[:100])
    # What was put aside is no trial.
    (path.with_name("seed0.old.json")).write_text("{")
    with pytest.raises(ValueError, match="seed0.json cannot be read as JSON"):
        report.write(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="seed0.json is no result, it lacks base, data, config"):
        report.write(folder)
    (folder / "baselines.json").unlink()
    with pytest.raises(ValueError, match="there is no .*baselines.json"):
        report.write(folder)


@pytest.mark.draws
def test_importing_and_writing_leave_matplotlib_alone(make: Make) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write(make())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("arm", "name"),
    [("joint-moe", "Joint-MoE"), ("joint-3r", "Joint-3r"), ("emb-only-aa", "Emb-Only (A/A)")],
)
def test_label(arm: str, name: str) -> None:
    assert figures.label(arm) == name


def test_seeds_of_an_older_code_stand_beside_newer_ones(make: Make) -> None:
    """What it did not know yet is at what changes nothing; other content under another commit is
    not the same data."""
    folder = make()
    path = folder / "joint-moe" / "seed0.json"
    trial = json.loads(path.read_text())
    trial["config"] = Config.completed(trial["config"])
    change(path, config=trial["config"], data=trial["data"] | {"hub/name": "another commit"})
    report.write(folder)
    change(path, config=trial["config"] | {"shard": True})
    with pytest.raises(ValueError, match="shard is .* they cannot be compared"):
        report.write(folder)
