"""The report: its numbers are those of eval.stats, and its words fit them."""

import json

import numpy as np
import pytest

from analysis import report, verdict_tables
from eval import rule, stats
from tests.analysis.made import QUERIES, Make, change, text_of, words_alone


@words_alone
def test_numbers_are_those_of_stats(make: Make) -> None:
    folder = make()
    _, arms = report.load(folder)
    verdict = report.write(folder)

    def matrix(arm: str, task: str) -> np.ndarray:
        trials = [t["scores"][task] for t in arms[arm].values()]
        return np.array([[r["ndcg_cut_10"] for r in t.values()] for t in trials])

    y = {
        task: {a: matrix(a, task) for a in (rule.SPECIALIST[task], "joint-single", "joint-moe")}
        for task in report.TASKS
    }
    baselines = json.loads((folder / "baselines.json").read_text())
    base = {
        task: np.array([r["ndcg_cut_10"] for r in baselines["untrained"][task].values()])
        for task in y
    }
    labels = list(baselines["clusters"].values())
    direct = rule.verdict(y, base, dict.fromkeys(y, labels))
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
        ((5.0, 0.0), 0.3, "proceed", "Proceed: one adapter for both scores 2 % or more below"),
        ((0.0, 0.0), 0.3, "pivot", "Pivot: one adapter for both scores less than 1 % below"),
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


@pytest.mark.parametrize(
    ("interval", "told"),
    [((-1146.9, -0.21), "-82 % [< -1,000, -21] %"), ((-0.9, 12.0), "-82 % [-90, > 1,000] %"),
     ((-0.9, 0.5), "-82 % [-90, 50] %"), (None, "-82 % (no interval)")],
)  # fmt: skip
def test_a_share_of_next_to_nothing_has_no_digits(interval: tuple | None, told: str) -> None:
    assert verdict_tables.back({"won_back": -0.82, "won_back_interval": interval}) == told


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
def test_a_verdict_says_where_a_router_has_collapsed(make: Make) -> None:
    folder = make()
    assert "an expert carried" not in report.summary(report.write(folder))
    for arm in ("joint-moe", "joint-single"):
        path = folder / arm / "seed1.json"
        last = {"step": 9, "alarm": "collapse: shared carry no weight"}
        change(path, curve=[*json.loads(path.read_text())["curve"], last])
    told = "Joint-MoE: in 1 of 3 seeds an expert carried under 1 % of the weight"
    assert told in report.summary(report.write(folder)) and told in text_of(folder)
    assert "Joint-Single: in" not in text_of(folder)  # it has no router
