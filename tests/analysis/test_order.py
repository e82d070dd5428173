"""Pointwise against listwise: what was planted is found, and what is measured of a saved model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import experiments
from analysis import order, reports
from eval import order as evaluated
from eval.collections import load
from eval.protocol import EvaluationSet, without_states
from model.unimoer import UniMoER
from tests.analysis.made import Maker, write_json
from tests.train.tiny import NOISY_MOE, tiny_config, write_collection
from train.trial import model_config

SCORES = {  # reranking; MoE adds 1 point pointwise, 5 listwise and 1 by pseudo-query
    "pointwise-single": 0.50, "pointwise-moe": 0.51, "listwise-single": 0.50, "listwise-moe": 0.55,
    "e2rank-single": 0.48, "e2rank-moe": 0.49,
}  # fmt: skip


def measured(mean: float, spread: float, tau: float, rate: float, **more: float) -> dict:
    row = {"by_order": [mean] * 4, "mean": mean, "spread": spread, "tau": tau, "queries": 16,
           "orders": 4}  # fmt: skip
    speed = {"pairs": 80, "seconds": 80 / rate, "pairs_per_second": rate, **more}
    return {"order": row, "speed": speed}


LIKE = {  # mode -> what was measured of a seed
    "pointwise": lambda score, seed: measured(score, 0.0, 1.0, 10.0 + seed),
    "listwise": lambda score, seed: measured(score, 0.02, 0.6, 30.0 + seed),
    "e2rank": lambda score, seed: measured(
        score, 0.01, 0.8, 20.0 + seed, stored_pairs_per_second=60.0 + seed
    ),
}


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    maker = Maker(tmp_path / "pointwise_vs_listwise" / "smoke")
    maker.baselines()
    for arm, score in SCORES.items():
        maker.arm(arm, {"embedding": 0.6, "reranking": score})
        for seed in range(3):
            row = LIKE[arm.partition("-")[0]](score, seed)
            write_json(maker.folder / arm / f"order-seed{seed}.json", row)
    return maker


def test_what_was_planted_is_found(made: Maker) -> None:
    found = order.write(made.folder)
    assert found["order"]["listwise-moe"] == {
        "seeds": 3, "queries": 16, "orders": 4, "mean": pytest.approx(0.55),
        "spread": pytest.approx(0.02), "tau": pytest.approx(0.6),
        "pairs_per_second": pytest.approx(31), "stored": None, "slowest": 30.0, "fastest": 32.0,
    }  # fmt: skip
    gain = found["routing_gain"]
    for mode, points in {"pointwise": 1, "listwise": 5, "e2rank": 1}.items():
        assert gain["by_mode"][mode] == pytest.approx(points, abs=0.5), mode
    assert gain["against"].keys() == {"listwise", "e2rank"}
    for mode, row in gain["against"].items():
        difference = gain["by_mode"][mode] - gain["by_mode"]["pointwise"]
        assert row["difference"] == pytest.approx(difference)
        low, high = row["interval"]
        assert low < difference < high and row["p"] <= row["p_holm"]
    assert gain["against"]["listwise"]["interval"][0] > 0
    assert gain["against"]["listwise"]["p_holm"] < 0.05 < gain["against"]["e2rank"]["p_holm"]
    text = (made.folder / "report.md").read_text()
    assert "| Listwise-MoE | 55.00 | 2.00 | 0.600 | 31.0 (30.0 to 32.0) | - |" in text
    assert "| Pointwise-Single | 50.00 | 0.00 | 1.000 | 11.0 (10.0 to 12.0) | - |" in text
    assert "| E2Rank-Single | 48.00 | 1.00 | 0.800 | 21.0 (20.0 to 22.0) | 61.0 |" in text
    assert "Routing adds more listwise than pointwise." in text
    assert "Whether routing adds more pointwise or by pseudo-query is undetermined (Holm p" in text
    assert "Another order moves Listwise-MoE by 2.00 points (Kendall's tau 0.60); it scores" in text
    assert "2.82 times as many pairs a second as pointwise." in text
    assert "1.91 times as many pairs a second as pointwise, 5.55 times with the docum" in text
    assert "what routing adds, listwise" in text and "what the list adds, one LoRA" in text
    pairs = {(row["arm"], row["against"], row["task"]) for row in found["differences"]}
    assert len(pairs) == 10 and ("listwise-moe", "listwise-single", "embedding") in pairs
    assert ("e2rank-moe", "pointwise-moe", "reranking") in pairs
    assert json.loads((made.folder / "comparison.json").read_text()) == found
    assert order.summary(found).startswith("pointwise_vs_listwise smoke, 18 trials: ")


def test_an_equal_gain_cannot_be_told_from_chance(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "pointwise_vs_listwise" / "smoke")
    maker.baselines()
    for arm in SCORES:
        maker.arm(arm, {"embedding": 0.6, "reranking": 0.5})
    found = order.write(maker.folder)
    assert found["order"] == {}
    assert all(row["p_holm"] > 0.05 for row in found["routing_gain"]["against"].values())
    text = (maker.folder / "report.md").read_text()
    assert "Whether routing adds more pointwise or listwise is undetermined (Holm p" in text
    assert "Nothing was measured yet." in text


def test_missing_arms_and_seeds(made: Maker, tmp_path: Path) -> None:
    """Gains are of the seeds that both arms of a mode have, and of the modes that have both."""
    for name in ("seed0.json", "order-seed0.json"):
        (made.folder / "listwise-moe" / name).unlink()
    found = order.write(made.folder)
    assert found["order"]["listwise-moe"]["seeds"] == 2
    for path in (made.folder / "listwise-single").glob("order-*"):
        path.unlink()
    order.write(made.folder)
    assert "Not measured: Listwise-Single." in (made.folder / "report.md").read_text()
    assert found["routing_gain"]["by_mode"]["listwise"] == pytest.approx(5, abs=0.6)
    for path in (made.folder / "e2rank-single").iterdir():
        path.unlink()
    assert order.write(made.folder)["routing_gain"]["by_mode"].keys() == {"pointwise", "listwise"}
    for path in (made.folder / "pointwise-moe").iterdir():
        path.unlink()
    found = order.write(made.folder)
    assert found["routing_gain"] is None
    assert "Not known: it takes both arms of pointwise" in (made.folder / "report.md").read_text()


def test_the_arms_differ_in_the_head_and_in_routing_alone() -> None:
    def made(arm: str):
        return experiments.config("pointwise_vs_listwise", arm, "small", 1)

    for kind in ("single", "moe"):
        pointwise, listwise = made(f"pointwise-{kind}"), made(f"listwise-{kind}")
        assert listwise == replace(pointwise, rerank_head="interaction")
        assert made(f"e2rank-{kind}") == replace(pointwise, rerank_head="pseudo_query")
        # the same trials as the kill gate's, which are trained once
        assert pointwise == experiments.config("kill_gate", f"joint-{kind}", "small", 1)
    study = experiments.EXPERIMENTS["pointwise_vs_listwise"]
    assert reports.REPORTS[study.report] is order and study.measures == ("order",)


def test_measured_of_a_saved_model(tiny_base: Path, tmp_path: Path) -> None:
    """Order on the model at hand, speed on the saved one."""
    config = tiny_config(tiny_base, write_collection(tmp_path / "tiny"), measured=5,
                         rerank_head="interaction", **NOISY_MOE)  # fmt: skip
    model = UniMoER(model_config(config))
    place = tmp_path / "arm" / "seed0"
    model.save_pretrained(place.with_name("seed0.model"))
    evaluation = EvaluationSet(load(config.data), model.tokenizer, config, without_states)
    found = order.measure(model, evaluation, lambda: pytest.fail("no training data"), config, place)
    part = evaluation.sample(5)
    assert found["order"] == evaluated.sensitivity(model, part, order.ORDERS)
    assert found["order"]["queries"] == 5 and found["order"]["spread"] > 0
    assert found["speed"]["pairs"] == len(part.pairs) and found["speed"]["pairs_per_second"] > 0
    json.dumps(found, allow_nan=False)
