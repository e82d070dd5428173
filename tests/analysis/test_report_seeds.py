"""The report: which arms and seeds are held against one another, and what is said of the rest."""

import json
import shutil

import pytest

from analysis import figures, report
from eval import inference, rule
from tests.analysis.made import ARMS, Make, text_of, words_alone


@words_alone
def test_a_missing_arm_is_shown_and_gives_no_verdict(make: Make) -> None:
    folder = make()
    shutil.rmtree(folder / "rank-only")
    verdict = report.write(folder)
    assert verdict["decision"] is None and not verdict["supported"]
    assert verdict["reason"] == "no trial of rank-only."
    assert list(verdict["tasks"]) == ["embedding"]
    assert "| Rank-Only | - | missing | 0 |" in text_of(folder)
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
    assert "seed 1 of Joint-Single; seed 2 of Joint-MoE." in text_of(folder)


@words_alone
def test_no_common_seed_gives_no_verdict(make: Make) -> None:
    folder = make(seeds=2)
    (folder / "joint-single" / "seed0.json").unlink()
    for arm in ("emb-only", "rank-only"):
        (folder / arm / "seed1.json").unlink()
    verdict = report.write(folder)
    assert verdict["decision"] is None and "no seed in common" in verdict["reason"]


def test_controls_and_twins(make: Make) -> None:
    arms = (*ARMS, "joint-3r", "uniform-moe", "emb-only-aa", "rank-only-aa")
    verdict = report.write(make(arms=arms))
    plain = {k: v for k, v in verdict["tasks"]["embedding"].items()}
    assert set(verdict["aa"]) == {"embedding", "reranking"}
    assert set(verdict["aa"]["embedding"]) == {*plain, "alpha"}
    assert abs(verdict["aa"]["embedding"]["interference"]) < 1
    assert verdict["arms"]["joint-3r"]["against_joint"]["embedding"]["difference"] > 0
    assert verdict["arms"]["emb-only-aa"]["against_joint"] == {}
    told = [d for row in verdict["arms"].values() for d in row["against_joint"].values()]
    assert len(told) == 6 and len(verdict["moe_against"]) == 4
    told += verdict["moe_against"]  # one family
    assert [d["p_holm"] for d in told] == inference.holm([d["p"] for d in told])
    level = verdict["alpha"] / len(told)
    for d in told:
        least = inference.smallest_detectable_effect(d["se"], d["df"], level)
        assert d["detectable"] == pytest.approx(least)
    text = report.markdown(verdict, [])
    assert "| Emb-Only (A/A) |" in text and "| its twin, nDCG@10 |" in text
    assert "threefold size" not in text


@words_alone
def test_an_aa_pair_is_judged_at_the_level_of_its_own_look(make: Make) -> None:
    """It often has fewer seeds than the arms, and its figure shows what it shows by itself."""
    folder = make(arms=(*ARMS, "emb-only-aa"), seeds=6)
    for seed in (3, 4, 5):
        (folder / "emb-only-aa" / f"seed{seed}.json").unlink()
    verdict = report.write(folder)
    level = verdict["aa"]["embedding"]["alpha"]
    assert level == rule.alpha_at_look(3) > verdict["alpha"] == rule.alpha_at_look(6)
    verdict["aa"]["embedding"]["p_holm"] = (level + verdict["alpha"]) / 2
    colours = {text: colour for text, colour, _ in figures._effects(verdict)}
    assert colours["Retrieval A/A"] == figures.SIGNIFICANT


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
